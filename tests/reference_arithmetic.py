"""The arithmetic that records share: exact integers, every rounding as the mathematical statement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reference_plan import ROUND_AWAY, ROUND_DOUBLE, ROUND_SINGLE

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def clamp(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))


def round_half_up(numerator: int, denominator: int) -> int:
    """floor(numerator / denominator + 1/2) for a denominator above 0"""
    return (2 * numerator + denominator) // (2 * denominator)


def round_half_away(numerator: int, denominator: int) -> int:
    """numerator / denominator for a denominator above 0, halves rounded away from zero"""
    size = round_half_up(abs(numerator), denominator)
    return -size if numerator < 0 else size


def max_abs(values: Sequence[int]) -> int:
    return max((abs(value) for value in values), default=0)


def wrap_int32(value: int) -> int:
    """The number from -2^31 to 2^31 - 1 that equals value mod 2^32."""
    return (value + 2**31) % 2**32 - 2**31


def rshift(p: int, s: int) -> int:
    """floor(p / 2^s + 1/2), cut to +-2^30; 0 for s > 62"""
    if s > 62:
        return 0
    exact = p * 2**-s if s <= 0 else round_half_up(p, 2**s)
    return clamp(exact, -(2**30), 2**30)


def wq(weight: int, fraction: int) -> int:
    """The weight that layers compute with: weight / 2^fraction, rounded half up. int8 weights have fraction 0."""
    return round_half_up(weight, 2**fraction)


def saturate(value: int) -> int:
    return clamp(value, INT32_MIN, INT32_MAX)


def high_product(a: int, b: int) -> int:
    """floor((a * b + 2^30) / 2^31), saturated to 32 bits"""
    return saturate((a * b + 2**30) // 2**31)


@dataclass(frozen=True)
class Gradient:
    """Real value of element n: mantissas[n] * 2^exponent."""

    exponent: int
    mantissas: list[int]


def top(narrow: bool) -> int:
    """The largest mantissa of a gradient."""
    return 127 if narrow else 2047


def bits(narrow: bool) -> int:
    """bitlen of the largest mantissa"""
    return top(narrow).bit_length()


@dataclass(frozen=True)
class Scale:
    """What a channel's sums are multiplied by: multiplier * 2^(shift - 31), and how the product is rounded."""

    multiplier: int
    lower: int  # with AWAY: 16 bits more of the multiplier
    shift: int
    rounding: int

    def round(self, acc: int) -> int:
        return requantise(acc, self.multiplier, self.shift, self.rounding, self.lower)


def requantise(acc: int, multiplier: int, shift: int, rounding: int, lower: int = 0) -> int:
    """acc * multiplier * 2^(shift - 31) in 32 bits, with the rounding that the record names; shift is cut to -31..30.
    The rounding AWAY has a lower part of the multiplier besides."""
    shift = clamp(shift, -31, 30)
    if rounding == ROUND_SINGLE:
        return single_rounding(acc, multiplier, shift)
    if rounding == ROUND_DOUBLE:
        return double_rounding(acc, multiplier, shift)
    if rounding == ROUND_AWAY:
        return away_rounding(acc, multiplier, lower, shift)
    raise ValueError(f"rounding {rounding} is refused, expected {ROUND_SINGLE}, {ROUND_DOUBLE} or {ROUND_AWAY}")


def single_rounding(acc: int, multiplier: int, shift: int) -> int:
    """floor((acc * multiplier + 2^(30 - shift)) / 2^(31 - shift)), saturated to 32 bits"""
    return saturate((acc * multiplier + 2 ** (30 - shift)) // 2 ** (31 - shift))


def double_rounding(acc: int, multiplier: int, shift: int) -> int:
    """h = floor((a * multiplier + 2^30) / 2^31), saturated, where a = acc * 2^left mod 2^32; then h / 2^right, halves
    away from zero"""
    left, right = max(shift, 0), max(-shift, 0)
    return round_half_away(high_product(wrap_int32(acc * 2**left), multiplier), 2**right)


def away_rounding(acc: int, upper: int, lower: int, shift: int) -> int:
    """sign(acc) * floor((P + 2^(30 - shift)) / 2^(31 - shift)), saturated to 32 bits, where
    P = a * upper + floor(a * lower / 2^16) and a = |acc|, at most 2^31 - 1"""
    lower %= 2**16
    a = min(abs(acc), INT32_MAX)
    p = a * upper + a * lower // 2**16
    size = (p + 2 ** (30 - shift)) // 2 ** (31 - shift)
    return saturate(-size if acc < 0 else size)


def log2q(value: int) -> int:
    """1024 * log2(value), cut off, from the 16 leading bits of the value: ten squarings, one bit each."""
    n = value.bit_length() - 1
    x = value * 2**15 // 2**n
    result = n
    for _ in range(10):
        x = x * x // 2**15
        bit = x // 2**16
        x = x // 2 if bit else x
        result = 2 * result + bit
    return result


def mul11(a: int, b: int) -> tuple[int, int]:
    """(m, e) with a * b ~ m * 2^e and m in 1024..2047, for a and b in 1024..2047; (0, 0) where one of them is 0."""
    product = a * b
    if product == 0:
        return 0, 0
    exponent = 11 if product >= 2**21 else 10
    mantissa = round_half_up(product, 2**exponent)
    if mantissa == 2048:
        return 1024, exponent + 1
    return mantissa, exponent


def xorshift32(x: int) -> int:
    x ^= x * 2**13 % 2**32
    x ^= x // 2**17
    x ^= x * 2**5 % 2**32
    return x


def mix(v: int) -> int:
    """A number whose bits all depend on all bits of v, 32 of them: what turns a counter into random draws."""
    v ^= v // 2**16
    v = v * 0x7FEB352D % 2**32
    v ^= v // 2**15
    v = v * 0x846CA68B % 2**32
    return v ^ v // 2**16


def stochastic_rshift(p: int, s: int, r: int) -> int:
    """p / 2^s, rounded up with a probability equal to the fraction that is cut off, then cut to +-2^30; r is uniform
    in 0..2^32 - 1."""
    if s <= 0:
        return rshift(p, s)
    if s > 30:
        p //= 2 ** min(s - 30, 62)
        s = 30
    return clamp((p + r // 2 ** (32 - s)) // 2**s, -(2**30), 2**30)
