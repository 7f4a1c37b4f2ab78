// Runs over gradients, for wide and narrow ones each a loop of its own.
#include "ul_gradient.h"

static inline void read_run(int32_t *to, const int16_t *m, const ul_span *s, int narrow, const uint16_t *scale,
    uint32_t scale_step) {
    const uint32_t step = s->step, to_step = s->other_step;
    for (uint32_t row = 0, first = s->at; row < s->rows; row++, first += s->line, to += s->other_line) {
        int32_t *here = to;
        const uint16_t *factor = scale;
        for (uint32_t left = s->count, i = first; left; left--, i += step, here += to_step) {
            const int32_t v = ul_cut_at(m, i, narrow);
            if (scale) {
                *here = ul_scaled(v, *factor);
                factor += scale_step;
            } else {
                *here = v;
            }
        }
    }
}

void ul_read_run(int32_t *to, const ul_gradient *g, const ul_span *s, int narrow) {
    if (narrow) {
        read_run(to, g->mantissa, s, 1, NULL, 0);
    } else {
        read_run(to, g->mantissa, s, 0, NULL, 0);
    }
}

void ul_read_scaled_run(int32_t *to, const ul_gradient *g, const ul_span *s, int narrow, const uint16_t *scale,
    uint32_t scale_step) {
    if (narrow) {
        read_run(to, g->mantissa, s, 1, scale, scale_step);
    } else {
        read_run(to, g->mantissa, s, 0, scale, scale_step);
    }
}

// Of one channel: rounding is monotone, so only the least and the largest mantissa can be the largest scaled one.
uint32_t ul_largest_scaled(const ul_gradient *g, const uint16_t *scale, uint32_t positions, uint32_t channels, int narrow) {
    uint32_t largest = 0;
    for (uint32_t n = 0; n < channels; n++) {
        int32_t least = 0, most = 0;
        if (narrow) {
            const int8_t *m = (const int8_t *)g->mantissa + n;
            for (uint32_t p = positions; p; p--, m += channels) {
                least = *m < least ? *m : least;
                most = *m > most ? *m : most;
            }
        } else {
            const int16_t *m = g->mantissa + n;
            for (uint32_t p = positions; p; p--, m += channels) {
                least = *m < least ? *m : least;
                most = *m > most ? *m : most;
            }
        }
        const int32_t top = narrow ? UL_NARROW_MAX : UL_MANTISSA_MAX;
        const uint32_t low = ul_abs(ul_scaled(ul_cut(least, top), scale[n])), high = ul_abs(ul_scaled(ul_cut(most, top), scale[n]));
        largest = low > largest ? low : largest;
        largest = high > largest ? high : largest;
    }
    return largest;
}

static inline void put_rows(ul_writer *w, const ul_span *s, const int32_t *from, int32_t shift, int narrow) {
    const int32_t top = narrow ? UL_NARROW_MAX : UL_MANTISSA_MAX;
    const uint32_t step = s->step, from_step = s->other_step;
    int16_t *const to = w->to->mantissa;
    int32_t least = 0, most = 0;
    uint32_t saturated = 0;
    for (uint32_t row = 0, first = s->at; row < s->rows; row++, first += s->line, from += s->other_line) {
        const int32_t *here = from;
        for (uint32_t left = s->count, i = first; left; left--, i += step, here += from_step) {
            int32_t m = shift ? ((*here >> (shift - 1)) + 1) >> 1 : *here;
            if ((uint32_t)m + (uint32_t)top > (uint32_t)(2 * top)) {
                m = m < 0 ? -top : top;
                saturated++;
            }
            least = m < least ? m : least;
            most = m > most ? m : most;
            if (narrow) {
                ((int8_t *)to)[i] = (int8_t)m;
            } else {
                to[i] = (int16_t)m;
            }
        }
    }
    const uint32_t size = (uint32_t)(-least > most ? -least : most);
    w->max = size > w->max ? size : w->max;
    w->saturated += saturated;
}

void ul_put_run(ul_writer *w, const ul_span *s, const int32_t *from, int32_t shift) {
    if (w->narrow) {
        put_rows(w, s, from, shift, 1);
    } else {
        put_rows(w, s, from, shift, 0);
    }
}

uint32_t ul_largest_of(const int32_t *from, uint32_t from_step, uint32_t count, uint32_t largest) {
    for (; count; count--, from += from_step) {
        largest = ul_abs(*from) > largest ? ul_abs(*from) : largest;
    }
    return largest;
}
