// Runs programs on the core for tests/test_fuzz.py, with every buffer in an allocation of exactly its size, so that
// AddressSanitizer sees each byte beyond it. Reads a stream of sessions from stdin, answers on stdout.
//
//   driver run     session: u32 flags (1: answer with TRAIN, STATE and ARENA), u32 fill byte of ARENA and SCRATCH,
//                  u32 programs, each u32 bytes and the bytes; u32 sizes[7]; contents of FROZEN, TRAIN, STATE;
//                  u32 calls, each u32 program, first, count, then sizes[INPUT] and sizes[TARGET] bytes.
//                  Answer of a call: i32 code, then what the flags ask for.
//   driver round   u32 count, then count times i32 acc, multiplier, shift. Answer: i32 each.
//
// INPUT and TARGET stand at odd addresses: the core promises to read them anywhere. What it must only read is compared.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ul_math.h"

static void fail(const char *what) {
    fprintf(stderr, "driver: %s\n", what);
    exit(3);
}

static void get(void *to, size_t bytes) {
    if (bytes && fread(to, 1, bytes, stdin) != bytes) {
        fail("the stream ends in the middle");
    }
}

static uint32_t number(void) {
    uint32_t value;
    get(&value, sizeof(value));
    return value;
}

static void put(const void *from, size_t bytes) {
    if (bytes && fwrite(from, 1, bytes, stdout) != bytes) {
        fail("nobody reads the answers");
    }
}

static uint8_t *room(size_t bytes) {
    uint8_t *const p = malloc(bytes ? bytes : 1);
    if (p == NULL) {
        fail("out of memory");
    }
    return p;
}

static uint8_t *received(size_t bytes) {
    uint8_t *const p = room(bytes);
    get(p, bytes);
    return p;
}

static uint8_t *copied(const uint8_t *from, size_t bytes) {
    uint8_t *const p = room(bytes);
    memcpy(p, from, bytes);
    return p;
}

static void session(uint32_t flags) {
    const int fill = (int)number();
    const uint32_t programs = number();
    uint8_t **const program = calloc(programs, sizeof(*program));
    size_t *const bytes = calloc(programs, sizeof(*bytes));
    if (program == NULL || bytes == NULL) {
        fail("out of memory");
    }
    for (uint32_t i = 0; i < programs; i++) {
        bytes[i] = number();
        program[i] = received(bytes[i]);
    }
    ul_buffer table[UL_BUFFERS];
    for (int b = 0; b < UL_BUFFERS; b++) {
        table[b] = (ul_buffer){NULL, number(), 0, 0};
    }
    for (int b = 0; b < UL_BUFFERS; b++) {
        if (b == UL_BUF_INPUT || b == UL_BUF_TARGET) {
            continue;
        }
        const int sent = b == UL_BUF_FROZEN || b == UL_BUF_TRAIN || b == UL_BUF_STATE;
        table[b].data = sent ? received(table[b].bytes) : room(table[b].bytes);
        if (!sent) {
            memset(table[b].data, fill, table[b].bytes);
        }
    }
    uint8_t *const frozen = copied(table[UL_BUF_FROZEN].data, table[UL_BUF_FROZEN].bytes);
    const uint32_t calls = number();
    for (uint32_t i = 0; i < calls; i++) {
        const uint32_t which = number(), first = number(), count = number();
        if (which >= programs) {
            fail("no such program");
        }
        // Odd at the front, exact at the end.
        uint8_t *const input = room(table[UL_BUF_INPUT].bytes + 1), *const target = room(table[UL_BUF_TARGET].bytes + 1);
        get(input + 1, table[UL_BUF_INPUT].bytes);
        get(target + 1, table[UL_BUF_TARGET].bytes);
        uint8_t *const input_copy = copied(input + 1, table[UL_BUF_INPUT].bytes);
        uint8_t *const target_copy = copied(target + 1, table[UL_BUF_TARGET].bytes);
        uint8_t *const program_copy = copied(program[which], bytes[which]);
        table[UL_BUF_INPUT].data = input + 1;
        table[UL_BUF_TARGET].data = target + 1;
        const int32_t code = ul_run(program[which], bytes[which], table, first, count);
        if (memcmp(input + 1, input_copy, table[UL_BUF_INPUT].bytes) ||
            memcmp(target + 1, target_copy, table[UL_BUF_TARGET].bytes) ||
            memcmp(program[which], program_copy, bytes[which]) ||
            memcmp(table[UL_BUF_FROZEN].data, frozen, table[UL_BUF_FROZEN].bytes)) {
            fail("the core wrote into what it must only read");
        }
        put(&code, sizeof(code));
        if (flags & 1) {
            put(table[UL_BUF_TRAIN].data, table[UL_BUF_TRAIN].bytes);
            put(table[UL_BUF_STATE].data, table[UL_BUF_STATE].bytes);
            put(table[UL_BUF_ARENA].data, table[UL_BUF_ARENA].bytes);
        }
        free(input);
        free(target);
        free(input_copy);
        free(target_copy);
        free(program_copy);
    }
    fflush(stdout); // what was answered before a sanitizer ends the process tells which session it was
    free(frozen);
    for (int b = 0; b < UL_BUFFERS; b++) {
        if (b == UL_BUF_INPUT || b == UL_BUF_TARGET) {
            continue;
        }
        free(table[b].data);
    }
    for (uint32_t i = 0; i < programs; i++) {
        free(program[i]);
    }
    free(program);
    free(bytes);
}

static void round_many(void) {
    for (uint32_t left = number(); left; left--) {
        int32_t v[3];
        get(v, sizeof(v));
        v[0] = ul_round_single(v[0], v[1], v[2]);
        put(v, sizeof(v[0]));
    }
}

int main(int count, char **words) {
    if (count == 2 && strcmp(words[1], "round") == 0) {
        round_many();
        return 0;
    }
    uint32_t flags;
    while (fread(&flags, 1, sizeof(flags), stdin) == sizeof(flags)) {
        session(flags);
    }
    return 0;
}
