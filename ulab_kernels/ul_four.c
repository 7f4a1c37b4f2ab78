#include "ul_four.h"

ul_walk ul_walk_of(int32_t dtype, int32_t fraction, int32_t step, const int32_t *quads, uint32_t count) {
    const ul_walk walk = {quads + 4 * count, step, 15 + fraction, quads, dtype, fraction};
    return walk;
}

#if defined(UL_FOUR_V6M)
void ul_four(int32_t sums[4], const void *at, const ul_walk *walk) {
    if (walk->quads == walk->end) {
        return;
    }
    if (walk->dtype == UL_DTYPE_UINT8) {
        ul_four_uint8_v6m(sums, walk->quads, at, walk);
    } else if (walk->dtype == UL_DTYPE_INT16) {
        ul_four_int16_v6m(sums, walk->quads, at, walk);
    } else {
        ul_four_int8_v6m(sums, walk->quads, at, walk);
    }
}

void ul_add_products(int32_t *to, const int32_t *from, int32_t w, uint32_t count) {
    if (count > 1) {
        ul_add_products_v6m(to, from, w, count >> 1);
    }
    if (count & 1) {
        to[count - 1] += from[count - 1] * w;
    }
}
#else
void ul_add_products(int32_t *to, const int32_t *from, int32_t w, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        to[i] += from[i] * w;
    }
}

#define UL_WALK(type, expression)                                                                                     \
    for (const type *v = at; quads < end; v = (const type *)(const void *)((const uint8_t *)v + step), quads += 4) { \
        const int32_t value = (expression);                                                                          \
        a += value * quads[0];                                                                                       \
        b += value * quads[1];                                                                                       \
        c += value * quads[2];                                                                                       \
        d += value * quads[3];                                                                                       \
    }

void ul_four(int32_t sums[4], const void *at, const ul_walk *walk) {
    const int32_t *quads = walk->quads, *const end = walk->end;
    const int32_t step = walk->step;
    int32_t a = sums[0], b = sums[1], c = sums[2], d = sums[3];
    if (walk->dtype == UL_DTYPE_INT16) {
        const int32_t half = ul_half(walk->fraction), fraction = walk->fraction;
        UL_WALK(int16_t, ul_wq(*v, half, fraction))
    } else if (walk->dtype == UL_DTYPE_INT8) {
        UL_WALK(int8_t, *v)
    } else {
        UL_WALK(uint8_t, *v)
    }
    sums[0] = a;
    sums[1] = b;
    sums[2] = c;
    sums[3] = d;
}
#endif
