// Every rounding and scaling rule of the format, once. Plain 32-bit integer arithmetic: an ARMv6-M has no long
// multiply, no divide and no count-leading-zeros, and a native module has no libgcc to call.
#ifndef UL_MATH_H
#define UL_MATH_H

#include "ul_core.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "plans are little-endian and read in place"
#endif

// Where a 64-bit product and a shift of it need no library call. UL_NO_LONG_MULTIPLY lets a test take the other way.
#if (UINTPTR_MAX > 0xFFFFFFFF || __ARM_ARCH >= 7) && !defined(UL_NO_LONG_MULTIPLY)
#define UL_HAVE_LONG_MULTIPLY
#endif

// Shifting a negative number right is arithmetic with every compiler this builds with; say so once.
typedef char ul_arithmetic_shift_right[(-3 >> 1) == -2 ? 1 : -1];

static inline uint32_t ul_abs(int32_t v) {
    return v < 0 ? 0u - (uint32_t)v : (uint32_t)v;
}

static inline int32_t ul_clamp(int32_t v, int32_t low, int32_t high) {
    return v < low ? low : v > high ? high : v;
}

static inline int32_t ul_bitlen(uint32_t v) {
    int32_t n = 0;
    for (int32_t s = 16; s; s >>= 1) {
        if (v >> s) {
            v >>= s;
            n += s;
        }
    }
    return n + (int32_t)v;
}

// p / 2^s, rounded half up and cut to +-2^30: rshift in ul_format.h for numbers of 32 bits.
static inline int32_t ul_rshift(int32_t p, int32_t s) {
    if (s > 0) {
        return s > 31 ? 0 : (p >> s) + ((p >> (s - 1)) & 1);
    }
    const int32_t top = (int32_t)1 << 30;
    if (s < -30) {
        return p == 0 ? 0 : p < 0 ? -top : top;
    }
    if (ul_abs(p) > (uint32_t)top >> -s) {
        return p < 0 ? -top : top;
    }
    return p * ((int32_t)1 << -s);
}

// A product of two 11-bit mantissas, brought back to 11 bits; adds what it shifted to *exponent.
static inline uint32_t ul_mul11(uint32_t a, uint32_t b, int32_t *exponent) {
    uint32_t p = a * b;
    if (p == 0) {
        return 0;
    }
    const int32_t s = p >= (uint32_t)1 << 21 ? 11 : 10;
    p = (p + ((uint32_t)1 << (s - 1))) >> s;
    *exponent += s;
    if (p == 2048) {
        p = 1024;
        *exponent += 1;
    }
    return p;
}

// The 64-bit product of two int32 as two halves, from 16-bit pieces.
static inline void ul_product(int32_t a, int32_t b, int32_t *high, uint32_t *low) {
    const uint32_t al = (uint32_t)a & 0xFFFF, bl = (uint32_t)b & 0xFFFF;
    const int32_t ah = a >> 16, bh = b >> 16;
    const uint32_t ll = al * bl;
    const int32_t lh = (int32_t)(ll >> 16); // below 2^16
    // ah * bl lies within +-2^31, so the sum with 16 more bits needs care: split it before adding.
    const int32_t p = ah * (int32_t)bl, q = (int32_t)al * bh;
    const int32_t middle = (p & 0xFFFF) + (q & 0xFFFF) + lh;
    *low = ((uint32_t)middle << 16) | (ll & 0xFFFF);
    *high = ah * bh + (p >> 16) + (q >> 16) + (middle >> 16);
}

// (high:low + 2^(s-1)) >> s, saturated to 32 bits; s in 1..62.
static inline int32_t ul_narrow(int32_t high, uint32_t low, int32_t s) {
    if (s > 32) {
        return (high >> (s - 32)) + ((high >> (s - 33)) & 1);
    }
    const uint32_t half = (low >> (s - 1)) & 1;
    if (s == 32) {
        return high == INT32_MAX && half ? INT32_MAX : high + (int32_t)half;
    }
    // The result is (high:low >> s) + half; it fits when the bits above its sign bit all equal it.
    const int32_t sign = high >> (s - 1);
    if (sign != 0 && sign != -1) {
        return high < 0 ? INT32_MIN : INT32_MAX;
    }
    const int32_t v = (int32_t)(((uint32_t)high << (32 - s)) | (low >> s));
    return v == INT32_MAX && half ? INT32_MAX : v + (int32_t)half;
}

// rshift in ul_format.h of the product a * b, and the same rounded by chance: r is the draw (UPDATE_WEIGHT in ul_format.h).
int32_t ul_rshift_product(int32_t a, int32_t b, int32_t s);
int32_t ul_draw_product(int32_t a, int32_t b, int32_t s, uint32_t r);
// a / b, cut off, for b > 0: an ARMv6-M has no division.
uint32_t ul_quotient(uint32_t a, uint32_t b);

