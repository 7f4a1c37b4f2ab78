#include "ul_records.h"

void ul_copy(const ul_buffer *table, const ul_record *r) {
    const int8_t *x = ul_operand(table, r, 0);
    int8_t *y = (int8_t *)ul_operand(table, r, 1) + r->extra;
    const uint32_t length = (uint32_t)r->in_w * r->in_c, step = (uint32_t)r->out_w * r->out_c;
    for (uint32_t i = 0; i < r->in_h; i++, y += step) {
        for (uint32_t k = 0; k < length; k++) {
            y[k] = *x++;
        }
    }
}

void ul_table(const ul_buffer *table, const ul_record *r) {
    const int8_t *const x = ul_operand(table, r, 0);
    int8_t *const y = ul_operand(table, r, 1);
    const int8_t *const values = ul_operand(table, r, 2);
    const uint32_t count = (uint32_t)r->in_h * r->in_w * r->in_c;
    for (uint32_t i = 0; i < count; i++) {
        y[i] = values[x[i] + 128];
    }
}
