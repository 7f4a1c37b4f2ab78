// Inner loops for ARMv6-M (Cortex-M0, RP2040), which has no long multiply, no multiply-accumulate and eight low registers.
// ul_kernel.h says what they do; the C in ul_sums.c and ul_depthwise.c is their definition.
//
// Two products a multiplication: weights w0 + w2 * 2^16 times inputs x2 + x0 * 2^16 leave, mod 2^32, w0 * x2 below and
// w0 * x0 + w2 * x2 above, which fits into 16 bits where no weight is -128. An arithmetic shift by 16 leaves the upper half
// one too small where the lower one is negative; then bit 15, the last one shifted out, is the carry, and adc mends it.
#if defined(__ARM_ARCH_6M__) && !defined(UL_NO_ASM)

#include "ul_armv6m.inc"

// Dots. r0 inputs, r1 weights, r9 takes the + 128 off two weights, r10 first input, r11 sums, r12 and lr the inputs' end
// for four groups at a time and for single ones.

.macro product x, weights, sum
    muls \x, \weights, \x
    asrs \x, \x, #16
    adcs \sum, \x
.endm

// Four inputs of one position: 13 instructions. r6 sum, r7 mask.
.macro group1
    ldmia r1!, {r2}
    lsrs r3, r2, #8
    ands r3, r7
    ands r2, r7
    add r3, r9
    add r2, r9
    ldmia r0!, {r4, r5}
    product r4, r2, r6
    product r5, r3, r6
.endm

// Four inputs of each of two positions: 21 instructions. r6, r7 sums, r8 mask.
.macro group2
    ldmia r1!, {r2}
    mov r3, r8
    ands r3, r2
    subs r2, r2, r3
    lsrs r2, r2, #8
    add r3, r9
    add r2, r9
    ldmia r0!, {r4, r5}
    product r4, r3, r6
    product r5, r3, r7
    ldmia r0!, {r4, r5}
    product r4, r2, r6
    product r5, r2, r7
.endm

