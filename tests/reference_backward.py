"""The records of a backward pass: gradients at a layer's input, and updates of what is trained.

"out" is the side of the loss, "in" the side of the network's input. Where numpy adds many products it does so in int64:
|g| <= 2047, |w| <= 2^15 and fewer than 2^27 summands keep every sum below 2^53; AVERAGE_BACK, whose shares have up to
31 bits and whose windows overlap at most 2^16 times, stays below 2^58.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from reference_arithmetic import (
    INT32_MAX,
    Gradient,
    bits,
    clamp,
    max_abs,
    mix,
    mul11,
    round_half_up,
    rshift,
    stochastic_rshift,
    top,
    xorshift32,
)
from reference_forward import (
    by_output_channel,
    cells_inside,
    centred_windows,
    elements,
    multiplicity,
    output_positions,
    read_byte_rows,
    read_image,
    read_int8_rows,
    read_trained_rows,
    taps_of,
    weight_code,
)
from reference_plan import DTYPE_INT8, FLAG_BITS
from reference_state import add_state, get_state, learned_gain, set_state

if TYPE_CHECKING:
    from reference import Machine
    from reference_plan import Record

DENSE_BACK, UPDATE_WEIGHT, UPDATE_BIAS = range(5, 8)
CONV_BACK, DEPTHWISE_BACK, UPDATE_CONV, UPDATE_DEPTHWISE, AVERAGE_BACK, MAX_BACK = range(32, 38)
SCALE_BACK, CROP, SUM, RELU_BACK = range(38, 42)
EXPONENT_MAX = 8192
GRADIENT_HEADER = 4
BIAS_MAX = 2**30 - 1
Cells = Sequence[tuple[int, int]]  # (i, j) of a window's cells inside, row by row
GOLDEN = 2654435769  # 2^32 divided by the golden ratio: the step of the random draws' counter


# ---- What they share -------------------------------------------------------------------------------------------------


def read_out(machine: Machine, record: Record, count: int) -> Gradient:
    return machine.read_gradient(record.operands[0], count, record.narrow_out)


def read_out_image(machine: Machine, record: Record, channels: int) -> tuple[int, np.ndarray]:
    """The exponent, and mantissa[oi][oj][n]"""
    out = read_out(machine, record, record.out_h * record.out_w * channels)
    return out.exponent, np.array(out.mantissas, np.int64).reshape(record.out_h, record.out_w, channels)


def write_in(machine: Machine, record: Record, exponent: int, exact: Sequence[int]) -> None:
    """gradient_in of numbers that may exceed the range: cut off, and counted"""
    largest = top(record.narrow_in)
    mantissas = [clamp(value, -largest, largest) for value in exact]
    gradient = Gradient(clamp(exponent, -EXPONENT_MAX, EXPONENT_MAX), mantissas)
    machine.write_gradient(record.operands[1], gradient, record.narrow_in)
    add_state(machine.state, "saturated", sum(abs(value) > largest for value in exact))


def at_one_position(record: Record) -> Record:
    """A dense layer has K inputs and N outputs; heights and widths of its records have no say."""
    return replace(record, in_h=1, in_w=1, out_h=1, out_w=1)


def expect_alike(record: Record) -> None:
    if record.narrow_in != record.narrow_out:
        raise ValueError(f"record: type {record.op} has gradients of two widths")


def expect_same_size(record: Record) -> int:
    """n of records that go element by element"""
    n = elements(record)
    if n != record.out_h * record.out_w * record.out_c:
        raise ValueError(f"record: type {record.op} has an output of another size than its input")
    return n


# ---- Layers with weights: the gradient at their input ----------------------------------------------------------------


def layer_back(machine: Machine, record: Record, adjoint: Callable[[np.ndarray], np.ndarray]) -> None:
    """gradient_in = adjoint of gradient_out * channel_scale, whose [out_h][out_w][N] integers are g"""
    exponent, mantissas = read_out_image(machine, record, record.out_c)
    scale = machine.read(record.operands[3], "H", record.out_c)
    flat = mantissas.reshape(-1).tolist()
    g = [round_half_up(mantissa * scale[i % record.out_c], 65536) for i, mantissa in enumerate(flat)]
    if max_abs(g) == 0:
        write_in(machine, record, 0, [0] * elements(record))
        return
    acc = adjoint(np.array(g, np.int64).reshape(mantissas.shape)).reshape(-1).tolist()
    if max_abs(acc) > INT32_MAX:
        raise ValueError("layer_back: an accumulator needs more than 32 bits, which the host's bounds rule out")
    b = max_abs(g).bit_length()
    gain = learned_gain(machine.state, record.gain, max_abs(acc).bit_length(), b)
    s = clamp(b + gain + 1 - bits(record.narrow_in), 0, 30)
    write_in(machine, record, exponent + record.scale_exp + s, [rshift(value, s) for value in acc])


def read_mixed_rows(machine: Machine, record: Record, taps: int) -> np.ndarray:
    """[N][taps]: the first N - T rows are frozen bytes, the last T = extra trained ones"""
    trained = record.extra
    if trained > record.out_c:
        raise ValueError(f"record: {trained} of {record.out_c} rows are trained")
    rows = []
    if trained < record.out_c:
        rows.append(read_byte_rows(machine, record.operands[2], record.out_c - trained, taps))
    if trained > 0:
        rows.append(read_trained_rows(machine, record, record.operands[5], trained, taps))
    return np.concatenate(rows)


def dense_back(machine: Machine, record: Record) -> None:
    """gradient_in[k] = sum_n gradient_out[n] * channel_scale[n] * wq(w[n][k])"""
    record = at_one_position(record)
    weights = read_mixed_rows(machine, record, record.in_c)
    layer_back(machine, record, lambda g: g.reshape(-1) @ weights)


def conv_back(machine: Machine, record: Record) -> None:
    """acc[i][j][c] = sum over n, ki, kj, oi, oj that meet at i, j of g[oi][oj][n] * wq(w[n][ki][kj][c])"""
    weights = read_mixed_rows(machine, record, taps_of(record, record.in_c))

    def adjoint(g: np.ndarray) -> np.ndarray:
        acc = np.zeros((record.in_h, record.in_w, record.in_c), np.int64)
        for oi, oj in output_positions(record):
            window = (g[oi, oj] @ weights).reshape(record.kernel_h, record.kernel_w, record.in_c)
            for ki, kj, i, j in cells_inside(record, oi, oj):
                acc[i, j] += window[ki, kj]
        return acc

    layer_back(machine, record, adjoint)


def depthwise_back(machine: Machine, record: Record) -> None:
    """acc[i][j][c] = sum over n, ki, kj, oi, oj that meet at i, j, n / m = c, of g[oi][oj][n] * wq(w[n][ki][kj])"""
    m = multiplicity(record)
    taps = taps_of(record, 1)
    if record.extra == 0:
        rows = read_int8_rows(machine, record.operands[2], record.out_c, taps)
    elif record.extra == record.out_c:
        rows = read_trained_rows(machine, record, record.operands[5], record.out_c, taps)
    else:
        raise ValueError(f"depthwise_back: {record.extra} of {record.out_c} rows are trained, expected all or none")
    weights = rows.reshape(record.out_c, record.kernel_h, record.kernel_w)

    def adjoint(g: np.ndarray) -> np.ndarray:
        acc = np.zeros((record.in_h, record.in_w, record.in_c), np.int64)
        for oi, oj in output_positions(record):
            for ki, kj, i, j in cells_inside(record, oi, oj):
                acc[i, j] += (g[oi, oj] * weights[:, ki, kj]).reshape(record.in_c, m).sum(axis=1)
        return acc

    layer_back(machine, record, adjoint)


# ---- Updates ---------------------------------------------------------------------------------------------------------


def update_factor(state: bytes | bytearray, record: Record, exponent_out: int, entry: int) -> tuple[int, int]:
    """(m, s): learning rate * scale of the record * reciprocal of the channel's weight scale * 2^exponent_out
    = m * 2^-s"""
    m, i = mul11(record.scale_mant, get_state(state, "lr_mant"))
    m, j = mul11(m, 1024 + entry % 1024)
    return m, -(exponent_out + record.scale_exp + get_state(state, "lr_exp") + i + j + entry // 1024)


def read_own_channels(machine: Machine, record: Record) -> tuple[int, np.ndarray]:
    """The exponent, and mantissa[oi][oj][n] of the last N of M channels, to which the rows of weights belong"""
    channels = record.extra % 65536
    if record.out_c > channels:
        raise ValueError(f"record: {record.out_c} rows of weights, the gradient has {channels} channels")
    exponent, mantissas = read_out_image(machine, record, channels)
    return exponent, mantissas[:, :, channels - record.out_c :]


def update_rows(machine: Machine, record: Record, exponent: int, mantissas: np.ndarray, acc: np.ndarray) -> None:
    """w[n][k] -= learning rate * acc[n][k], in units of the stored weight; rows without a gradient are passed over"""
    taps = acc.shape[1]
    table = machine.read(record.operands[3], "H", record.out_c)
    code = weight_code(record)
    weights = machine.read(record.operands[2], code, record.out_c * taps)
    stochastic = record.w_dtype == DTYPE_INT8
    limit = 127 if stochastic else 32767
    generator = get_state(machine.state, "rng")
    if stochastic:
        generator = xorshift32(generator)
        set_state(machine.state, "rng", generator)
    clipped = 0
    for n, row in enumerate(acc.tolist()):
        if not mantissas[:, :, n].any():
            continue
        m, s = update_factor(machine.state, record, exponent, table[n])
        for i, value in enumerate(row, n * taps):
            if stochastic:
                change = stochastic_rshift(value * m, s, mix((generator + i * GOLDEN) % 2**32))
            else:
                change = rshift(value * m, s)
            exact = weights[i] - change
            weights[i] = clamp(exact, -limit, limit)
            clipped += abs(exact) > limit
    machine.write(record.operands[2], code, weights)
    add_state(machine.state, "clipped", clipped)


def update_weight(machine: Machine, record: Record) -> None:
    """acc[n][k] = mantissa[n] * (x[k] - zero_in)"""
    record = at_one_position(record)
    exponent, mantissas = read_own_channels(machine, record)
    x = np.array(machine.read(record.operands[1], "b", record.in_c), np.int64)
    update_rows(machine, record, exponent, mantissas, np.outer(mantissas[0, 0], x - record.zero_in))


def update_conv(machine: Machine, record: Record) -> None:
    """acc[n][ki][kj][c] = sum over positions inside of mantissa[oi][oj][n] * (x[i][j][c] - zero_in)"""
    exponent, mantissas = read_own_channels(machine, record)
    acc = np.zeros((record.out_c, taps_of(record, record.in_c)), np.int64)
    windows = centred_windows(machine, record, operand=1)
    for (oi, oj), window in zip(output_positions(record), windows, strict=True):
        acc += np.outer(mantissas[oi, oj], window.reshape(-1))
    update_rows(machine, record, exponent, mantissas, acc)


def update_depthwise(machine: Machine, record: Record) -> None:
    """acc[n][ki][kj] = sum over positions inside of mantissa[oi][oj][n] * (x[i][j][n / m] - zero_in)"""
    if record.extra != record.out_c:
        raise ValueError(f"update_depthwise: extra {record.extra}, expected {record.out_c}")
    exponent, mantissas = read_own_channels(machine, record)
    acc = np.zeros((record.out_c, taps_of(record, 1)), np.int64)
    windows = centred_windows(machine, record, operand=1)
    for (oi, oj), window in zip(output_positions(record), windows, strict=True):
        acc += mantissas[oi, oj][:, np.newaxis] * by_output_channel(window, record)
    update_rows(machine, record, exponent, mantissas, acc)


def update_bias(machine: Machine, record: Record) -> None:
    """bias[n] -= learning rate * sum over the positions of mantissa[..][in_c + n], in units of the accumulator"""
    channels, first = record.extra % 65536, record.in_c
    if first + record.out_c > channels:
        raise ValueError(f"update_bias: channels {first} + {record.out_c} lie outside the gradient's {channels}")
    exponent, mantissas = read_out_image(machine, record, channels)
    sums = np.sum(mantissas, axis=(0, 1)).tolist()
    bias = machine.read(record.operands[2], "i", record.out_c)
    table = machine.read(record.operands[3], "H", record.out_c)
    clipped = 0
    for n in range(record.out_c):
        acc = sums[first + n]
        if acc == 0:
            continue
        m, s = update_factor(machine.state, record, exponent, table[n])
        exact = clamp(bias[n], -BIAS_MAX, BIAS_MAX) - rshift(acc * m, s)
        bias[n] = clamp(exact, -BIAS_MAX, BIAS_MAX)
        clipped += abs(exact) > BIAS_MAX
    machine.write(record.operands[2], "i", bias)
    add_state(machine.state, "clipped", clipped)


# ---- Pooling ---------------------------------------------------------------------------------------------------------


def average_back(machine: Machine, record: Record) -> None:
    """acc[i][j][c] = sum over the windows that hold i, j of mantissa[..][c] * 2^extra / (cells of the window inside)"""
    pool_back(machine, record, record.extra, give_to_all)


def give_to_all(record: Record, cells: Cells, mantissas: np.ndarray, acc: np.ndarray) -> None:
    share = (2**record.extra + len(cells) // 2) // len(cells)
    for i, j in cells:
        acc[i, j] += mantissas * share


def max_back(machine: Machine, record: Record) -> None:
    """acc[i][j][c] = sum of mantissa[..][c] over the windows whose first largest x[..][c], row by row, is at i, j"""
    x = read_image(machine, record, operand=4)

    def give_to_first_largest(_: Record, cells: Cells, mantissas: np.ndarray, acc: np.ndarray) -> None:
        for c in range(record.in_c):
            largest = max(x[cell][c] for cell in cells)
            i, j = next(cell for cell in cells if x[cell][c] == largest)
            acc[i, j, c] += mantissas[c]

    if record.extra != 0:
        raise ValueError(f"max_back: extra {record.extra}, expected 0")
    pool_back(machine, record, 0, give_to_first_largest)


def pool_back(machine: Machine, record: Record, share_bits: int, give: Callable[..., None]) -> None:
    """Every window gives its mantissas to its cells inside; the sums are then cut down by scale_mant bits."""
    if record.in_c != record.out_c:
        raise ValueError(f"pool_back: {record.out_c} output channels, expected {record.in_c}")
    if not (0 <= share_bits <= 30 and 0 <= record.scale_mant <= 30):
        raise ValueError(f"pool_back: shifts {share_bits} and {record.scale_mant}, expected 0..30")
    exponent, mantissas = read_out_image(machine, record, record.out_c)
    acc = np.zeros((record.in_h, record.in_w, record.in_c), np.int64)
    for oi, oj in output_positions(record):
        cells = [(i, j) for _, _, i, j in cells_inside(record, oi, oj)]
        if not cells:
            raise ValueError(f"pool_back: the window at {oi}, {oj} has no cell inside")
        give(record, cells, mantissas[oi, oj], acc)
    exact = [rshift(value, record.scale_mant) for value in acc.reshape(-1).tolist()]
    write_in(machine, record, exponent - share_bits + record.scale_mant, exact)


# ---- Element by element ----------------------------------------------------------------------------------------------


def scale_back(machine: Machine, record: Record) -> None:
    """gradient_in[i] = gradient_out[i] * table[i mod extra] * 2^scale_exp"""
    expect_alike(record)
    out = read_out(machine, record, expect_same_size(record))
    if record.extra == 0:
        raise ValueError("scale_back: the table has no entry")
    table = machine.read(record.operands[2], "h", record.extra)
    exact = [rshift(mantissa * table[i % record.extra], 11) for i, mantissa in enumerate(out.mantissas)]
    write_in(machine, record, out.exponent + record.scale_exp + 11, exact)


def crop(machine: Machine, record: Record) -> None:
    """mantissa_in[i][j][c] = mantissa_out[((i + pad_top) * out_w + j + pad_left) * N + extra + c]"""
    if record.narrow_in and not record.narrow_out:
        raise ValueError("crop: a wide gradient does not fit into a narrow one")
    out = read_out(machine, record, record.out_h * record.out_w * record.out_c)
    mantissas = []
    for i in range(record.in_h):
        for j in range(record.in_w):
            position = (i + record.pad_top) * record.out_w + j + record.pad_left
            begin = position * record.out_c + record.extra
            if begin + record.in_c > len(out.mantissas):
                raise ValueError(f"crop: {begin} + {record.in_c} reach beyond {len(out.mantissas)}")
            mantissas += out.mantissas[begin : begin + record.in_c]
    machine.write_gradient(record.operands[1], Gradient(out.exponent, mantissas), record.narrow_in)


def sum_back(machine: Machine, record: Record) -> None:
    """gradient_in = a + b at the exponent that leaves room for the sum of the larger one with its like"""
    expect_alike(record)
    n, narrow = expect_same_size(record), record.narrow_in
    a = read_out(machine, record, n)
    b = machine.read_gradient(record.operands[4], n, narrow)
    max_a, max_b = machine.read_largest(record.operands[0]), machine.read_largest(record.operands[4])
    if max_a == 0 or max_b == 0:
        machine.write_gradient(record.operands[1], b if max_a == 0 else a, narrow)
        return
    e = max(a.exponent + max_a.bit_length(), b.exponent + max_b.bit_length()) + 1 - bits(narrow)
    down_a, down_b = clamp(e - a.exponent, -15, 62), clamp(e - b.exponent, -15, 62)
    exact = [rshift(a.mantissas[i], down_a) + rshift(b.mantissas[i], down_b) for i in range(n)]
    write_in(machine, record, e, exact)


def relu_back(machine: Machine, record: Record) -> None:
    """gradient_in = gradient_out, 0 where x is act_min, or where the bit of MASK is 0; its header stays"""
    expect_alike(record)
    n = expect_same_size(record)
    code = "b" if record.narrow_out else "h"
    header = machine.read(record.operands[0], "h", 2)
    stored = machine.read(record.operands[0], code, n, GRADIENT_HEADER)
    if record.flags & FLAG_BITS:
        packed = machine.read(record.operands[4], "B", (n + 7) // 8)
        passes = [packed[i // 8] // 2 ** (i % 8) % 2 == 1 for i in range(n)]
    else:
        passes = [x != record.act_min for x in machine.read(record.operands[4], "b", n)]
    machine.write(record.operands[1], "h", header)
    machine.write(record.operands[1], code, [m if passes[i] else 0 for i, m in enumerate(stored)], GRADIENT_HEADER)


BACKWARD: dict[int, Callable[[Machine, Record], None]] = {
    DENSE_BACK: dense_back,
    UPDATE_WEIGHT: update_weight,
    UPDATE_BIAS: update_bias,
    CONV_BACK: conv_back,
    DEPTHWISE_BACK: depthwise_back,
    UPDATE_CONV: update_conv,
    UPDATE_DEPTHWISE: update_depthwise,
    AVERAGE_BACK: average_back,
    MAX_BACK: max_back,
    SCALE_BACK: scale_back,
    CROP: crop,
    SUM: sum_back,
    RELU_BACK: relu_back,
}
