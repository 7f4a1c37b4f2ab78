// The inner loop of everything that is trained: four sums at once over one walk through memory.
#ifndef UL_FOUR_H
#define UL_FOUR_H

#include "ul_records.h"

// How the numbers of a walk lie in memory: UL_DTYPE_INT8, INT16 (used as wq) or UINT8 (as they are, not less 128).
// quads, end: the numbers they meet, four for each. shift is what the assembler brings an int16 down by.
typedef struct {
    const int32_t *end;
    int32_t step; // bytes
    int32_t shift;
    const int32_t *quads;
    int32_t dtype, fraction;
} ul_walk;

ul_walk ul_walk_of(int32_t dtype, int32_t fraction, int32_t step, const int32_t *quads, uint32_t count);
// sums[j] += sum over i of at[i] * quads[4 * i + j]. On ARMv6-M in ul_four_armv6m.S, with the C as its definition.
void ul_four(int32_t sums[4], const void *at, const ul_walk *walk);

// to[i] += from[i] * w.
void ul_add_products(int32_t *to, const int32_t *from, int32_t w, uint32_t count);

#if defined(__ARM_ARCH_6M__) && !defined(UL_NO_ASM)
#define UL_FOUR_V6M
void ul_four_int8_v6m(int32_t sums[4], const int32_t *quads, const void *at, const ul_walk *walk);
void ul_four_uint8_v6m(int32_t sums[4], const int32_t *quads, const void *at, const ul_walk *walk);
void ul_four_int16_v6m(int32_t sums[4], const int32_t *quads, const void *at, const ul_walk *walk);
// pairs: of numbers, at least one.
void ul_add_products_v6m(int32_t *to, const int32_t *from, int32_t w, uint32_t pairs);
#endif

#endif
