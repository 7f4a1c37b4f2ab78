// Convolution: the inputs under the kernel are gathered for one or two positions at a time, then every channel's
// weights walk over them.
#include "ul_kernel.h"

typedef struct {
    uint8_t *to;
    uint32_t taps; // already there
    uint32_t step; // bytes from one group of four to the next
#if defined(UL_ASM_V6M)
    int32_t first, second; // of the group in hand
#endif
} sink;

static inline void put(sink *s, int32_t x) {
#if defined(UL_ASM_V6M)
    // Pairs of a group: (x0, x2) in the first word, (x1, x3) in the one `step / 2` bytes on.
    const uint32_t phase = s->taps++ & 3;
    if (phase == 0) {
        s->first = x;
    } else if (phase == 1) {
        s->second = x;
    } else if (phase == 2) {
        *(uint32_t *)(void *)s->to = (uint32_t)x + ((uint32_t)s->first << 16);
    } else {
        *(uint32_t *)(void *)(s->to + (s->step >> 1)) = (uint32_t)x + ((uint32_t)s->second << 16);
        s->to += s->step;
    }
#else
    *(int16_t *)(void *)s->to = (int16_t)x;
    s->to += 2;
    s->taps++;
#endif
}

static void put_many(sink *s, int32_t x, uint32_t count) {
    for (; count; count--) {
        put(s, x);
    }
}

static void put_run(sink *s, const int8_t *x, uint32_t count) {
#if defined(UL_ASM_V6M)
    for (; count && (s->taps & 3); count--) {
        put(s, *x++);
    }
    uint8_t *to = s->to;
    const uint32_t step = s->step, half = step >> 1;
    s->taps += count & ~(uint32_t)3;
    for (; count >= 4; count -= 4, x += 4, to += step) {
        *(uint32_t *)(void *)to = (uint32_t)x[2] + ((uint32_t)x[0] << 16);
        *(uint32_t *)(void *)(to + half) = (uint32_t)x[3] + ((uint32_t)x[1] << 16);
    }
    s->to = to;
#endif
    for (; count; count--) {
        put(s, *x++);
    }
}

// A stretch of `length` taps, of which [from, to) are wanted: x, or where it is NULL the zero point.
static void stretch(sink *s, const int8_t *x, int32_t zero, int32_t length, int32_t *from, int32_t *to) {
    const int32_t begin = *from > 0 ? *from : 0, end = *to < length ? *to : length;
    if (begin < end) {
        if (x) {
            put_run(s, x + begin, (uint32_t)(end - begin));
        } else {
            put_many(s, zero, (uint32_t)(end - begin));
        }
    }
    *from -= length;
    *to -= length;
}

// All taps of a kernel that lies inside the image.
static void gather_inside(sink *s, const ul_record *r, const int8_t *x, uint32_t run) {
    const uint32_t line = (uint32_t)r->in_w * r->in_c;
    for (uint32_t ki = 0; ki < r->kernel_h; ki++, x += line) {
        put_run(s, x, run);
    }
}

// Taps [from, to) under the kernel whose upper left corner lies at row i, column j, which may lie outside.
static void gather(sink *s, const ul_record *r, const int8_t *x, int32_t i, int32_t j, int32_t from, int32_t to) {
    const int32_t channels = r->in_c, width = r->in_w, kernel = r->kernel_w;
    const int32_t left = ul_clamp(-j, 0, kernel), right = ul_clamp(j + kernel - width, 0, kernel - left);
    const int32_t inside = kernel - left - right;
    for (int32_t ki = 0; ki < r->kernel_h && to > 0; ki++, i++) {
        if (from >= kernel * channels) {
            from -= kernel * channels;
            to -= kernel * channels;
        } else if (i < 0 || i >= r->in_h) {
            stretch(s, NULL, r->zero_in, kernel * channels, &from, &to);
        } else {
            stretch(s, NULL, r->zero_in, left * channels, &from, &to);
            stretch(s, x + (i * width + j + left) * channels, 0, inside * channels, &from, &to);
            stretch(s, NULL, r->zero_in, right * channels, &from, &to);
        }
    }
}

typedef struct {
    int32_t i, j, column;
} place;

