// What the record functions share: resolving operands, the gradient tensor, STATE by name.
#ifndef UL_RECORDS_H
#define UL_RECORDS_H

#include "ul_math.h"

typedef struct {
    uint32_t rng, step;
    uint16_t lr_mant;
    int16_t lr_exp;
    uint32_t saturated, clipped, skipped;
    int32_t loss;
    uint16_t skip_below, flags;
    uint16_t n_gains, n_gates, n_active, gates;
    uint8_t zero[8];
} ul_state;

typedef struct {
    int16_t exponent;
    uint16_t max;
    int16_t mantissa[];
} ul_gradient;

static inline void *ul_operand(const ul_buffer *table, const ul_record *r, int index) {
    const uint32_t operand = r->operand[index];
    const ul_buffer *const buffer = &table[operand >> 28];
    return buffer->data + ((operand & 0x0FFFFFFF) - buffer->base);
}

static inline ul_state *ul_state_of(const ul_buffer *table) {
    return (ul_state *)(void *)table[UL_BUF_STATE].data;
}

// A trainable weight as the layer uses it.
static inline int32_t ul_wq(int16_t w, int32_t half, int32_t fraction) {
    return (w + half) >> fraction;
}

static inline int32_t ul_half(int32_t fraction) {
    return ((int32_t)1 << fraction) >> 1;
}

// Of a forward record: the fraction bits that its sums keep, those that its weights lose, and a sum without the former.
static inline int32_t ul_finer(const ul_record *r) {
    return r->fraction >> 4;
}

static inline int32_t ul_lost(const ul_record *r) {
    return (r->fraction & 15) - ul_finer(r);
}

static inline int32_t ul_coarse(int32_t sum, int32_t finer) {
    return (sum + ul_half(finer)) >> finer;
}

// A rounded sum as an output code: clamped before the zero point is added, so that the sum cannot overflow.
static inline int8_t ul_code(const ul_record *r, int32_t scaled) {
    return (int8_t)(ul_clamp(scaled, r->act_min - r->zero_out, r->act_max - r->zero_out) + r->zero_out);
}

// From one channel's multiplier and shift to the next one's.
static inline uint32_t ul_scale_step(const ul_record *r) {
    return r->flags & UL_FLAG_ONE_SCALE ? 0 : 1;
}

// The code of a channel's sum; n: its entry of multiplier and shift. Behind them lie the lower parts of finer ones.
static inline int8_t ul_channel_code_inline(const ul_record *r, int32_t acc, const int32_t *multiplier, const int8_t *shift,
    uint32_t n) {
    const int32_t scaled = r->rounding == UL_ROUND_AWAY
        ? ul_round_away(acc, multiplier[n], multiplier[(ul_scale_step(r) ? r->out_c : 1u) + n], shift[n])
        : ul_round(acc, multiplier[n], shift[n], r->rounding);
    return ul_code(r, scaled);
}

// The same, once: it is long.
int8_t ul_channel_code(const ul_record *r, int32_t acc, const int32_t *multiplier, const int8_t *shift, uint32_t n);

void ul_dense(const ul_buffer *table, const ul_record *r);
void ul_relu(const ul_buffer *table, const ul_record *r);
int32_t ul_softmax_ce(const ul_buffer *table, const ul_record *r);
void ul_mse(const ul_buffer *table, const ul_record *r);
void ul_dense_back(const ul_buffer *table, const ul_record *r);
void ul_update_weight(const ul_buffer *table, const ul_record *r);
void ul_update_bias(const ul_buffer *table, const ul_record *r);
void ul_conv(const ul_buffer *table, const ul_record *r);
void ul_depthwise(const ul_buffer *table, const ul_record *r);
void ul_pool(const ul_buffer *table, const ul_record *r);
void ul_mean(const ul_buffer *table, const ul_record *r);
void ul_add(const ul_buffer *table, const ul_record *r);
void ul_mul(const ul_buffer *table, const ul_record *r);
void ul_pad(const ul_buffer *table, const ul_record *r);
void ul_copy(const ul_buffer *table, const ul_record *r);
void ul_table(const ul_buffer *table, const ul_record *r);
void ul_softmax(const ul_buffer *table, const ul_record *r);
int32_t ul_hinge(const ul_buffer *table, const ul_record *r);
void ul_conv_trained(const ul_buffer *table, const ul_record *r);
void ul_depthwise_trained(const ul_buffer *table, const ul_record *r);
void ul_mask(const ul_buffer *table, const ul_record *r);
void ul_conv_back(const ul_buffer *table, const ul_record *r);
void ul_depthwise_back(const ul_buffer *table, const ul_record *r);
void ul_update_conv(const ul_buffer *table, const ul_record *r);
void ul_update_depthwise(const ul_buffer *table, const ul_record *r);
void ul_pool_back(const ul_buffer *table, const ul_record *r);
void ul_scale_back(const ul_buffer *table, const ul_record *r);
void ul_crop(const ul_buffer *table, const ul_record *r);
void ul_sum(const ul_buffer *table, const ul_record *r);
void ul_relu_back(const ul_buffer *table, const ul_record *r);

#endif
