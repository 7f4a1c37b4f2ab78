// The gradient at a convolution's input: the weights of the forward pass, walked the other way.
#include "ul_four.h"
#include "ul_gradient.h"

static void all_zero(const ul_buffer *table, ul_writer *in, const ul_record *r) {
    for (uint32_t i = (uint32_t)r->in_h * r->in_w * r->in_c; i; i--) {
        ul_put_mantissa(in, i - 1, 0);
    }
    ul_end_gradient(table, in, 0);
}

typedef struct {
    const ul_gradient *out;
    const uint16_t *scale;
    const uint8_t *frozen;
    const uint8_t *trained;
    int32_t *quads, *sums; // [N][4], [in_c][4]
} layer;

typedef struct {
    int32_t i, j;
} cell;

// The output position that reads input coordinate `at` (padding added) by this tap, or -1.
static int32_t source(int32_t at, int32_t stride, int32_t out) {
    if (at < 0) {
        return -1;
    }
    const int32_t o = (int32_t)ul_quotient((uint32_t)at, (uint32_t)stride);
    return o < out && o * stride == at ? o : -1;
}

// g of four cells by one tap; 0 where there is none of any.
static int gather_scaled(const layer *l, const ul_record *r, const cell cells[4], uint32_t count, int32_t ki, int32_t kj) {
    const uint32_t channels = r->out_c;
    const int narrow = ul_narrow_out(r);
    int any = 0;
    for (uint32_t q = 0; q < 4; q++) {
        int32_t oi = -1, oj = -1;
        if (q < count) {
            oi = source(cells[q].i + r->pad_top - ki, r->stride_h, r->out_h);
            oj = source(cells[q].j + r->pad_left - kj, r->stride_w, r->out_w);
        }
        int32_t *to = l->quads + q;
        if (oi < 0 || oj < 0) {
            for (uint32_t n = 0; n < channels; n++, to += 4) {
                *to = 0;
            }
            continue;
        }
        any = 1;
        const ul_span span = ul_one_run(((uint32_t)oi * r->out_w + (uint32_t)oj) * channels, 1, channels, 4);
        ul_read_scaled_run(to, l->out, &span, narrow, l->scale, 1);
    }
    return any;
}

// Adds one tap's products to the sums of all input channels.
static void add_tap(const layer *l, const ul_record *r, uint32_t tap) {
    const uint32_t frozen = r->out_c - r->extra, channels = r->in_c;
    const uint32_t count = (uint32_t)r->kernel_h * r->kernel_w * channels, row = (count + 3) & ~3u;
    const uint32_t size = r->w_dtype == UL_DTYPE_INT16 ? 2 : 1;
    int32_t part[4]; // the bytes are weights + 128
    part[0] = part[1] = part[2] = part[3] = 0;
    for (const int32_t *q = l->quads; q < l->quads + 4 * frozen; q += 4) {
        part[0] -= q[0] * 128;
        part[1] -= q[1] * 128;
        part[2] -= q[2] * 128;
        part[3] -= q[3] * 128;
    }
    const ul_walk bytes = ul_walk_of(UL_DTYPE_UINT8, 0, (int32_t)row, l->quads, frozen);
    const ul_walk trained =
        ul_walk_of(r->w_dtype, r->fraction, (int32_t)(size * count), l->quads + 4 * frozen, r->extra);
    const uint8_t *in_frozen = frozen ? l->frozen + tap * channels : NULL;
    const uint8_t *in_trained = r->extra ? l->trained + size * tap * channels : NULL;
    for (int32_t *sums = l->sums; sums < l->sums + 4 * channels; sums += 4) {
        if (frozen) {
            sums[0] += part[0];
            sums[1] += part[1];
            sums[2] += part[2];
            sums[3] += part[3];
            ul_four(sums, in_frozen++, &bytes);
        }
        if (r->extra) {
            ul_four(sums, in_trained, &trained);
            in_trained += size;
        }
    }
}

