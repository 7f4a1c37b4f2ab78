// The inner loops of convolutions: in C here and in ul_sums.c, on ARMv6-M in ul_armv6m.S with the C beside as their
// definition. Both take the same arguments and leave the same sums and codes; only how inputs lie in SCRATCH differs.
#ifndef UL_KERNEL_H
#define UL_KERNEL_H

#include "ul_records.h"

// UL_NO_ASM lets a test run the C on the same chip.
#if defined(__ARM_ARCH_6M__) && !defined(UL_NO_ASM)
#define UL_ASM_V6M
#endif

// The inputs of one or two positions, widened to 16 bits. C: x[k] of the first position, then of the second.
// Assembler: for each four inputs of each position x2 + x0 * 2^16 and x3 + x1 * 2^16, mod 2^32, the positions'
// words side by side, so that one multiplication by w0 + w2 * 2^16 makes two products and adds them in its upper half.
typedef struct {
    uint8_t *inputs;
    int32_t *sums; // [channel][position]
    uint32_t positions, taps; // taps: of the chunk in hand, a multiple of 4
    int full_range;           // a weight may be -128
} ul_patch;

// What turns sums into codes: sums[i * positions + p] becomes y[i * y_step + p * y_other], the first position's last, so
// that with y_other = 0 the second one's is dropped.
typedef struct {
    int32_t *sums;
    const int32_t *multiplier;
    const int8_t *shift;
    int8_t *y;
    uint32_t count, step; // step: of multiplier and shift from one i to the next, 1 or 0
    int32_t y_step, y_other;
    int32_t low, high, zero; // low and high without the zero point
    uint32_t lower;          // bytes from a multiplier to its lower part (AWAY)
} ul_codes;

// sums[n * positions + p] += the products of inputs with `taps` weights (bytes, + 128) of `count` rows.
void ul_dots(const ul_patch *patch, const uint8_t *weights, uint32_t row_bytes, uint32_t count);
void ul_to_codes(const ul_record *r, const ul_codes *codes, uint32_t positions, int fast);
// Whether every sum of a layer lies where the assembler's shorter multiplication is exact.
int ul_is_fast(const ul_record *r, const int32_t *bias, const int32_t *multiplier, const int8_t *shift, uint32_t taps);

#if defined(UL_ASM_V6M)
void ul_dots1_v6m(const void *inputs, const uint8_t *weights, int32_t *sums, const uint32_t sizes[3]);
void ul_dots2_v6m(const void *inputs, const uint8_t *weights, int32_t *sums, const uint32_t sizes[3]);
void ul_codes1_single_v6m(const ul_codes *codes);
void ul_codes1_double_v6m(const ul_codes *codes);
void ul_codes1_away_v6m(const ul_codes *codes);
void ul_codes2_single_v6m(const ul_codes *codes);
void ul_codes2_double_v6m(const ul_codes *codes);
// A shorter way from sums of one channel to codes: a = sum >> before, q = a * upper, floor((q + offset) / 2^after) is the
// rounded sum unless adding `window` to q changes it; then the long way decides. See quick_for in ul_depthwise.c.
typedef struct {
    int32_t before, upper, offset, window, after;
} ul_quick;

void ul_codes2_quick_v6m(const ul_codes *codes, const ul_quick *quick);
void ul_two_rows_v6m(int32_t *to, const int8_t *upper, const int8_t *lower, const uint32_t sizes[5]);
void ul_plane3x3_v6m(const int32_t *plane, const int32_t *weights, int32_t *sums, const uint32_t sizes[6]);
void ul_plane3x3_light_v6m(const int32_t *plane, const int32_t *weights, int32_t *sums, const uint32_t sizes[6]);
#endif

#endif
