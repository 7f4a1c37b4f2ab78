#include "ul_records.h"

int8_t ul_channel_code(const ul_record *r, int32_t acc, const int32_t *multiplier, const int8_t *shift, uint32_t n) {
    return ul_channel_code_inline(r, acc, multiplier, shift, n);
}
