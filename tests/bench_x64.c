// Runs the forward program of each file twice on the core, the second time under the eyes of callgrind: one dump a file.
// FILE: u32 bytes of the program, u32 sizes[7], the program, FROZEN, INPUT (tests/bench_board.py).
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <valgrind/callgrind.h>

#include "ul_core.h"

static void *got(FILE *file, size_t bytes) {
    void *const p = malloc(bytes ? bytes : 1);
    if (p == NULL || (bytes && fread(p, 1, bytes, file) != bytes)) {
        fprintf(stderr, "the file is too short\n");
        exit(1);
    }
    return p;
}

static void run(const char *name) {
    FILE *const file = fopen(name, "rb");
    if (file == NULL) {
        fprintf(stderr, "%s cannot be opened\n", name);
        exit(1);
    }
    const uint32_t *const head = got(file, 4 * (1 + UL_BUFFERS));
    const void *const program = got(file, head[0]);
    ul_buffer table[UL_BUFFERS];
    memset(table, 0, sizeof(table));
    for (int b = 0; b < UL_BUFFERS; b++) {
        table[b].bytes = head[1 + b];
        table[b].data = b == UL_BUF_FROZEN ? got(file, table[b].bytes) : calloc(1, table[b].bytes + 1);
    }
    table[UL_BUF_INPUT].data = got(file, table[UL_BUF_INPUT].bytes);
    const uint32_t records = (head[0] - UL_PROGRAM_BYTES) / UL_RECORD_BYTES;
    for (int turn = 0; turn < 2; turn++) {
        CALLGRIND_ZERO_STATS;
        const int32_t code = ul_run(program, head[0], table, 0, records);
        if (code < 0) {
            fprintf(stderr, "the core refuses %s: %d\n", name, (int)code);
            exit(1);
        }
    }
    CALLGRIND_DUMP_STATS;
    fclose(file);
}

int main(int count, char **words) {
    for (int i = 1; i < count; i++) {
        run(words[i]);
    }
    return 0;
}