static void sum_cells(const layer *l, const ul_record *r, const cell cells[4], uint32_t count) {
    for (uint32_t i = 0; i < 4u * r->in_c; i++) {
        l->sums[i] = 0;
    }
    uint32_t tap = 0;
    for (int32_t ki = 0; ki < r->kernel_h; ki++) {
        for (int32_t kj = 0; kj < r->kernel_w; kj++, tap++) {
            if (gather_scaled(l, r, cells, count, ki, kj)) {
                add_tap(l, r, tap);
            }
        }
    }
}

// Over all cells: the largest sum where `in` is NULL, else the mantissas.
static uint32_t walk_cells(const layer *l, const ul_record *r, ul_writer *in, int32_t shift) {
    const uint32_t total = (uint32_t)r->in_h * r->in_w;
    uint32_t top = 0;
    cell next = {0, 0};
    for (uint32_t first = 0; first < total; first += 4) {
        const uint32_t count = total - first < 4 ? total - first : 4;
        cell cells[4];
        for (uint32_t q = 0; q < 4; q++) {
            cells[q] = next;
            if (++next.j == r->in_w) {
                next.j = 0;
                next.i++;
            }
        }
        sum_cells(l, r, cells, count);
        for (uint32_t q = 0; q < count; q++) {
            const ul_span span = ul_one_run((first + q) * r->in_c, 1, r->in_c, 4);
            if (in) {
                ul_put_run(in, &span, l->sums + q, shift);
            } else {
                top = ul_largest_of(l->sums + q, 4, r->in_c, top);
            }
        }
    }
    return top;
}

void ul_conv_back(const ul_buffer *table, const ul_record *r) {
    int32_t *const quads = (int32_t *)(void *)table[UL_BUF_SCRATCH].data;
    const layer l = {
        ul_operand(table, r, 0),
        ul_operand(table, r, 3),
        r->extra < r->out_c ? ul_operand(table, r, 2) : NULL,
        r->extra ? ul_operand(table, r, 5) : NULL,
        quads,
        quads + 4 * r->out_c,
    };
    ul_writer in = ul_write_gradient(table, r);
    const int32_t exponent = l.out->exponent;
    const uint32_t largest =
        ul_largest_scaled(l.out, l.scale, (uint32_t)r->out_h * r->out_w, r->out_c, ul_narrow_out(r));
    if (largest == 0) {
        all_zero(table, &in, r);
        return;
    }
    ul_gain gain = ul_gain_of(table, r, largest);
    if (ul_is_learning(&gain)) {
        ul_learn_gain(&gain, walk_cells(&l, r, NULL, 0));
    }
    const int32_t shift = ul_gain_shift(&gain, &in);
    walk_cells(&l, r, &in, shift);
    ul_end_gradient(table, &in, exponent + r->scale_exp + shift);
}

static int32_t depthwise_weight(const layer *l, const ul_record *r, uint32_t i) {
    if (r->extra == 0) {
        return ((const int8_t *)l->frozen)[i];
    }
    return r->w_dtype == UL_DTYPE_INT16
        ? ul_wq(((const int16_t *)(const void *)l->trained)[i], ul_half(r->fraction), r->fraction)
        : ((const int8_t *)l->trained)[i];
}

// One channel's gradients and the sums at its inputs, both with a margin, so that every tap is one walk over them.
typedef struct {
    int32_t *sums, *g;
    uint32_t height, width, pitch; // of the sums, with their margin; from one row of g to the next
    int is_dense;                  // both strides are 1
} plane;

static plane plane_of(const ul_record *r, void *scratch) {
    plane p;
    p.height = (uint32_t)(r->out_h - 1) * r->stride_h + r->kernel_h;
    p.width = (uint32_t)(r->out_w - 1) * r->stride_w + r->kernel_w;
    p.is_dense = r->stride_h == 1 && r->stride_w == 1;
    p.pitch = p.is_dense ? p.width : r->out_w;
    p.sums = scratch;
    p.g = p.sums + p.height * p.width;
    for (uint32_t i = 0; i < (r->out_h - 1u) * p.pitch + r->out_w; i++) {
        p.g[i] = 0; // the margin stays 0
    }
    return p;
}

