#include "ul_records.h"

void ul_mean(const ul_buffer *table, const ul_record *r) {
    const int8_t *const x = ul_operand(table, r, 0);
    int8_t *const y = ul_operand(table, r, 1);
    const int32_t *const parameters = ul_operand(table, r, 2);
    const uint32_t channels = r->in_c, cells = (uint32_t)r->in_h * r->in_w;
    for (uint32_t c = 0; c < channels; c++) {
        int32_t sum = 0;
        const int8_t *cell = x + c;
        for (uint32_t k = 0; k < cells; k++, cell += channels) {
            sum += *cell - r->zero_in;
        }
        y[c] = ul_code(r, ul_round(sum, parameters[0], parameters[1], r->rounding));
    }
}
