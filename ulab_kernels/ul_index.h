// Which sample of INPUT and TARGET a call means; shared by the bindings, checked where the buffers enter.
#ifndef UL_INDEX_H
#define UL_INDEX_H

#include "ul_core.h"

// index * size, or SIZE_MAX where it reaches 2^30: no division and no 64-bit product on armv6m.
static inline size_t ul_offset(size_t size, uint32_t index) {
    if (size >= (size_t)1 << 24 || index >= (uint32_t)1 << 16) {
        return SIZE_MAX;
    }
    const uint32_t s = (uint32_t)size, high = (s >> 8) * (index >> 8), low = (s & 255) * index;
    const uint32_t middle = (s >> 8) * (index & 255);
    if (high >= (uint32_t)1 << 14 || middle >= (uint32_t)1 << 22) {
        return SIZE_MAX;
    }
    return (size_t)(high << 16) + (middle << 8) + low;
}

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
        const size_t offset = ul_offset(size, (uint32_t)index);
        if (b->data == NULL || size > b->bytes || offset > b->bytes - size) {
            return UL_E_BUFFER;
        }
        b->data += offset;
        b->bytes = size;
    }
    return 0;
}

#endif
