// MicroPython takes every Thumb-2 core for a Cortex-M4 (armv7em) at least, whose DSP instructions a Cortex-M3 lacks.
#include <stddef.h>
#include "py/persistentcode.h"

#if defined(__thumb2__) && !defined(__ARM_FEATURE_DSP)
#undef MPY_FEATURE_ARCH
#define MPY_FEATURE_ARCH (MP_NATIVE_ARCH_ARMV7M)
#endif
