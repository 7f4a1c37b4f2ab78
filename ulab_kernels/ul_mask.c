// Which numbers a ReLU let pass, a bit each, and gradients by those bits or by the numbers themselves.
#include "ul_gradient.h"

void ul_mask(const ul_buffer *table, const ul_record *r) {
    const int8_t *x = ul_operand(table, r, 0);
    uint8_t *bits = ul_operand(table, r, 1);
    const int32_t least = r->act_min;
    for (uint32_t left = (uint32_t)r->in_h * r->in_w * r->in_c; left;) {
        const uint32_t some = left < 8 ? left : 8;
        uint32_t byte = 0;
        for (uint32_t bit = 1; bit < (uint32_t)1 << some; bit <<= 1) {
            byte |= *x++ != least ? bit : 0;
        }
        *bits++ = (uint8_t)byte;
        left -= some;
    }
}

void ul_relu_back(const ul_buffer *table, const ul_record *r) {
    const ul_gradient *const out = ul_operand(table, r, 0);
    ul_gradient *const in = ul_operand(table, r, 1);
    const uint8_t *x = ul_operand(table, r, 4);
    const uint32_t count = (uint32_t)r->in_h * r->in_w * r->in_c;
    const int bits = r->flags & UL_FLAG_BITS, narrow = ul_narrow_out(r);
    const int32_t least = r->act_min;
    int16_t *wide = in->mantissa;
    int8_t *bytes = (int8_t *)wide;
    if (in != out) {
        const int8_t *from = (const int8_t *)out;
        int8_t *to = (int8_t *)in;
        for (uint32_t i = UL_GRADIENT_HEADER + (narrow ? count : 2 * count); i; i--) {
            *to++ = *from++;
        }
    }
    for (uint32_t i = 0; i < count;) {
        const uint32_t some = count - i < 8 ? count - i : 8;
        uint32_t stopped = 0; // of eight, which do not pass
        if (bits) {
            stopped = ~(uint32_t)*x++ & 0xFF;
        } else {
            for (uint32_t k = 0; k < some; k++) {
                stopped |= (int8_t)*x++ == least ? (uint32_t)1 << k : 0;
            }
        }
        i += some;
        for (uint32_t k = 0; stopped && k < some; k++, stopped >>= 1) {
            if (!(stopped & 1)) {
                continue;
            }
            if (narrow) {
                bytes[k] = 0;
            } else {
                wide[k] = 0;
            }
        }
        bytes += some;
        wide += some;
    }
}
