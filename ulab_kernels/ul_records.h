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
    return table[operand >> 28].data + (operand & 0x0FFFFFFF);
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

void ul_dense(const ul_buffer *table, const ul_record *r);
void ul_relu(const ul_buffer *table, const ul_record *r);
int32_t ul_softmax_ce(const ul_buffer *table, const ul_record *r);
void ul_mse(const ul_buffer *table, const ul_record *r);
void ul_dense_back(const ul_buffer *table, const ul_record *r);
void ul_update_weight(const ul_buffer *table, const ul_record *r);
void ul_update_bias(const ul_buffer *table, const ul_record *r);

#endif
