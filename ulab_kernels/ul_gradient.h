// Gradient tensors, read and written: 12-bit mantissas in 16 bits, or narrow ones in 8.
#ifndef UL_GRADIENT_H
#define UL_GRADIENT_H

#include "ul_records.h"

// The i-th mantissa, cut to its range: no other value may reach the bounded sums.
int32_t ul_mantissa(const ul_gradient *g, uint32_t i, int narrow);

// The same for loops over runs, where `narrow` is a constant.
static inline int32_t ul_cut(int32_t m, int32_t top) {
    return (uint32_t)m + (uint32_t)top <= (uint32_t)(2 * top) ? m : m < 0 ? -top : top;
}

static inline int32_t ul_cut_at(const int16_t *mantissas, uint32_t i, int narrow) {
    return narrow ? ul_cut(((const int8_t *)mantissas)[i], UL_NARROW_MAX) : ul_cut(mantissas[i], UL_MANTISSA_MAX);
}

static inline int ul_narrow_out(const ul_record *r) {
    return r->flags & UL_FLAG_NARROW_OUT;
}

static inline int32_t ul_gradient_bits(int narrow) {
    return narrow ? 7 : 11;
}

// What a record writes: the largest mantissa and how many were cut are found on the way.
typedef struct {
    ul_gradient *to;
    int narrow;
    int32_t top;
    uint32_t max, saturated;
} ul_writer;

ul_writer ul_write_gradient(const ul_buffer *table, const ul_record *r);
void ul_put_mantissa(ul_writer *w, uint32_t i, int32_t value);
void ul_end_gradient(const ul_buffer *table, ul_writer *w, int32_t exponent);

// A mantissa times its channel's weight scale.
static inline int32_t ul_scaled(int32_t mantissa, uint32_t scale) {
    return (mantissa * (int32_t)scale + 32768) >> 16;
}

// Runs: where the time goes beside the products. `rows` runs of `count` numbers of a gradient, the first from `at` on, `step`
// from one number to the next, `line` from one run to the next; and what they are read to or written from.
typedef struct {
    uint32_t at, step, count, rows, line;
    uint32_t other_step, other_line;
} ul_span;

static inline ul_span ul_one_run(uint32_t at, uint32_t step, uint32_t count, uint32_t other_step) {
    const ul_span span = {at, step, count, 1, 0, other_step, 0};
    return span;
}

void ul_read_run(int32_t *to, const ul_gradient *g, const ul_span *span, int narrow);
// The same, each times its weight scale: scale[i * scale_step].
void ul_read_scaled_run(int32_t *to, const ul_gradient *g, const ul_span *span, int narrow, const uint16_t *scale,
    uint32_t scale_step);
// The largest of all mantissas times their channels' weight scales.
uint32_t ul_largest_scaled(const ul_gradient *g, const uint16_t *scale, uint32_t positions, uint32_t channels, int narrow);
// mantissas = rshift(from, shift), shift in 0..30.
void ul_put_run(ul_writer *w, const ul_span *span, const int32_t *from, int32_t shift);
uint32_t ul_largest_of(const int32_t *from, uint32_t from_step, uint32_t count, uint32_t largest);

// The shift of the one-pass scaling; see DENSE_BACK.
typedef struct {
    int8_t *gain;
    uint8_t *seen;
    int32_t bits; // of the largest number that goes in
} ul_gain;

ul_gain ul_gain_of(const ul_buffer *table, const ul_record *r, uint32_t largest);
static inline int ul_is_learning(const ul_gain *g) {
    return *g->seen < UL_GAIN_SAMPLES;
}
// top: the largest sum of this sample.
void ul_learn_gain(ul_gain *g, uint32_t top);
int32_t ul_gain_shift(const ul_gain *g, const ul_writer *w);

// Where along one dimension of the output a tap meets the image: [from, to).
typedef struct {
    int32_t from, to;
} ul_reach;

// tap: the kernel's offset less the padding.
ul_reach ul_reach_of(int32_t tap, int32_t stride, int32_t in, int32_t out);

#endif
