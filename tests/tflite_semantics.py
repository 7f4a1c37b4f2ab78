"""The int8 operators of LiteRT 2.3.0's reference kernels, to the bit, written as exact integers.

Every function's docstring is the definition. Where a kernel is integer, so is the function; where a kernel computes
with float (fully connected, the tables, the borders), the function says in which width and order, and how integers give
the same result. The scales of the file are float32; "double(s)" below is that value widened.

Run as a program it compares every operator of every test model with the reference kernels, each operator fed with the
reference's own inputs, and prints how many elements were compared and how many differ.

Notation: trunc, floor are the usual roundings of a quotient; "half away" is to nearest with ties away from zero;
wrap32(x) is x modulo 2**32 as a signed number; clamp(x, a, b) is min(max(x, a), b) in this order of nesting:
min(max(x, a), b).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

Array = np.ndarray
INT32_MAX = 2**31 - 1
INT32_MIN = -(2**31)
NONE, RELU, RELU_N1_TO_1, RELU6 = 0, 1, 2, 3
SAME = 0


# ---- Fixed point ---------------------------------------------------------------------------------------------------


def wrap32(x: Array) -> Array:
    """The low 32 bits of each number as a signed integer: what an int32 accumulator holds."""
    return (np.asarray(x, np.int64) + 2**31) % 2**32 - 2**31


def saturating_rounding_doubling_high_mul(a: Array, b: Array | int) -> Array:
    """trunc((a*b + nudge) / 2**31) with nudge = 2**30 where a*b >= 0 and 1 - 2**30 elsewhere; INT32_MIN**2 saturates.

    So the product is rounded to nearest with ties upwards (towards plus infinity): for a negative product the
    truncation and its nudge give -floor((-a*b + 2**30 - 1) / 2**31).
    """
    product = np.asarray(a, np.int64) * np.asarray(b, np.int64)
    result = np.where(product >= 0, (product + 2**30) >> 31, -((-product + 2**30 - 1) >> 31))
    return np.where((np.asarray(a) == INT32_MIN) & (np.asarray(b) == INT32_MIN), INT32_MAX, result)


def rounding_divide_by_power(x: Array, exponent: int) -> Array:
    """x / 2**exponent to nearest, ties away from zero: (x >> e) + (rem > threshold).

    rem = x & (2**e - 1), threshold = (2**e - 1) >> 1, plus one for a negative x.
    """
    x = np.asarray(x, np.int64)
    mask = (1 << exponent) - 1
    return (x >> exponent) + ((x & mask) > (mask >> 1) + (x < 0))


def quantize_multiplier(real: float) -> tuple[int, int]:
    """A real multiplier as (m, shift) with real ~ m * 2**(shift - 31), 2**30 <= m < 2**31.

    real = f * 2**shift with 0.5 <= f < 1 (frexp of the double); m = half away of f * 2**31; m = 2**31 becomes
    (2**30, shift + 1); real = 0 or shift < -31 becomes (0, 0). f * 2**31 is exact, its 53 bits are rounded once.
    """
    if real == 0:
        return 0, 0
    fraction, shift = math.frexp(real)
    m = math.floor(fraction * 2**31 + 0.5)
    if m == 2**31:
        m, shift = 2**30, shift + 1
    return (0, 0) if shift < -31 else (m, shift)


def multiply(x: Array, m: Array | int, shift: Array | int) -> Array:
    """MultiplyByQuantizedMultiplier with double rounding, for (m, shift) of quantize_multiplier.

    rounding_divide_by_power(srdhm(wrap32(x * 2**max(shift, 0)), m), max(-shift, 0)). The left shift wraps, it does not
    saturate. Not the same as one rounding of x*m / 2**(31 - shift).
    """
    shift = np.broadcast_to(np.asarray(shift, np.int64), np.shape(x))
    high = saturating_rounding_doubling_high_mul(wrap32(np.asarray(x, np.int64) << np.maximum(shift, 0)), m)
    result = np.empty(np.shape(x), np.int64)
    for right in np.unique(np.maximum(-shift, 0)):
        chosen = np.maximum(-shift, 0) == right
        result[chosen] = rounding_divide_by_power(high[chosen], int(right))
    return result


def half_away(x: float) -> int:
    """To the nearest integer, ties away from zero; exact for any double, unlike floor(x + 0.5)."""
    whole = math.trunc(x)
    return whole + int(math.copysign(1, x)) if abs(x - whole) >= 0.5 else whole


def clamp(x: Array, low: int, high: int) -> Array:
    """min(max(x, low), high): with low > high the result is high."""
    return np.minimum(np.maximum(x, low), high)


def activation_bounds(fused: int, scale: float, zero_point: int) -> tuple[int, int]:
    """(low, high) of a fused activation, from the output's scale and zero point.

    quantised(r) = zero_point + half away of float32(float32(r) / float32(scale)), one float32 division.
    NONE (-128, 127); RELU (max(-128, quantised(0)), 127); RELU6 adds min(127, quantised(6)); RELU_N1_TO_1 is
    (max(-128, quantised(-1)), min(127, quantised(1))). RELU6 and RELU_N1_TO_1 at an extreme zero point never give
    low > high, since zero_point itself lies in int8.
    """

    def quantised(real: float) -> int:
        return zero_point + half_away(float(np.float32(real) / np.float32(scale)))

    low = {NONE: -128, RELU: quantised(0), RELU6: quantised(0), RELU_N1_TO_1: quantised(-1)}[fused]
    high = {NONE: 127, RELU: 127, RELU6: quantised(6), RELU_N1_TO_1: quantised(1)}[fused]
    return max(-128, low), min(127, high)


def window_padding(size: int, kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """(output length, cells before the image) of a window operator along one axis.

    SAME: out = ceil(size / stride); VALID: out = floor((size + stride - kernel) / stride).
    before = floor(max((out - 1) * stride + kernel - size, 0) / 2): the odd cell goes behind (below, right).
    """
    out = -(-size // stride) if padding == SAME else (size + stride - kernel) // stride
    return out, max((out - 1) * stride + kernel - size, 0) // 2


def layer_multiplier(in_scale: float, weight_scale: float, out_scale: float) -> float:
    """double(in) * double(weight) / double(out), in this order, each step a double (the product is exact)."""
    return float(np.float32(in_scale)) * float(np.float32(weight_scale)) / float(np.float32(out_scale))


# ---- Layers with weights -------------------------------------------------------------------------------------------


def windows(x: Array, kernel: Sequence[int], stride: Sequence[int], padding: int) -> tuple[Array, Array]:
    """Patches [out_h, out_w, kernel_h, kernel_w, c] of an image [h, w, c] and the mask of cells inside the image."""
    height, width, channels = x.shape
    out_h, top = window_padding(height, kernel[0], stride[0], padding)
    out_w, left = window_padding(width, kernel[1], stride[1], padding)
    rows = np.arange(out_h)[:, None] * stride[0] - top + np.arange(kernel[0])[None, :]
    columns = np.arange(out_w)[:, None] * stride[1] - left + np.arange(kernel[1])[None, :]
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[None, :, None, :]
    taken = x[np.clip(rows, 0, height - 1)[:, None, :, None], np.clip(columns, 0, width - 1)[None, :, None, :]]
    return taken, np.broadcast_to(inside[..., None], (*taken.shape[:4], 1))


def conv_2d(
    x: Array,
    weights: Array,
    bias: Array,
    in_zero: int,
    out_zero: int,
    multipliers: Sequence[tuple[int, int]],
    stride: Sequence[int],
    padding: int,
    bounds: tuple[int, int],
) -> Array:
    """CONV_2D; x [h, w, in_c], weights [out_c, kh, kw, in_c], bias int32 [out_c] (LiteRT refuses int8 without bias).

    acc = wrap32(sum over cells inside the image of w * (x - in_zero) + bias[c]); cells outside contribute nothing.
    y = clamp(multiply(acc, m[c], shift[c]) + out_zero, low, high).
    (m, shift)[c] = quantize_multiplier(layer_multiplier(in, weight[c], out)); one weight scale serves all channels.
    The bias tensor's own scale is not read. The weights' zero point is not read (taken as 0).
    """
    taken, inside = windows(x.astype(np.int64) - in_zero, weights.shape[1:3], stride, padding)
    taken = np.where(inside, taken, 0)
    acc = np.tensordot(taken, weights.astype(np.int64), ([2, 3, 4], [1, 2, 3])) + bias.astype(np.int64)
    m, shift = np.asarray(multipliers, np.int64).T
    return clamp(multiply(wrap32(acc), m, shift) + out_zero, *bounds).astype(np.int8)


def depthwise_conv_2d(
    x: Array,
    weights: Array,
    bias: Array | None,
    in_zero: int,
    out_zero: int,
    multipliers: Sequence[tuple[int, int]],
    stride: Sequence[int],
    padding: int,
    bounds: tuple[int, int],
) -> Array:
    """DEPTHWISE_CONV_2D; weights [1, kh, kw, out_c], out_c = in_c * multiplier, output channel c reads c // multiplier.

    Otherwise as CONV_2D: int32 accumulator, double rounding, scales along the last axis; the bias may be missing.
    The multiplier is out_c / in_c; the option depth_multiplier of the file is not read.
    """
    out_c = weights.shape[3]
    taken, inside = windows(x.astype(np.int64) - in_zero, weights.shape[1:3], stride, padding)
    taken = np.repeat(np.where(inside, taken, 0), out_c // x.shape[2], axis=4)
    acc = (taken * weights[0].astype(np.int64)).sum(axis=(2, 3))
    acc = acc if bias is None else acc + bias.astype(np.int64)
    m, shift = np.asarray(multipliers, np.int64).T
    return clamp(multiply(wrap32(acc), m, shift) + out_zero, *bounds).astype(np.int8)


def scale_accumulator(acc: int, real: float) -> int:
    """half away of double(acc) * real in exact integers, with the rounding of the double product to 53 bits.

    real = f * 2**e with an integer f < 2**53. p = |acc| * f is exact; if it has more than 53 bits it is rounded to 53
    bits to nearest even (that is the double multiplication); then (p + half) >> -e, ties away since p is a magnitude.
    """
    fraction, exponent = math.frexp(real)
    p, e = abs(acc) * int(fraction * 2**53), exponent - 53
    excess = p.bit_length() - 53
    if excess > 0:
        kept, rest, half = p >> excess, p & ((1 << excess) - 1), 1 << (excess - 1)
        kept += rest > half or (rest == half and kept & 1)
        p, e = kept, e + excess
    whole = p << e if e >= 0 else (p + (1 << (-e - 1))) >> -e
    return whole if acc >= 0 else -whole


def fully_connected(
    x: Array,
    weights: Array,
    bias: Array | None,
    in_zero: int,
    out_zero: int,
    reals: Sequence[float],
    bounds: tuple[int, int],
) -> Array:
    """FULLY_CONNECTED; weights [units, depth], x flattened to rows of `depth`; the bias may be missing.

    acc = wrap32(sum of w * (x - in_zero) + bias[u]);
    y = clamp(half away of (double(acc) * real[u]) + out_zero, low, high),
    real[u] = layer_multiplier(in, weight[u], out).
    One double product and round(); no quantised multiplier at all. Neither the gemmlowp double rounding nor a single
    rounding (x*m + 2**(30 - shift)) >> (31 - shift) agrees: the latter sends negative ties the other way.
    exact_multiplier gives an integer (m, shift) with which magnitude_multiply agrees for every accumulator.
    The output is [rows, units], or the input's shape with the last axis replaced if keep_num_dims.
    """
    rows = x.reshape(-1, weights.shape[1]).astype(np.int64) - in_zero
    acc = rows @ weights.astype(np.int64).T
    acc = wrap32(acc if bias is None else acc + bias.astype(np.int64))
    scaled = [[scale_accumulator(int(a), r) for a, r in zip(row, reals, strict=True)] for row in acc]
    return clamp(np.asarray(scaled, np.int64) + out_zero, *bounds).astype(np.int8)


def magnitude_multiply(acc: Array, m: int, shift: int, bits: int = 47) -> Array:
    """sign(acc) * floor((|acc| * m + 2**(s - 1)) / 2**s), s = bits - shift: one rounding, ties away from zero.

    For 31 bits the product fits in 64. For 47 bits, m = high * 2**16 + low:
    floor((|acc| * high + ((|acc| * low) >> 16) + 2**(s - 17)) / 2**(s - 16)) is the same number by two 32-bit products.
    """
    acc = np.asarray(acc, np.int64)
    size, right = np.abs(acc), bits - shift
    if bits > 31:
        product, right = size * (m >> 16) + ((size * (m & 0xFFFF)) >> 16), right - 16
    else:
        product = size * m
    return np.sign(acc) * ((product + (1 << (right - 1))) >> right)


def exact_multiplier(real: float, bits: int = 47, largest: int = 256) -> tuple[int, int]:
    """(m, shift), m < 2**bits, with which magnitude_multiply equals scale_accumulator for every int32 accumulator.

    Equal as far as `largest`; beyond it both saturate. Both functions are odd and monotone, so they are equal if they
    reach every k = 1..largest at the same accumulator a[k]: (k - 1/2) / a[k] <= m * 2**(shift - bits) <
    (k - 1/2) / (a[k] - 1). This takes from that interval the m nearest to the real multiplier. Raises ValueError where
    none exists: 31 bits are too few for a part of the multipliers below 1/1000, 47 bits suffice except where the
    multiplier is a fraction of small numbers with a denominator that is no power of two, so that the double product
    rounds some exact ties up and others down; then only scale_accumulator itself will do.
    """
    fraction, shift = math.frexp(real)
    right = bits - shift
    if right < 18:
        raise ValueError(f"multiplier {real} is too large")
    least, most = 1, 2**bits
    for k in range(1, largest + 1):
        first = max(1, math.floor((k - 0.5) / real) - 1)
        while scale_accumulator(first, real) < k:
            first += 1
        if first > 2**31:
            break
        scaled = (2 * k - 1) << (right - 1)
        least = max(least, -(-scaled // first))
        if first > 1:
            most = min(most, -(-scaled // (first - 1)))
    if least >= most:
        raise ValueError(f"no {bits}-bit multiplier reproduces {real}")
    return min(max(math.floor(fraction * 2**bits + 0.5), least), most - 1), shift


# ---- Windows and reductions ----------------------------------------------------------------------------------------


def average_pool_2d(
    x: Array, kernel: Sequence[int], stride: Sequence[int], padding: int, bounds: tuple[int, int]
) -> Array:
    """AVERAGE_POOL_2D on the raw int8 values; only cells inside the image are summed and counted (n of them).

    y = clamp(trunc((sum + n//2) / n) if sum > 0 else trunc((sum - n//2) / n), low, high): half away from raw zero.
    The zero points play no part: the kernel takes input and output as having the same quantisation, and does not check.
    """
    taken, inside = windows(x.astype(np.int64), kernel, stride, padding)
    total, count = np.where(inside, taken, 0).sum(axis=(2, 3)), inside.sum(axis=(2, 3))
    rounded = np.where(total > 0, (total + count // 2) // count, -((-total + count // 2) // count))
    return clamp(rounded, *bounds).astype(np.int8)


def max_pool_2d(x: Array, kernel: Sequence[int], stride: Sequence[int], padding: int, bounds: tuple[int, int]) -> Array:
    """MAX_POOL_2D: clamp(the largest raw value among the cells inside the image, low, high)."""
    taken, inside = windows(x.astype(np.int64), kernel, stride, padding)
    return clamp(np.where(inside, taken, -128).max(axis=(2, 3)), *bounds).astype(np.int8)


def mean_multiplier(in_scale: float, out_scale: float, count: int) -> tuple[int, int]:
    """(m, shift) of MEAN over `count` cells.

    (m0, s0) = quantize_multiplier(double(in) / double(out)); k = min(floor(log2(count)), 32, 31 + s0);
    m = floor((m0 << k) / count), shift = s0 - k. So m may be below 2**30, and it is truncated, not rounded: equal
    scales and count = 3 give m0 = 2**30, s0 = 1, m = (2**30 << 1) // 3, shift = 0.
    """
    m, shift = quantize_multiplier(float(np.float32(in_scale)) / float(np.float32(out_scale)))
    k = min(count.bit_length() - 1, 32, 31 + shift)
    return (m << k) // count, shift - k


def mean(x: Array, axes: Sequence[int], in_zero: int, out_zero: int, in_scale: float, out_scale: float) -> Array:
    """MEAN over any axes, without kept dimensions; the same path for equal and for different quantisations.

    y = clamp(multiply(sum(x) - in_zero * count, m, shift) + out_zero, -128, 127), (m, shift) = mean_multiplier(...),
    with the double rounding of `multiply` and an int32 sum. There is no fused activation.
    """
    axes = tuple(axis % x.ndim for axis in axes)
    count = int(np.prod([x.shape[axis] for axis in axes]))
    total = wrap32(x.astype(np.int64).sum(axis=axes) - in_zero * count)
    m, shift = mean_multiplier(in_scale, out_scale, count)
    return clamp(multiply(total, m, shift) + out_zero, -128, 127).astype(np.int8)


# ---- Two operands --------------------------------------------------------------------------------------------------


def add_multipliers(a_scale: float, b_scale: float, out_scale: float) -> list[tuple[int, int]]:
    """The three multipliers of ADD, in double: t = 2 * double(max(a, b)).

    quantize_multiplier of double(a)/t, double(b)/t and t / (2**20 * double(out)); the last must be below 1, LiteRT
    aborts otherwise. No shift is positive.
    """
    a, b, out = (float(np.float32(s)) for s in (a_scale, b_scale, out_scale))
    twice = 2 * max(a, b)
    return [quantize_multiplier(real) for real in (a / twice, b / twice, twice / (2**20 * out))]


def add(
    a: Array,
    b: Array,
    zeros: tuple[int, int, int],
    multipliers: Sequence[tuple[int, int]],
    bounds: tuple[int, int],
) -> Array:
    """ADD with numpy's broadcasting; zeros and multipliers of a, b and the output.

    sa = multiply((a - za) << 20, ma), sb likewise; y = clamp(multiply(sa + sb, mo) + zo, low, high), int32 throughout.
    Equal scales make ma = mb = (2**30, 0): exactly half of the shifted value.
    """
    sa = multiply((a.astype(np.int64) - zeros[0]) << 20, *multipliers[0])
    sb = multiply((b.astype(np.int64) - zeros[1]) << 20, *multipliers[1])
    return clamp(multiply(wrap32(sa + sb), *multipliers[2]) + zeros[2], *bounds).astype(np.int8)


def mul_multiplier(a_scale: float, b_scale: float, out_scale: float) -> tuple[int, int]:
    """quantize_multiplier(double(float32(float32(a * b) / out))): both steps in float32, unlike the other layers."""
    a, b, out = (np.float32(s) for s in (a_scale, b_scale, out_scale))
    return quantize_multiplier(float(np.float32(np.float32(a * b) / out)))


def mul(a: Array, b: Array, zeros: tuple[int, int, int], multiplier: tuple[int, int], bounds: tuple[int, int]) -> Array:
    """MUL with numpy's broadcasting: clamp(multiply((a - za) * (b - zb), m, shift) + zo, low, high)."""
    product = (a.astype(np.int64) - zeros[0]) * (b.astype(np.int64) - zeros[1])
    return clamp(multiply(product, *multiplier) + zeros[2], *bounds).astype(np.int8)


# ---- Element by element --------------------------------------------------------------------------------------------


def requantize(x: Array, in_scale: float, in_zero: int, out_scale: float, out_zero: int, dtype: Any = np.int8) -> Array:
    """QUANTIZE between int8 and uint8: clamp(multiply(x - in_zero, m, shift) + out_zero, least, most of dtype).

    (m, shift) = quantize_multiplier(double(in) / double(out)). Equal scales give (2**30, 1), which is exact.
    """
    m, shift = quantize_multiplier(float(np.float32(in_scale)) / float(np.float32(out_scale)))
    limits = np.iinfo(dtype)
    return clamp(multiply(x.astype(np.int64) - in_zero, m, shift) + out_zero, limits.min, limits.max).astype(dtype)


def quantize(x: Array, scale: float, zero_point: int) -> Array:
    """QUANTIZE from float32: clamp(half away of float32(x / scale) + zero_point, -128, 127).

    One float32 division, then round. Defined for |x / scale| below 2**31 - 128: LiteRT converts the quotient to int32
    before it adds the zero point and saturates. On x86 everything else, plus and minus infinity and NaN alike, becomes
    -2**31, and the addition wraps: 127 if the zero point is negative, else -128. Here infinities saturate, NaN is 0.
    """
    ratio = (x.astype(np.float32) / np.float32(scale)).astype(np.float64)
    whole = np.trunc(ratio)
    with np.errstate(invalid="ignore"):
        whole = whole + np.where(np.abs(ratio - whole) >= 0.5, np.sign(ratio), 0)
    return np.nan_to_num(clamp(whole + zero_point, -128, 127)).astype(np.int8)


def dequantize(x: Array, scale: float, zero_point: int) -> Array:
    """DEQUANTIZE to float32: float32(scale * (x - zero_point)), one rounding."""
    return (np.float64(np.float32(scale)) * (x.astype(np.int64) - zero_point)).astype(np.float32)


def relu(x: Array, in_scale: float, in_zero: int, out_scale: float, out_zero: int, bounds: tuple[int, int]) -> Array:
    """RELU, RELU6, RELU_N1_TO_1 as operators: clamp(multiply(x - in_zero, m, shift) + out_zero, low, high).

    (m, shift) = quantize_multiplier(double(float32(in / out))): the quotient is float32, unlike QUANTIZE's.
    bounds = activation_bounds of the output. A function of one int8, so a table of 256 serves.
    """
    m, shift = quantize_multiplier(float(np.float32(in_scale) / np.float32(out_scale)))
    return clamp(multiply(x.astype(np.int64) - in_zero, m, shift) + out_zero, *bounds).astype(np.int8)


def table(function: Callable[[float], float], in_scale: float, in_zero: int, out_scale: float, out_zero: int) -> Array:
    """The int8 to int8 table of LOGISTIC and TANH, indexed by x + 128; every step is rounded to float32.

    r = scale * float32(x - in_zero); f = function(r);
    y = clamp(half away of float32(f * float32(1 / out_scale)) + out_zero, -128, 127).
    """
    scale, inverse = np.float32(in_scale), np.float32(1) / np.float32(out_scale)
    values = np.empty(256, np.int8)
    for i in range(256):
        real = np.float32(scale * np.float32(i - 128 - in_zero))
        scaled = np.float32(np.float32(function(float(real))) * inverse)
        values[i] = min(max(half_away(float(scaled)) + out_zero, -128), 127)
    return values


def logistic(x: float) -> float:
    """1 / (1 + exp(-x)): e = float32(exp(-x)), then one float32 addition and one division; 0 where e overflows."""
    with np.errstate(over="ignore"):
        exponential = np.float32(np.exp(np.float64(-x)))
        return float(np.float32(1) / np.float32(np.float32(1) + exponential))


# ---- Softmax -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoftmaxParameters:
    """What the host derives for SOFTMAX: a multiplier and the least difference that still counts."""

    multiplier: int
    left_shift: int
    least_difference: int

    @classmethod
    def of(cls, in_scale: float, beta: float) -> SoftmaxParameters:
        """(m, s) = quantize_multiplier(min(double(beta) * double(in) * 2**26, 2**31 - 1)), s >= 0.

        The product is evaluated from the left; beta is float32 widened. The real multiplier must exceed 1, LiteRT
        aborts otherwise. least_difference = -floor(31 * 2**26 / 2**s).
        """
        real = min(float(np.float32(beta)) * float(np.float32(in_scale)) * 2.0**26, 2.0**31 - 1)
        m, shift = quantize_multiplier(real)
        return cls(m, shift, -((31 << 26) >> shift))


def exp_on_negative(a: Array) -> Array:
    """exp(a) for a <= 0 in Q5.26, result in Q0.31 (gemmlowp): a polynomial on [-1/4, 0) and seven conditional factors.

    With "*" for srdhm: r = (a & (2**24 - 1)) - 2**24, x = (r << 5) + 2**28, x2 = x*x, x3 = x2*x, x4 = x2*x2,
    t = x + rdp(((rdp(x4, 2) + x3) * 715827883) + x2, 1), y = 1895147668 + 1895147668 * t.
    For every bit k = -2..4 set in (r - a) at position 26 + k: y = y * FACTOR[k].
    Finally exp(0) = 2**31 - 1. rdp is rounding_divide_by_power.
    """
    high, divide = saturating_rounding_doubling_high_mul, rounding_divide_by_power
    a = np.asarray(a, np.int64)
    r = (a & (2**24 - 1)) - 2**24
    x = (r << 5) + 2**28
    x2 = high(x, x)
    x3, x4 = high(x2, x), high(x2, x2)
    inner = divide(high(divide(x4, 2) + x3, 715827883) + x2, 1)
    y = 1895147668 + high(1895147668, x + inner)
    factors = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)
    for bit, factor in enumerate(factors, 24):
        y = np.where((r - a) >> bit & 1, high(y, factor), y)
    return np.where(a == 0, INT32_MAX, y)


def reciprocal(total: int) -> tuple[int, int]:
    """(1 / total in Q0.31, bits over one) for total > 0 in Q12.19 (gemmlowp: three Newton steps).

    z = leading zeros of total as uint32, bits = 12 - z, x0 = (total << z) - 2**31 (the fraction above the leading one).
    h = floor((x0 + 2**31) / 2) (the half sum with 2**31 - 1, rounded up); with "*" for srdhm, in Q2.29,
    x = 1515870810 + h * -1010580540, then three times x = x + saturate32((x * (2**29 - h * x)) << 2).
    The result is saturate32(x << 1).
    """
    high = saturating_rounding_doubling_high_mul
    zeros = 32 - total.bit_length()
    half = ((total << zeros) - 2**31 + 2**31) // 2
    x = 1515870810 + int(high(half, -1010580540))
    for _ in range(3):
        step = int(high(x, 2**29 - int(high(half, x)))) << 2
        x += min(max(step, INT32_MIN), INT32_MAX)
    return min(x << 1, INT32_MAX), 12 - zeros


def softmax(x: Array, parameters: SoftmaxParameters) -> Array:
    """SOFTMAX along the last axis; the fixed-point algorithm, integer throughout, output scale 1/256, zero point -128.

    d = x - max(x). Classes with d < least_difference give -128 and add nothing to the sum. For the others
    e = exp_on_negative(srdhm(d << left_shift, m)) in Q0.31, sum of rdp(e, 12) in Q12.19 (int32),
    (r, bits) = reciprocal(sum), y = clamp(rdp(srdhm(r, e), bits + 23) - 128, -128, 127).
    Only 256 values of d exist: the host can store e as a table of int32 indexed by -d. LiteRT ends the process with a
    failed check if bits + 23 > 31, that is where the exponentials sum to 512 or more; all such results are -128 here.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(np.int64)
    out = np.full(rows.shape, -128, np.int64)
    for row, result in zip(rows, out, strict=True):
        difference = row - row.max()
        counts = difference >= parameters.least_difference
        shifted = wrap32(np.where(counts, difference, 0) << parameters.left_shift)
        e = exp_on_negative(saturating_rounding_doubling_high_mul(shifted, parameters.multiplier))
        total = int(rounding_divide_by_power(e, 12)[counts].sum())
        inverse, bits = reciprocal(total)
        scaled = rounding_divide_by_power(saturating_rounding_doubling_high_mul(inverse, e), bits + 23)
        result[counts] = clamp(scaled - 128, -128, 127)[counts]
    return out.reshape(x.shape).astype(np.int8)


# ---- Shape ---------------------------------------------------------------------------------------------------------


def pad(x: Array, paddings: Array, value: int) -> Array:
    """PAD with the output's zero point, PADV2 with the raw int8 constant: cells before and after along every axis."""
    return np.pad(x, [tuple(pair) for pair in paddings.tolist()], constant_values=value)


# ---- A graph, operator by operator ---------------------------------------------------------------------------------


@dataclass
class Tensor:
    """A tensor of the file; scales as float32, `data` for constants."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    scales: Array
    zero_point: int
    data: Array | None

    @property
    def scale(self) -> float:
        """The one scale."""
        return float(self.scales[0])


@dataclass
class Operator:
    """An operator of the file."""

    name: str
    inputs: list[int]
    output: int
    options: Any


@dataclass
class Graph:
    """The one subgraph of a file."""

    tensors: list[Tensor] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)

    @classmethod
    def read(cls, content: bytes) -> Graph:
        """Parse a file with the schema's object interface."""
        model = schema.ModelT.InitFromPackedBuf(content, 0)
        names = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
        types = {
            number: np.dtype(name.lower())
            for name, number in vars(schema.TensorType).items()
            if name in ("FLOAT32", "INT8", "UINT8", "INT16", "INT32", "INT64")
        }
        graph, packed = cls(), model.subgraphs[0]
        for tensor in packed.tensors:
            quantization = tensor.quantization
            known = quantization is not None and quantization.scale is not None
            shape = tuple(int(size) for size in tensor.shape)
            dtype, stored = types[tensor.type], model.buffers[tensor.buffer].data
            data = None if stored is None else np.frombuffer(bytes(stored), dtype).reshape(shape)
            scales = np.asarray(quantization.scale if known else [], np.float32)
            graph.tensors.append(Tensor(shape, dtype, scales, int(quantization.zeroPoint[0]) if known else 0, data))
        for operator in packed.operators:
            name = names[model.operatorCodes[operator.opcodeIndex].builtinCode]
            inputs = [int(i) for i in operator.inputs]
            graph.operators.append(Operator(name, inputs, int(operator.outputs[0]), operator.builtinOptions))
        return graph

    def evaluate(self, operator: Operator, values: dict[int, Array]) -> Array:
        """The output of one operator from the values of its inputs; constants come from the file."""
        read = [self.tensors[i] if i >= 0 else None for i in operator.inputs]
        arrays = [
            None if tensor is None else tensor.data if tensor.data is not None else values[i]
            for i, tensor in zip(operator.inputs, read, strict=True)
        ]
        out = self.tensors[operator.output]
        result = EVALUATORS[operator.name](operator.options, read, arrays, out)
        return result.reshape(out.shape)

    def run(self, x: Array, index: int) -> dict[int, Array]:
        """All activations for one sample given to input tensor `index`."""
        values = {index: x.reshape(self.tensors[index].shape)}
        for operator in self.operators:
            values[operator.output] = self.evaluate(operator, values)
        return values


def _layer(kernel: Callable[..., Array]) -> Callable[..., Array]:
    """CONV_2D or DEPTHWISE_CONV_2D from the file's description."""

    def evaluate(chosen: Any, read: list[Tensor], arrays: list[Array], out: Tensor) -> Array:
        x, w = read[:2]
        channels = out.shape[3]
        scales = np.broadcast_to(w.scales, channels)
        return kernel(
            arrays[0][0],
            arrays[1],
            arrays[2] if len(arrays) > 2 else None,
            x.zero_point,
            out.zero_point,
            [quantize_multiplier(layer_multiplier(x.scale, scale, out.scale)) for scale in scales],
            (chosen.strideH, chosen.strideW),
            chosen.padding,
            activation_bounds(chosen.fusedActivationFunction, out.scale, out.zero_point),
        )

    return evaluate


def _dense(chosen: Any, read: list[Tensor], arrays: list[Array], out: Tensor) -> Array:
    x, w = read[:2]
    units = w.shape[0]
    reals = [layer_multiplier(x.scale, scale, out.scale) for scale in np.broadcast_to(w.scales, units)]
    bias = arrays[2] if len(arrays) > 2 else None
    bounds = activation_bounds(chosen.fusedActivationFunction, out.scale, out.zero_point)
    return fully_connected(arrays[0], arrays[1], bias, x.zero_point, out.zero_point, reals, bounds)


def _pool(kernel: Callable[..., Array]) -> Callable[..., Array]:
    def evaluate(chosen: Any, read: list[Tensor], arrays: list[Array], out: Tensor) -> Array:
        bounds = activation_bounds(chosen.fusedActivationFunction, out.scale, out.zero_point)
        window, stride = (chosen.filterHeight, chosen.filterWidth), (chosen.strideH, chosen.strideW)
        return kernel(arrays[0][0], window, stride, chosen.padding, bounds)

    return evaluate


def _mean(chosen: Any, read: list[Tensor], arrays: list[Array], out: Tensor) -> Array:
    x = read[0]
    return mean(arrays[0], arrays[1].reshape(-1).tolist(), x.zero_point, out.zero_point, x.scale, out.scale)


def _add(chosen: Any, read: list[Tensor], arrays: list[Array], out: Tensor) -> Array:
    a, b = read
    bounds = activation_bounds(chosen.fusedActivationFunction, out.scale, out.zero_point)
    zeros = (a.zero_point, b.zero_point, out.zero_point)
    return add(arrays[0], arrays[1], zeros, add_multipliers(a.scale, b.scale, out.scale), bounds)


def _mul(chosen: Any, read: list[Tensor], arrays: list[Array], out: Tensor) -> Array:
    a, b = read
    bounds = activation_bounds(chosen.fusedActivationFunction, out.scale, out.zero_point)
    zeros = (a.zero_point, b.zero_point, out.zero_point)
    return mul(arrays[0], arrays[1], zeros, mul_multiplier(a.scale, b.scale, out.scale), bounds)


def _quantize(chosen: Any, read: list[Tensor], arrays: list[Array], out: Tensor) -> Array:
    x = read[0]
    if x.dtype == np.float32:
        return quantize(arrays[0], out.scale, out.zero_point)
    return requantize(arrays[0], x.scale, x.zero_point, out.scale, out.zero_point, out.dtype)


def _relu(fused: int) -> Callable[..., Array]:
    def evaluate(chosen: Any, read: list[Tensor], arrays: list[Array], out: Tensor) -> Array:
        x = read[0]
        bounds = activation_bounds(fused, out.scale, out.zero_point)
        return relu(arrays[0], x.scale, x.zero_point, out.scale, out.zero_point, bounds)

    return evaluate


def _table(function: Callable[[float], float]) -> Callable[..., Array]:
    def evaluate(chosen: Any, read: list[Tensor], arrays: list[Array], out: Tensor) -> Array:
        x = read[0]
        return table(function, x.scale, x.zero_point, out.scale, out.zero_point)[arrays[0].astype(np.int64) + 128]

    return evaluate


EVALUATORS: dict[str, Callable[..., Array]] = {
    "CONV_2D": _layer(conv_2d),
    "DEPTHWISE_CONV_2D": _layer(depthwise_conv_2d),
    "FULLY_CONNECTED": _dense,
    "AVERAGE_POOL_2D": _pool(average_pool_2d),
    "MAX_POOL_2D": _pool(max_pool_2d),
    "MEAN": _mean,
    "ADD": _add,
    "MUL": _mul,
    "PAD": lambda chosen, read, arrays, out: pad(arrays[0], arrays[1], out.zero_point),
    "PADV2": lambda chosen, read, arrays, out: pad(arrays[0], arrays[1], int(arrays[2].item())),
    "CONCATENATION": lambda chosen, read, arrays, out: np.concatenate(arrays, axis=chosen.axis),
    "RESHAPE": lambda chosen, read, arrays, out: arrays[0],
    "SOFTMAX": lambda chosen, read, arrays, out: softmax(arrays[0], SoftmaxParameters.of(read[0].scale, chosen.beta)),
    "QUANTIZE": _quantize,
    "DEQUANTIZE": lambda chosen, read, arrays, out: dequantize(arrays[0], read[0].scale, read[0].zero_point),
    "RELU": _relu(RELU),
    "RELU6": _relu(RELU6),
    "RELU_N1_TO_1": _relu(RELU_N1_TO_1),
    "LOGISTIC": _table(logistic),
    "TANH": _table(math.tanh),
}


# ---- The comparison ------------------------------------------------------------------------------------------------


def samples(shape: Sequence[int], dtype: np.dtype[Any], random: np.random.Generator, count: int) -> list[Array]:
    """Inputs for a model: random ones, a checkerboard of extremes, a ramp, and constant extremes.

    No constants for 512 values or more: the reference softmax of so many equal classes ends the process.
    """
    size = int(np.prod(shape))
    if dtype == np.float32:
        drawn = [random.normal(0, 10.0 ** random.uniform(-1, 1.5), size) for _ in range(count)]
        extremes = [np.full(size, 4e6), np.full(size, -4e6), np.resize([0.05, -0.05, 0.15, -3e5], size)]
        return [values.astype(np.float32).reshape(shape) for values in drawn + extremes]
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    drawn = [random.integers(low, high + 1, size) for _ in range(count)]
    drawn[1::3] = [np.clip(random.normal((low + high) / 2, 20, size), low, high).astype(int) for _ in drawn[1::3]]
    extremes = [np.resize([low, high], size), np.resize(np.arange(low, high + 1), size)]
    if shape[-1] < 512:
        extremes += [np.full(size, low), np.full(size, high)]
    return [values.astype(dtype).reshape(shape) for values in drawn + extremes]


def compare(content: bytes, seed: int, count: int, totals: dict[str, list[int]]) -> int:
    """Compare each operator of a model and the whole model; adds to `totals`, returns how many elements differ."""
    from tflite_oracle import Oracle

    oracle, graph, wrong = Oracle(content, intermediates=True), Graph.read(content), 0
    border = oracle.details.input
    for x in samples(border.shape, border.dtype, np.random.default_rng(seed), count):
        reference = oracle.intermediate(x)
        for operator in graph.operators:
            expected = reference[operator.output]
            got = graph.evaluate(operator, reference)
            differing = int(np.count_nonzero(got != expected)) if got.dtype == expected.dtype else expected.size
            entry = totals.setdefault(operator.name, [0, 0, 0])
            entry[0] += 1
            entry[1] += expected.size
            entry[2] += differing
            wrong += differing
        whole = graph.run(x, border.index)[oracle.details.output.index]
        entry = totals.setdefault("whole model", [0, 0, 0])
        differing = int(np.count_nonzero(whole != reference[oracle.details.output.index]))
        entry[0] += 1
        entry[1] += whole.size
        entry[2] += differing
        wrong += differing
    return wrong


def main() -> int:
    """Compare all operator models and 100 random ones, print a table, and say which models differ."""
    from tflite_models import operator_models, random_model

    totals: dict[str, list[int]] = {}
    models = [*operator_models(), *((f"random_{seed}", random_model(seed)) for seed in range(100))]
    for number, (name, content) in enumerate(models):
        wrong = compare(content, number, 6 if name.startswith("random") else 12, totals)
        if wrong:
            print(f"{name}: {wrong} elements differ")
    print(f"{len(models)} models\n{'operator':20s}{'runs':>8s}{'elements':>12s}{'differing':>11s}")
    for name, (runs, elements, differing) in sorted(totals.items()):
        print(f"{name:20s}{runs:8d}{elements:12d}{differing:11d}")
    return 1 if any(entry[2] for entry in totals.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
