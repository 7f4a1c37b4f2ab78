// What only a Cortex-M knows: start, vectors, semihosting.
#include "py/mphal.h"

#define REG(address) (*(volatile uint32_t *)(address))
#include "hardware.h"

#define NVIC_ENABLE REG(0xe000e100)
#define SYSTEM_RESET REG(0xe000ed0c)

extern uint32_t _stack_top;

void core_interrupts_on(void) {
    NVIC_ENABLE = 1 << UART_IRQ | 1 << WAKE_IRQ;
}

void core_wait(void) {
    __asm volatile ("wfi");
}

intptr_t semihosting(uintptr_t operation, const void *arguments) {
    register uintptr_t r0 __asm__ ("r0") = operation;
    register const void *r1 __asm__ ("r1") = arguments;
    __asm__ volatile ("bkpt 0xab" : "+r" (r0) : "r" (r1) : "memory");
    return r0;
}

void board_reset(void) {
    SYSTEM_RESET = 0x05fa0004;
    for (;;) {
    }
}

__attribute__((naked)) void Reset_Handler(void) {
    __asm volatile ("ldr r0, =_stack_top \n mov sp, r0 \n bl start");
}

// 16 + n is the interrupt n.
__attribute__((section(".isr_vector"), used)) static void (*const vectors[])(void) = {
    (void (*)(void))&_stack_top, Reset_Handler, fault_handler, fault_handler,
    [16 + UART_IRQ] = uart_irq,
    [16 + WAKE_IRQ] = wake_irq,
};
