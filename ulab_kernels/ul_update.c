// Weights of dense layers move against their gradients.
#include "ul_update.h"

ul_step ul_channel_step(const ul_record *r, const ul_state *state, int32_t exponent, uint16_t entry) {
    int32_t e = exponent + r->scale_exp + state->lr_exp + (entry >> 10);
    const uint32_t rate = ul_mul11(r->scale_mant, state->lr_mant & 2047, &e);
    ul_step s;
    s.mantissa = (int32_t)ul_mul11(rate, 1024 + (entry & 1023u), &e);
    s.shift = -e;
    return s;
}

void ul_move_weight(const ul_record *r, ul_state *state, void *weights, uint32_t i, int32_t sum, const ul_step *s) {
    if (r->w_dtype == UL_DTYPE_INT16) {
        int16_t *const w = (int16_t *)weights + i;
        *w = (int16_t)ul_moved(*w, ul_rshift_product(sum, s->mantissa, s->shift), 32767, &state->clipped);
    } else {
        int8_t *const w = (int8_t *)weights + i;
        const uint32_t draw = ul_mix(state->rng + i * 2654435769u);
        *w = (int8_t)ul_moved(*w, ul_draw_product(sum, s->mantissa, s->shift, draw), 127, &state->clipped);
    }
}

// p: mantissa * step, so that p * (x - zero) fits 32 bits.
static uint32_t update_row_int16(int16_t *w, const int8_t *x, const ul_record *r, int32_t p, int32_t shift) {
    const int32_t zero = r->zero_in;
    uint32_t clipped = 0;
    if (shift < 1 || shift > 31) {
        for (uint32_t k = 0; k < r->in_c; k++) {
            w[k] = (int16_t)ul_moved(w[k], ul_rshift(p * (x[k] - zero), shift), 32767, &clipped);
        }
        return clipped;
    }
    shift--;
    for (const int8_t *const end = x + r->in_c; x < end; x++, w++) {
        int32_t value = *w - (((p * (*x - zero) >> shift) + 1) >> 1);
        if ((uint32_t)(value + 32767) > 65534) {
            value = value < 0 ? -32767 : 32767;
            clipped++;
        }
        *w = (int16_t)value;
    }
    return clipped;
}

void ul_update_weight(const ul_buffer *table, const ul_record *r) {
    const ul_gradient *const out = ul_operand(table, r, 0);
    const int8_t *const x = ul_operand(table, r, 1);
    void *const weights = ul_operand(table, r, 2);
    const uint16_t *const entry = ul_operand(table, r, 3);
    ul_state *const state = ul_state_of(table);
    const uint32_t first = r->extra - r->out_c;
    ul_begin_update(r, state);
    for (uint32_t n = 0; n < r->out_c; n++) {
        const int32_t m = ul_mantissa(out, first + n, ul_narrow_out(r));
        if (m == 0) {
            continue;
        }
        const ul_step s = ul_channel_step(r, state, out->exponent, entry[n]);
        if (r->w_dtype == UL_DTYPE_INT16) {
            int16_t *const row = (int16_t *)weights + n * r->in_c;
            state->clipped += update_row_int16(row, x, r, m * s.mantissa, s.shift);
            continue;
        }
        for (uint32_t k = 0; k < r->in_c; k++) {
            ul_move_weight(r, state, weights, n * r->in_c + k, m * (x[k] - r->zero_in), &s);
        }
    }
}
