#include "ul_kernel.h"

static uint32_t elements(const ul_record *r) {
    return (uint32_t)r->in_h * r->in_w * r->in_c;
}

// ul_round_double(d * 2^20, multiplier, shift) for |d| <= 255, a multiplier of 31 bits and no left shift, in 32 bits.
static inline int32_t scaled_difference(int32_t d, int32_t upper, int32_t lower, int32_t right) {
    const int32_t h = d * upper * 32 + ((d * lower + 1024) >> 11);
    return right ? ul_divide_by_power(h, right) : h;
}

// sums[i] += (x[i] - zero) * 2^20, scaled; x repeats from `at` on. Returns where it stands afterwards.
static uint32_t add_scaled(int32_t *sums, uint32_t count, const int8_t *x, uint32_t at, uint32_t length, int32_t zero,
    const int32_t *scale) {
    const int32_t multiplier = scale[0], shift = scale[1], upper = multiplier >> 16, lower = multiplier & 0xFFFF;
    if (multiplier < 0 || shift > 0 || shift < -31) {
        for (; count; count--, sums++) {
            const int32_t value = ul_round_double((x[at] - zero) * ((int32_t)1 << 20), multiplier, shift);
            *sums = (int32_t)((uint32_t)*sums + (uint32_t)value);
            at = at + 1 == length ? 0 : at + 1;
        }
        return at;
    }
    const int32_t right = -shift;
    while (count) {
        const uint32_t some = length - at < count ? length - at : count;
        const int8_t *p = x + at, *const end = p + some;
        while (p < end) {
            const int32_t value = scaled_difference(*p++ - zero, upper, lower, right);
            *sums = (int32_t)((uint32_t)*sums + (uint32_t)value);
            sums++;
        }
        count -= some;
        at = at + some == length ? 0 : at + some;
    }
    return at;
}

void ul_add(const ul_buffer *table, const ul_record *r) {
    const int8_t *const a = ul_operand(table, r, 0);
    const int8_t *const b = ul_operand(table, r, 2);
    const int32_t *const p = ul_operand(table, r, 3);
    const uint32_t count = elements(r);
    int32_t *const sums = (int32_t *)(void *)table[UL_BUF_SCRATCH].data;
    const int8_t shift = (int8_t)ul_clamp(p[6], -31, 30);
    // Two numbers of 9 bits, * 2^20 * less than 1, stay below 2^29 together.
    const int fast = p[1] >= 0 && p[2] <= 0 && p[3] >= 0 && p[4] <= 0 && p[5] >= 0 && shift < 0 && shift > -31;
    ul_codes codes;
    codes.sums = sums;
    codes.multiplier = p + 5;
    codes.shift = &shift;
    codes.y = ul_operand(table, r, 1);
    codes.step = 0;
    codes.y_step = 1;
    codes.y_other = 0;
    codes.low = r->act_min - r->zero_out;
    codes.high = r->act_max - r->zero_out;
    codes.zero = r->zero_out;
    codes.lower = 0;
    // A zero point is an int8 in any plan of ours; whatever else a plan says must not overflow.
    const int32_t zero_b = ul_clamp(p[0], -128, 127);
    for (uint32_t i = 0, j = 0; i < count; i += codes.count, codes.y += codes.count) {
        codes.count = count - i < UL_ADD_BLOCK ? count - i : UL_ADD_BLOCK;
        for (uint32_t k = 0; k < codes.count; k++) {
            sums[k] = 0;
        }
        add_scaled(sums, codes.count, a, i, count, r->zero_in, p + 1);
        j = add_scaled(sums, codes.count, b, j, r->extra, zero_b, p + 3);
        ul_to_codes(r, &codes, 1, fast);
    }
}

void ul_mul(const ul_buffer *table, const ul_record *r) {
    const int8_t *const a = ul_operand(table, r, 0);
    int8_t *const y = ul_operand(table, r, 1);
    const int8_t *const b = ul_operand(table, r, 2);
    const int32_t *const p = ul_operand(table, r, 3);
    const uint32_t count = elements(r);
    const int32_t zero_b = ul_clamp(p[0], -128, 127);
    for (uint32_t i = 0, j = 0; i < count; i++) {
        y[i] = ul_code(r, ul_round((a[i] - r->zero_in) * (b[j] - zero_b), p[1], p[2], r->rounding));
        j = j + 1 == r->extra ? 0 : j + 1;
    }
}
