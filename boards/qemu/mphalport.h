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

// Of the core (core.c): start to take the board's two interrupts, wait for one, start again.
void core_interrupts_on(void);
void core_wait(void);
void board_reset(void) __attribute__((noreturn));

// Of the board (hal.c): what the core calls.
void uart_irq(void);
void wake_irq(void);
void fault_handler(void);

// board_irq_disable() and board_irq_restore() enclose a section that an interrupt must not split; MicroPython's scheduler
// uses them, too.
#include "core.h"

#define MICROPY_BEGIN_ATOMIC_SECTION() board_irq_disable()
#define MICROPY_END_ATOMIC_SECTION(state) board_irq_restore(state)
