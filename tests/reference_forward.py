"""The operators of imported networks, record by record: exact integers, as the comments of ul_format.h define them.

Where numpy adds many products it does so in int64: |x| <= 255, |w| <= 2^15 and fewer than 2^30 taps keep every sum
below 2^53.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from reference_arithmetic import (
    clamp,
    high_product,
    requantise,
    round_half_away,
    round_half_up,
    saturate,
    wq,
    wrap_int32,
)
from reference_plan import DTYPE_INT8, DTYPE_INT16, DTYPE_UINT8, ROUND_DOUBLE, ROUND_SINGLE

if TYPE_CHECKING:
    from reference import Machine
    from reference_plan import Operand, Record

CONV, DEPTHWISE, AVERAGE_POOL, MAX_POOL, MEAN, ADD, MUL, PAD, COPY, TABLE, SOFTMAX = range(16, 27)
CONV_TRAINED, DEPTHWISE_TRAINED, MASK = range(27, 30)
INT8_MIN, INT8_MAX = -128, 127
ADD_SCALE = 2**20  # both summands of ADD, before they are rounded


# ---- Windows: what lies under the kernel -----------------------------------------------------------------------------


def read_image(machine: Machine, record: Record, operand: int = 0) -> np.ndarray:
    """x[i][j][c]"""
    x = machine.read(record.operands[operand], "b", elements(record))
    return np.array(x, np.int64).reshape(record.in_h, record.in_w, record.in_c)


def output_positions(record: Record) -> Iterator[tuple[int, int]]:
    """(oi, oj) of every window, row by row"""
    return product(range(record.out_h), range(record.out_w))


def cells_inside(record: Record, oi: int, oj: int) -> Iterator[tuple[int, int, int, int]]:
    """(ki, kj, i, j): the cells of the kernel at (oi, oj) that lie on x[i][j], without those beyond its borders"""
    for ki, kj in product(range(record.kernel_h), range(record.kernel_w)):
        i = oi * record.stride_h - record.pad_top + ki
        j = oj * record.stride_w - record.pad_left + kj
        if 0 <= i < record.in_h and 0 <= j < record.in_w:
            yield ki, kj, i, j


def padded_window(x: np.ndarray, record: Record, oi: int, oj: int) -> np.ndarray:
    """[kernel_h][kernel_w][in_c]: x under the kernel, zero_in where that hangs over the border"""
    window = np.full((record.kernel_h, record.kernel_w, record.in_c), record.zero_in, np.int64)
    for ki, kj, i, j in cells_inside(record, oi, oj):
        window[ki, kj] = x[i, j]
    return window


# ---- Weights as they are stored --------------------------------------------------------------------------------------


def weight_code(record: Record) -> str:
    """The struct code of weights that are trained."""
    if record.w_dtype == DTYPE_INT8:
        return "b"
    if record.w_dtype == DTYPE_INT16:
        return "h"
    raise ValueError(f"record: weights of type {record.w_dtype}, expected {DTYPE_INT8} or {DTYPE_INT16}")


def read_trained_rows(
    machine: Machine, record: Record, operand: Operand | None, rows: int, taps: int, finer: int = 0
) -> np.ndarray:
    """wq(w[n][k]) as [rows][taps], or wz with so many of the fraction bits left"""
    fraction = record.fraction % 16 - finer if record.w_dtype == DTYPE_INT16 else 0
    stored = machine.read(operand, weight_code(record), rows * taps)
    return np.array([wq(w, fraction) for w in stored], np.int64).reshape(rows, taps)


def read_byte_rows(machine: Machine, operand: Operand | None, rows: int, taps: int) -> np.ndarray:
    """Weights, byte - 128, as [rows][taps]. Rows are stored in a multiple of 4 bytes; what lies behind has no say."""
    row = -(-taps // 4) * 4
    stored = np.array(machine.read(operand, "B", rows * row), np.int64).reshape(rows, row)
    return stored[:, :taps] - 128


def read_int8_rows(machine: Machine, operand: Operand | None, rows: int, taps: int) -> np.ndarray:
    """Weights as [rows][taps]"""
    return np.array(machine.read(operand, "b", rows * taps), np.int64).reshape(rows, taps)


def taps_of(record: Record, channels: int) -> int:
    """K: how many weights a row has whose kernel sees so many channels."""
    return record.kernel_h * record.kernel_w * channels


# ---- Layers with weights ---------------------------------------------------------------------------------------------


def conv(machine: Machine, record: Record) -> None:
    """acc[n] = bias[n] + sum over the kernel of x[i][j][c] * w[n][ki][kj][c]; the first N of M channels"""
    if record.w_dtype != DTYPE_UINT8:
        raise ValueError(f"conv: weights of type {record.w_dtype}, expected {DTYPE_UINT8}")
    x = read_image(machine, record)
    weights = read_byte_rows(machine, record.operands[2], record.out_c, taps_of(record, record.in_c))
    sums = [weights @ padded_window(x, record, oi, oj).reshape(-1) for oi, oj in output_positions(record)]
    finish_layer(machine, record, sums, record.scale_mant or record.out_c, 0)


def conv_trained(machine: Machine, record: Record) -> None:
    """acc[n] = bias[n] + coarse(sum over the kernel of (x - zero_in) * wz(w[n][ki][kj][c])); last N of M channels"""
    finer = record.fraction // 16
    weights = read_trained_rows(machine, record, record.operands[2], record.out_c, taps_of(record, record.in_c), finer)
    sums = [coarse(weights @ window.reshape(-1), finer) for window in centred_windows(machine, record)]
    finish_layer(machine, record, sums, record.scale_mant, record.scale_mant - record.out_c)


def coarse(sums: np.ndarray, finer: int) -> np.ndarray:
    """floor(sum / 2^z + 1/2)"""
    return np.array([round_half_up(int(s), 2**finer) for s in sums.reshape(-1)], np.int64).reshape(sums.shape)


def centred_windows(machine: Machine, record: Record, operand: int = 0) -> list[np.ndarray]:
    """x - zero_in under the kernel at every position, 0 where that hangs over the border"""
    x = read_image(machine, record, operand)
    return [padded_window(x, record, oi, oj) - record.zero_in for oi, oj in output_positions(record)]


def depthwise(machine: Machine, record: Record) -> None:
    """acc[n] = bias[n] + sum over the kernel of x[i][j][n / m] * w[n][ki][kj], where N = m * in_c"""
    if record.w_dtype != DTYPE_INT8:
        raise ValueError(f"depthwise: weights of type {record.w_dtype}, expected {DTYPE_INT8}")
    x = read_image(machine, record)
    weights = read_int8_rows(machine, record.operands[2], record.out_c, taps_of(record, 1))
    windows = [padded_window(x, record, oi, oj) for oi, oj in output_positions(record)]
    finish_depthwise(machine, record, windows, weights)


def depthwise_trained(machine: Machine, record: Record) -> None:
    """acc[n] = bias[n] + coarse(sum over the kernel of (x[i][j][n / m] - zero_in) * wz(w[n][ki][kj])), N = m * in_c"""
    expect_rounding(record, ROUND_DOUBLE)
    finer = record.fraction // 16
    weights = read_trained_rows(machine, record, record.operands[2], record.out_c, taps_of(record, 1), finer)
    finish_depthwise(machine, record, centred_windows(machine, record), weights, finer)


def finish_depthwise(
    machine: Machine, record: Record, windows: Sequence[np.ndarray], weights: np.ndarray, finer: int = 0
) -> None:
    """Each channel n sees the input channel n / m of the windows alone."""
    if record.scale_mant != 0:
        raise ValueError("depthwise: all channels are written, scale_mant has to be 0")
    seen = [by_output_channel(window, record) for window in windows]
    finish_layer(machine, record, [coarse(np.sum(taps * weights, axis=1), finer) for taps in seen], record.out_c, 0)


def by_output_channel(window: np.ndarray, record: Record) -> np.ndarray:
    """[N][kernel_h * kernel_w]: what the channels of a depthwise layer see of a window"""
    m = multiplicity(record)
    input_channel = [n // m for n in range(record.out_c)]
    return window.reshape(taps_of(record, 1), record.in_c).T[input_channel]


def multiplicity(record: Record) -> int:
    """m, how many output channels read each input channel of a depthwise layer"""
    if record.in_c == 0 or record.out_c % record.in_c:
        raise ValueError(f"depthwise: {record.out_c} output channels are no multiple of {record.in_c} input channels")
    return record.out_c // record.in_c


def finish_layer(machine: Machine, record: Record, sums: Sequence[np.ndarray], channels: int, first: int) -> None:
    """y = clamp(round(bias[n] + sum, multiplier[n], shift[n]) + zero_out, act_min, act_max), position by position, in N
    channels of y from `first` on; the others stay"""
    if not 0 <= first <= channels - record.out_c:
        raise ValueError(f"record: channels {first} + {record.out_c} lie outside the {channels} of y")
    bias = machine.read(record.operands[3], "i", record.out_c)
    scales = machine.read_scales(record)
    y = []
    for position in sums:
        accs = [wrap_int32(bias[n] + exact) for n, exact in enumerate(position.tolist())]
        y.append([activation(record, scales[n].round(acc)) for n, acc in enumerate(accs)])
    for p, values in enumerate(y):
        machine.write(record.operands[1], "b", values, p * channels + first)


def activation(record: Record, rounded: int) -> int:
    return clamp(rounded + record.zero_out, record.act_min, record.act_max)


def expect_rounding(record: Record, *expected: int) -> None:
    if record.rounding not in expected:
        raise ValueError(f"record: type {record.op} has rounding {record.rounding}, expected {expected}")


# ---- Pooling ---------------------------------------------------------------------------------------------------------


def pool(machine: Machine, record: Record, summary: Callable[[Sequence[int]], int]) -> None:
    """y = clamp(summary of the cells inside, act_min, act_max), channel by channel"""
    if record.out_c != record.in_c:
        raise ValueError(f"pool: {record.out_c} output channels, expected {record.in_c}")
    x = read_image(machine, record)
    y = []
    for oi, oj in output_positions(record):
        cells = [x[i, j].tolist() for _, _, i, j in cells_inside(record, oi, oj)]
        if not cells:
            raise ValueError(f"pool: the window at {oi}, {oj} has no cell inside")
        y += [clamp(summary(channel), record.act_min, record.act_max) for channel in zip(*cells, strict=True)]
    machine.write(record.operands[1], "b", y)


def average_pool(machine: Machine, record: Record) -> None:
    """The sum of the cells / their number, halves away from zero"""
    pool(machine, record, lambda cells: round_half_away(sum(cells), len(cells)))


def max_pool(machine: Machine, record: Record) -> None:
    """The largest of the cells"""
    pool(machine, record, max)


def mean(machine: Machine, record: Record) -> None:
    """y[c] = clamp(round(sum over i, j of (x[i][j][c] - zero_in)) + zero_out, act_min, act_max)"""
    expect_rounding(record, ROUND_DOUBLE)
    x = read_image(machine, record)
    multiplier, shift = machine.read(record.operands[2], "i", 2)
    sums = np.sum(x - record.zero_in, axis=(0, 1)).tolist()
    y = [activation(record, requantise(exact, multiplier, shift, ROUND_DOUBLE)) for exact in sums]
    machine.write(record.operands[1], "b", y)


# ---- Element by element ----------------------------------------------------------------------------------------------


def add(machine: Machine, record: Record) -> None:
    """s = round((a - zero_in) * 2^20, of a) + round((b - zero_b) * 2^20, of b)
    y = clamp(round(s, of the sum) + zero_out, act_min, act_max)"""
    expect_rounding(record, ROUND_DOUBLE)
    a, b = read_pair(machine, record)
    zero_b, *scales = machine.read(record.operands[3], "i", 7)
    zero_b = clamp(zero_b, INT8_MIN, INT8_MAX)
    of_a, of_b, of_sum = zip(scales[0::2], scales[1::2], strict=True)  # multiplier and shift of each
    y = []
    for i in range(len(a)):
        s = requantise((a[i] - record.zero_in) * ADD_SCALE, *of_a, ROUND_DOUBLE)
        s += requantise((b[i] - zero_b) * ADD_SCALE, *of_b, ROUND_DOUBLE)
        y.append(activation(record, requantise(s, *of_sum, ROUND_DOUBLE)))
    machine.write(record.operands[1], "b", y)


def mul(machine: Machine, record: Record) -> None:
    """y = clamp(round((a - zero_in) * (b - zero_b)) + zero_out, act_min, act_max)"""
    expect_rounding(record, ROUND_SINGLE, ROUND_DOUBLE)
    a, b = read_pair(machine, record)
    zero_b, multiplier, shift = machine.read(record.operands[3], "i", 3)
    zero_b = clamp(zero_b, INT8_MIN, INT8_MAX)
    y = []
    for i in range(len(a)):
        exact = (a[i] - record.zero_in) * (b[i] - zero_b)
        y.append(activation(record, requantise(exact, multiplier, shift, record.rounding)))
    machine.write(record.operands[1], "b", y)


def read_pair(machine: Machine, record: Record) -> tuple[list[int], list[int]]:
    """a[n] and b, which repeats: b[i mod extra]"""
    n = elements(record)
    if record.extra == 0:
        raise ValueError("record: the second operand has no element")
    b = machine.read(record.operands[2], "b", record.extra)
    return machine.read(record.operands[0], "b", n), [b[i % record.extra] for i in range(n)]


def table(machine: Machine, record: Record) -> None:
    """y = table[x + 128]"""
    entries = machine.read(record.operands[2], "b", 256)
    x = machine.read(record.operands[0], "b", elements(record))
    machine.write(record.operands[1], "b", [entries[value + 128] for value in x])


def mask(machine: Machine, record: Record) -> None:
    """Bit i mod 8 of byte i / 8 says x[i] != act_min."""
    x = machine.read(record.operands[0], "b", elements(record))
    packed = [0] * ((len(x) + 7) // 8)
    for i, value in enumerate(x):
        packed[i // 8] += (value != record.act_min) * 2 ** (i % 8)
    machine.write(record.operands[1], "B", packed)


def elements(record: Record) -> int:
    """n of the records that go element by element"""
    return record.in_h * record.in_w * record.in_c


# ---- Softmax ---------------------------------------------------------------------------------------------------------


def softmax(machine: Machine, record: Record) -> None:
    """y = 256 * softmax(x) - 128 of each row of in_c numbers by itself"""
    if not 1 <= record.in_c < 8192:
        raise ValueError(f"softmax: rows of {record.in_c}, expected 1..8191")
    exponential = machine.read(record.operands[2], "i", record.extra)  # of -d in units of 2^-31
    x = machine.read(record.operands[0], "b", elements(record))
    y = []
    for begin in range(0, len(x), record.in_c):
        y += softmax_row(x[begin : begin + record.in_c], exponential)
    machine.write(record.operands[1], "b", y)


def softmax_row(x: Sequence[int], exponential: Sequence[int]) -> list[int]:
    """y[c] = r * e[c] / 2^(35 - z) - 128, with r in units of 2^-31 being 1 / S, normalised; -128 beyond the table"""
    distance = [max(x) - value for value in x]
    total = sum(round_half_away(exponential[d], 2**12) for d in distance if d < len(exponential)) % 2**32
    if total == 0:
        return [INT8_MIN for _ in x]
    z = 32 - total.bit_length()
    if 35 - z > 31:
        return [INT8_MIN for _ in x]
    r = reciprocal(total * 2**z // 2)
    y = []
    for d in distance:
        if d < len(exponential):
            scaled = round_half_away(high_product(r, exponential[d]), 2 ** (35 - z))
            y.append(clamp(scaled + INT8_MIN, INT8_MIN, INT8_MAX))
        else:
            y.append(INT8_MIN)
    return y


def reciprocal(h: int) -> int:
    """2^61 / h, nearly, for h from 2^30 to 2^31 - 1: three of Newton's steps on the way from 48/17 - 32/17 * h"""
    r = 1515870810 + high_product(h, -1010580540)
    for _ in range(3):
        r += saturate(4 * high_product(r, 2**29 - high_product(h, r)))
    return saturate(2 * r)


