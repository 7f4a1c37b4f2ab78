// The board's hardware, as MicroPython sees it: hal.c.
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "shared/runtime/interrupt_char.h"

void board_init(void);
void board_exit(const char *message) __attribute__((noreturn));

// Ask the debugger, which is QEMU, for something: the host's files, or the end of the process.
enum { SYS_OPEN = 0x01, SYS_WRITE = 0x05, SYS_READ = 0x06, SYS_SEEK = 0x0a, SYS_FLEN = 0x0c, SYS_EXIT = 0x18 };
intptr_t semihosting(uintptr_t operation, const void *arguments);

// A file of the host, or a negative number.
enum file_mode { FILE_READ = 1, FILE_UPDATE = 3, FILE_CREATE = 7 }; // "rb", "r+b", "w+b"
intptr_t host_open(const char *name, enum file_mode mode);

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
