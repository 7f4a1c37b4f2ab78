// Depthwise convolution, band by band and channel by channel: a band of one channel's image is gathered with its border
// into SCRATCH.
#include "ul_kernel.h"

// The band of a channel: out rows [first, first + rows).
typedef struct {
    const int8_t *x; // the channel's first number
    uint32_t first, rows, width; // width: numbers in a row of the plane
} band;

static int is_row(const ul_record *r, int32_t i) {
    return i >= 0 && i < r->in_h;
}

static int16_t *fill_row(int16_t *to, int32_t value, int32_t count) {
    for (; count > 0; count--) {
        *to++ = (int16_t)value;
    }
    return to;
}

static void fill_plane(const ul_record *r, const band *b, int16_t *to) {
    const int32_t top = (int32_t)(b->first * r->stride_h) - r->pad_top, step = r->in_c, width = (int32_t)b->width;
    const int32_t rows = (int32_t)((b->rows - 1) * r->stride_h) + r->kernel_h;
    const int32_t inside = ul_clamp(width - r->pad_left, 0, r->in_w);
    for (int32_t i = top; i < top + rows; i++) {
        if (!is_row(r, i)) {
            to = fill_row(to, r->zero_in, width);
            continue;
        }
        const int8_t *x = b->x + i * (int32_t)r->in_w * step;
        to = fill_row(to, r->zero_in, r->pad_left < width ? r->pad_left : width);
        for (int16_t *const end = to + inside; to < end; x += step) {
            *to++ = *x;
        }
        to = fill_row(to, r->zero_in, width - r->pad_left - inside);
    }
}

// A row of outputs under one row of the kernel: sums[j] += the products of its taps.
static void add_row(const int16_t *x, const int8_t *w, int32_t *sums, const ul_record *r) {
    const uint32_t stride = r->stride_w, count = r->out_w;
#if !defined(UL_ASM_V6M) // which has its own for nearly all of these
    if (r->kernel_w == 3) {
        const int32_t w0 = w[0], w1 = w[1], w2 = w[2];
        for (uint32_t j = 0; j < count; j++, x += stride) {
            sums[j] += x[0] * w0 + x[1] * w1 + x[2] * w2;
        }
        return;
    }
#endif
    for (uint32_t j = 0; j < count; j++, x += stride) {
        int32_t sum = sums[j];
        for (uint32_t kj = 0; kj < r->kernel_w; kj++) {
            sum += x[kj] * w[kj];
        }
        sums[j] = sum;
    }
}

static void sums_of(const ul_record *r, const band *b, const int16_t *x, const int8_t *w, int32_t bias, int32_t *sums) {
    const uint32_t width = b->width, count = r->out_w;
    for (uint32_t i = 0; i < b->rows; i++, x += r->stride_h * width, sums += count) {
        for (uint32_t j = 0; j < count; j++) {
            sums[j] = 0;
        }
        for (uint32_t ki = 0; ki < r->kernel_h; ki++) {
            add_row(x + ki * width, w + ki * r->kernel_w, sums, r);
        }
        for (uint32_t j = 0; j < count; j++) {
            sums[j] = (int32_t)((uint32_t)sums[j] + (uint32_t)bias);
        }
    }
}

#if defined(UL_ASM_V6M)
// Two outputs a multiplication: a word of the plane holds a number of output rows [0, half) of the band and, * 2^16, its
// partner `down` input rows below. Where the band has an odd number of rows, the middle one is made twice.
typedef struct {
    uint32_t half;
    int32_t top, down, rows, inside; // rows: of the plane; inside: columns that lie inside the image
} halves;

static halves halves_of(const ul_record *r, const band *b) {
    halves h;
    h.half = (b->rows + 1) / 2;
    h.down = (int32_t)((b->rows - h.half) * r->stride_h);
    h.top = (int32_t)(b->first * r->stride_h) - r->pad_top;
    h.rows = (int32_t)((h.half - 1) * r->stride_h) + r->kernel_h;
    h.inside = ul_clamp((int32_t)b->width - r->pad_left, 0, r->in_w);
    return h;
}

