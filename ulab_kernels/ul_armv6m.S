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

#endif