// floor((acc * multiplier + more + 2^(30 - shift)) / 2^(31 - shift)), saturated to 32 bits.
static inline int32_t ul_round_sum(int32_t acc, int32_t multiplier, uint32_t more, int32_t shift) {
    const int32_t s = 31 - ul_clamp(shift, -31, 30); // 1..62
#if defined(UL_HAVE_LONG_MULTIPLY)
    const int64_t v = ((int64_t)acc * multiplier + more + ((int64_t)1 << (s - 1))) >> s;
    return v > INT32_MAX ? INT32_MAX : v < INT32_MIN ? INT32_MIN : (int32_t)v;
#else
    int32_t high;
    uint32_t low;
    ul_product(acc, multiplier, &high, &low);
    low += more;
    return ul_narrow(high + (low < more), low, s);
#endif
}

// UL_ROUND_SINGLE.
static inline int32_t ul_round_single(int32_t acc, int32_t multiplier, int32_t shift) {
    return ul_round_sum(acc, multiplier, 0, shift);
}

// UL_ROUND_AWAY.
static inline int32_t ul_round_away(int32_t acc, int32_t upper, int32_t lower, int32_t shift) {
    const uint32_t size = ul_abs(acc) > INT32_MAX ? INT32_MAX : ul_abs(acc);
    const uint32_t fine = (uint32_t)lower & 0xFFFF;
    const uint32_t more = (size >> 16) * fine + (((size & 0xFFFF) * fine) >> 16);
    const int32_t v = ul_round_sum((int32_t)size, upper, more, shift);
    return acc < 0 ? -ul_clamp(v, -INT32_MAX, INT32_MAX) : v;
}

// h / 2^right, halves away from zero; right in 0..31.
static inline int32_t ul_divide_by_power(int32_t h, int32_t right) {
    const uint32_t mask = ((uint32_t)1 << right) - 1;
    const uint32_t rest = (uint32_t)h & mask;
    return (h >> right) + (rest > (mask >> 1) + (h < 0));
}

// UL_ROUND_DOUBLE.
static inline int32_t ul_round_double(int32_t acc, int32_t multiplier, int32_t shift) {
    shift = ul_clamp(shift, -31, 30);
    const int32_t a = shift > 0 ? (int32_t)((uint32_t)acc << shift) : acc;
    int32_t h;
#if defined(UL_HAVE_LONG_MULTIPLY)
    const int64_t v = ((int64_t)a * multiplier + ((int64_t)1 << 30)) >> 31;
    h = v > INT32_MAX ? INT32_MAX : (int32_t)v;
#else
    uint32_t low;
    ul_product(a, multiplier, &h, &low);
    const uint32_t sum = low + ((uint32_t)1 << 30);
    h += sum < low;
    h = h >= (int32_t)1 << 30 ? INT32_MAX : (int32_t)((uint32_t)h << 1 | sum >> 31);
#endif
    return shift < 0 ? ul_divide_by_power(h, -shift) : h;
}

// Either of the roundings with a multiplier of 32 bits.
static inline int32_t ul_round(int32_t acc, int32_t multiplier, int32_t shift, int32_t rounding) {
    return rounding == UL_ROUND_DOUBLE ? ul_round_double(acc, multiplier, shift)
                                       : ul_round_single(acc, multiplier, shift);
}

// floor(n * 2^bits / d) and what is left over, for n <= d < 2^31: one bit a turn.
static inline uint32_t ul_fraction(uint32_t n, uint32_t d, int32_t bits, uint32_t *rest) {
    uint32_t q = n >= d;
    n -= q ? d : 0;
    while (bits-- > 0) {
        n <<= 1;
        q <<= 1;
        if (n >= d) {
            n -= d;
            q |= 1;
        }
    }
    *rest = n;
    return q;
}

// 1024 * log2(v) for v >= 1, floor: the integer part is the bit length, each squaring yields one bit more.
static inline int32_t ul_log2q10(uint32_t v) {
    const int32_t n = ul_bitlen(v) - 1;
    uint32_t x = n > 15 ? v >> (n - 15) : v << (15 - n);
    int32_t result = n;
    for (int32_t i = 0; i < 10; i++) {
        x = (x * x) >> 15;
        result <<= 1;
        if (x >> 16) {
            x >>= 1;
            result |= 1;
        }
    }
    return result;
}

// floor((a * b + 2^30) / 2^31), saturated: a product of numbers that stand for a / 2^31.
static inline int32_t ul_high_product(int32_t a, int32_t b) {
    return ul_round_double(a, b, 0);
}

// lowbias32 (Wellons 2018): a number's bits as if by chance.
static inline uint32_t ul_mix(uint32_t v) {
    v ^= v >> 16;
    v *= 0x7FEB352D;
    v ^= v >> 15;
    v *= 0x846CA68B;
    return v ^ v >> 16;
}

static inline uint32_t ul_xorshift32(uint32_t x) {
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return x;
}

#endif
