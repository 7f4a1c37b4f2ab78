"""Real scale factors as the integer mantissas and exponents of the format (ulab_kernels/ul_format.h)."""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

from ulearn_host.errors import UserError


def fraction(real: float, bits: int) -> tuple[int, int]:
    """real = multiplier * 2^(shift - bits), the multiplier of `bits` bits and rounded; real > 0."""
    part, shift = math.frexp(real)
    multiplier = math.floor(part * 2.0**bits + 0.5)
    return (multiplier // 2, shift + 1) if multiplier == 2**bits else (multiplier, shift)


def requantisation(scale: float) -> tuple[int, int]:
    """scale = multiplier * 2^(shift - 31), as TFLite's QuantizeMultiplier; 0 < scale < 2^30."""
    multiplier, shift = fraction(scale, 31)
    if shift < -31:
        return 0, 0
    _refuse_large(scale, shift)
    return multiplier, shift


def _refuse_large(scale: float, shift: int) -> None:
    if shift > 30:
        raise UserError(f"a layer scales its sums by {scale:g}, expected less than 2^30; calibrate with better samples")


def _reached(real: float, step: int) -> int:
    """The least sum that the float64 product with `real`, rounded half away from zero, takes to `step` >= 1."""
    first = max(1, math.floor((step - 0.5) / real) - 1)
    while math.trunc(first * real) + (math.fmod(first * real, 1.0) >= 0.5) < step:
        first += 1
    return first


@functools.lru_cache(maxsize=4096)
def dense_requantisation(real: float, reach: int, steps: int, bits: int) -> tuple[int, int] | None:
    """(multiplier of `bits` bits, shift) that gives TFLite's FULLY_CONNECTED for every sum within +-reach.

    steps: how far from its zero point an output can be without saturating.

    TFLite multiplies in float64 and rounds halves away from zero. The result is odd and monotone in the sum, so a
    multiplier m gives the same if it reaches every step k at the same sum a, rounding halves up or away alike:
    (k - 1/2) / a < m * 2^(shift - bits) < (k - 1/2) / (a - 1). None where no such multiplier exists.
    """
    nearest, shift = fraction(real, bits)
    _refuse_large(real, shift)
    if shift < -31:
        return 0, 0  # not even the largest sum reaches half a step
    least, most = 1, 2**bits - 1
    for step in range(1, steps + 1):
        first = _reached(real, step)
        if first > reach:
            most = min(most, -(-((2 * step - 1) << (bits - shift - 1)) // reach) - 1)
            break
        scaled = (2 * step - 1) << (bits - shift - 1)
        least = max(least, scaled // first + 1)
        if first > 1:
            most = min(most, -(-scaled // (first - 1)) - 1)
    if least > most:
        return None
    return min(max(nearest, least), most), shift


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


def mean(in_scale: float, out_scale: float, cells: int) -> tuple[int, int]:
    """Multiplier and shift of TFLite's MEAN over `cells`: the quotient's multiplier over cells, cut off."""
    multiplier, shift = requantisation(in_scale / out_scale)
    k = min(cells.bit_length() - 1, 32, 31 + shift)
    return (multiplier << k) // cells, shift - k


def exponentials(scale: float) -> NDArray[np.uint16]:
    """32768 * exp(-k * scale) for k = 0, 1, ..., up to where it rounds to 0 (at most 256 entries)."""
    table = np.rint(32768 * np.exp(-scale * np.arange(256))).astype(np.uint16)
    used: NDArray[np.uint16] = table[: int(np.count_nonzero(table))]
    return used
