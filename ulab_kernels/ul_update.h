// What every update shares: the learning rate and a channel's scales as one mantissa and one shift, and a weight's move.
#ifndef UL_UPDATE_H
#define UL_UPDATE_H

#include "ul_gradient.h"

typedef struct {
    int32_t mantissa, shift;
} ul_step;

ul_step ul_channel_step(const ul_record *r, const ul_state *state, int32_t exponent, uint16_t entry);

static inline int32_t ul_moved(int32_t weight, int32_t step, int32_t top, uint32_t *clipped) {
    const int32_t value = weight - step, cut = ul_clamp(value, -top, top);
    *clipped += cut != value;
    return cut;
}

// One weight, by the exact product of its gradient's sum and the channel's mantissa.
void ul_move_weight(const ul_record *r, ul_state *state, void *weights, uint32_t i, int32_t sum, const ul_step *s);

static inline void ul_begin_update(const ul_record *r, ul_state *state) {
    if (r->w_dtype != UL_DTYPE_INT16) {
        state->rng = ul_xorshift32(state->rng);
    }
}

#endif
