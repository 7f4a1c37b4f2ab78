#include "ul_records.h"

void ul_pad(const ul_buffer *table, const ul_record *r) {
    const int8_t *x = ul_operand(table, r, 0);
    int8_t *y = ul_operand(table, r, 1);
    for (int32_t i = -(int32_t)r->pad_top; i < r->out_h - r->pad_top; i++) {
        for (int32_t j = -(int32_t)r->pad_left; j < r->out_w - r->pad_left; j++) {
            const int32_t channel = -(int32_t)r->extra;
            const int inside = i >= 0 && i < r->in_h && j >= 0 && j < r->in_w;
            for (int32_t c = channel; c < r->out_c + channel; c++) {
                *y++ = inside && c >= 0 && c < r->in_c ? *x++ : r->zero_in;
            }
        }
    }
}
