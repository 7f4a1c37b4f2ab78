// QEMU's MPS2 board with the AN385 image: ARM's CMSDK UART and timers at 25 MHz. Included by hal.c alone.

#define UART 0x40004000
#define UART_DATA REG(UART + 0x00)
#define UART_STATE REG(UART + 0x04)
#define UART_CTRL REG(UART + 0x08)
#define UART_INTCLEAR REG(UART + 0x0c)
#define UART_BAUDDIV REG(UART + 0x10)
enum { UART_TX_FULL = 1 << 0, UART_RX_FULL = 1 << 1 };
enum { UART_TX_ON = 1 << 0, UART_RX_ON = 1 << 1, UART_RX_INTERRUPT = 1 << 3 };
enum { UART_INT_RX = 1 << 1 };

// Timer 0 wakes the board up; timer 1 runs through all 32 bits for time.ticks_cpu(). Both count down.
#define WAKE 0x40000000
#define TICKER 0x40001000
#define TIMER_CTRL(timer) REG(timer + 0x0)
#define TIMER_VALUE(timer) REG(timer + 0x4)
#define TIMER_RELOAD(timer) REG(timer + 0x8)
#define TIMER_INTCLEAR(timer) REG(timer + 0xc)
enum { TIMER_ON = 1 << 0, TIMER_INTERRUPT = 1 << 3 };

// A counter behind a divider: microseconds.
#define FPGAIO 0x40028000
#define FPGAIO_COUNTER REG(FPGAIO + 0x18)
#define FPGAIO_PRESCALE REG(FPGAIO + 0x1c)

#define MHZ 25

#define NVIC_SET_PENDING REG(0xe000e200)
enum { UART_IRQ = 0, WAKE_IRQ = 8 };

static inline void hardware_init(void) {
    FPGAIO_PRESCALE = MHZ - 1;
    TIMER_VALUE(WAKE) = 0xffffffff; // at zero it would not start
    TIMER_CTRL(WAKE) = TIMER_ON | TIMER_INTERRUPT;
    TIMER_RELOAD(TICKER) = TIMER_VALUE(TICKER) = 0xffffffff;
    TIMER_CTRL(TICKER) = TIMER_ON;
    UART_BAUDDIV = 16; // the fastest, which QEMU does not wait for
    UART_CTRL = UART_TX_ON | UART_RX_ON | UART_RX_INTERRUPT;
}

static inline uint32_t clock_read_us(void) {
    return FPGAIO_COUNTER;
}

static inline uint32_t ticker_read(void) {
    return ~TIMER_VALUE(TICKER);
}

static inline void wake_set(uint32_t now_us, uint32_t sleep_us) {
    (void)now_us;
    TIMER_VALUE(WAKE) = MHZ * sleep_us;
}

static inline void wake_clear(void) {
    TIMER_INTCLEAR(WAKE) = 1;
}

static inline bool uart_received(void) {
    return UART_STATE & UART_RX_FULL;
}

// Nothing in this UART tells QEMU to look for the next byte; a timer that ends does. Sleepers bear being woken early.
static inline uint8_t uart_take(void) {
    UART_INTCLEAR = UART_INT_RX; // first: the next byte may come as soon as this one is read
    uint8_t c = UART_DATA;
    TIMER_VALUE(WAKE) = MHZ;
    return c;
}

// Leave what is received where it is, without an interrupt, until uart_resume(). Only a new byte raises another.
static inline void uart_hold(void) {
    UART_INTCLEAR = UART_INT_RX;
}

static inline void uart_resume(void) {
    if (uart_received()) {
        NVIC_SET_PENDING = 1 << UART_IRQ;
    }
}

static inline bool uart_ready(void) {
    return !(UART_STATE & UART_TX_FULL);
}

static inline void uart_send(uint8_t c) {
    UART_DATA = c;
}
