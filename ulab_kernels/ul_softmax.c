// Softmax in fixed point, as gemmlowp's: exponentials from the host's table, the reciprocal by Newton's iteration.
#include "ul_records.h"

static int32_t saturated_quadruple(int32_t v) {
    const int32_t limit = (int32_t)1 << 29;
    return v >= limit ? INT32_MAX : v < -limit ? INT32_MIN : v * 4;
}

// 2^(31 - zeros) / sum, * 2^31: the sum has `zeros` leading zeros.
static int32_t reciprocal(uint32_t sum, int32_t zeros) {
    const int32_t half = (int32_t)((sum << zeros) >> 1);
    int32_t r = 1515870810 + ul_high_product(half, -1010580540);
    for (int i = 0; i < 3; i++) {
        r += saturated_quadruple(ul_high_product(r, ((int32_t)1 << 29) - ul_high_product(half, r)));
    }
    return r >= (int32_t)1 << 30 ? INT32_MAX : r * 2;
}

static void row(const int8_t *x, int8_t *y, uint32_t classes, const int32_t *table, uint32_t known) {
    int32_t top = -128;
    for (uint32_t c = 0; c < classes; c++) {
        top = x[c] > top ? x[c] : top;
    }
    uint32_t sum = 0;
    for (uint32_t c = 0; c < classes; c++) {
        const uint32_t below = (uint32_t)(top - x[c]);
        sum += below < known ? (uint32_t)ul_divide_by_power(table[below], 12) : 0;
    }
    const int32_t zeros = 32 - ul_bitlen(sum), shift = 35 - zeros;
    const int32_t inverse = sum ? reciprocal(sum, zeros) : 0;
    for (uint32_t c = 0; c < classes; c++) {
        const uint32_t below = (uint32_t)(top - x[c]);
        int32_t code = -128;
        if (below < known && shift <= 31) {
            code = ul_divide_by_power(ul_high_product(inverse, table[below]), shift);
            code = ul_clamp(code, 0, 255) - 128;
        }
        y[c] = (int8_t)code;
    }
}

void ul_softmax(const ul_buffer *table, const ul_record *r) {
    const int8_t *x = ul_operand(table, r, 0);
    int8_t *y = ul_operand(table, r, 1);
    const int32_t *const exponentials = ul_operand(table, r, 2);
    const uint32_t rows = (uint32_t)r->in_h * r->in_w;
    for (uint32_t i = 0; i < rows; i++, x += r->in_c, y += r->in_c) {
        row(x, y, r->in_c, exponentials, r->extra);
    }
}