// (inputs, weights, sums, {taps, row bytes, channels}); `shift`: log2 of the bytes that a tap takes in inputs.
.macro dots name, group, shift, sum_bytes, sums:vararg
function \name
    save_high
    sub sp, #8
    mov r10, r0
    mov r11, r2
    ldmia r3!, {r4, r5, r6}
    lsrs r7, r4, #4
    lsls r7, r7, #(4 + \shift)
    adds r7, r7, r0
    mov r12, r7
    lsls r7, r4, #\shift
    adds r7, r7, r0
    mov lr, r7
    subs r5, r5, r4
    str r5, [sp]
    movs r7, #\sum_bytes
    muls r6, r7, r6
    adds r6, r6, r2
    str r6, [sp, #4]
    ldr r7, =0x00ff00ff
    mov r8, r7
    ldr r2, =0xff7fff80
    mov r9, r2
1:
    mov r3, r11
    ldmia r3!, {\sums}
    mov r0, r10
    cmp r0, r12
    beq 3f
2:
    \group
    \group
    \group
    \group
    cmp r0, r12
    bne 2b
3:
    cmp r0, lr
    beq 5f
4:
    \group
    cmp r0, lr
    bne 4b
5:
    mov r3, r11
    stmia r3!, {\sums}
    mov r11, r3
    ldr r2, [sp]
    adds r1, r1, r2
    ldr r2, [sp, #4]
    cmp r3, r2
    bne 1b
    add sp, #8
    restore_high
    .ltorg
.endm

dots ul_dots1_v6m, group1, 1, 4, r6
dots ul_dots2_v6m, group2, 2, 8, r6, r7

// Codes. The 48-bit product of a sum below 2^29 with a multiplier of 31 bits, from 16-bit halves of which the sum's
// lower one is taken as signed, so that nothing overflows; only floor(product / 2^31) is wanted.
// r3, r4 the multiplier's upper and lower half, r5 right shift, r8 half of what the right shift drops, r9 2^14, r10, r11
// bounds, lr zero point. Clobbers r1, r2.
.macro bounded acc
    cmp \acc, r10
    bge 11f
    mov \acc, r10
11:
    cmp \acc, r11
    ble 12f
    mov \acc, r11
12:
    add \acc, lr
.endm

.macro code acc, rounding
    sxth r1, \acc
    subs \acc, \acc, r1
    asrs \acc, \acc, #16
    movs r2, r1
    muls r2, r4, r2
    asrs r2, r2, #16
    muls r1, r3, r1
    adds r1, r1, r2
    movs r2, r4
    muls r2, \acc, r2
    adds r1, r1, r2
.if \rounding == 2
    add r1, r9
.endif
    asrs r1, r1, #15
    muls \acc, r3, \acc
    lsls \acc, \acc, #1
    adds \acc, \acc, r1
.if \rounding == 2
    asrs r1, \acc, #31
    adds \acc, \acc, r1
.endif
    add \acc, r8
    asrs \acc, \acc, r5
    bounded \acc
.endm

// The same with a multiplier of 47 bits for the sum's size, and its sign put back: r7 the lower 16 bits, r9 takes the sign.
.macro code_away acc
    asrs r1, \acc, #31
    mov r9, r1
    eors \acc, r1
    subs \acc, \acc, r1
    uxth r1, \acc
    lsrs \acc, \acc, #16
    movs r2, r7
    muls r2, r1, r2
    lsrs r2, r2, #16
    muls r7, \acc, r7
    adds r7, r7, r2
    movs r2, r1
    muls r2, r4, r2
    adds r2, r2, r7
    movs r7, #0
    adcs r7, r7
    lsls r7, r7, #16
    lsrs r2, r2, #16
    adds r2, r2, r7
    muls r1, r3, r1
    adds r1, r1, r2
    movs r2, r4
    muls r2, \acc, r2
    adds r1, r1, r2
    lsrs r1, r1, #15
    muls \acc, r3, \acc
    lsls \acc, \acc, #1
    adds \acc, \acc, r1
    add \acc, r8
    asrs \acc, \acc, r5
    mov r1, r9
    eors \acc, r1
    subs \acc, \acc, r1
    bounded \acc
.endm

// (codes): the fields of ul_codes are copied to the stack, where the pointers move on.
.macro codes name, rounding, positions
function \name
    save_high
    sub sp, #48
    mov r1, sp
    ldmia r0!, {r2-r7}
    stmia r1!, {r2-r7}
    ldmia r0!, {r2-r7}
    stmia r1!, {r2-r7}
    mov r10, r4
    mov r11, r5
    mov lr, r6
    movs r0, #1
    lsls r0, r0, #14
    mov r9, r0
    ldr r6, [sp]
    ldr r0, [sp, #12]
    mov r12, r0
    ldr r0, [sp, #16]
    cmp r0, #0
    beq 4f
1:
    ldr r1, [sp, #4]
    ldr r3, [r1]
.if \rounding == 3
    ldr r2, [sp, #44]
    ldr r7, [r1, r2]
    uxth r7, r7
    str r7, [sp]
.endif
    ldr r2, [sp, #20]
    lsls r0, r2, #2
    adds r1, r1, r0
    str r1, [sp, #4]
    ldr r1, [sp, #8]
    movs r0, #0
    ldrsb r5, [r1, r0]
    adds r1, r1, r2
    str r1, [sp, #8]
    rsbs r5, r5, #0
    uxth r4, r3
    lsrs r3, r3, #16
    movs r0, #1
    lsls r0, r0, r5
    lsrs r0, r0, #1
    mov r8, r0
2:
.if \positions == 2
    ldmia r6!, {r0, r7}
    code r7, \rounding
    mov r1, r12
    ldr r2, [sp, #28]
    strb r7, [r1, r2]
.else
    ldmia r6!, {r0}
.endif
.if \rounding == 3
    ldr r7, [sp]
    code_away r0
.else
    code r0, \rounding
.endif
    mov r1, r12
    strb r0, [r1]
    ldr r2, [sp, #24]
    add r12, r2
    ldr r0, [sp, #16]
    subs r0, #1
    beq 4f
    str r0, [sp, #16]
    ldr r2, [sp, #20]
    cmp r2, #0
    beq 2b
    b 1b
4:
    add sp, #48
    restore_high
.endm

// The numbers are UL_ROUND_SINGLE, DOUBLE and AWAY.
codes ul_codes1_single_v6m, 1, 1
codes ul_codes1_double_v6m, 2, 1
codes ul_codes1_away_v6m, 3, 1
codes ul_codes2_single_v6m, 1, 2
codes ul_codes2_double_v6m, 2, 2

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