# ---- Moving ----------------------------------------------------------------------------------------------------------


def pad(machine: Machine, record: Record) -> None:
    """x at row pad_top, column pad_left, channel extra of y, and zero_in everywhere else"""
    x = read_image(machine, record)
    y = np.full((record.out_h, record.out_w, record.out_c), record.zero_in, np.int64)
    corner = (record.pad_top, record.pad_left, record.extra)
    for begin, length, room in zip(corner, x.shape, y.shape, strict=True):
        if begin + length > room:
            raise ValueError(f"pad: {begin} + {length} reach beyond {room}")
    place = tuple(slice(begin, begin + length) for begin, length in zip(corner, x.shape, strict=True))
    y[place] = x
    machine.write(record.operands[1], "b", y.reshape(-1).tolist())


def copy(machine: Machine, record: Record) -> None:
    """Each row of x, in_w * in_c bytes, to the bytes from extra on of its row of y; the rest of y stays as it is."""
    length, row = record.in_w * record.in_c, record.out_w * record.out_c
    if record.extra + length > row:
        raise ValueError(f"copy: {record.extra} + {length} reach beyond {row}")
    x = machine.read(record.operands[0], "b", record.in_h * length)
    for i in range(record.in_h):
        machine.write(record.operands[1], "b", x[i * length : (i + 1) * length], i * row + record.extra)


FORWARD: dict[int, Callable[[Machine, Record], None]] = {
    CONV: conv,
    DEPTHWISE: depthwise,
    AVERAGE_POOL: average_pool,
    MAX_POOL: max_pool,
    MEAN: mean,
    ADD: add,
    MUL: mul,
    PAD: pad,
    COPY: copy,
    TABLE: table,
    SOFTMAX: softmax,
    CONV_TRAINED: conv_trained,
    DEPTHWISE_TRAINED: depthwise_trained,
    MASK: mask,
}
