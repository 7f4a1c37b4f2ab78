// Gradients are written, and their scaling is learnt.
#include "ul_gradient.h"

ul_writer ul_write_gradient(const ul_buffer *table, const ul_record *r) {
    ul_writer w = {ul_operand(table, r, 1), r->flags & UL_FLAG_NARROW_IN, UL_MANTISSA_MAX, 0, 0};
    if (w.narrow) {
        w.top = UL_NARROW_MAX;
    }
    return w;
}

void ul_put_mantissa(ul_writer *w, uint32_t i, int32_t value) {
    const int32_t cut = ul_clamp(value, -w->top, w->top);
    w->saturated += cut != value;
    if (w->narrow) {
        ((int8_t *)w->to->mantissa)[i] = (int8_t)cut;
    } else {
        w->to->mantissa[i] = (int16_t)cut;
    }
    w->max = ul_abs(cut) > w->max ? ul_abs(cut) : w->max;
}

void ul_end_gradient(const ul_buffer *table, ul_writer *w, int32_t exponent) {
    w->to->max = (uint16_t)w->max;
    w->to->exponent = (int16_t)ul_clamp(exponent, -8192, 8192);
    ul_state_of(table)->saturated += w->saturated;
}

ul_gain ul_gain_of(const ul_buffer *table, const ul_record *r, uint32_t largest) {
    uint8_t *const at = table[UL_BUF_STATE].data + r->gain;
    const ul_gain g = {(int8_t *)at, at + 1, ul_bitlen(largest)};
    return g;
}

void ul_learn_gain(ul_gain *g, uint32_t top) {
    if (top) {
        const int32_t needed = ul_bitlen(top) - g->bits;
        if (*g->seen == 0 || needed > *g->gain) {
            *g->gain = (int8_t)needed;
        }
        (*g->seen)++;
    }
}

int32_t ul_gain_shift(const ul_gain *g, const ul_writer *w) {
    return ul_clamp(g->bits + ul_clamp(*g->gain, -31, 31) + 1 - ul_gradient_bits(w->narrow), 0, 30);
}

ul_reach ul_reach_of(int32_t tap, int32_t stride, int32_t in, int32_t out) {
    ul_reach reach = {0, out};
    if (tap < 0) {
        reach.from = (int32_t)ul_quotient((uint32_t)(-tap + stride - 1), (uint32_t)stride);
    }
    const int32_t room = in - 1 - tap;
    const int32_t end = room < 0 ? 0 : (int32_t)ul_quotient((uint32_t)room, (uint32_t)stride) + 1;
    reach.to = end < out ? end : out;
    return reach;
}
