// Biases move against their gradients, summed over the positions of a channel.
#include "ul_update.h"

static int32_t sum_run(const ul_gradient *g, const ul_span *s, int narrow) {
    int32_t sum = 0;
    for (uint32_t left = s->count, i = s->at; left; left--, i += s->step) {
        sum += narrow ? ul_cut_at(g->mantissa, i, 1) : ul_cut_at(g->mantissa, i, 0);
    }
    return sum;
}

void ul_update_bias(const ul_buffer *table, const ul_record *r) {
    const ul_gradient *const out = ul_operand(table, r, 0);
    int32_t *const bias = ul_operand(table, r, 2);
    const uint16_t *const entry = ul_operand(table, r, 3);
    ul_state *const state = ul_state_of(table);
    ul_span span = ul_one_run(r->in_c, r->extra, (uint32_t)r->out_h * r->out_w, 0);
    for (uint32_t n = 0; n < r->out_c; n++, span.at++) {
        const int32_t sum = sum_run(out, &span, ul_narrow_out(r));
        if (sum == 0) {
            continue;
        }
        const ul_step s = ul_channel_step(r, state, out->exponent, entry[n]);
        const int32_t before = ul_clamp(bias[n], -UL_BIAS_MAX, UL_BIAS_MAX);
        bias[n] = ul_moved(before, ul_rshift_product(sum, s.mantissa, s.shift), UL_BIAS_MAX, &state->clipped);
    }
}
