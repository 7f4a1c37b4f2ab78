// Gradients on their way through what has no weights: pooling, scaling, cutting out, adding up, masking.
#include "ul_gradient.h"

static uint32_t cells_inside(int32_t start, int32_t kernel, int32_t size) {
    const int32_t from = start > 0 ? start : 0, to = start + kernel < size ? start + kernel : size;
    return (uint32_t)(to - from);
}

// The windows along one dimension that hold coordinate `at` (padding added): [from, to).
static ul_reach windows_of(int32_t at, int32_t kernel, int32_t stride, int32_t out) {
    ul_reach reach = {0, (int32_t)ul_quotient((uint32_t)at, (uint32_t)stride) + 1};
    if (at >= kernel) {
        reach.from = (int32_t)ul_quotient((uint32_t)(at - kernel), (uint32_t)stride) + 1;
    }
    reach.to = reach.to < out ? reach.to : out;
    return reach;
}

// Whether the first largest input of a window, row by row, is the cell at i, j.
static int is_first_largest(const int8_t *x, const ul_record *r, int32_t oi, int32_t oj, int32_t i, int32_t j) {
    const int32_t top = oi * r->stride_h - r->pad_top, left = oj * r->stride_w - r->pad_left, channels = r->in_c;
    const int8_t here = x[(i * r->in_w + j) * channels];
    for (int32_t a = top > 0 ? top : 0; a < top + r->kernel_h && a < r->in_h; a++) {
        for (int32_t b = left > 0 ? left : 0; b < left + r->kernel_w && b < r->in_w; b++) {
            const int8_t other = x[(a * r->in_w + b) * channels];
            if (other > here || (other == here && (a < i || (a == i && b < j)))) {
                return 0;
            }
        }
    }
    return 1;
}

static int is_alike(ul_reach a, ul_reach b) {
    return a.from == b.from && a.to == b.to;
}

// The mantissas before `at` once more.
static void repeat(const ul_writer *w, uint32_t at, uint32_t count) {
    if (w->narrow) {
        int8_t *const m = (int8_t *)w->to->mantissa + at;
        for (uint32_t i = 0; i < count; i++) {
            m[i] = m[(int32_t)i - (int32_t)count];
        }
        return;
    }
    int16_t *const m = w->to->mantissa + at;
    for (uint32_t i = 0; i < count; i++) {
        m[i] = m[(int32_t)i - (int32_t)count];
    }
}

void ul_pool_back(const ul_buffer *table, const ul_record *r) {
    const ul_gradient *const out = ul_operand(table, r, 0);
    const int8_t *const x = r->op == UL_OP_MAX_BACK ? ul_operand(table, r, 4) : NULL;
    const int32_t channels = r->in_c;
    ul_writer in = ul_write_gradient(table, r);
    uint32_t at = 0, known = 0, before = 0;
    ul_reach rows_before = {0, 0}, columns_before = {0, 0};
    int32_t reciprocal = 0;
    for (int32_t i = 0; i < r->in_h; i++) {
        const ul_reach rows = windows_of(i + r->pad_top, r->kernel_h, r->stride_h, r->out_h);
        for (int32_t j = 0; j < r->in_w; j++) {
            const ul_reach columns = windows_of(j + r->pad_left, r->kernel_w, r->stride_w, r->out_w);
            // Under the same windows as the cell before: the same means.
            if (!x && at && is_alike(rows, rows_before) && is_alike(columns, columns_before)) {
                in.saturated += before;
                repeat(&in, at, (uint32_t)channels);
                at += (uint32_t)channels;
                continue;
            }
            rows_before = rows;
            columns_before = columns;
            before = in.saturated;
            for (int32_t c = 0; c < channels; c++, at++) {
                int32_t sum = 0;
                for (int32_t oi = rows.from; oi < rows.to; oi++) {
                    for (int32_t oj = columns.from; oj < columns.to; oj++) {
                        const int32_t m =
                            ul_mantissa(out, (uint32_t)((oi * r->out_w + oj) * channels + c), ul_narrow_out(r));
                        if (x) {
                            sum += is_first_largest(x + c, r, oi, oj, i, j) ? m : 0;
                            continue;
                        }
                        const uint32_t count = cells_inside(oi * r->stride_h - r->pad_top, r->kernel_h, r->in_h) *
                            cells_inside(oj * r->stride_w - r->pad_left, r->kernel_w, r->in_w);
                        if (count != known) {
                            known = count;
                            reciprocal = (int32_t)ul_quotient(((uint32_t)1 << r->extra) + count / 2, count);
                        }
                        sum += m * reciprocal;
                    }
                }
                ul_put_mantissa(&in, at, ul_rshift(sum, r->scale_mant));
            }
            before = in.saturated - before;
        }
    }
    ul_end_gradient(table, &in, out->exponent - (int32_t)r->extra + r->scale_mant);
}

void ul_scale_back(const ul_buffer *table, const ul_record *r) {
    const ul_gradient *const out = ul_operand(table, r, 0);
    const int16_t *const factors = ul_operand(table, r, 2);
    const uint32_t count = (uint32_t)r->in_h * r->in_w * r->in_c;
    const int32_t exponent = out->exponent;
    ul_writer in = ul_write_gradient(table, r);
    uint32_t k = 0;
    for (uint32_t i = 0; i < count; i++) {
        ul_put_mantissa(&in, i, ul_rshift(ul_mantissa(out, i, ul_narrow_out(r)) * factors[k], 11));
        k = k + 1 == r->extra ? 0 : k + 1;
    }
    ul_end_gradient(table, &in, exponent + r->scale_exp + 11);
}

void ul_crop(const ul_buffer *table, const ul_record *r) {
    const ul_gradient *const out = ul_operand(table, r, 0);
    ul_writer in = ul_write_gradient(table, r);
    uint32_t at = 0;
    for (uint32_t i = 0; i < r->in_h; i++) {
        for (uint32_t j = 0; j < r->in_w; j++) {
            const uint32_t from = ((i + r->pad_top) * r->out_w + j + r->pad_left) * r->out_c + r->extra;
            for (uint32_t c = 0; c < r->in_c; c++, at++) {
                ul_put_mantissa(&in, at, ul_mantissa(out, from + c, ul_narrow_out(r)));
            }
        }
    }
    ul_end_gradient(table, &in, out->exponent);
}

void ul_sum(const ul_buffer *table, const ul_record *r) {
    const ul_gradient *const a = ul_operand(table, r, 0), *const b = ul_operand(table, r, 4);
    const uint32_t count = (uint32_t)r->in_h * r->in_w * r->in_c, max_a = a->max, max_b = b->max;
    const int narrow = ul_narrow_out(r);
    ul_writer in = ul_write_gradient(table, r);
    int32_t exponent = max_a ? a->exponent : b->exponent, down_a = 0, down_b = 0;
    if (max_a && max_b) {
        const int32_t of_a = a->exponent + ul_bitlen(max_a), of_b = b->exponent + ul_bitlen(max_b);
        exponent = (of_a > of_b ? of_a : of_b) + 1 - ul_gradient_bits(narrow);
        down_a = ul_clamp(exponent - a->exponent, -15, 62);
        down_b = ul_clamp(exponent - b->exponent, -15, 62);
    }
    for (uint32_t i = 0; i < count; i++) {
        const int32_t from_a = max_a ? ul_rshift(ul_mantissa(a, i, narrow), down_a) : 0;
        ul_put_mantissa(&in, i, from_a + (max_b ? ul_rshift(ul_mantissa(b, i, narrow), down_b) : 0));
    }
    ul_end_gradient(table, &in, exponent);
}
