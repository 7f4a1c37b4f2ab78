#include "ul_kernel.h"

#if !defined(UL_ASM_V6M)
// Where there are no vectors a loop's own instructions weigh as much as its products: four at a time.
#if defined(__SSE2__) || defined(__AVX2__) || defined(__ARM_NEON)
#define UL_AT_A_TIME 1
#else
#define UL_AT_A_TIME 4
#endif

static inline int32_t weight(uint8_t byte) {
    return (int32_t)byte - 128;
}

static int32_t dot(const int16_t *x, const uint8_t *w, uint32_t taps) {
    int32_t sum = 0;
    for (const uint8_t *const end = w + taps; w < end; w += UL_AT_A_TIME, x += UL_AT_A_TIME) {
        sum += x[0] * weight(w[0]);
#if UL_AT_A_TIME == 4
        sum += x[1] * weight(w[1]);
        sum += x[2] * weight(w[2]);
        sum += x[3] * weight(w[3]);
#endif
    }
    return sum;
}

// Two positions, each weight read once.
static void dot_pair(const int16_t *x, const int16_t *z, const uint8_t *w, uint32_t taps, int32_t *sums) {
    int32_t a = 0, b = 0;
    for (const uint8_t *const end = w + taps; w < end; w += UL_AT_A_TIME, x += UL_AT_A_TIME, z += UL_AT_A_TIME) {
        const int32_t w0 = weight(w[0]);
        a += x[0] * w0;
        b += z[0] * w0;
#if UL_AT_A_TIME == 4
        const int32_t w1 = weight(w[1]), w2 = weight(w[2]), w3 = weight(w[3]);
        a += x[1] * w1;
        b += z[1] * w1;
        a += x[2] * w2;
        b += z[2] * w2;
        a += x[3] * w3;
        b += z[3] * w3;
#endif
    }
    sums[0] = (int32_t)((uint32_t)sums[0] + (uint32_t)a);
    sums[1] = (int32_t)((uint32_t)sums[1] + (uint32_t)b);
}
#endif

#if defined(UL_ASM_V6M)
// Products of -128 with -128, of which two do not fit into the 16 bits that the assembler has for them.
static void dots_full_range(const ul_patch *patch, const uint8_t *weights, uint32_t row_bytes, uint32_t count) {
    const uint32_t positions = patch->positions;
    int32_t *sums = patch->sums;
    for (uint32_t n = 0; n < count; n++, weights += row_bytes) {
        for (uint32_t p = 0; p < positions; p++, sums++) {
            const int32_t *pairs = (const int32_t *)(const void *)patch->inputs + p;
            uint32_t sum = (uint32_t)*sums;
            for (uint32_t k = 0; k < patch->taps; k += 4) {
                for (uint32_t odd = 0; odd < 2; odd++, pairs += positions) {
                    const int32_t lower = (int16_t)*pairs, upper = (int32_t)((uint32_t)*pairs - (uint32_t)lower) >> 16;
                    const int32_t first = (int32_t)weights[k + odd] - 128, third = (int32_t)weights[k + odd + 2] - 128;
                    sum += (uint32_t)(upper * first + lower * third);
                }
            }
            *sums = (int32_t)sum;
        }
    }
}
#endif

void ul_dots(const ul_patch *patch, const uint8_t *weights, uint32_t row_bytes, uint32_t count) {
    const void *const inputs = patch->inputs;
#if defined(UL_ASM_V6M)
    if (patch->full_range) {
        dots_full_range(patch, weights, row_bytes, count);
        return;
    }
    const uint32_t sizes[3] = {patch->taps, row_bytes, count};
    if (patch->positions == 2) {
        ul_dots2_v6m(inputs, weights, patch->sums, sizes);
    } else {
        ul_dots1_v6m(inputs, weights, patch->sums, sizes);
    }
#else
    const int16_t *const x = inputs;
    int32_t *sums = patch->sums;
    for (uint32_t n = 0; n < count; n++, weights += row_bytes, sums += patch->positions) {
        if (patch->positions == 2) {
            dot_pair(x, x + patch->taps, weights, patch->taps, sums);
        } else {
            *sums = (int32_t)((uint32_t)*sums + (uint32_t)dot(x, weights, patch->taps));
        }
    }
#endif
}

static void to_codes(const ul_record *r, const ul_codes *c, uint32_t positions) {
    const int32_t *sums = c->sums;
    int8_t *y = c->y;
    for (uint32_t i = 0; i < c->count; i++, y += c->y_step, sums += positions) {
        const uint32_t n = i * c->step;
        if (positions == 2) {
            y[c->y_other] = ul_channel_code_inline(r, sums[1], c->multiplier, c->shift, n);
        }
        y[0] = ul_channel_code_inline(r, sums[0], c->multiplier, c->shift, n);
    }
}

void ul_to_codes(const ul_record *r, const ul_codes *codes, uint32_t positions, int fast) {
#if defined(UL_ASM_V6M)
    if (fast) {
        const int twice = r->rounding == UL_ROUND_DOUBLE, away = r->rounding == UL_ROUND_AWAY;
        if (positions == 1) {
            (twice ? ul_codes1_double_v6m : away ? ul_codes1_away_v6m : ul_codes1_single_v6m)(codes);
            return;
        }
        if (!away) {
            (twice ? ul_codes2_double_v6m : ul_codes2_single_v6m)(codes);
            return;
        }
    }
#endif
    (void)fast;
    to_codes(r, codes, positions);
}

int ul_is_fast(const ul_record *r, const int32_t *bias, const int32_t *multiplier, const int8_t *shift, uint32_t taps) {
    const uint32_t limit = (uint32_t)1 << 28;
    uint32_t large = 0, negative = 0, far = 0;
    for (uint32_t n = 0; n < r->out_c; n++) {
        large |= (uint32_t)bias[n] + limit;
    }
    for (uint32_t n = ul_scale_step(r) ? r->out_c : 1; n; n--) {
        negative |= (uint32_t)*multiplier++;
        far |= (uint32_t)(*shift++ + 31) > 30; // beyond -31..-1
    }
    // A bias beyond +-2^28 has left a bit above the 29th.
    return taps < (uint32_t)1 << 14 && !(r->flags & UL_FLAG_FULL_RANGE) && !(large >> 29) && !(negative >> 31) && !far;
}
