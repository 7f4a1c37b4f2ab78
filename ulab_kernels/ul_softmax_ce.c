#include "ul_loss.h"

// e[n] of one class; the logits are compared with their maximum, so the table starts at exp(0).
static uint32_t exponential(const ul_record *r, const uint16_t *exp_table, int32_t below_max) {
    return (uint32_t)below_max < r->extra ? exp_table[below_max] : 0;
}

// |d[n]| of one class of the sum S; a logit at the end of its range can go no further.
static uint32_t distance(const int8_t *logits, uint32_t n, uint32_t label, uint32_t e, uint32_t sum) {
    if (n == label) {
        return logits[n] == 127 ? 0 : sum - e;
    }
    return logits[n] == -128 ? 0 : e;
}

int32_t ul_softmax_ce(const ul_buffer *table, const ul_record *r) {
    const int8_t *const logits = ul_operand(table, r, 0);
    ul_gradient *const gradient = ul_operand(table, r, 1);
    const uint16_t *const exp_table = ul_operand(table, r, 2);
    const uint8_t *const target = ul_operand(table, r, 3);
    const uint32_t label = (uint32_t)target[0] | (uint32_t)target[1] << 8; // TARGET may lie anywhere
    const uint32_t classes = r->out_c;
    if (label >= classes) {
        return UL_E_LABEL;
    }
    int32_t top = -128;
    for (uint32_t n = 0; n < classes; n++) {
        top = logits[n] > top ? logits[n] : top;
    }
    uint32_t sum = 0;
    for (uint32_t n = 0; n < classes; n++) {
        sum += exponential(r, exp_table, top - logits[n]);
    }
    if (sum == 0) {
        return UL_E_DATA;
    }
    ul_state *const state = ul_state_of(table);
    ul_begin_step(state);
    const uint32_t right = exponential(r, exp_table, top - logits[label]);
    uint32_t largest = 0;
    for (uint32_t n = 0; n < classes; n++) {
        const uint32_t d = distance(logits, n, label, exponential(r, exp_table, top - logits[n]), sum);
        largest = d > largest ? d : largest;
    }
    state->loss = ((ul_log2q10(sum) - ul_log2q10(right ? right : 1)) * 710 + 512) >> 10;

    uint32_t rest;
    if (largest == 0 || ul_fraction(largest, sum, 16, &rest) < state->skip_below) {
        ul_nothing_to_learn(state);
    }
    int32_t bits = 10;
    for (uint32_t v = largest; v != 0 && v < sum; v <<= 1) {
        bits++;
    }
    int32_t max = 0;
    for (uint32_t n = 0; n < classes; n++) {
        const uint32_t d = distance(logits, n, label, exponential(r, exp_table, top - logits[n]), sum);
        int32_t m = (int32_t)ul_fraction(d, sum, bits, &rest);
        m += 2 * rest >= sum;
        m = m > UL_MANTISSA_MAX ? UL_MANTISSA_MAX : m;
        max = m > max ? m : max;
        gradient->mantissa[n] = (int16_t)(n == label ? -m : m);
    }
    gradient->max = (uint16_t)max;
    gradient->exponent = (int16_t)(largest ? -bits : 0);
    return 0;
}