// What no channel changes: the zero point all over.
static void fill(const ul_record *r, const band *b, const halves *h, int32_t *to) {
    const int32_t both = r->zero_in + (int32_t)((uint32_t)r->zero_in << 16);
    for (uint32_t left = (uint32_t)h->rows * b->width; left; left--) {
        *to++ = both;
    }
}

static void two_planes(const ul_record *r, const band *b, const halves *h, int32_t *to) {
    const int32_t line = (int32_t)r->in_w * r->in_c, step = r->in_c;
    int32_t i = h->top, left = h->rows;
    to += r->pad_left;
    while (left > 0) {
        const int is_upper = is_row(r, i), is_lower = is_row(r, i + h->down);
        if (is_upper && is_lower) {
            // As many rows as lie inside with both halves.
            const int32_t until = r->in_h - i - h->down, rows = left < until ? left : until;
            const uint32_t sizes[5] = {(uint32_t)h->inside, (uint32_t)rows, r->in_c, (uint32_t)(line - h->inside * step),
                4 * (b->width - (uint32_t)h->inside)};
            ul_two_rows_v6m(to, b->x + i * line, b->x + (i + h->down) * line, sizes);
            i += rows;
            left -= rows;
            to += rows * (int32_t)b->width;
            continue;
        }
        if (is_upper || is_lower) {
            const int8_t *x = b->x + (is_upper ? i : i + h->down) * line;
            const int32_t up = is_upper ? 0 : r->zero_in;
            const int32_t base = up + (int32_t)((uint32_t)(is_upper ? r->zero_in : 0) << 16), shift = is_upper ? 0 : 16;
            for (int32_t j = 0; j < h->inside; j++, x += step) {
                to[j] = base + (int32_t)((uint32_t)*x << shift);
            }
        }
        i++;
        left--;
        to += b->width;
    }
}

// Finds the shorter way for sums up to `most` in size (DOUBLE rounding); 0 where there is none.
//
// With e the right shift and m the multiplier, the exact value is u = sum * m / 2^(31 + e). Here q = a * upper with
// a = sum >> before and upper = m / 2^16 rounded, so that u is about q / 2^after, after = 15 + e - before. In units of q
// - dropping bits of the sum costs from 0 to 2^15,
// - rounding m costs up to |a| / 2; where |u| <= 257, and beyond it every code has saturated, |a| <= 257 * 2^(e + 1 - before);
// - gemmlowp's first rounding and its way with ties shift u by -3/2 to 1/2 of 2^(15 - before).
static int quick_for(const ul_codes *codes, uint32_t most, ul_quick *quick) {
    const int32_t e = -codes->shift[0], multiplier = codes->multiplier[0];
    if (multiplier < (int32_t)1 << 30 || multiplier >= 0x7FFF8000) {
        return 0; // the bounds below are for 31 bits, of which the upper half must not round up to 2^15
    }
    int32_t before = 0;
    while ((most >> before) >= 0xF000) {
        before++;
    }
    const int32_t after = 15 + e - before;
    if (after < 18 || after > 26 || before > 8) {
        return 0;
    }
    const int32_t slop = (257 << (e - before > 0 ? e - before : 0)) + 4, first = (int32_t)1 << (14 - before);
    quick->before = before;
    quick->upper = (multiplier + 0x8000) >> 16;
    quick->after = after;
    quick->offset = ((int32_t)1 << (after - 1)) - slop - 3 * first;
    quick->window = 2 * slop + 4 * first + ((int32_t)1 << 15);
    return 1;
}

