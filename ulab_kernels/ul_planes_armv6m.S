// Inner loops of depthwise convolution for ARMv6-M; the C in ul_depthwise.c and ul_sums.c is their definition.
#if defined(__ARM_ARCH_6M__) && !defined(UL_NO_ASM)

#include "ul_armv6m.inc"

// (codes, quick): two sums at a time, of one channel. r3 upper, r4 before, r5 after, r8 offset, r9 window, r10, r11 bounds,
// r12 y, lr zero point.
.macro quick acc, slow, back
    movs r1, \acc
    asrs r1, r1, r4
    muls r1, r3, r1
    add r1, r8
    movs r2, r1
    add r2, r9
    asrs r1, r1, r5
    asrs r2, r2, r5
    cmp r1, r2
    bne \slow
    bounded r1
\back:
.endm

// The long way for the sum in r0, leaving its code in r1.
.macro exact slow, back
\slow:
    push {r3-r5}
    mov r3, r8
    mov r4, r9
    push {r3, r4}
    ldr r1, [sp, #24]
    ldr r3, [r1]
    ldr r1, [sp, #28]
    movs r2, #0
    ldrsb r5, [r1, r2]
    rsbs r5, r5, #0
    uxth r4, r3
    lsrs r3, r3, #16
    movs r1, #1
    lsls r1, r1, r5
    lsrs r1, r1, #1
    mov r8, r1
    movs r1, #1
    lsls r1, r1, #14
    mov r9, r1
    code r0, 2
    movs r1, r0
    pop {r3, r4}
    mov r8, r3
    mov r9, r4
    pop {r3-r5}
    b \back
.endm

function ul_codes2_quick_v6m
    save_high
    sub sp, #32
    ldmia r1!, {r4}
    ldmia r1!, {r3}
    ldmia r1!, {r5, r6}
    mov r8, r5
    mov r9, r6
    ldr r5, [r1]
    mov r1, sp
    ldmia r0!, {r2, r6, r7}
    stmia r1!, {r2, r6, r7}
    ldmia r0!, {r2, r6, r7}
    stmia r1!, {r2, r6, r7}
    ldmia r0!, {r6, r7}
    stmia r1!, {r6, r7}
    ldmia r0!, {r2, r6, r7}
    mov r10, r2
    mov r11, r6
    mov lr, r7
    ldr r6, [sp]
    ldr r7, [sp, #12]
    ldr r0, [sp, #16]
    lsls r0, r0, #3
    adds r0, r0, r6
    mov r12, r0
    cmp r6, r12
    beq 4f
2:
    ldmia r6!, {r0}
    quick r0, .Lslow0, .Lback0
    strb r1, [r7]
    ldmia r6!, {r0}
    quick r0, .Lslow1, .Lback1
    ldr r2, [sp, #28]
    strb r1, [r7, r2]
    ldr r2, [sp, #24]
    adds r7, r7, r2
    cmp r6, r12
    bne 2b
4:
    add sp, #32
    restore_high
    exact .Lslow0, .Lback0
    exact .Lslow1, .Lback1

// (to, upper, lower, {numbers, rows, step, skip, to_skip}): words upper + lower * 2^16; `step` bytes from a number to the
// next, after each row `skip` bytes more, and to_skip in what is written.
function ul_two_rows_v6m
    save_high
    subs r2, r2, r1
    ldmia r3!, {r4-r7}
    mov r8, r5
    mov r9, r7
    ldr r7, [r3]
    mov r10, r7
    mov r7, r6
    lsls r6, r4, #2
    mov r11, r6
    movs r4, #0
    cmp r6, #0
    beq 3f
1:
    mov r6, r11
    adds r3, r0, r6
2:
    ldrsb r5, [r1, r4]
    ldrsb r6, [r1, r2]
    lsls r6, r6, #16
    adds r5, r5, r6
    stmia r0!, {r5}
    adds r1, r1, r7
    cmp r0, r3
    bne 2b
    add r0, r10
    add r1, r9
    mov r5, r8
    subs r5, #1
    mov r8, r5
    bne 1b
3:
    restore_high

// A channel of a depthwise 3x3 convolution, two rows at once: (plane, weights, sums, {rows, out_w, width, stride_h,
// stride_w, bias}). A word of the plane holds a number of the upper row and, * 2^16, one of the lower; times a weight both
// products stay below 2^14, and two such sums may be added before the halves are taken apart.
// r7 sum of the upper halves, r8 of whole words.

.macro take x
    add r8, \x
    asrs \x, \x, #16
    adcs r7, \x
.endm

.macro line
    ldmia r0!, {r2-r4}
    ldmia r1!, {r5, r6}
    muls r2, r5, r2
    muls r3, r6, r3
    adds r2, r2, r3
    ldmia r1!, {r5}
    muls r4, r5, r4
.endm

// light: no row's weights exceed 255 in size together, so that all three products may be added first.
.macro plane name, light
function \name
    save_high
    sub sp, #20
    mov r12, r2
    ldmia r3!, {r4-r7}
    str r4, [sp, #8]
    lsls r6, r6, #2
    muls r7, r6, r7
    ldr r4, [r3]
    lsls r4, r4, #2
    movs r2, r6
    subs r2, #12
    mov r9, r2
    lsls r2, r6, #1
    adds r2, #12
    subs r2, r4, r2
    mov r11, r2
    muls r4, r5, r4
    subs r7, r7, r4
    str r7, [sp, #12]
    lsls r5, r5, #3
    str r5, [sp, #16]
    ldr r4, [r3, #4]
    str r4, [sp]
    lsls r5, r4, #16
    adds r5, r5, r4
    str r5, [sp, #4]
1:
    mov r2, r12
    ldr r3, [sp, #16]
    adds r2, r2, r3
    mov lr, r2
2:
    ldr r7, [sp]
    ldr r2, [sp, #4]
    mov r8, r2
.if \light
    line
    adds r2, r2, r4
    take r2
    add r0, r9
    line
    adds r2, r2, r4
    take r2
    add r0, r9
    line
    adds r2, r2, r4
    take r2
.else
    line
    take r2
    mov r10, r4
    add r0, r9
    line
    take r2
    add r4, r10
    take r4
    add r0, r9
    line
    take r2
    take r4
.endif
    add r0, r11
    subs r1, #36
    lsls r2, r7, #16
    mov r3, r8
    subs r3, r3, r2
    mov r2, r12
    stmia r2!, {r3, r7}
    mov r12, r2
    cmp r2, lr
    bne 2b
    ldr r2, [sp, #12]
    adds r0, r0, r2
    ldr r2, [sp, #8]
    subs r2, #1
    str r2, [sp, #8]
    bne 1b
    add sp, #20
    restore_high
.endm

plane ul_plane3x3_v6m, 0
plane ul_plane3x3_light_v6m, 1

#endif
