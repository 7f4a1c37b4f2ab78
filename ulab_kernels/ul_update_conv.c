// Weights of convolutions move against their gradients.
#include "ul_four.h"
#include "ul_update.h"

// Four channels' mantissas side by side for the rows [from, to) of the output; says which of them are not all 0.
static uint32_t gather_inputs(int32_t *quads, const ul_gradient *out, const ul_record *r, uint32_t channel, uint32_t some,
    uint32_t from, uint32_t to) {
    const uint32_t channels = r->extra & 0xFFFF, count = (to - from) * r->out_w;
    uint32_t used = 0;
    for (uint32_t j = 0; j < 4; j++) {
        const ul_span span = ul_one_run(from * r->out_w * channels + channel + j, channels, count, 4);
        if (j < some) {
            ul_read_run(quads + j, out, &span, ul_narrow_out(r));
        }
        for (uint32_t p = j; p < 4 * count; p += 4) {
            quads[p] = j < some ? quads[p] : 0;
            used |= quads[p] ? 1u << j : 0;
        }
    }
    return used;
}

// Where one tap of the kernel meets the image within a band: rows of the output, columns, and where its inputs lie.
typedef struct {
    ul_reach rows, columns;
    uint32_t runs, length; // runs of `length` positions; one run where the rows follow each other without a gap
    int32_t x, x_step, line; // of the first input, bytes from one position to the next, from one run to the next
} taps;

static taps taps_of(const ul_record *r, int32_t ki, int32_t kj, int32_t from, int32_t to) {
    taps t;
    const int32_t i = ki - r->pad_top, j = kj - r->pad_left, channels = r->in_c;
    t.rows = ul_reach_of(i, r->stride_h, r->in_h, r->out_h);
    t.columns = ul_reach_of(j, r->stride_w, r->in_w, r->out_w);
    t.rows.from = t.rows.from > from ? t.rows.from : from;
    t.rows.to = t.rows.to < to ? t.rows.to : to;
    t.runs = t.length = 0;
    if (t.rows.from < t.rows.to && t.columns.from < t.columns.to) {
        t.runs = (uint32_t)(t.rows.to - t.rows.from);
        t.length = (uint32_t)(t.columns.to - t.columns.from);
    }
    t.x_step = r->stride_w * channels;
    // Where two runs fit into an image this fits, too; else nobody walks it.
    t.line = (int32_t)((uint32_t)r->stride_h * r->in_w * r->in_c);
    t.x = t.runs ? ((i + t.rows.from * r->stride_h) * r->in_w + j + t.columns.from * r->stride_w) * channels : 0;
    if (t.length == r->out_w && t.line == (int32_t)t.length * t.x_step) {
        t.length *= t.runs;
        t.runs = t.runs ? 1 : 0;
    }
    return t;
}

// The sum of the quads that a tap meets, times -zero: what the zero point takes off each of the four sums.
static void zero_part(int32_t part[4], const int32_t *quads, const taps *t, const ul_record *r, int32_t from) {
    part[0] = part[1] = part[2] = part[3] = 0;
    const int32_t *run = quads + 4 * ((t->rows.from - from) * r->out_w + t->columns.from);
    for (uint32_t i = 0; i < t->runs; i++, run += 4 * r->out_w) {
        for (uint32_t p = 0; p < 4 * t->length; p += 4) {
            part[0] -= run[p];
            part[1] -= run[p + 1];
            part[2] -= run[p + 2];
            part[3] -= run[p + 3];
        }
    }
    for (uint32_t j = 0; j < 4; j++) {
        part[j] *= r->zero_in;
    }
}

static void move_four(const ul_record *r, const ul_buffer *table, const ul_step *s, uint32_t used, uint32_t n, uint32_t k,
    const int32_t sums[4]) {
    void *const weights = ul_operand(table, r, 2);
    const uint32_t count = (uint32_t)r->kernel_h * r->kernel_w * r->in_c;
    for (uint32_t j = 0; j < 4; j++) {
        if (used >> j & 1) {
            ul_move_weight(r, ul_state_of(table), weights, (n + j) * count + k, sums[j], &s[j]);
        }
    }
}

