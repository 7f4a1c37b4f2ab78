// QEMU's "virt" machine: its 16550 UART, and the timer of every RISC-V core, at 10 MHz. Included by hal.c and core.c.

#define BYTE(address) (*(volatile uint8_t *)(address))

#define UART 0x10000000
#define UART_DATA BYTE(UART + 0)
#define UART_INTERRUPTS BYTE(UART + 1)
#define UART_FIFO BYTE(UART + 2)
#define UART_STATE BYTE(UART + 5)
enum { UART_RX_FULL = 1 << 0, UART_TX_EMPTY = 1 << 5 };
enum { UART_INT_RX = 1 << 0 };

#define TIME_LOW REG(0x0200bff8)
#define TIME_HIGH REG(0x0200bffc)
#define WAKE_LOW REG(0x02004000)
#define WAKE_HIGH REG(0x02004004)

#define MHZ 10

enum { UART_IRQ = 10 };

static inline void wake_clear(void) {
    WAKE_HIGH = 0xffffffff;
}

static inline void hardware_init(void) {
    wake_clear();
    UART_FIFO = 1;
    UART_INTERRUPTS = UART_INT_RX;
}

static inline uint64_t time_now(void) {
    for (;;) {
        const uint32_t high = TIME_HIGH, low = TIME_LOW;
        if (high == TIME_HIGH) {
            return (uint64_t)high << 32 | low;
        }
    }
}

static inline uint32_t clock_read_us(void) {
    return time_now() / MHZ;
}

static inline uint32_t ticker_read(void) {
    return TIME_LOW;
}

static inline void wake_set(uint32_t now_us, uint32_t sleep_us) {
    (void)now_us;
    const uint64_t end = time_now() + MHZ * (uint64_t)sleep_us;
    wake_clear(); // so that no half of it is taken for a time that has come
    WAKE_LOW = (uint32_t)end;
    WAKE_HIGH = end >> 32;
}

static inline bool uart_received(void) {
    return UART_STATE & UART_RX_FULL;
}

static inline uint8_t uart_take(void) {
    return UART_DATA;
}

// Leave what is received where it is, without an interrupt, until uart_resume().
static inline void uart_hold(void) {
    UART_INTERRUPTS = 0;
}

static inline void uart_resume(void) {
    UART_INTERRUPTS = UART_INT_RX;
}

static inline bool uart_ready(void) {
    return UART_STATE & UART_TX_EMPTY;
}

static inline void uart_send(uint8_t c) {
    UART_DATA = c;
}
