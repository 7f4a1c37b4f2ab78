"""Real scale factors as the integer mantissas and exponents of the format (ulab_kernels/ul_format.h)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ulearn_host.errors import UserError


def requantisation(scale: float) -> tuple[int, int]:
    """scale = multiplier * 2^(shift - 31), as TFLite's QuantizeMultiplier; 0 < scale < 2^30."""
    fraction, shift = math.frexp(scale)
    multiplier = round(fraction * 2**31)
    if multiplier == 2**31:
        multiplier, shift = multiplier // 2, shift + 1
    if shift < -31:
        return 0, 0
    if shift > 30:
        raise UserError(f"a layer scales its sums by {scale:g}, expected less than 2^30; calibrate with better samples")
    return multiplier, shift


def mantissa11(value: float) -> tuple[int, int]:
    """value = mantissa * 2^exponent with a mantissa from 1024 to 2047; value > 0."""
    fraction, exponent = math.frexp(value)
    mantissa = round(fraction * 2048)
    return (1024, exponent - 10) if mantissa == 2048 else (mantissa, exponent - 11)


def channel_scales(scales: NDArray[np.float64]) -> tuple[NDArray[np.uint16], int]:
    """scales = mantissas * 2^(exponent - 16), one exponent for all: a gradient's factors on its way down."""
    exponent = math.frexp(float(scales.max()))[1]
    return np.clip(np.rint(scales * 2.0 ** (16 - exponent)), 1, 65535).astype(np.uint16), exponent


def reciprocals(scales: NDArray[np.float64]) -> tuple[NDArray[np.uint16], int]:
    """1 / scales = (1024 + (t & 1023)) * 2^(t >> 10) * 2^exponent, one table entry t a channel."""
    pairs = [mantissa11(1 / float(s)) for s in scales]
    lowest = min(e for _, e in pairs)
    if max(e for _, e in pairs) - lowest > 63:
        raise UserError("the weight scales of one layer differ by more than 2^63")
    return np.array([(m - 1024) | (e - lowest) << 10 for m, e in pairs], dtype=np.uint16), lowest


def exponentials(scale: float) -> NDArray[np.uint16]:
    """32768 * exp(-k * scale) for k = 0, 1, ..., up to where it rounds to 0 (at most 256 entries)."""
    table = np.rint(32768 * np.exp(-scale * np.arange(256))).astype(np.uint16)
    used: NDArray[np.uint16] = table[: int(np.count_nonzero(table))]
    return used
