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
        const int32_t sum = wide ? dot_int16(x, (const int16_t *)(const void *)w, count, r->zero_in, r->fraction)
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

// Sum over the output channels that meet in input k: a walk down column k of the weights.
static int32_t column(const int16_t *g, const void *weights, const ul_record *r, uint32_t k) {
    int32_t sum = 0;
    if (r->w_dtype == UL_DTYPE_INT16) {
        const int16_t *w = (const int16_t *)weights + k;
        const int32_t half = ul_half(r->fraction), fraction = r->fraction;
        for (uint32_t n = 0; n < r->out_c; n++, w += r->in_c) {
            sum += g[n] * ul_wq(*w, half, fraction);
        }
    } else {
        const int8_t *w = (const int8_t *)weights + k;
        for (uint32_t n = 0; n < r->out_c; n++, w += r->in_c) {
            sum += g[n] * *w;
        }
    }
    return sum;
}

void ul_dense_back(const ul_buffer *table, const ul_record *r) {
    const ul_gradient *const out = ul_operand(table, r, 0);
    ul_gradient *const in = ul_operand(table, r, 1);
    const void *const weights = ul_operand(table, r, 2);
    const uint16_t *const scale = ul_operand(table, r, 3);
    const int8_t *const x = r->flags & UL_FLAG_MASK ? ul_operand(table, r, 4) : NULL;
    int16_t *const g = (int16_t *)(void *)table[UL_BUF_SCRATCH].data;
    int8_t *const gain = (int8_t *)table[UL_BUF_STATE].data + r->gain;
    uint8_t *const seen = table[UL_BUF_STATE].data + r->gain + 1;

    uint32_t largest = 0;
    for (uint32_t n = 0; n < r->out_c; n++) {
        // The mantissa lies within +-2047 in any gradient that a record wrote; cut it so that no other can overflow.
        const int32_t m = ul_clamp(out->mantissa[n], -UL_MANTISSA_MAX, UL_MANTISSA_MAX);
        g[n] = (int16_t)((m * (int32_t)scale[n] + 32768) >> 16);
        largest = ul_abs(g[n]) > largest ? ul_abs(g[n]) : largest;
    }
    if (largest == 0) {
        for (uint32_t k = 0; k < r->in_c; k++) {
            in->mantissa[k] = 0;
        }
        in->exponent = 0;
        in->max = 0;
        return;
    }
    const int32_t bits = ul_bitlen(largest);
    if (*seen < UL_GAIN_SAMPLES) {
        uint32_t top = 0;
        for (uint32_t k = 0; k < r->in_c; k++) {
            if (!x || x[k] != r->act_min) {
                const uint32_t size = ul_abs(column(g, weights, r, k));
                top = size > top ? size : top;
            }
        }
        if (top) {
            const int32_t needed = ul_bitlen(top) - bits;
            if (*seen == 0 || needed > *gain) {
                *gain = (int8_t)needed;
            }
            (*seen)++;
        }
    }
    const int32_t shift = ul_clamp(bits + ul_clamp(*gain, -31, 31) - 10, 0, 30);
    const int32_t exponent = out->exponent + r->scale_exp + shift;
    uint32_t saturated = 0, max = 0;
    for (uint32_t k = 0; k < r->in_c; k++) {
        int32_t m = 0;
        if (!x || x[k] != r->act_min) {
            m = column(g, weights, r, k);
            m = shift ? (m >> shift) + ((m >> (shift - 1)) & 1) : m;
            const int32_t cut = ul_clamp(m, -UL_MANTISSA_MAX, UL_MANTISSA_MAX);
            saturated += cut != m;
            m = cut;
        }
        in->mantissa[k] = (int16_t)m;
        max = ul_abs(m) > max ? ul_abs(m) : max;
    }
    in->max = (uint16_t)max;
    in->exponent = (int16_t)ul_clamp(exponent, -8192, 8192);
    ul_state_of(table)->saturated += saturated;
}

// What one channel's products are multiplied by: a mantissa and the shift that ends the product.
typedef struct {
    int32_t mantissa, shift;
} step_scale;

