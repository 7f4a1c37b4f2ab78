// Start of a bare windowed Xtensa in QEMU's "sim" machine: vectors, registers, stack, then runtime.c. Placed at 0x2000
// and at the reset vector by tests/xtensa_image.py, which lays the rest of the memory out.
    .macro simcall
    .byte 0x00, 0x51, 0x00
    .endm
    .macro fail
    movi a2, 1 // exit
    movi a3, 99
    simcall
    .endm

    .section .start, "ax"
// Registers go to the stack when the window of them is full, and come back: offsets that the processor asks for.
overflow4:
    s32e a0, a5, -16
    s32e a1, a5, -12
    s32e a2, a5, -8
    s32e a3, a5, -4
    rfwo
    .org 0x40
underflow4:
    l32e a0, a5, -16
    l32e a1, a5, -12
    l32e a2, a5, -8
    l32e a3, a5, -4
    rfwu
    .org 0x80
overflow8:
    s32e a0, a9, -16
    l32e a0, a1, -12
    s32e a1, a9, -12
    s32e a2, a9, -8
    s32e a3, a9, -4
    s32e a4, a0, -32
    s32e a5, a0, -28
    s32e a6, a0, -24
    s32e a7, a0, -20
    rfwo
    .org 0xc0
underflow8:
    l32e a0, a9, -16
    l32e a1, a9, -12
    l32e a2, a9, -8
    l32e a7, a1, -12
    l32e a3, a9, -4
    l32e a4, a7, -32
    l32e a5, a7, -28
    l32e a6, a7, -24
    l32e a7, a7, -20
    rfwu
    .org 0x100
overflow12:
    s32e a0, a13, -16
    l32e a0, a1, -12
    s32e a1, a13, -12
    s32e a2, a13, -8
    s32e a3, a13, -4
    s32e a4, a0, -48
    s32e a5, a0, -44
    s32e a6, a0, -40
    s32e a7, a0, -36
    s32e a8, a0, -32
    s32e a9, a0, -28
    s32e a10, a0, -24
    s32e a11, a0, -20
    rfwo
    .org 0x140
underflow12:
    l32e a0, a13, -16
    l32e a1, a13, -12
    l32e a2, a13, -8
    l32e a11, a1, -12
    l32e a3, a13, -4
    l32e a4, a11, -48
    l32e a5, a11, -44
    l32e a6, a11, -40
    l32e a7, a11, -36
    l32e a8, a11, -32
    l32e a9, a11, -28
    l32e a10, a11, -24
    l32e a11, a11, -20
    rfwu
    .org 0x300 // exceptions of the kernel, of the user, in an exception
    j moved
    .org 0x340
    fail
    .org 0x3c0
    fail
    .org 0x400
start:
    movi a2, 2 // the vectors
    slli a2, a2, 12
    wsr.vecbase a2
    movi a2, 0
    wsr.windowbase a2
    rsync
    movi a2, 1
    wsr.windowstart a2
    movi a2, 4 // windows on, interrupts off
    slli a2, a2, 16
    addi a2, a2, 15
    wsr.ps a2
    rsync
    movi a1, 0xf0 // the stack's top
    slli a1, a1, 12
    movi a0, 0
    movi a8, 3 // the code
    slli a8, a8, 12
    callx8 a8
    movi a2, 1 // exit
    movi a3, 0
    simcall

// A function that moves its stack's end needs its caller in the registers: as if it had returned to it, whose registers
// are fetched, then it tries again. Before the window of a function whose caller is not there lie four registers to use.
moved:
    rotw -1
    rsr.exccause a0
    addi a0, a0, -5
    bnez a0, failed
    rsr.windowbase a0
    addi a0, a0, 1
    extui a0, a0, 0, 3
    slli a0, a0, 8
    rsr.ps a1
    extui a2, a1, 8, 4
    slli a2, a2, 8
    xor a1, a1, a2
    or a1, a1, a0 // the window to come back to
    wsr.ps a1
    rsync
    bbsi a4, 31, farther // how many registers the call moved on stands in the return address
    j underflow4
farther:
    rotw -1
    bbsi a8, 30, farthest
    j underflow8
farthest:
    rotw -1
    j underflow12
failed:
    fail

    .section .reset, "ax"
    movi a2, 9 // start
    slli a2, a2, 10
    jx a2
