// Which sample of INPUT and TARGET a call means; shared by the bindings, checked where the buffers enter.
#ifndef UL_INDEX_H
#define UL_INDEX_H

#include "ul_core.h"

// index < 0: INPUT must hold exactly one sample (so that an array of wider numbers is never taken for codes).
// index >= 0: both are arrays of samples; moves them to the index-th. Returns 0 or UL_E_BUFFER.
static inline int32_t ul_index(const void *program, size_t bytes, ul_buffer table[UL_BUFFERS], int32_t index) {
    if (bytes < UL_PROGRAM_BYTES || ((uintptr_t)program & 3)) {
        return ((uintptr_t)program & 3) ? UL_E_ALIGNMENT : UL_E_BUFFER;
    }
    const ul_program *const p = (const ul_program *)program;
    static const uint8_t kinds[2] = {UL_BUF_INPUT, UL_BUF_TARGET};
    for (int i = 0; i < 2; i++) {
        ul_buffer *const b = &table[kinds[i]];
        const size_t size = p->sizes[kinds[i]];
        if (size == 0) {
            continue;
        }
        if (index < 0) {
            if (b->bytes != size) {
                return UL_E_BUFFER;
            }
            continue;
        }
        // In steps of one sample, so that no product can overflow.
        if (b->data == NULL || size > b->bytes || (size_t)index > (b->bytes - size) / size) {
            return UL_E_BUFFER;
        }
        b->data += (size_t)index * size;
        b->bytes = size;
    }
    return 0;
}

#endif
