// The wire, the clocks and the random numbers of QEMU's nRF51.
#include "py/mphal.h"
#include "py/mpstate.h"
#include "py/ringbuf.h"
#include "py/runtime.h"
#include "py/stream.h"

#define REG(address) (*(volatile uint32_t *)(address))

#define UART 0x40002000
#define UART_STARTRX REG(UART + 0x000)
#define UART_STARTTX REG(UART + 0x008)
#define UART_RXDRDY REG(UART + 0x108)
#define UART_TXDRDY REG(UART + 0x11c)
#define UART_INTENSET REG(UART + 0x304)
#define UART_INTENCLR REG(UART + 0x308)
#define UART_ENABLE REG(UART + 0x500)
#define UART_RXD REG(UART + 0x518)
#define UART_TXD REG(UART + 0x51c)
#define UART_INT_RXDRDY (1 << 2)

// Timer 0 counts microseconds and wakes the board up; timer 1 runs at 16 MHz for time.ticks_cpu().
#define CLOCK 0x40008000
#define TICKER 0x40009000
#define TIMER_START(timer) REG(timer + 0x000)
#define TIMER_CAPTURE(timer, n) REG(timer + 0x040 + 4 * (n))
#define TIMER_COMPARE(timer, n) REG(timer + 0x140 + 4 * (n))
#define TIMER_INTENSET(timer) REG(timer + 0x304)
#define TIMER_BITMODE(timer) REG(timer + 0x508)
#define TIMER_PRESCALER(timer) REG(timer + 0x510)
#define TIMER_CC(timer, n) REG(timer + 0x540 + 4 * (n))
enum { CC_NOW, CC_WAKE };

#define RANDOM 0x4000d000
#define RANDOM_START REG(RANDOM + 0x000)
#define RANDOM_READY REG(RANDOM + 0x100)
#define RANDOM_VALUE REG(RANDOM + 0x508)

#define NVIC_ENABLE REG(0xe000e100)
#define SYSTEM_RESET REG(0xe000ed0c)

#define SPINS 200 // looks at a busy wire before sleeping

static uint8_t rx_bytes[4096];
static ringbuf_t rx = {rx_bytes, sizeof(rx_bytes)};

void board_init(void) {
    TIMER_BITMODE(CLOCK) = TIMER_BITMODE(TICKER) = 3; // 32 bits
    TIMER_PRESCALER(CLOCK) = 4; // 16 MHz / 2^4
    TIMER_PRESCALER(TICKER) = 0;
    TIMER_INTENSET(CLOCK) = 1 << (16 + CC_WAKE);
    TIMER_START(CLOCK) = TIMER_START(TICKER) = 1;
    UART_ENABLE = 4;
    UART_STARTRX = UART_STARTTX = 1;
    UART_INTENSET = UART_INT_RXDRDY;
    NVIC_ENABLE = 1 << 2 | 1 << 8;
}

// Clocks.

void clock_irq(void) {
    TIMER_COMPARE(CLOCK, CC_WAKE) = 0;
}

// Microseconds since the start. Extended to 64 bits here, which sleep_us() keeps right by its limit.
static uint64_t clock_us(void) {
    static uint64_t last;
    TIMER_CAPTURE(CLOCK, CC_NOW) = 1;
    last += (uint32_t)(TIMER_CC(CLOCK, CC_NOW) - (uint32_t)last);
    return last;
}

// Sleep until an interrupt, at most a second. With interrupts off nothing slips in before the wfi, which wakes up anyway.
static void sleep_us(uint32_t us) {
    TIMER_CC(CLOCK, CC_WAKE) = (uint32_t)clock_us() + MIN(us, 1000000);
    __asm volatile ("wfi");
}

// Wire. Nothing is lost when the ring is full: the interrupt goes off and QEMU keeps the rest for the host.

void uart_irq(void) {
    while (UART_RXDRDY) {
        if (ringbuf_free(&rx) == 0) {
            UART_INTENCLR = UART_INT_RXDRDY;
            return;
        }
        UART_RXDRDY = 0;
        uint8_t c = UART_RXD;
        if (c == mp_interrupt_char) {
            mp_sched_keyboard_interrupt();
        } else {
            ringbuf_put(&rx, c);
        }
    }
}

