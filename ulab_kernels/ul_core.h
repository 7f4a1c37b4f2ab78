// The core's face: one call walks a program's records over a table of caller-owned buffers.
// No allocation, no static state, no float. A program must have passed the verifier (firmware/ulearn/verify.py).
#ifndef UL_CORE_H
#define UL_CORE_H

#include <stddef.h>
#include <stdint.h>

#include "ul_format.h"

typedef struct {
    char name[16];
    uint32_t sizes[UL_BUFFERS];
    uint32_t output;
    uint32_t output_bytes;
    uint16_t n_records;
    uint8_t kind;
    uint8_t flags;
    uint8_t zero[8];
} ul_program;

typedef struct {
    uint8_t op, mode, flags, rounding;
    uint16_t gate, gain;
    uint32_t operand[UL_OPERANDS];
    uint16_t in_h, in_w, in_c, out_h, out_w, out_c;
    uint8_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left;
    int8_t zero_in, zero_out, act_min, act_max;
    uint8_t w_dtype, fraction;
    uint16_t scale_mant;
    int16_t scale_exp;
    uint32_t extra;
} ul_record;

// is_part: data holds only what the records to be run need of the buffer, from its byte `base` on; the caller sees to it.
typedef struct {
    uint8_t *data;
    size_t bytes;
    size_t base;
    int is_part;
} ul_buffer;

// Runs records [first, first + count) of the program at `program` (its header, then its records; `bytes` of them).
// Returns the number of records done or a UL_E_ code; buffers are untouched on any code but UL_E_LABEL and UL_E_DATA.
int32_t ul_run(const void *program, size_t bytes, const ul_buffer table[UL_BUFFERS], uint32_t first, uint32_t count);

#endif
