// What only QEMU's RISC-V "virt" machine knows: start, traps, the interrupt controller, semihosting.
#include "py/mphal.h"

#define REG(address) (*(volatile uint32_t *)(address))
#include "hardware.h"

#define PLIC_PRIORITY(irq) REG(0x0c000000 + 4 * (irq))
#define PLIC_ENABLE REG(0x0c002000)
#define PLIC_CLAIM REG(0x0c200004)
#define SYSTEM REG(0x00100000)
enum { SYSTEM_RESET = 0x7777 };

// mie and mcause: the timer and what comes through the controller.
enum { MIE_TIMER = 1 << 7, MIE_EXTERNAL = 1 << 11 };
#define CAUSE_TIMER 0x80000007
#define CAUSE_EXTERNAL 0x8000000b

__attribute__((interrupt("machine"), aligned(4))) static void trap(void) {
    uint32_t cause;
    __asm volatile ("csrr %0, mcause" : "=r" (cause));
    if (cause == CAUSE_TIMER) {
        wake_irq();
    } else if (cause == CAUSE_EXTERNAL) {
        const uint32_t irq = PLIC_CLAIM;
        if (irq == UART_IRQ) {
            uart_irq();
        }
        PLIC_CLAIM = irq;
    } else {
        fault_handler();
    }
}

void core_interrupts_on(void) {
    PLIC_PRIORITY(UART_IRQ) = 1;
    PLIC_ENABLE = 1 << UART_IRQ;
    __asm volatile ("csrw mtvec, %0 \n csrs mie, %1 \n csrsi mstatus, 8"
        : : "r" (trap), "r" (MIE_TIMER | MIE_EXTERNAL) : "memory");
}

void core_wait(void) {
    __asm volatile ("wfi");
}

// Three instructions that do nothing, in this order and uncompressed, are the call.
__attribute__((noinline)) intptr_t semihosting(uintptr_t operation, const void *arguments) {
    register uintptr_t a0 __asm__ ("a0") = operation;
    register const void *a1 __asm__ ("a1") = arguments;
    __asm__ volatile (
        ".option push \n .option norvc \n .balign 16 \n"
        "slli zero, zero, 0x1f \n ebreak \n srai zero, zero, 7 \n"
        ".option pop"
        : "+r" (a0) : "r" (a1) : "memory");
    return a0;
}

void board_reset(void) {
    SYSTEM = SYSTEM_RESET;
    for (;;) {
    }
}

__attribute__((naked, section(".isr_vector"), used)) void Reset_Handler(void) {
    __asm volatile ("la sp, _stack_top \n call start");
}
