#include "ul_records.h"

// sum / count, halves away from zero, for quotients within 8 bits: an ARMv6-M has no division.
static int32_t mean_of(int32_t sum, uint32_t count) {
    uint32_t rest = ul_abs(sum) + count / 2, quotient = 0;
    for (int32_t bit = 7; bit >= 0; bit--) {
        if (rest >= count << bit) {
            rest -= count << bit;
            quotient |= (uint32_t)1 << bit;
        }
    }
    return sum < 0 ? -(int32_t)quotient : (int32_t)quotient;
}

typedef struct {
    int32_t from, to;
} span;

// Where a kernel that begins at `start` lies inside an image of `size`.
static span inside(int32_t start, int32_t kernel, int32_t size) {
    const span s = {start > 0 ? start : 0, start + kernel < size ? start + kernel : size};
    return s;
}

void ul_pool(const ul_buffer *table, const ul_record *r) {
    const int8_t *const x = ul_operand(table, r, 0);
    int8_t *y = ul_operand(table, r, 1);
    const int32_t channels = r->in_c, width = r->in_w;
    int32_t i = -(int32_t)r->pad_top;
    for (uint32_t oi = 0; oi < r->out_h; oi++, i += r->stride_h) {
        const span rows = inside(i, r->kernel_h, r->in_h);
        int32_t j = -(int32_t)r->pad_left;
        for (uint32_t oj = 0; oj < r->out_w; oj++, j += r->stride_w) {
            const span columns = inside(j, r->kernel_w, width);
            const uint32_t count = (uint32_t)((rows.to - rows.from) * (columns.to - columns.from));
            for (int32_t c = 0; c < channels; c++) {
                int32_t sum = 0, most = -128;
                for (int32_t row = rows.from; row < rows.to; row++) {
                    const int8_t *cell = x + (row * width + columns.from) * channels + c;
                    for (int32_t column = columns.from; column < columns.to; column++, cell += channels) {
                        sum += *cell;
                        most = *cell > most ? *cell : most;
                    }
                }
                const int32_t value = r->op == UL_OP_MAX_POOL ? most : mean_of(sum, count);
                *y++ = (int8_t)ul_clamp(value, r->act_min, r->act_max);
            }
        }
    }
}
