// What training alone needs of ul_math.h; code on a board is heap, so it is here once.
#include "ul_math.h"

uint32_t ul_quotient(uint32_t a, uint32_t b) {
    if (b == 1) {
        return a;
    }
    uint32_t quotient = 0, bit = 1;
    while (b <= a >> 1) {
        b <<= 1;
        bit <<= 1;
    }
    for (; bit; bit >>= 1, b >>= 1) {
        if (a >= b) {
            a -= b;
            quotient |= bit;
        }
    }
    return quotient;
}

int32_t ul_rshift_product(int32_t a, int32_t b, int32_t s) {
    const int32_t top = (int32_t)1 << 30;
    int32_t high;
    uint32_t low;
    ul_product(a, b, &high, &low);
    if (high == (int32_t)low >> 31) {
        return ul_rshift((int32_t)low, s);
    }
    if (s <= 0) {
        return high < 0 ? -top : top;
    }
    return s > 62 ? 0 : ul_clamp(ul_narrow(high, low, s), -top, top);
}

// high:low >> s, s >= 0.
static void shift_right(int32_t *high, uint32_t *low, int32_t s) {
    if (s >= 32) {
        *low = (uint32_t)(*high >> (s - 32 > 31 ? 31 : s - 32));
        *high >>= 31;
    } else if (s) {
        *low = *low >> s | (uint32_t)*high << (32 - s);
        *high >>= s;
    }
}

int32_t ul_draw_product(int32_t a, int32_t b, int32_t s, uint32_t r) {
    if (s <= 0) {
        return ul_rshift_product(a, b, s);
    }
    const int32_t top = (int32_t)1 << 30;
    int32_t high;
    uint32_t low;
    ul_product(a, b, &high, &low);
    if (s > 30) {
        shift_right(&high, &low, s - 30 > 62 ? 62 : s - 30);
        s = 30;
    }
    r >>= 32 - s;
    low += r;
    high += low < r;
    shift_right(&high, &low, s);
    return high == (int32_t)low >> 31 ? ul_clamp((int32_t)low, -top, top) : high < 0 ? -top : top;
}
