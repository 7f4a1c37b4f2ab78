// Mean squared error and hinge loss.
#include "ul_loss.h"

void ul_mse(const ul_buffer *table, const ul_record *r) {
    const int8_t *const output = ul_operand(table, r, 0);
    ul_gradient *const gradient = ul_operand(table, r, 1);
    const int8_t *const target = ul_operand(table, r, 3);
    ul_state *const state = ul_state_of(table);
    ul_begin_step(state);
    int32_t loss = 0;
    uint32_t max = 0;
    for (uint32_t n = 0; n < r->out_c; n++) {
        const int32_t difference = output[n] - target[n];
        max = ul_abs(difference) > max ? ul_abs(difference) : max;
        loss += difference * difference;
    }
    // Small differences are brought to 11 bits, or passing them on would round them away.
    const int32_t shift = max ? 11 - ul_bitlen(max) : 0;
    for (uint32_t n = 0; n < r->out_c; n++) {
        gradient->mantissa[n] = (int16_t)((output[n] - target[n]) * ((int32_t)1 << shift));
    }
    state->loss = loss;
    gradient->max = (uint16_t)(max << shift);
    gradient->exponent = (int16_t)-shift;
    if (max == 0) {
        ul_nothing_to_learn(state);
    }
}

int32_t ul_hinge(const ul_buffer *table, const ul_record *r) {
    const int8_t *const logits = ul_operand(table, r, 0);
    ul_gradient *const gradient = ul_operand(table, r, 1);
    const uint8_t *const target = ul_operand(table, r, 3);
    const uint32_t label = (uint32_t)target[0] | (uint32_t)target[1] << 8;
    if (label >= r->out_c) {
        return UL_E_LABEL;
    }
    ul_state *const state = ul_state_of(table);
    ul_begin_step(state);
    uint32_t rival = label ? 0 : 1;
    for (uint32_t n = 0; n < r->out_c; n++) {
        rival = n != label && logits[n] > logits[rival] ? n : rival;
        gradient->mantissa[n] = 0;
    }
    const int32_t missing = logits[rival] - logits[label] + (int32_t)r->extra;
    const int wrong = missing > 0;
    if (wrong) {
        gradient->mantissa[rival] = 1024;
        gradient->mantissa[label] = -1024;
    } else {
        ul_nothing_to_learn(state);
    }
    state->loss = wrong ? missing : 0;
    gradient->max = wrong ? 1024 : 0;
    gradient->exponent = wrong ? -10 : 0;
    return 0;
}
