#include "ul_records.h"

static int32_t dot_int8(const int8_t *x, const int8_t *w, uint32_t count, int32_t zero) {
    int32_t sum = 0;
    for (uint32_t k = 0; k < count; k++) {
        sum += (x[k] - zero) * w[k];
    }
    return sum;
}

static int32_t dot_int16(const int8_t *x, const int16_t *w, uint32_t count, int32_t zero, int32_t fraction) {
    const int32_t half = ul_half(fraction);
    int32_t sum = 0;
    for (uint32_t k = 0; k < count; k++) {
        sum += (x[k] - zero) * ul_wq(w[k], half, fraction);
    }
    return sum;
}

void ul_dense(const ul_buffer *table, const ul_record *r) {
    const int8_t *const x = ul_operand(table, r, 0);
    int8_t *const y = ul_operand(table, r, 1);
    const uint8_t *w = ul_operand(table, r, 2);
    const int32_t *const bias = ul_operand(table, r, 3);
    const int32_t *const multiplier = ul_operand(table, r, 4);
    const int8_t *const shift = ul_operand(table, r, 5);
    const uint32_t count = r->in_c;
    const int wide = r->w_dtype == UL_DTYPE_INT16;
    for (uint32_t n = 0; n < r->out_c; n++) {
        const int32_t sum = wide
            ? ul_coarse(dot_int16(x, (const int16_t *)(const void *)w, count, r->zero_in, ul_lost(r)), ul_finer(r))
            : dot_int8(x, (const int8_t *)w, count, r->zero_in);
        w += wide ? 2 * count : count;
        // The sum is bounded by the verifier; a bias is whatever the plan says, so it is added modulo 2^32.
        const int32_t acc = (int32_t)((uint32_t)sum + (uint32_t)bias[n]);
        y[n] = ul_channel_code(r, acc, multiplier, shift, n * ul_scale_step(r));
    }
}

void ul_relu(const ul_buffer *table, const ul_record *r) {
    const int8_t *const x = ul_operand(table, r, 0);
    int8_t *const y = ul_operand(table, r, 1);
    for (uint32_t k = 0; k < r->in_c; k++) {
        y[k] = (int8_t)ul_clamp(x[k], r->act_min, r->act_max);
    }
}