void ul_update_conv(const ul_buffer *table, const ul_record *r) {
    const ul_gradient *const out = ul_operand(table, r, 0);
    const int8_t *const x = ul_operand(table, r, 1);
    const uint16_t *const entry = ul_operand(table, r, 3);
    ul_state *const state = ul_state_of(table);
    const uint32_t band = r->extra >> 16, first = (r->extra & 0xFFFF) - r->out_c;
    const uint32_t count = (uint32_t)r->kernel_h * r->kernel_w * r->in_c;
    const int whole = band >= r->out_h;
    int32_t *const quads = (int32_t *)(void *)table[UL_BUF_SCRATCH].data, *const kept = quads + 4 * band * r->out_w;
    ul_begin_update(r, state);
    for (uint32_t n = 0; n < r->out_c; n += 4) {
        const uint32_t some = r->out_c - n < 4 ? r->out_c - n : 4;
        ul_step scales[4];
        for (uint32_t j = 0; j < some; j++) {
            scales[j] = ul_channel_step(r, state, out->exponent, entry[n + j]);
        }
        for (uint32_t i = 0; i < 4 * count && !whole; i++) {
            kept[i] = 0;
        }
        uint32_t used = 0;
        for (uint32_t from = 0; from < r->out_h; from += band) {
            const uint32_t to = from + band < r->out_h ? from + band : r->out_h;
            used |= gather_inputs(quads, out, r, first + n, some, from, to);
            uint32_t k = 0;
            for (int32_t ki = 0; ki < r->kernel_h; ki++) {
                for (int32_t kj = 0; kj < r->kernel_w; kj++) {
                    const taps t = taps_of(r, ki, kj, (int32_t)from, (int32_t)to);
                    const int32_t *const start = quads + 4 * ((t.rows.from - (int32_t)from) * r->out_w + t.columns.from);
                    int32_t part[4];
                    zero_part(part, quads, &t, r, (int32_t)from);
                    for (uint32_t c = 0; c < r->in_c; c++, k++) {
                        int32_t here[4], *const sums = whole ? here : kept + 4 * k;
                        for (uint32_t j = 0; j < 4; j++) {
                            sums[j] = part[j] + (whole ? 0 : sums[j]);
                        }
                        const int8_t *cell = x + t.x + c;
                        const int32_t *run = start;
                        for (uint32_t i = 0; i < t.runs; i++, run += 4 * r->out_w, cell += t.line) {
                            const ul_walk walk = ul_walk_of(UL_DTYPE_INT8, 0, t.x_step, run, t.length);
                            ul_four(sums, cell, &walk);
                        }
                        if (whole) {
                            move_four(r, table, scales, used, n, k, sums);
                        }
                    }
                }
            }
        }
        for (uint32_t k = 0; k < count && !whole; k++) {
            move_four(r, table, scales, used, n, k, kept + 4 * k);
        }
    }
}

// Sum over the positions that a tap meets, of one channel.
static int32_t depthwise_sum(const ul_gradient *out, const int8_t *x, const ul_record *r, const taps *t, uint32_t n) {
    const uint32_t channels = r->out_c;
    const int32_t zero = r->zero_in, step = t->x_step;
    const int narrow = ul_narrow_out(r);
    int32_t sum = 0;
    uint32_t at = ((uint32_t)t->rows.from * r->out_w + (uint32_t)t->columns.from) * channels + n;
    x += t->x;
    for (uint32_t i = 0; i < t->runs; i++, at += r->out_w * channels, x += t->line) {
        const int8_t *cell = x;
        uint32_t m = at;
        for (uint32_t p = t->length; p; p--, cell += step, m += channels) {
            sum += ul_mantissa(out, m, narrow) * (*cell - zero);
        }
    }
    return sum;
}

static int is_beyond(const ul_record *r, const void *weights, uint32_t i) {
    return r->w_dtype == UL_DTYPE_INT16 ? ((const int16_t *)weights)[i] == -32768 : ((const int8_t *)weights)[i] == -128;
}

// Whether all mantissas of a channel are 0.
static int is_silent(const ul_gradient *out, const ul_record *r, uint32_t n) {
    const uint32_t end = (uint32_t)r->out_h * r->out_w * r->out_c;
    for (uint32_t i = n; i < end; i += r->out_c) {
        if (ul_mantissa(out, i, ul_narrow_out(r))) {
            return 0;
        }
    }
    return 1;
}

void ul_update_depthwise(const ul_buffer *table, const ul_record *r) {
    const ul_gradient *const out = ul_operand(table, r, 0);
    const int8_t *const x = ul_operand(table, r, 1);
    void *const weights = ul_operand(table, r, 2);
    const uint16_t *const entry = ul_operand(table, r, 3);
    ul_state *const state = ul_state_of(table);
    const uint32_t multiplier = ul_quotient(r->out_c, r->in_c), count = (uint32_t)r->kernel_h * r->kernel_w;
    ul_begin_update(r, state);
    uint32_t k = 0;
    for (int32_t ki = 0; ki < r->kernel_h; ki++) {
        for (int32_t kj = 0; kj < r->kernel_w; kj++, k++) {
            const taps t = taps_of(r, ki, kj, 0, r->out_h);
            uint32_t n = 0;
            for (uint32_t c = 0; c < r->in_c; c++) {
                for (uint32_t m = 0; m < multiplier; m++, n++) {
                    const int32_t sum = depthwise_sum(out, x + c, r, &t, n);
                    // A weight beyond its range is cut even by nothing, but where its channel is passed over.
                    if (sum || (is_beyond(r, weights, n * count + k) && !is_silent(out, r, n))) {
                        const ul_step s = ul_channel_step(r, state, out->exponent, entry[n]);
                        ul_move_weight(r, state, weights, n * count + k, sum, &s);
                    }
                }
            }
        }
    }
}
