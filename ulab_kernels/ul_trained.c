// The forward pass of convolutions whose weights are trained: canonical rows, four positions at a time.
#include "ul_four.h"

// The inputs [from, to) of one position's kernel, less the zero point; one of four columns.
static void gather_trained(int32_t *to_quads, const int8_t *x, const ul_record *r, int32_t i, int32_t j, uint32_t from, uint32_t to) {
    const uint32_t channels = r->in_c;
    const int32_t zero = r->zero_in;
    uint32_t k = 0;
    for (int32_t ki = 0; ki < r->kernel_h; ki++) {
        for (int32_t kj = 0; kj < r->kernel_w; kj++, k += channels) {
            if (k >= to || k + channels <= from) {
                continue;
            }
            const uint32_t first = k > from ? k : from, end = k + channels < to ? k + channels : to;
            const int inside = i + ki >= 0 && i + ki < r->in_h && j + kj >= 0 && j + kj < r->in_w;
            const int8_t *const cell = inside ? x + ((i + ki) * r->in_w + j + kj) * (int32_t)channels : x;
            for (uint32_t t = first; t < end; t++, to_quads += 4) {
                *to_quads = inside ? cell[t - k] - zero : 0;
            }
        }
    }
}

void ul_conv_trained(const ul_buffer *table, const ul_record *r) {
    const int8_t *const x = ul_operand(table, r, 0);
    int8_t *const y = ul_operand(table, r, 1);
    const uint8_t *const weights = ul_operand(table, r, 2);
    const int32_t *const bias = ul_operand(table, r, 3);
    const int32_t *const multiplier = ul_operand(table, r, 4);
    const int8_t *const shift = ul_operand(table, r, 5);
    const uint32_t count = (uint32_t)r->kernel_h * r->kernel_w * r->in_c, chunk = r->extra;
    const uint32_t size = r->w_dtype == UL_DTYPE_INT16 ? 2 : 1, total = (uint32_t)r->out_h * r->out_w;
    int32_t *const quads = (int32_t *)(void *)table[UL_BUF_SCRATCH].data, *const kept = quads + 4 * chunk;
    const int whole = chunk == count;
    const int32_t finer = ul_finer(r);
    int32_t i = -(int32_t)r->pad_top, j = -(int32_t)r->pad_left, column = 0;
    for (uint32_t first = 0; first < total; first += 4) {
        const uint32_t some = total - first < 4 ? total - first : 4;
        int32_t is[4], js[4]; // those behind the last position are gathered like any, and dropped
        for (uint32_t q = 0; q < 4; q++) {
            is[q] = i;
            js[q] = j;
            j += r->stride_w;
            if (++column == r->out_w) {
                column = 0;
                j = -(int32_t)r->pad_left;
                i += r->stride_h;
            }
        }
        for (uint32_t from = 0; from < count; from += chunk) {
            const uint32_t to = from + chunk < count ? from + chunk : count;
            for (uint32_t q = 0; q < 4; q++) {
                gather_trained(quads + q, x, r, is[q], js[q], from, to);
            }
            const ul_walk walk = ul_walk_of(r->w_dtype, ul_lost(r), (int32_t)size, quads, to - from);
            const uint8_t *row = weights + size * from;
            int8_t *out = y + (first * r->scale_mant) + r->scale_mant - r->out_c;
            for (uint32_t n = 0; n < r->out_c; n++, out++) {
                int32_t here[4], *const sums = whole ? here : kept + 4 * n;
                if (from == 0) {
                    sums[0] = sums[1] = sums[2] = sums[3] = 0;
                }
                ul_four(sums, row, &walk);
                row += size * count;
                for (uint32_t q = 0; q < some && to == count; q++) {
                    const int32_t acc = (int32_t)((uint32_t)ul_coarse(sums[q], finer) + (uint32_t)bias[n]);
                    out[q * r->scale_mant] = ul_channel_code(r, acc, multiplier, shift, n * ul_scale_step(r));
                }
            }
        }
    }
}

void ul_depthwise_trained(const ul_buffer *table, const ul_record *r) {
    const int8_t *const x = ul_operand(table, r, 0);
    int8_t *y = ul_operand(table, r, 1);
    const void *const weights = ul_operand(table, r, 2);
    const int32_t *const bias = ul_operand(table, r, 3);
    const int32_t *const multiplier = ul_operand(table, r, 4);
    const int8_t *const shift = ul_operand(table, r, 5);
    const uint32_t channels = r->in_c, repeat = ul_quotient(r->out_c, channels), count = (uint32_t)r->kernel_h * r->kernel_w;
    const int32_t finer = ul_finer(r), lost = ul_lost(r), half = ul_half(lost), zero = r->zero_in;
    for (int32_t oi = 0; oi < r->out_h; oi++) {
        for (int32_t oj = 0; oj < r->out_w; oj++) {
            const int32_t i = oi * r->stride_h - r->pad_top, j = oj * r->stride_w - r->pad_left;
            uint32_t n = 0;
            for (uint32_t c = 0; c < channels; c++) {
                for (uint32_t m = 0; m < repeat; m++, n++) {
                    int32_t sum = 0;
                    uint32_t k = n * count;
                    for (int32_t ki = 0; ki < r->kernel_h; ki++) {
                        for (int32_t kj = 0; kj < r->kernel_w; kj++, k++) {
                            if (i + ki < 0 || i + ki >= r->in_h || j + kj < 0 || j + kj >= r->in_w) {
                                continue;
                            }
                            const int32_t w = r->w_dtype == UL_DTYPE_INT16
                                ? ul_wq(((const int16_t *)weights)[k], half, lost)
                                : ((const int8_t *)weights)[k];
                            sum += (x[((i + ki) * r->in_w + j + kj) * (int32_t)channels + (int32_t)c] - zero) * w;
                        }
                    }
                    const int32_t acc = (int32_t)((uint32_t)ul_coarse(sum, finer) + (uint32_t)bias[n]);
                    *y++ = ul_channel_code(r, acc, multiplier, shift, n * ul_scale_step(r));
                }
            }
        }
    }
}