// Sums and codes of a channel's band, 3x3.
static void band_of_two(const ul_record *r, const band *b, const int8_t *w, int32_t bias, ul_codes *codes, int32_t *room) {
    const halves h = halves_of(r, b);
    int32_t *const sums = codes->sums, *const wide = sums + r->extra * r->out_w;
    const uint32_t sizes[6] = {h.half, r->out_w, b->width, r->stride_h, r->stride_w, (uint32_t)bias};
    two_planes(r, b, &h, room);
    uint32_t most = 0, heaviest = 0;
    for (int k = 0; k < 9; k += 3) {
        wide[k] = w[k];
        wide[k + 1] = w[k + 1];
        wide[k + 2] = w[k + 2];
        const uint32_t row = ul_abs(wide[k]) + ul_abs(wide[k + 1]) + ul_abs(wide[k + 2]);
        most += row;
        heaviest = row > heaviest ? row : heaviest;
    }
    (heaviest < 256 ? ul_plane3x3_light_v6m : ul_plane3x3_v6m)(room, wide, sums, sizes);
    codes->count = h.half * r->out_w;
    codes->y_other = (int32_t)((b->rows - h.half) * r->out_w * r->out_c);
    ul_quick quick;
    if (quick_for(codes, (most << 7) + ul_abs(bias), &quick)) {
        ul_codes2_quick_v6m(codes, &quick);
    } else {
        ul_to_codes(r, codes, 2, 1);
    }
}
#endif

void ul_depthwise(const ul_buffer *table, const ul_record *r) {
    const int8_t *const x = ul_operand(table, r, 0);
    int8_t *const y = ul_operand(table, r, 1);
    const int8_t *const weights = ul_operand(table, r, 2);
    const int32_t *const bias = ul_operand(table, r, 3);
    const int32_t *const multiplier = ul_operand(table, r, 4);
    const int8_t *const shift = ul_operand(table, r, 5);
    const uint32_t taps = (uint32_t)r->kernel_h * r->kernel_w, step = ul_scale_step(r);
    const int fast = ul_is_fast(r, bias, multiplier, shift, taps);
    uint8_t *const scratch = table[UL_BUF_SCRATCH].data;
    const uint32_t reach = r->kernel_h > r->stride_h ? r->kernel_h : r->stride_h;
    band b;
    b.width = (uint32_t)(r->out_w - 1) * r->stride_w + r->kernel_w;
    ul_codes codes;
    codes.sums = (int32_t *)(void *)(scratch + 4 * ((r->extra / 2 - 1) * r->stride_h + reach) * b.width);
    codes.step = 0;
    codes.y_step = r->out_c;
    codes.zero = r->zero_out;
    codes.low = r->act_min - r->zero_out;
    codes.high = r->act_max - r->zero_out;
    codes.lower = 0;
    // Where it works in place there is one band, gathered before any of the channel is written.
    for (b.first = 0; b.first < r->out_h; b.first += r->extra) {
        b.rows = r->out_h - b.first < r->extra ? r->out_h - b.first : r->extra;
        codes.y = y + b.first * r->out_w * r->out_c;
        const int8_t *w = weights;
        uint32_t in = 0, repeat = 0; // the input channel, and how often it was used
#if defined(UL_ASM_V6M)
        const int by_two = fast && r->kernel_h == 3 && r->kernel_w == 3 && b.rows > 1;
        if (by_two) {
            const halves h = halves_of(r, &b);
            fill(r, &b, &h, (int32_t *)(void *)scratch);
        }
#endif
        for (uint32_t n = 0; n < r->out_c; n++, w += taps, codes.y++) {
            b.x = x + in;
            codes.multiplier = multiplier + n * step;
            codes.shift = shift + n * step;
#if defined(UL_ASM_V6M)
            if (by_two) {
                band_of_two(r, &b, w, bias[n], &codes, (int32_t *)(void *)scratch);
            } else
#endif
            {
                codes.count = b.rows * r->out_w;
                fill_plane(r, &b, (int16_t *)(void *)scratch);
                sums_of(r, &b, (const int16_t *)(const void *)scratch, w, bias[n], codes.sums);
                ul_to_codes(r, &codes, 1, fast);
            }
            if (++repeat * r->in_c == r->out_c) {
                repeat = 0;
                in++;
            }
        }
    }
}