// The sums of one input channel's whole plane.
static void sum_plane(const layer *l, const ul_record *r, const plane *p, uint32_t c, uint32_t multiplier) {
    const uint32_t count = (uint32_t)r->kernel_h * r->kernel_w, length = (r->out_h - 1u) * p->pitch + r->out_w;
    for (uint32_t i = 0; i < p->height * p->width; i++) {
        p->sums[i] = 0;
    }
    for (uint32_t n = c * multiplier; n < (c + 1) * multiplier; n++) {
        const ul_span span = {n, r->out_c, r->out_w, r->out_h, r->out_w * r->out_c, 1, p->pitch};
        ul_read_scaled_run(p->g, l->out, &span, ul_narrow_out(r), l->scale + n, 0);
        uint32_t tap = n * count;
        for (uint32_t ki = 0; ki < r->kernel_h; ki++) {
            for (uint32_t kj = 0; kj < r->kernel_w; kj++, tap++) {
                const int32_t w = depthwise_weight(l, r, tap);
                int32_t *to = p->sums + ki * p->width + kj;
                if (p->is_dense) {
                    ul_add_products(to, p->g, w, length);
                    continue;
                }
                for (uint32_t i = 0; i < r->out_h; i++, to += r->stride_h * p->width) {
                    const int32_t *from = p->g + i * p->pitch;
                    for (uint32_t j = 0, at = 0; j < r->out_w; j++, at += r->stride_w) {
                        to[at] += from[j] * w;
                    }
                }
            }
        }
    }
}

void ul_depthwise_back(const ul_buffer *table, const ul_record *r) {
    const plane p = plane_of(r, table[UL_BUF_SCRATCH].data);
    const uint32_t channels = r->in_c, multiplier = ul_quotient(r->out_c, channels);
    const layer l = {
        ul_operand(table, r, 0),
        ul_operand(table, r, 3),
        r->extra ? NULL : ul_operand(table, r, 2),
        r->extra ? ul_operand(table, r, 5) : NULL,
        NULL,
        NULL,
    };
    ul_writer in = ul_write_gradient(table, r);
    const int32_t exponent = l.out->exponent;
    const uint32_t largest =
        ul_largest_scaled(l.out, l.scale, (uint32_t)r->out_h * r->out_w, r->out_c, ul_narrow_out(r));
    if (largest == 0) {
        all_zero(table, &in, r);
        return;
    }
    // Of the sums, what lies inside the image; what no window reaches is 0.
    const uint32_t below = p.height - r->pad_top, right = p.width - r->pad_left;
    const uint32_t rows = below < r->in_h ? below : r->in_h, columns = right < r->in_w ? right : r->in_w;
    ul_gain gain = ul_gain_of(table, r, largest);
    if (ul_is_learning(&gain)) {
        uint32_t top = 0;
        for (uint32_t c = 0; c < channels; c++) {
            sum_plane(&l, r, &p, c, multiplier);
            for (uint32_t i = 0; i < rows; i++) {
                top = ul_largest_of(p.sums + (i + r->pad_top) * p.width + r->pad_left, 1, columns, top);
            }
        }
        ul_learn_gain(&gain, top);
    }
    const int32_t shift = ul_gain_shift(&gain, &in);
    for (uint32_t c = 0; c < channels; c++) {
        sum_plane(&l, r, &p, c, multiplier);
        const int32_t zero = 0;
        const uint32_t line = r->in_w * channels;
        const ul_span inside = {c, channels, columns, rows, line, 1, p.width};
        const ul_span right_of = {c + columns * channels, channels, r->in_w - columns, rows, line, 0, 0};
        const ul_span under = {c + rows * line, channels, r->in_w, r->in_h - rows, line, 0, 0};
        ul_put_run(&in, &inside, p.sums + r->pad_top * p.width + r->pad_left, shift);
        ul_put_run(&in, &right_of, &zero, 0);
        ul_put_run(&in, &under, &zero, 0);
    }
    ul_end_gradient(table, &in, exponent + r->scale_exp + shift);
}
