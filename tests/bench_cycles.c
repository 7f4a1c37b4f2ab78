// One inference of the plan in the file SESSION (as tests/bench_board.py writes it) on a bare Cortex-M0, for QEMU to log.
#include "ul_core.h"

#define RAM_BYTES 65536

__asm__(".section .rodata\n.balign 4\nsession:\n.incbin \"" SESSION "\"\n.balign 4\n.previous\n");
extern const uint32_t session[];
static uint32_t ram[RAM_BYTES / 4];

static void leave(void) {
    register uint32_t reason __asm__("r0") = 0x18, code __asm__("r1") = 0x20026; // semihosting: exit, all is well
    __asm__ volatile("bkpt 0xab" ::"r"(reason), "r"(code));
}

static void start(void) {
    const uint32_t *const head = session;
    const uint8_t *const program = (const uint8_t *)(head + 1 + UL_BUFFERS);
    uint8_t *const frozen = (uint8_t *)program + head[0];
    ul_buffer table[UL_BUFFERS];
    uint32_t at = 0;
    for (int b = 0; b < UL_BUFFERS; b++) {
        table[b].bytes = head[1 + b];
        table[b].data = (uint8_t *)ram + at;
        table[b].base = 0;
        table[b].is_part = 0;
        at += (b == UL_BUF_FROZEN || b == UL_BUF_INPUT) ? 0 : (head[1 + b] + 3) & ~3u;
    }
    table[UL_BUF_FROZEN].data = frozen;
    table[UL_BUF_INPUT].data = frozen + head[1 + UL_BUF_FROZEN];
    const uint32_t records = (head[0] - UL_PROGRAM_BYTES) / UL_RECORD_BYTES;
    if (at <= RAM_BYTES && ul_run(program, head[0], table, 0, records) == (int32_t)records) {
        leave();
    }
    for (;;) {
    }
}

__attribute__((section(".vectors"), used)) static void *const vectors[] = {(uint8_t *)0x20000000 + 131072, (void *)start};
