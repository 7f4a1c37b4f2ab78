// The wire, the clocks and the random numbers. What differs between boards is in their hardware.h.
#include <string.h>
#include "py/mperrno.h"
#include "py/mphal.h"
#include "py/mpstate.h"
#include "py/ringbuf.h"
#include "py/runtime.h"
#include "py/stream.h"

#define REG(address) (*(volatile uint32_t *)(address))
#include "hardware.h"

#define SPINS 200 // looks at a busy wire before sleeping

static uint8_t rx_bytes[4096];
static ringbuf_t rx = {rx_bytes, sizeof(rx_bytes)};

void board_init(void) {
    hardware_init();
    core_interrupts_on();
}

// Clocks.

void wake_irq(void) {
    wake_clear();
}

// Microseconds since the start. Extended to 64 bits here, which sleep_us() keeps right by its limit.
static uint64_t clock_us(void) {
    static uint64_t last;
    last += (uint32_t)(clock_read_us() - (uint32_t)last);
    return last;
}

// Sleep until an interrupt, at most a second. With interrupts off nothing slips in before the wait, which ends anyway.
static void sleep_us(uint32_t us) {
    wake_set(clock_us(), MIN(us, 1000000));
    core_wait();
}

// Wire. Nothing is lost when the ring is full: the interrupt goes off and QEMU keeps the rest for the host.

void uart_irq(void) {
    while (uart_received()) {
        if (ringbuf_free(&rx) == 0) {
            uart_hold();
            return;
        }
        uint8_t c = uart_take();
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
        uart_resume();
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
        if (uart_ready()) {
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
    for (size_t i = 0; i < len && (uart_ready() || tx_ready()); i++) {
        uart_send(str[i]);
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
    return ticker_read();
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

// The host's files, random numbers, the end.

intptr_t host_open(const char *name, enum file_mode mode) {
    const uintptr_t arguments[] = {(uintptr_t)name, mode, strlen(name)};
    return semihosting(SYS_OPEN, arguments);
}

uint32_t board_random(void) {
    static intptr_t file; // 0: not open yet
    uint32_t value;
    if (file <= 0) {
        file = host_open("/dev/urandom", FILE_READ);
    }
    const uintptr_t arguments[] = {file, (uintptr_t)&value, sizeof(value)};
    if (file < 0 || semihosting(SYS_READ, arguments) != 0) {
        mp_raise_OSError(MP_EIO);
    }
    return value;
}

void board_exit(const char *message) {
    while (*message) {
        mp_hal_stdout_tx_strn(message++, 1);
    }
    for (;;) {
        semihosting(SYS_EXIT, (void *)0x20023); // internal error
    }
}
