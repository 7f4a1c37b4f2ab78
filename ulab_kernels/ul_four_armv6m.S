// The inner loop of training for ARMv6-M; the C in ul_four.c is its definition.
#if defined(__ARM_ARCH_6M__) && !defined(UL_NO_ASM)

#include "ul_armv6m.inc"

// Fours (ul_four.c): r0 quads, r1 the walk, r2 its number, r3-r6 a quad, r7 0 or a shift, r8-r11 sums, r12 step, lr the
// quads' end.
.macro one load
.ifc \load, int8
    ldrsb r2, [r1, r7]
.endif
.ifc \load, uint8
    ldrb r2, [r1]
.endif
.ifc \load, int16
    ldrh r2, [r1]
    lsls r2, r2, #16
    asrs r2, r7
    adds r2, #1
    asrs r2, r2, #1
.endif
    add r1, r12
    ldmia r0!, {r3-r6}
    muls r3, r2, r3
    add r8, r3
    muls r4, r2, r4
    add r9, r4
    muls r5, r2, r5
    add r10, r5
    muls r6, r2, r6
    add r11, r6
.endm

.macro four name, load
function \name
    save_high
    push {r0}
    ldmia r0!, {r4-r7}
    mov r8, r4
    mov r9, r5
    mov r10, r6
    mov r11, r7
    ldmia r3!, {r4, r5, r7}
    mov lr, r4
    mov r12, r5
    mov r0, r1
    mov r1, r2
    subs r4, r4, r0
    lsls r4, r4, #27
.ifc \load, int8
    bmi 3f
    movs r7, #0
    b 1f
3:
    movs r7, #0
    b 2f
.else
    bmi 2f
.endif
1:
    one \load
2:
    one \load
    cmp r0, lr
    bne 1b
    pop {r0}
    mov r4, r8
    mov r5, r9
    mov r6, r10
    mov r7, r11
    stmia r0!, {r4-r7}
    restore_high
.endm

    four ul_four_int8_v6m, int8
    four ul_four_uint8_v6m, uint8
    four ul_four_int16_v6m, int16

// ul_add_products: r0 sums, r1 factors, r2 weight, r3 pairs.
.macro pair
    ldmia r1!, {r4, r5}
    ldr r6, [r0]
    ldr r7, [r0, #4]
    muls r4, r2, r4
    muls r5, r2, r5
    adds r6, r6, r4
    adds r7, r7, r5
    stmia r0!, {r6, r7}
.endm

function ul_add_products_v6m
    push {r4-r7, lr}
    lsls r4, r3, #31
    bmi 2f
1:
    pair
    subs r3, #1
2:
    pair
    subs r3, #1
    bne 1b
    pop {r4-r7, pc}

#endif
