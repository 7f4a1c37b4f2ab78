"""gemmlowp's fixed-point arithmetic, as TFLite's reference kernels use it, for what the host computes once: tables."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ulearn_host import scales

_INT32_MAX, _INT32_MIN = 2**31 - 1, -(2**31)
# exp(-2^k) for k = -2..4, * 2^31.
_FACTORS = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)
_EXP_EIGHTH = 1895147668  # exp(-1/8) * 2^31
_THIRD = 715827883  # 1/3 * 2^31


def high_product(a: int, b: int) -> int:
    """floor((a * b + 2^30) / 2^31), saturated to 32 bits (SaturatingRoundingDoublingHighMul)."""
    return min((a * b + 2**30) >> 31, _INT32_MAX)


def divide_by_power(x: int, exponent: int) -> int:
    """x / 2^exponent, halves away from zero (RoundingDivideByPOT)."""
    half = (1 << exponent) >> 1
    return (x + half) >> exponent if x >= 0 else -((-x + half) >> exponent)


def multiply(x: int, multiplier: int, shift: int) -> int:
    """x * multiplier * 2^(shift - 31) with gemmlowp's two roundings; UL_ROUND_DOUBLE in ul_format.h."""
    left = (x << max(shift, 0)) & 0xFFFFFFFF
    return divide_by_power(high_product(left - 2**32 if left > _INT32_MAX else left, multiplier), max(-shift, 0))


def _exp(a: int) -> int:
    """exp(a / 2^26) * 2^31 for a <= 0: a polynomial on [-1/4, 0), then a factor for every bit."""
    if a == 0:
        return _INT32_MAX
    rest = (a & (2**24 - 1)) - 2**24
    x = (rest << 5) + 2**28
    x2 = high_product(x, x)
    x3, x4 = high_product(x2, x), high_product(x2, x2)
    inner = divide_by_power(high_product(divide_by_power(x4, 2) + x3, _THIRD) + x2, 1)
    y = _EXP_EIGHTH + high_product(_EXP_EIGHTH, x + inner)
    for bit, factor in enumerate(_FACTORS, 24):
        if (rest - a) >> bit & 1:
            y = high_product(y, factor)
    return y


def softmax_exponentials(scale: float, beta: float) -> NDArray[np.int32]:
    """exp(-k * scale * beta) * 2^31 for k = 0, 1, ... as SOFTMAX (ul_format.h) takes it: int32, 1 to 256 entries.

    It ends where an entry no longer changes any output: below 2^11 it adds nothing to the sum, and its code is -128.
    """
    real = min(float(np.float32(beta)) * float(np.float32(scale)) * 2.0**26, 2.0**31 - 1)
    multiplier, shift = scales.fraction(real, 31)
    table = []
    for k in range(256):
        if k > (31 << 26) >> shift:
            break
        value = _exp(high_product(-k << shift, multiplier))
        if value < 2**11:
            break
        table.append(value)
    return np.array(table, dtype=np.int32)


def _table(codes: list[int]) -> NDArray[np.int8]:
    return np.clip(codes, -128, 127).astype(np.int8)


def requantised(
    scale: float, zero: int, out_scale: float, out_zero: int, bounds: tuple[int, int], quotient: float
) -> NDArray[np.int8]:
    """A table int8 [256] that brings codes from one quantisation to another.

    quotient: scale / out_scale as the operator computes it: in double for QUANTIZE, in float32 for RELU.
    """
    pair = scales.requantisation(quotient)
    codes = [min(max(multiply(x - zero, *pair) + out_zero, bounds[0]), bounds[1]) for x in range(-128, 128)]
    return _table(codes)


def logistic(scale: float, zero: int, out_scale: float, out_zero: int) -> NDArray[np.int8]:
    """The table int8 [256] of LOGISTIC, every step in float32 as the reference kernel takes it."""
    x = np.float32(scale) * (np.arange(-128, 128) - zero).astype(np.float32)
    with np.errstate(over="ignore"):
        exponential = np.exp(-x.astype(np.float64)).astype(np.float32)
    y = np.float32(1) / (np.float32(1) + exponential)
    return rounded(y * (np.float32(1) / np.float32(out_scale)), out_zero)


def rounded(scaled: NDArray[np.floating], zero: int) -> NDArray[np.int8]:
    """Numbers in units of the output's scale as codes, halves away from zero."""
    wide = scaled.astype(np.float64)
    codes = np.trunc(wide) + np.where(np.abs(wide - np.trunc(wide)) >= 0.5, np.sign(wide), 0) + zero
    return _table(codes.tolist())


def tanh(scale: float, zero: int, out_scale: float, out_zero: int) -> NDArray[np.int8]:
    """The table int8 [256] of TANH, as LOGISTIC's."""
    x = np.float32(scale) * (np.arange(-128, 128) - zero).astype(np.float32)
    y = np.tanh(x.astype(np.float64)).astype(np.float32)
    return rounded(y * (np.float32(1) / np.float32(out_scale)), out_zero)
