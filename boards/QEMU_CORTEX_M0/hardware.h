// QEMU's nRF51: its UART, and timers. Included by hal.c alone.

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

enum { UART_IRQ = 2, WAKE_IRQ = 8 };

static inline void hardware_init(void) {
    TIMER_BITMODE(CLOCK) = TIMER_BITMODE(TICKER) = 3; // 32 bits
    TIMER_PRESCALER(CLOCK) = 4; // 16 MHz / 2^4
    TIMER_PRESCALER(TICKER) = 0;
    TIMER_INTENSET(CLOCK) = 1 << (16 + CC_WAKE);
    TIMER_START(CLOCK) = TIMER_START(TICKER) = 1;
    UART_ENABLE = 4;
    UART_STARTRX = UART_STARTTX = 1;
    UART_INTENSET = UART_INT_RXDRDY;
}

static inline uint32_t clock_read_us(void) {
    TIMER_CAPTURE(CLOCK, CC_NOW) = 1;
    return TIMER_CC(CLOCK, CC_NOW);
}

static inline uint32_t ticker_read(void) {
    TIMER_CAPTURE(TICKER, CC_NOW) = 1;
    return TIMER_CC(TICKER, CC_NOW);
}

static inline void wake_set(uint32_t now_us, uint32_t sleep_us) {
    TIMER_CC(CLOCK, CC_WAKE) = now_us + sleep_us;
}

static inline void wake_clear(void) {
    TIMER_COMPARE(CLOCK, CC_WAKE) = 0;
}

static inline bool uart_received(void) {
    return UART_RXDRDY;
}

static inline uint8_t uart_take(void) {
    UART_RXDRDY = 0;
    return UART_RXD;
}

// Leave what is received where it is, without an interrupt, until uart_resume().
static inline void uart_hold(void) {
    UART_INTENCLR = UART_INT_RXDRDY;
}

static inline void uart_resume(void) {
    UART_INTENSET = UART_INT_RXDRDY;
}

static bool uart_used; // before the first byte it is never said to be ready

static inline bool uart_ready(void) {
    return !uart_used || UART_TXDRDY;
}

static inline void uart_send(uint8_t c) {
    uart_used = true;
    UART_TXDRDY = 0;
    UART_TXD = c;
}
