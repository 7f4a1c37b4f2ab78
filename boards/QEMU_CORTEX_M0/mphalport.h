// The board's hardware, as MicroPython sees it. QEMU's nRF51 behind it: hal.c.
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "shared/runtime/interrupt_char.h"

void board_init(void);

// Ask the debugger, which is QEMU, for something: the host's files, or the end of the process.
intptr_t semihosting(uintptr_t operation, const void *arguments);
void board_exit(const char *message) __attribute__((noreturn));

// Entering a section that an interrupt must not split; used by MicroPython's scheduler.
static inline uint32_t board_irq_disable(void) {
    uint32_t state;
    __asm volatile ("mrs %0, primask \n cpsid i" : "=r" (state) : : "memory");
    return state;
}

static inline void board_irq_restore(uint32_t state) {
    __asm volatile ("msr primask, %0" : : "r" (state) : "memory");
}

#define MICROPY_BEGIN_ATOMIC_SECTION() board_irq_disable()
#define MICROPY_END_ATOMIC_SECTION(state) board_irq_restore(state)
