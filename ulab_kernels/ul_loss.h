// What every loss does to STATE.
#ifndef UL_LOSS_H
#define UL_LOSS_H

#include "ul_records.h"

static inline void ul_begin_step(ul_state *state) {
    state->step++;
    state->flags &= (uint16_t)~UL_STATE_NOTHING_TO_LEARN;
}

static inline void ul_nothing_to_learn(ul_state *state) {
    state->flags |= UL_STATE_NOTHING_TO_LEARN;
    state->skipped++;
}

#endif