static step_scale channel_step(const ul_record *r, const ul_state *state, int32_t exponent, uint16_t entry) {
    int32_t e = exponent + r->scale_exp + state->lr_exp + (entry >> 10);
    const uint32_t rate = ul_mul11(r->scale_mant, state->lr_mant & 2047, &e);
    step_scale s;
    s.mantissa = (int32_t)ul_mul11(rate, 1024 + (entry & 1023u), &e);
    s.shift = -e;
    return s;
}

static uint32_t update_row_int16(int16_t *w, const int8_t *x, const ul_record *r, int32_t gm, int32_t shift) {
    uint32_t clipped = 0;
    for (uint32_t k = 0; k < r->in_c; k++) {
        const int32_t value = w[k] - ul_rshift(gm * (x[k] - r->zero_in), shift);
        const int32_t cut = ul_clamp(value, -32767, 32767);
        clipped += cut != value;
        w[k] = (int16_t)cut;
    }
    return clipped;
}

static uint32_t update_row_int8(int8_t *w, const int8_t *x, const ul_record *r, int32_t gm, int32_t shift,
    uint32_t *rng) {
    uint32_t clipped = 0;
    const int32_t s = shift > 30 ? 30 : shift;
    const int32_t extra = shift - s > 31 ? 31 : shift - s; // what lies beyond 30 bits only biases the draw
    for (uint32_t k = 0; k < r->in_c; k++) {
        const int32_t p = gm * (x[k] - r->zero_in);
        *rng = ul_xorshift32(*rng);
        const int32_t step = s > 0 ? ((p >> extra) + (int32_t)(*rng >> (32 - s))) >> s : ul_rshift(p, s);
        const int32_t value = w[k] - step;
        const int32_t cut = ul_clamp(value, -127, 127);
        clipped += cut != value;
        w[k] = (int8_t)cut;
    }
    return clipped;
}

void ul_update_weight(const ul_buffer *table, const ul_record *r) {
    const ul_gradient *const out = ul_operand(table, r, 0);
    const int8_t *const x = ul_operand(table, r, 1);
    uint8_t *const weights = ul_operand(table, r, 2);
    const uint16_t *const entry = ul_operand(table, r, 3);
    ul_state *const state = ul_state_of(table);
    const size_t row_bytes = r->w_dtype == UL_DTYPE_INT16 ? 2 * (size_t)r->in_c : r->in_c;
    for (uint32_t n = 0; n < r->out_c; n++) {
        const int32_t m = ul_clamp(out->mantissa[n], -UL_MANTISSA_MAX, UL_MANTISSA_MAX);
        if (m == 0) {
            continue;
        }
        const step_scale s = channel_step(r, state, out->exponent, entry[n]);
        uint8_t *const row = weights + n * row_bytes;
        if (r->w_dtype == UL_DTYPE_INT16) {
            state->clipped += update_row_int16((int16_t *)(void *)row, x, r, m * s.mantissa, s.shift);
        } else {
            state->clipped += update_row_int8((int8_t *)row, x, r, m * s.mantissa, s.shift, &state->rng);
        }
    }
}

void ul_update_bias(const ul_buffer *table, const ul_record *r) {
    const ul_gradient *const out = ul_operand(table, r, 0);
    int32_t *const bias = ul_operand(table, r, 2);
    const uint16_t *const entry = ul_operand(table, r, 3);
    ul_state *const state = ul_state_of(table);
    for (uint32_t n = 0; n < r->out_c; n++) {
        const int32_t m = ul_clamp(out->mantissa[n], -UL_MANTISSA_MAX, UL_MANTISSA_MAX);
        if (m == 0) {
            continue;
        }
        const step_scale s = channel_step(r, state, out->exponent, entry[n]);
        const int32_t before = ul_clamp(bias[n], -UL_BIAS_MAX, UL_BIAS_MAX);
        const int32_t value = before - ul_rshift(m * s.mantissa, s.shift);
        bias[n] = ul_clamp(value, -UL_BIAS_MAX, UL_BIAS_MAX);
        state->clipped += bias[n] != value;
    }
}
