#include "ul_gradient.h"

// Sum over the rows that meet in input k: a walk down a column of weights.
static int32_t column_int16(const int16_t *g, const int16_t *w, uint32_t rows, uint32_t step, int32_t fraction) {
    const int32_t half = ul_half(fraction);
    int32_t sum = 0;
    for (const int16_t *const end = g + rows; g < end; g++, w += step) {
        sum += *g * ul_wq(*w, half, fraction);
    }
    return sum;
}

static int32_t column_int8(const int16_t *g, const int8_t *w, uint32_t rows, uint32_t step) {
    int32_t sum = 0;
    for (const int16_t *const end = g + rows; g < end; g++, w += step) {
        sum += *g * *w;
    }
    return sum;
}

static int32_t column_bytes(const int16_t *g, const uint8_t *w, uint32_t rows, uint32_t step) {
    int32_t sum = 0;
    for (const int16_t *const end = g + rows; g < end; g++, w += step) {
        sum += *g * ((int32_t)*w - 128);
    }
    return sum;
}

typedef struct {
    const int16_t *g;
    const uint8_t *frozen;
    const void *trained;
    uint32_t count; // of frozen rows
} rows;

static int32_t column(const rows *l, const ul_record *r, uint32_t k) {
    const uint32_t row = (r->in_c + 3u) & ~3u;
    int32_t sum = l->count ? column_bytes(l->g, l->frozen + k, l->count, row) : 0;
    if (r->extra && r->w_dtype == UL_DTYPE_INT16) {
        sum += column_int16(l->g + l->count, (const int16_t *)l->trained + k, r->extra, r->in_c, r->fraction);
    } else if (r->extra) {
        sum += column_int8(l->g + l->count, (const int8_t *)l->trained + k, r->extra, r->in_c);
    }
    return sum;
}

void ul_dense_back(const ul_buffer *table, const ul_record *r) {
    const ul_gradient *const out = ul_operand(table, r, 0);
    const uint16_t *const scale = ul_operand(table, r, 3);
    int16_t *const g = (int16_t *)(void *)table[UL_BUF_SCRATCH].data;
    const uint32_t frozen = r->out_c - r->extra;
    const rows layer = {g, frozen ? ul_operand(table, r, 2) : NULL, r->extra ? ul_operand(table, r, 5) : NULL, frozen};
    ul_writer in = ul_write_gradient(table, r);
    uint32_t largest = 0;
    for (uint32_t n = 0; n < r->out_c; n++) {
        g[n] = (int16_t)ul_scaled(ul_mantissa(out, n, ul_narrow_out(r)), scale[n]);
        largest = ul_abs(g[n]) > largest ? ul_abs(g[n]) : largest;
    }
    if (largest == 0) {
        for (uint32_t k = 0; k < r->in_c; k++) {
            ul_put_mantissa(&in, k, 0);
        }
        ul_end_gradient(table, &in, 0);
        return;
    }
    ul_gain gain = ul_gain_of(table, r, largest);
    if (ul_is_learning(&gain)) {
        uint32_t top = 0;
        for (uint32_t k = 0; k < r->in_c; k++) {
            const uint32_t size = ul_abs(column(&layer, r, k));
            top = size > top ? size : top;
        }
        ul_learn_gain(&gain, top);
    }
    const int32_t shift = ul_gain_shift(&gain, &in);
    for (uint32_t k = 0; k < r->in_c; k++) {
        ul_put_mantissa(&in, k, ul_rshift(column(&layer, r, k), shift));
    }
    ul_end_gradient(table, &in, out->exponent + r->scale_exp + shift);
}