static int rx_take(void) {
    int c = ringbuf_get(&rx);
    if (c >= 0 && ringbuf_avail(&rx) == 0) {
        UART_INTENSET = UART_INT_RXDRDY;
    }
    return c;
}

int mp_hal_stdin_rx_chr(void) {
    for (;;) {
        int c = rx_take();
        if (c >= 0) {
            return c;
        }
        mp_event_wait_indefinite();
    }
}

// A host that does not read holds the board up for a second; after that output is dropped until it reads again.
static bool tx_ready(void) {
    static bool stalled;
    for (int tries = stalled ? 1 : 1000 + SPINS; tries > 0; tries--) {
        if (UART_TXDRDY) {
            stalled = false;
            return true;
        }
        if (tries <= 1000 && !stalled) {
            uint32_t state = board_irq_disable();
            sleep_us(1000);
            board_irq_restore(state);
        }
    }
    stalled = true;
    return false;
}

mp_uint_t mp_hal_stdout_tx_strn(const char *str, size_t len) {
    static bool sent; // before the first byte nothing is ever ready
    for (size_t i = 0; i < len && (!sent || UART_TXDRDY || tx_ready()); i++) {
        sent = true;
        UART_TXDRDY = 0;
        UART_TXD = (uint8_t)str[i];
    }
    return len;
}

uintptr_t mp_hal_stdio_poll(uintptr_t poll_flags) {
    uintptr_t ready = poll_flags & MP_STREAM_POLL_WR;
    if ((poll_flags & MP_STREAM_POLL_RD) && ringbuf_avail(&rx)) {
        ready |= MP_STREAM_POLL_RD;
    }
    return ready;
}

// Time.

mp_uint_t mp_hal_ticks_ms(void) {
    return clock_us() / 1000;
}

mp_uint_t mp_hal_ticks_us(void) {
    return clock_us();
}

mp_uint_t mp_hal_ticks_cpu(void) {
    TIMER_CAPTURE(TICKER, CC_NOW) = 1;
    return TIMER_CC(TICKER, CC_NOW);
}

uint64_t mp_hal_time_ns(void) {
    return clock_us() * 1000; // like an RP2040 whose clock nobody has set
}

void mp_hal_delay_us(mp_uint_t us) {
    for (uint64_t end = clock_us() + us; clock_us() < end;) {
    }
}

void mp_hal_delay_ms(mp_uint_t ms) {
    uint64_t end = clock_us() + 1000ull * ms;
    for (uint64_t now; (now = clock_us()) < end;) {
        mp_event_wait_ms((end - now + 999) / 1000);
    }
}

void board_wait(int timeout_ms) {
    uint32_t state = board_irq_disable();
    if (ringbuf_avail(&rx) == 0 && MP_STATE_MAIN_THREAD(mp_pending_exception) == MP_OBJ_NULL && timeout_ms != 0) {
        sleep_us(timeout_ms < 0 || timeout_ms > 1000 ? 1000000 : 1000 * timeout_ms);
    }
    board_irq_restore(state);
}

// Random numbers, the host's files, the end.

uint32_t board_random(void) {
    uint32_t value = 0;
    RANDOM_START = 1;
    for (int i = 0; i < 4; i++) {
        RANDOM_READY = 0;
        while (!RANDOM_READY) {
        }
        value = value << 8 | RANDOM_VALUE;
    }
    return value;
}

intptr_t semihosting(uintptr_t operation, const void *arguments) {
    register uintptr_t r0 __asm__ ("r0") = operation;
    register const void *r1 __asm__ ("r1") = arguments;
    __asm__ volatile ("bkpt 0xab" : "+r" (r0) : "r" (r1) : "memory");
    return r0;
}

void board_exit(const char *message) {
    while (*message) {
        mp_hal_stdout_tx_strn(message++, 1);
    }
    for (;;) {
        semihosting(0x18, (void *)0x20023); // SYS_EXIT, internal error
    }
}

void board_reset(void) {
    SYSTEM_RESET = 0x05fa0004;
    for (;;) {
    }
}