static void next(const ul_record *r, place *p) {
    p->j += r->stride_w;
    if (++p->column == r->out_w) {
        p->column = 0;
        p->j = -(int32_t)r->pad_left;
        p->i += r->stride_h;
    }
}

void ul_conv(const ul_buffer *table, const ul_record *r) {
    const int8_t *const x = ul_operand(table, r, 0);
    int8_t *y = ul_operand(table, r, 1);
    const uint8_t *const weights = ul_operand(table, r, 2);
    const int32_t *const bias = ul_operand(table, r, 3);
    const int32_t *const multiplier = ul_operand(table, r, 4);
    const int8_t *const shift = ul_operand(table, r, 5);
    const uint32_t channels = r->out_c, taps = (uint32_t)r->kernel_h * r->kernel_w * r->in_c, row = (taps + 3) & ~3u;
    const uint32_t chunk = r->extra & 0xFFFF, block = r->extra >> 16;
    const uint32_t count = (uint32_t)r->out_h * r->out_w, pixel = r->scale_mant ? r->scale_mant : channels;
    const int fast = ul_is_fast(r, bias, multiplier, shift, row);
    ul_patch patch;
    patch.positions = count == 1 ? 1 : 2;
    patch.full_range = r->flags & UL_FLAG_FULL_RANGE;
    patch.inputs = table[UL_BUF_SCRATCH].data;
    patch.sums = (int32_t *)(void *)(patch.inputs + 2 * chunk * patch.positions);
    ul_codes codes;
    codes.sums = patch.sums;
    codes.step = ul_scale_step(r);
    codes.y_step = 1;
    codes.lower = 4 * (codes.step ? channels : 1);
    codes.zero = r->zero_out;
    codes.low = r->act_min - r->zero_out;
    codes.high = r->act_max - r->zero_out;
    place here = {-(int32_t)r->pad_top, -(int32_t)r->pad_left, 0};
    for (uint32_t left = count; left;) {
        place second = here;
        if (left > 1) {
            next(r, &second);
        }
        for (uint32_t from = 0; from < row; from += chunk) {
            const uint32_t to = from + chunk < taps ? from + chunk : taps;
            patch.taps = (to - from + 3) & ~3u;
            for (uint32_t p = 0; p < patch.positions; p++) {
                const place *const at = p ? &second : &here;
                sink s;
                s.taps = 0;
#if defined(UL_ASM_V6M)
                s.first = s.second = 0;
                s.to = patch.inputs + 4 * p;
                s.step = 8 * patch.positions;
#else
                s.to = patch.inputs + 2 * p * patch.taps;
#endif
                if (from == 0 && to == taps && at->i >= 0 && at->j >= 0 && at->i + r->kernel_h <= r->in_h &&
                    at->j + r->kernel_w <= r->in_w) {
                    const int32_t corner = (at->i * (int32_t)r->in_w + at->j) * (int32_t)r->in_c;
                    gather_inside(&s, r, x + corner, (uint32_t)r->kernel_w * r->in_c);
                } else {
                    gather(&s, r, x, at->i, at->j, (int32_t)from, (int32_t)to);
                }
                put_many(&s, 0, patch.taps - (to - from));
            }
            for (uint32_t n = 0; n < channels; n += block) {
                const uint32_t some = channels - n < block ? channels - n : block;
                if (from == 0) {
                    int32_t *sums = patch.sums;
                    for (uint32_t c = n; c < n + some; c++) {
                        *sums++ = bias[c];
                        if (patch.positions == 2) {
                            *sums++ = bias[c];
                        }
                    }
                }
                ul_dots(&patch, weights + n * row + from, row, some);
                if (from + chunk >= row) {
                    codes.multiplier = multiplier + n * codes.step;
                    codes.shift = shift + n * codes.step;
                    codes.y = y + n;
                    codes.count = some;
                    // Alone at the end: the second position is the first once more.
                    codes.y_other = left > 1 ? (int32_t)pixel : 0;
                    ul_to_codes(r, &codes, patch.positions, fast);
                }
            }
        }
        here = second;
        next(r, &here);
        y += left > 1 ? 2 * pixel : pixel;
        left -= left > 1 ? 2 : 1;
    }
}
