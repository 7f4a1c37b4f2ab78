#include "ul_gradient.h"

int32_t ul_mantissa(const ul_gradient *g, uint32_t i, int narrow) {
    return narrow ? ul_clamp(((const int8_t *)g->mantissa)[i], -UL_NARROW_MAX, UL_NARROW_MAX)
                  : ul_clamp(g->mantissa[i], -UL_MANTISSA_MAX, UL_MANTISSA_MAX);
}
