"""The judge judged: tests/reference.py against numbers worked out by hand and against numpy's own formulations."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest

from reference import (
    DENSE,
    HINGE,
    MSE,
    SOFTMAX_CE,
    Machine,
    execute,
    get_state,
    set_gate,
    set_learning_rate,
    set_state,
)
from reference_arithmetic import mix, requantise, round_half_away, rshift, stochastic_rshift, xorshift32
from reference_backward import (
    AVERAGE_BACK,
    BACKWARD,
    CONV_BACK,
    CROP,
    DENSE_BACK,
    DEPTHWISE_BACK,
    MAX_BACK,
    RELU_BACK,
    SCALE_BACK,
    SUM,
    UPDATE_BIAS,
    UPDATE_CONV,
    UPDATE_DEPTHWISE,
    UPDATE_WEIGHT,
)
from reference_forward import (
    ADD,
    AVERAGE_POOL,
    CONV,
    CONV_TRAINED,
    COPY,
    DEPTHWISE,
    DEPTHWISE_TRAINED,
    MASK,
    MAX_POOL,
    MEAN,
    MUL,
    PAD,
    SOFTMAX,
    TABLE,
    reciprocal,
)
from reference_plan import (
    ARENA,
    DTYPE_INT8,
    DTYPE_INT16,
    DTYPE_UINT8,
    FLAG_BITS,
    FLAG_FULL_RANGE,
    FLAG_NARROW_IN,
    FLAG_NARROW_OUT,
    FLAG_ONE_SCALE,
    FROZEN,
    INPUT,
    ROUND_AWAY,
    ROUND_DOUBLE,
    ROUND_NONE,
    ROUND_SINGLE,
    STATE_BYTES,
    Operand,
    Plan,
    Program,
    Record,
)

LARGEST, SMALLEST = 2**31 - 1, -(2**31)
HALF = 2**30  # a multiplier: acc * HALF * 2^(shift - 31) = acc / 2 * 2^shift
BLANK = -77  # what y holds before a record runs

EMPTY = Record(
    op=0,
    mode=0,
    flags=0,
    rounding=ROUND_NONE,
    gate=0,
    gain=0,
    operands=(None,) * 6,
    in_h=1,
    in_w=1,
    in_c=1,
    out_h=1,
    out_w=1,
    out_c=1,
    kernel_h=1,
    kernel_w=1,
    stride_h=1,
    stride_w=1,
    pad_top=0,
    pad_left=0,
    zero_in=0,
    zero_out=0,
    act_min=-128,
    act_max=127,
    w_dtype=0,
    fraction=0,
    scale_mant=0,
    scale_exp=0,
    extra=0,
)


# ---- One record on a machine of its own ------------------------------------------------------------------------------


def machine_for(record: Record, constants: list[np.ndarray], size: int) -> Machine:
    """A machine whose only program is the record: x from INPUT, y to the ARENA, operands from 2 on in FROZEN."""
    frozen, operands = b"", [Operand(INPUT, 0), Operand(ARENA, 0)]
    for values in constants:
        operands.append(Operand(FROZEN, len(frozen)))
        frozen += values.tobytes()
        frozen += bytes(-len(frozen) % 4)
    record = replace(record, operands=(*operands, *[None] * (6 - len(operands))))
    program = Program("forward", (0, size, 0, 0, 0, 0, 0), Operand(ARENA, 0), size, 1, 0, [record])
    state = bytearray(STATE_BYTES + 4)
    machine = Machine(Plan(programs={"forward": program}, frozen=frozen, state=bytes(state)))
    set_state(machine.state, "n_gates", 1)
    set_state(machine.state, "gates", STATE_BYTES)
    machine.arena[:] = np.full(size, BLANK, np.int8).tobytes()
    return machine


def run(op: int, x: object, constants: list[np.ndarray], size: int, **fields: int) -> list[int]:
    """y after the record has run on x, which is in_h * in_w * in_c numbers."""
    machine = machine_for(replace(EMPTY, op=op, **fields), constants, size)
    return np.frombuffer(machine.predict(int8(x).tobytes()), np.int8).tolist()


def int8(values: object) -> np.ndarray:
    return typed(values, np.int8)


def int32(values: object) -> np.ndarray:
    return typed(values, np.int32)


def typed(values: object, dtype: type) -> np.ndarray:
    """The values in a smaller type; none may change."""
    exact = np.asarray(values, np.int64)
    result = exact.astype(dtype)
    assert np.array_equal(result, exact)
    return result


def byte_rows(weights: np.ndarray) -> np.ndarray:
    """Weights [N][...] as CONV stores them."""
    rows = np.reshape(weights, (len(weights), -1))
    stored = np.full((len(rows), (rows.shape[1] + 3) // 4 * 4), 128)
    stored[:, : rows.shape[1]] = rows + 128
    return typed(stored, np.uint8)


def layer(weights: np.ndarray, bias: object, multiplier: object, shift: object) -> list[np.ndarray]:
    """Operands 2 to 5 of CONV or DEPTHWISE; the weights as they are stored."""
    return [weights, int32(bias), int32(multiplier), int8(shift)]


# ---- Roundings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("acc", "multiplier", "shift", "single", "double"),
    [
        (3, HALF, 0, 2, 2),  # 1.5: halves go up
        (-3, HALF, 0, -1, -1),  # -1.5: up as well, with no second rounding behind
        (-1, HALF, 0, 0, 0),
        (5, HALF, -1, 1, 2),  # 1.25; double: 2.5 -> 3, 3 / 2 -> 2
        (-5, HALF, -1, -1, -1),  # -1.25; double: -2.5 -> -2, -2 / 2
        (-6, HALF, -1, -1, -2),  # -1.5: up; double: -3, then -3 / 2 away from zero
        (6, HALF, -1, 2, 2),
        (-2, HALF, -1, 0, -1),  # -0.5
        (2, HALF, -1, 1, 1),
        (-7, HALF, -1, -2, -2),  # -1.75; double: -3.5 -> -3, -3 / 2 -> -2
        (3, HALF, 2, 6, 6),  # a shift to the left comes before the product: no rounding
        (-3, HALF, 1, -3, -3),
        (SMALLEST, SMALLEST, 0, LARGEST, LARGEST),  # 2^31 saturates
        (SMALLEST, SMALLEST, -1, 2**30, 2**30),  # double: 2^31 - 1, whose half is rounded up
        (SMALLEST, SMALLEST, -31, 1, 1),
        (SMALLEST, LARGEST, 0, -LARGEST, -LARGEST),
        (LARGEST, LARGEST, 0, LARGEST - 1, LARGEST - 1),
        (2**30, HALF, 1, 2**30, -(2**30)),  # double: 2^31 wraps to -2^31
        (2**30, HALF, 2, LARGEST, 0),  # double: 2^32 wraps to 0; single: 2^31 saturates
        (1, HALF, 30, 2**29, 2**29),
        (3, HALF, 30, 3 * 2**29, -(2**29)),  # double: 3 * 2^30 wraps to -2^30
        (LARGEST, LARGEST, -31, 1, 1),  # nearly 1
        (SMALLEST, HALF, -31, 0, -1),  # -0.5: single up, double away from zero
        (SMALLEST + 2, HALF, -31, 0, 0),
        (1, HALF, 31, 2**29, 2**29),  # a shift is cut to -31..30
        (SMALLEST, HALF, -100, 0, -1),
        (0, LARGEST, 0, 0, 0),
        (-12345, 0, 5, 0, 0),
    ],
)
def test_requantise(acc: int, multiplier: int, shift: int, single: int, double: int) -> None:
    """Both roundings, worked out by hand."""
    assert requantise(acc, multiplier, shift, ROUND_SINGLE) == single
    assert requantise(acc, multiplier, shift, ROUND_DOUBLE) == double


@pytest.mark.parametrize(
    ("numerator", "denominator", "quotient"),
    [
        (5, 2, 3),
        (-5, 2, -3),
        (1, 2, 1),
        (-1, 2, -1),
        (4, 3, 1),
        (5, 3, 2),
        (-4, 3, -1),
        (-5, 3, -2),
        (-7, 1, -7),
        (0, 4, 0),
    ],
)
def test_halves_away_from_zero(numerator: int, denominator: int, quotient: int) -> None:
    assert round_half_away(numerator, denominator) == quotient


@pytest.mark.parametrize(
    ("acc", "upper", "lower", "shift", "rounded"),
    [
        (3, HALF, 0, 0, 2),  # halves away from zero: 1.5
        (-3, HALF, 0, 0, -2),
        (-1, HALF, 0, 0, -1),
        (-5, HALF, 0, -1, -1),  # -1.25, rounded once
        (5, HALF, 0, -1, 1),
        (1, HALF - 1, 65535, 0, 0),  # nearly a half: floor(a * lower / 2^16) = 0
        (2, HALF // 2 - 1, 32768, 0, 0),  # 2 * 0.5 makes one unit, and one is missing
        (2, HALF // 2 - 1, 65535, 0, 0),
        (65536, HALF // 65536 - 1, 65535, 0, 0),  # P = 2^30 - 1
        (65537, HALF // 65536 - 1, 65535, 0, 1),  # P = 2^30 + 2^14 - 2
        (-65537, HALF // 65536 - 1, 65535, 0, -1),
        (SMALLEST, HALF, 0, 1, -LARGEST),  # |acc| is cut to 2^31 - 1
        (SMALLEST, HALF, 0, 2, SMALLEST),  # -2^32 + 2 saturates
        (LARGEST, LARGEST, 65535, 30, LARGEST),
        (LARGEST, HALF, 0, -31, 0),  # a little less than a half
        (SMALLEST, HALF, 2, -31, 0),  # P = 2^61 - 2^30 + 65535
        (LARGEST, HALF, 32769, -31, 1),  # P = 2^61 - 2^30 + 2^30 + 32767
        (0, LARGEST, 65535, 30, 0),
        (1, HALF, 0, 99, 2**29),  # a shift is cut to -31..30
    ],
)
def test_rounding_away(acc: int, upper: int, lower: int, shift: int, rounded: int) -> None:
    """One rounding of |acc| times a multiplier in two parts."""
    assert requantise(acc, upper, shift, ROUND_AWAY, lower) == rounded


def test_other_roundings_are_refused() -> None:
    for rounding in (ROUND_NONE, 4):
        with pytest.raises(ValueError, match="rounding"):
            requantise(1, HALF, 0, rounding)
    # Of the lower part 16 bits count.
    assert requantise(2**20, HALF, 0, ROUND_AWAY, 65536 + 5) == requantise(2**20, HALF, 0, ROUND_AWAY, 5)


def gemmlowp(acc: np.ndarray, multiplier: np.ndarray | int, shift: np.ndarray | int) -> np.ndarray:
    """The double rounding as gemmlowp writes it: a nudge and a division that truncates, then a mask and a threshold."""
    left, right = np.maximum(shift, 0), np.maximum(np.negative(shift), 0)
    ab = (acc * 2**left).astype(np.int32).astype(np.int64) * multiplier
    nudged = ab + np.where(ab >= 0, 2**30, 1 - 2**30)
    high = np.minimum(np.sign(nudged) * (np.abs(nudged) // 2**31), LARGEST)
    mask = 2**right - 1
    return (high >> right) + ((high & mask) > (mask >> 1) + (high < 0))


def one_rounding(acc: np.ndarray, multiplier: np.ndarray | int, shift: np.ndarray | int) -> np.ndarray:
    """The single rounding by a shift of 64 bits; the product must leave room for the rounding."""
    down = 31 - np.asarray(shift, np.int64)
    return np.clip((acc * multiplier + (np.int64(1) << (down - 1))) >> down, SMALLEST, LARGEST)


def away(acc: np.ndarray, multiplier: np.ndarray | int, shift: np.ndarray | int, lower: np.ndarray | int) -> np.ndarray:
    """AWAY as a product in two halves of 31 and 16 bits, carried by hand."""
    size = np.minimum(np.abs(acc), LARGEST)
    p = size * multiplier + ((size >> 16) * lower + ((size & 65535) * lower >> 16))
    down = 31 - np.asarray(shift, np.int64)
    return np.clip(np.sign(acc) * (((p >> (down - 1)) + 1) >> 1), SMALLEST, LARGEST)


def test_away_random() -> None:
    """Against int64, and within half a unit of the real product."""
    rng = np.random.default_rng(3)
    n = 20000
    acc = rng.integers(SMALLEST, LARGEST, n, endpoint=True) >> rng.integers(0, 31, n)
    upper, lower = rng.integers(HALF, LARGEST, n, endpoint=True), rng.integers(0, 65535, n, endpoint=True)
    shift = rng.integers(-31, 30, n, endpoint=True)
    got = [
        requantise(a, m, s, ROUND_AWAY, low)
        for a, m, s, low in zip(acc.tolist(), upper.tolist(), shift.tolist(), lower.tolist(), strict=True)
    ]
    assert got == away(acc, upper, shift, lower).tolist()
    real = acc * (upper + lower / 65536) * 2.0 ** (shift - 31)
    assert np.max(np.abs(np.clip(real, SMALLEST, LARGEST) - got)) < 0.501


IN_NUMPY = {ROUND_SINGLE: one_rounding, ROUND_DOUBLE: gemmlowp}


@pytest.mark.parametrize("rounding", IN_NUMPY)
def test_requantise_random(rounding: int) -> None:
    """20000 products of every size, ties among them, against the usual implementations in 64 bits."""
    rng = np.random.default_rng(1)
    n = 20000
    acc = rng.integers(SMALLEST, LARGEST, n, endpoint=True) >> rng.integers(0, 31, n)
    multiplier = np.where(rng.random(n) < 0.5, HALF, rng.integers(HALF, LARGEST, n, endpoint=True))
    shift = rng.integers(-31, 30, n, endpoint=True)
    wanted = IN_NUMPY[rounding](acc, multiplier, shift).tolist()
    cases = zip(acc.tolist(), multiplier.tolist(), shift.tolist(), strict=True)
    assert [requantise(*case, rounding) for case in cases] == wanted


# ---- CONV and DEPTHWISE ----------------------------------------------------------------------------------------------


def test_conv_by_hand() -> None:
    """3 x 3 on 2 x 2, one cell of padding all around: what lies outside counts as zero_in."""
    weights = np.arange(1, 10).reshape(1, 3, 3, 1)
    stored = 5 - 10 * 45  # bias 5, zero_in 10, weights that sum to 45
    # Without the zero point x is 1 2 / 3 4. At (0, 0) those lie under the weights 5 6 / 8 9 and so on.
    sums = [5 + 12 + 24 + 36, 4 + 10 + 21 + 32, 2 + 6 + 15 + 24, 1 + 4 + 12 + 20]
    y = run(
        CONV,
        [11, 12, 13, 14],
        layer(byte_rows(weights), [stored], [HALF], [1]),
        4,
        rounding=ROUND_SINGLE,
        w_dtype=DTYPE_UINT8,
        in_h=2,
        in_w=2,
        out_h=2,
        out_w=2,
        kernel_h=3,
        kernel_w=3,
        pad_top=1,
        pad_left=1,
        zero_in=10,
        zero_out=-3,
        act_max=70,
    )
    assert y == [min(70, total + 5 - 3) for total in sums]


def test_conv_order_of_weights() -> None:
    """A row of weights is [ki][kj][c]; a stride moves the window; a kernel may reach beyond the far border."""
    weights = np.array([[1, 2, 3, 4], [10, 20, 0, 0]])  # [N][kernel_w = 2][c = 2]
    y = run(
        CONV,
        [1, 2, 3, 4, 5, 6],  # three columns of two channels
        layer(byte_rows(weights), [0, 0], [HALF, HALF], [1, 1]),
        4,
        rounding=ROUND_DOUBLE,
        w_dtype=DTYPE_UINT8,
        in_w=3,
        in_c=2,
        out_w=2,
        out_c=2,
        kernel_w=2,
        stride_w=2,
        zero_in=-1,
    )
    assert y == [1 + 4 + 9 + 16, 10 + 40, 5 + 12 - 3 - 4, 127]


@pytest.mark.parametrize(("rounding", "y"), [(ROUND_SINGLE, [-1, 1, 0]), (ROUND_DOUBLE, [-2, 1, -1])])
def test_conv_rounding(rounding: int, y: list[int]) -> None:
    """A fully connected layer that has to round -6 / 4, 5 / 8 and -2 / 4."""
    constants = layer(byte_rows(np.array([[-6], [5], [-2]])), [0, 0, 0], [HALF, HALF, HALF], [-1, -2, -1])
    fields = {"rounding": rounding, "w_dtype": DTYPE_UINT8, "out_c": 3}
    assert run(CONV, [1], constants, 3, **fields) == y


def test_conv_extremes() -> None:
    """acc goes round at 2^32; the rounded value plus zero_out does not."""
    fields = {"rounding": ROUND_SINGLE, "w_dtype": DTYPE_UINT8}
    weights = byte_rows(np.array([[1]]))
    assert run(CONV, [1], layer(weights, [LARGEST], [HALF], [1]), 1, **fields) == [-128]
    assert run(CONV, [0], layer(weights, [LARGEST], [LARGEST], [1]), 1, zero_out=127, **fields) == [127]
    assert run(CONV, [0], layer(weights, [SMALLEST], [LARGEST], [1]), 1, zero_out=-128, **fields) == [-128]


@pytest.mark.parametrize("op", [CONV, DEPTHWISE, DENSE])
def test_one_scale(op: int) -> None:
    """One multiplier and one shift for all channels; with AWAY, upper parts come before lower ones."""
    rows = np.array([[-6], [5], [-2]])
    weights = byte_rows(rows) if op == CONV else int8(rows)
    fields = {"w_dtype": DTYPE_UINT8 if op == CONV else DTYPE_INT8, "out_c": 3}
    one = {**fields, "flags": FLAG_ONE_SCALE}
    bias, unit = [0, 0, 0], HALF // 65536
    assert run(op, [1], layer(weights, bias, [HALF], [-1]), 3, rounding=ROUND_SINGLE, **one) == [-1, 1, 0]
    assert run(op, [1], layer(weights, bias, [HALF, 0], [-1]), 3, rounding=ROUND_AWAY, **one) == [-2, 1, -1]
    several = layer(weights, bias, [HALF] * 3 + [0] * 3, [-1, -2, -3])
    assert run(op, [1], several, 3, rounding=ROUND_AWAY, **fields) == [-2, 1, 0]
    # 65537 * (2^14 - 1 + lower / 2^16) is above 2^30 with the last lower part alone.
    acc, scale = [65537 - w for w in (-6, 5, -2)], [unit - 1] * 3 + [0, 32768, 65535]
    assert run(op, [1], layer(weights, acc, scale, [0] * 3), 3, rounding=ROUND_AWAY, **fields) == [0, 0, 1]
    assert run(op, [1], layer(weights, acc, [unit - 1, 65535], [0]), 3, rounding=ROUND_AWAY, **one) == [1, 1, 1]
    if op == DENSE:
        with pytest.raises(ValueError, match="rounding 2"):
            run(op, [1], layer(weights, bias, [HALF], [-1]), 3, rounding=ROUND_DOUBLE, **one)


def test_conv_refuses() -> None:
    """Weights of other types and roundings are refused; bytes behind a row have no say."""
    fields = {"rounding": ROUND_SINGLE, "w_dtype": DTYPE_UINT8}
    good = byte_rows(np.array([[-128]]))
    assert run(CONV, [1], layer(good, [0], [HALF], [1]), 1, flags=FLAG_FULL_RANGE, **fields) == [-128]
    for place in (1, 2, 3):
        bad = byte_rows(np.array([[7]]))
        bad[0, place] = 127
        assert run(CONV, [1], layer(bad, [0], [HALF], [1]), 1, **fields) == [7]
    with pytest.raises(ValueError, match="type 1"):
        run(CONV, [1], layer(good, [0], [HALF], [1]), 1, rounding=ROUND_SINGLE, w_dtype=DTYPE_INT8)
    with pytest.raises(ValueError, match="rounding 0"):
        run(CONV, [1], layer(byte_rows(np.array([[7]])), [0], [HALF], [1]), 1, w_dtype=DTYPE_UINT8)


def test_depthwise_by_hand() -> None:
    """Two output channels read each input channel; weights are [n][ki][kj]."""
    weights = np.array([[1, 2], [3, 4], [5, 6], [7, -128]])  # [N][kernel_w = 2]
    constants = layer(int8(weights), [0, 1, 2, 3], [HALF] * 4, [1] * 4)
    fields = {"rounding": ROUND_SINGLE, "w_dtype": DTYPE_INT8, "in_w": 2, "in_c": 2, "out_c": 4, "kernel_w": 2}
    x = [1, -2, 3, 4]  # channel 0: 1 3; channel 1: -2 4
    y = [1 + 6, 1 + 3 + 12, 2 - 10 + 24, -128]  # the last: 3 - 14 - 512
    assert run(DEPTHWISE, x, constants, 4, flags=FLAG_FULL_RANGE, **fields) == y
    with pytest.raises(ValueError, match="multiple"):
        run(DEPTHWISE, x, constants, 3, **{**fields, "out_c": 3})
    # One column to the left: the window is zero_in and the first column. -128 * -2 - 3 * 7 saturates.
    shifted = {**fields, "pad_left": 1, "zero_in": -3, "flags": FLAG_FULL_RANGE}
    assert run(DEPTHWISE, x, constants, 4, **shifted) == [-3 + 2, 1 - 9 + 4, 2 - 15 - 12, 127]


def draw(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high, endpoint=True))


def windows_of(x: np.ndarray, fields: dict[str, int], outside: float) -> np.ndarray:
    """float64 [out_h][out_w][kernel_h][kernel_w][in_c]: a bordered copy of x, seen through strided windows."""
    size = [(fields[f"out_{a}"] - 1) * fields[f"stride_{a}"] + fields[f"kernel_{a}"] for a in "hw"]
    before = (fields["pad_top"], fields["pad_left"])
    after = [max(0, size[a] - before[a] - x.shape[a]) for a in (0, 1)]
    border = [(before[0], after[0]), (before[1], after[1]), (0, 0)]
    bordered = np.pad(x.astype(np.float64), border, constant_values=outside)[: size[0], : size[1]]
    kernel = (fields["kernel_h"], fields["kernel_w"])
    seen = np.lib.stride_tricks.sliding_window_view(bordered, kernel, (0, 1))
    return seen[:: fields["stride_h"], :: fields["stride_w"]].transpose(0, 1, 3, 4, 2)


def random_geometry(rng: np.random.Generator) -> dict[str, int]:
    """Any window on any image: strides and kernels of their own each way, padding, at least one cell inside."""
    fields = {}
    for axis, pad in (("h", "pad_top"), ("w", "pad_left")):
        size, kernel, stride = draw(rng, 1, 9), draw(rng, 1, 5), draw(rng, 1, 3)
        before = draw(rng, 0, kernel - 1)
        fields |= {f"in_{axis}": size, f"kernel_{axis}": kernel, f"stride_{axis}": stride, pad: before}
        fields[f"out_{axis}"] = draw(rng, 1, (size - 1 + before) // stride + 1)
    return fields


@pytest.mark.parametrize("op", [CONV, DEPTHWISE])
@pytest.mark.parametrize("rounding", IN_NUMPY)
def test_layers_random(op: int, rounding: int) -> None:
    """Real convolutions in float64 of x - zero_in with zeros around, and a bias that knows no zero point."""
    rng = np.random.default_rng(op + 100 * rounding)
    varied = 0
    for _ in range(30):
        fields = random_geometry(rng)
        channels, m = draw(rng, 1, 7), draw(rng, 1, 3)
        n = channels * m if op == DEPTHWISE else draw(rng, 1, 7)
        fields |= {"in_c": channels, "out_c": n, "zero_in": draw(rng, -128, 127), "zero_out": draw(rng, -128, 127)}
        fields |= {"act_min": draw(rng, -128, -60), "act_max": draw(rng, 60, 127)}
        x = rng.integers(-128, 127, (fields["in_h"], fields["in_w"], channels), endpoint=True)
        kernel = (fields["kernel_h"], fields["kernel_w"])
        weights = rng.integers(-127, 127, (n, *kernel) if op == DEPTHWISE else (n, *kernel, channels), endpoint=True)
        bias = rng.integers(-20000, 20000, n)
        multiplier, shift = rng.integers(HALF, LARGEST, n), rng.integers(-9, -5, n)

        windows = windows_of(x - fields["zero_in"], fields, 0.0)
        if op == DEPTHWISE:
            sums = np.einsum("hwijc,cmij->hwcm", windows, weights.reshape(channels, m, *kernel).astype(np.float64))
            sums = sums.reshape(*sums.shape[:2], n)
        else:
            sums = np.einsum("hwijc,nijc->hwn", windows, weights.astype(np.float64))
        acc = np.rint(sums).astype(np.int64) + bias
        wanted = IN_NUMPY[rounding](acc, multiplier, shift) + fields["zero_out"]
        wanted = np.clip(wanted, fields["act_min"], fields["act_max"]).reshape(-1).tolist()

        stored = bias - fields["zero_in"] * weights.reshape(n, -1).sum(axis=1)
        fields |= {"rounding": rounding, "w_dtype": DTYPE_INT8 if op == DEPTHWISE else DTYPE_UINT8}
        constants = layer(int8(weights) if op == DEPTHWISE else byte_rows(weights), stored, multiplier, shift)
        assert run(op, x, constants, len(wanted), **fields) == wanted
        varied += len(set(wanted)) > 2
    assert varied > 15


# ---- Pooling ---------------------------------------------------------------------------------------------------------


def test_pooling_at_borders() -> None:
    """3 x 3 with padding on 2 x 3: only cells inside count, at a corner four of them."""
    fields = {"in_h": 2, "in_w": 3, "out_h": 2, "out_w": 3, "kernel_h": 3, "kernel_w": 3, "pad_top": 1, "pad_left": 1}
    x = [-1, -2, -3, -4, -5, -7]
    # Sums -12 of 4, -22 of 6, -17 of 4: -3, -3.67, -4.25.
    assert run(AVERAGE_POOL, x, [], 6, **fields) == [-3, -4, -4] * 2
    assert run(MAX_POOL, x, [], 6, **fields) == [-1, -1, -2] * 2


def test_average_halves() -> None:
    """Halves go away from zero, then the activation's range applies; the channels stay apart."""
    fields = {"in_w": 2, "in_c": 4, "out_c": 4, "kernel_w": 2}
    x = [1, -1, 127, -128, 2, -2, 126, -127]
    assert run(AVERAGE_POOL, x, [], 4, **fields) == [2, -2, 127, -128]
    assert run(AVERAGE_POOL, x, [], 4, act_min=-1, act_max=100, **fields) == [2, -1, 100, -1]
    assert run(MAX_POOL, x, [], 4, act_min=-1, act_max=100, **fields) == [2, -1, 100, -1]


def test_pooling_refuses() -> None:
    """A window without a cell inside; another number of channels."""
    for op in (AVERAGE_POOL, MAX_POOL):
        with pytest.raises(ValueError, match="no cell"):
            run(op, [1], [], 2, out_w=2)
        with pytest.raises(ValueError, match="channels"):
            run(op, [1], [], 2, out_c=2)


@pytest.mark.parametrize("op", [AVERAGE_POOL, MAX_POOL])
def test_pooling_random(op: int) -> None:
    """Against numpy in float64, cells outside being no number."""
    rng = np.random.default_rng(op)
    for _ in range(40):
        fields = random_geometry(rng)
        channels = draw(rng, 1, 5)
        fields |= {"in_c": channels, "out_c": channels, "act_min": draw(rng, -128, -9), "act_max": draw(rng, 9, 127)}
        x = rng.integers(-128, 127, (fields["in_h"], fields["in_w"], channels), endpoint=True)
        seen = windows_of(x, fields, np.nan)
        if op == MAX_POOL:
            y = np.nanmax(seen, axis=(2, 3))
        else:
            real = np.nansum(seen, axis=(2, 3)) / np.sum(~np.isnan(seen), axis=(2, 3))
            y = np.trunc(real + np.copysign(0.5, real))
        wanted = np.clip(y, fields["act_min"], fields["act_max"]).astype(int).reshape(-1).tolist()
        assert run(op, x, [], len(wanted), **fields) == wanted


def test_mean() -> None:
    """Sums without the zero point, times a quarter, in two roundings: 1.5 -> 2, and -2.5 -> -5 / 2 -> -3."""
    x = [5, 0, 6, 0, 4, 0, 3, 2]  # channel 0: 18 - 12, channel 1: 2 - 12 with zero_in 3
    fields = {"in_h": 2, "in_w": 2, "in_c": 2, "out_c": 2, "zero_in": 3, "rounding": ROUND_DOUBLE}
    assert run(MEAN, x, [int32([HALF, -1])], 2, zero_out=10, **fields) == [12, 7]
    assert run(MEAN, x, [int32([HALF, -1])], 2, zero_out=10, act_min=8, act_max=11, **fields) == [11, 8]
    assert run(MEAN, x, [int32([HALF, 6])], 2, **fields) == [127, -128]
    with pytest.raises(ValueError, match="rounding 1"):
        run(MEAN, x, [int32([HALF, -1])], 2, **{**fields, "rounding": ROUND_SINGLE})


# ---- Element by element ----------------------------------------------------------------------------------------------


def test_add_by_hand() -> None:
    """(a - 1) / 2 + (b + 2) / 4 with b repeated, halves at the end away from zero."""
    # Scales: 2^20 * 1/2, 2^20 * 1/4, and the sum * 2^-20 = 1/2 * 2^-19.
    constants = [int8([0, 2]), int32([-2, HALF, 0, HALF, -1, HALF, -19])]
    fields = {"rounding": ROUND_DOUBLE, "in_h": 2, "in_w": 3, "zero_in": 1, "zero_out": 4, "extra": 2}
    # Without zero_out: 0.5, 2, -0.5, 0, 63.5, -63.5
    assert run(ADD, [1, 3, -1, -1, 127, -128], constants, 6, **fields) == [5, 6, 3, 4, 68, -60]
    assert run(ADD, [1, 3, -1, -1, 127, -128], constants, 6, act_min=4, act_max=6, **fields) == [5, 6, 4, 4, 6, 4]
    with pytest.raises(ValueError, match="rounding 1"):
        run(ADD, [0] * 6, constants, 6, **{**fields, "rounding": ROUND_SINGLE})
    cut = [int8([127]), int32([1000, HALF, 0, HALF, 1, HALF, -19])]  # zero_b counts as 127
    assert run(ADD, [1, 3, -1, -1, 127, -128], cut, 6, **{**fields, "extra": 1}) == [4, 5, 3, 3, 67, -61]
    with pytest.raises(ValueError, match="no element"):
        run(ADD, [0] * 6, constants, 6, **{**fields, "extra": 0})


@pytest.mark.parametrize("repeats", [1, 4])
def test_add_random(repeats: int) -> None:
    """To the bit against gemmlowp's formulation in int64, and within a unit of the real sum."""
    rng = np.random.default_rng(repeats)
    for _ in range(20):
        width, channels = draw(rng, 1, 6), draw(rng, 1, 9)
        a = rng.integers(-128, 127, (repeats, width, channels), endpoint=True)
        b = rng.integers(-128, 127, (width, channels), endpoint=True)
        zero_a, zero_b, zero_out = (draw(rng, -128, 127) for _ in range(3))
        scales = [
            (draw(rng, HALF, LARGEST), shift) for shift in (draw(rng, -4, 0), draw(rng, -4, 0), draw(rng, -19, -16))
        ]
        (mul_a, shift_a), (mul_b, shift_b), (mul_y, shift_y) = scales
        s = gemmlowp((a - zero_a) << 20, mul_a, shift_a) + gemmlowp((b - zero_b) << 20, mul_b, shift_b)
        wanted = np.clip(gemmlowp(s, mul_y, shift_y) + zero_out, -128, 127)
        fields = {"rounding": ROUND_DOUBLE, "in_h": repeats, "in_w": width, "in_c": channels, "extra": b.size}
        constants = [int8(b), int32([zero_b, *(number for scale in scales for number in scale)])]
        y = run(ADD, a, constants, a.size, zero_in=zero_a, zero_out=zero_out, **fields)
        assert y == wanted.reshape(-1).tolist()
        real_a, real_b, real_y = (multiplier * 2.0 ** (shift - 31) for multiplier, shift in scales)
        real = ((a - zero_a) * real_a + (b - zero_b) * real_b) * 2**20 * real_y + zero_out
        assert np.max(np.abs(np.clip(real, -128, 127).reshape(-1) - y)) < 0.501


def test_mul() -> None:
    """(a - 1) * (b + 1) / 4 with the record's rounding and b repeated."""
    constants = [int8([1, 0]), int32([-1, HALF, -1])]
    fields = {"in_c": 6, "zero_in": 1, "zero_out": 10, "extra": 2}
    a = [4, 3, -2, -1, 127, -128]  # products 6, 2, -6, -2, 252, -129: the last is -64.5 -> -64 -> -32 either way
    assert run(MUL, a, constants, 6, rounding=ROUND_SINGLE, **fields) == [12, 11, 9, 10, 73, -22]
    assert run(MUL, a, constants, 6, rounding=ROUND_DOUBLE, **fields) == [12, 11, 8, 9, 73, -22]
    with pytest.raises(ValueError, match="rounding 3"):
        run(MUL, a, constants, 6, rounding=ROUND_AWAY, **fields)
    assert run(MUL, a, constants, 6, rounding=ROUND_SINGLE, act_min=10, act_max=11, **fields) == [
        11,
        11,
        10,
        10,
        11,
        10,
    ]


def test_table() -> None:
    """Entry x + 128, also in place."""
    entries = int8(np.arange(127, -129, -1))  # of -128: 127; of 127: -128
    assert run(TABLE, [-128, -1, 0, 1, 126, 127], [entries], 6, in_w=3, in_c=2) == [127, 0, -1, -2, -127, -128]
    machine = machine_for(replace(EMPTY, op=TABLE, in_c=1), [entries], 1)
    records = machine.plan.programs["forward"].records
    records[0] = replace(records[0], operands=(Operand(ARENA, 0), *records[0].operands[1:]))
    assert machine.predict(b"") == int8([-BLANK - 1]).tobytes()


# ---- Softmax ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "table", "y"),
    [
        ([9], [LARGEST], [127]),  # 256 - 128 is cut off
        ([-5, -5], [LARGEST], [0, 0]),
        ([0, 0, 0], [LARGEST], [-43] * 3),  # 85.3
        ([0] * 4, [LARGEST], [-64] * 4),
        ([3, 2, 3, -128], [LARGEST], [0, -128, 0, -128]),  # what lies beyond the table is no part of the sum
        ([3, 2], [LARGEST, 2**30], [43, -43]),  # 2/3 and 1/3: 170.7 and 85.3
        ([0] * 256, [LARGEST], [-127] * 256),
        ([0] * 511, [LARGEST], [-127] * 511),  # 0.501 counts as 1
        ([0] * 512, [LARGEST], [-128] * 512),  # 2^28: four leading zeros are needed
        ([1, 2, 3], [0, 0, 0], [-128] * 3),  # S = 0
        ([1, 2, 3], [], [-128] * 3),
        ([0, 0], [2047], [-128] * 2),  # each is 0 in the sum
        ([0], [2048], [0]),  # a half counts as 1: twice the value that it stands for
        ([0, 0, 0], [2048], [-85] * 3),  # each is rounded before they are added: S = 3
    ],
)
def test_softmax(x: list[int], table: list[int], y: list[int]) -> None:
    """Rows worked out by hand, with r as exact as Newton makes it."""
    fields = {"in_c": len(x), "extra": len(table)}
    assert run(SOFTMAX, x, [int32(table)], len(x), **fields) == y
    assert run(SOFTMAX, x * 2, [int32(table)], len(x) * 2, in_h=2, **fields) == y * 2


def test_softmax_random() -> None:
    """Within a unit of softmax in float64, rows that differ."""
    rng = np.random.default_rng(4)
    for scale in (0.01, 0.05, 0.2, 1.0):
        table = np.minimum(np.rint(np.exp(-scale * np.arange(256)) * 2**31), LARGEST)
        x = rng.integers(-128, 127, (6, 5, 9), endpoint=True)
        e = np.exp(scale * (x - x.max(axis=2, keepdims=True)))
        wanted = np.minimum(256 * e / e.sum(axis=2, keepdims=True) - 128, 127).reshape(-1)
        y = run(SOFTMAX, x, [int32(table)], x.size, in_h=6, in_w=5, in_c=9, extra=256)
        assert np.max(np.abs(wanted - y)) < 0.501


def test_softmax_refuses() -> None:
    for length in (0, 8192):
        with pytest.raises(ValueError, match="rows"):
            run(SOFTMAX, [0] * length, [int32([LARGEST])], max(1, length), in_c=length, extra=1)


@pytest.mark.parametrize("h", [2**30, 2**30 + 1, 3 * 2**29, 2**31 - 2, 2**31 - 1])
def test_reciprocal(h: int) -> None:
    """2^61 / h within a few units; 2^31 does not fit."""
    assert abs(reciprocal(h) - min(LARGEST, 2**61 / h)) < 12


# ---- Moving ----------------------------------------------------------------------------------------------------------


def test_pad() -> None:
    """Rows, columns and channels around x are zero_in."""
    fields = {"in_w": 2, "out_h": 2, "out_w": 3, "out_c": 2, "pad_top": 1, "pad_left": 1, "extra": 1, "zero_in": -9}
    assert run(PAD, [1, 2], [], 12, **fields) == [-9] * 6 + [-9, -9, -9, 1, -9, 2]
    for name, value in (("pad_top", 2), ("pad_left", 2), ("extra", 2)):
        with pytest.raises(ValueError, match="beyond"):
            run(PAD, [1, 2], [], 12, **{**fields, name: value})


def test_copy() -> None:
    """Columns of y count in bytes; what lies beside them stays."""
    fields = {"in_h": 2, "in_w": 1, "in_c": 2, "out_h": 2, "out_w": 2, "out_c": 2}
    assert run(COPY, [1, 2, 3, 4], [], 8, extra=1, **fields) == [BLANK, 1, 2, BLANK, BLANK, 3, 4, BLANK]
    assert run(COPY, [1, 2, 3, 4], [], 8, extra=2, **fields) == [BLANK, BLANK, 1, 2, BLANK, BLANK, 3, 4]
    with pytest.raises(ValueError, match="beyond"):
        run(COPY, [1, 2, 3, 4], [], 8, extra=3, **fields)


# ---- Layers that are trained -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", [ROUND_SINGLE, ROUND_DOUBLE, ROUND_AWAY])
def test_layers_in_two_parts(rounding: int) -> None:
    """A layer's first channels by CONV and its last ones by CONV_TRAINED are the layer by CONV alone."""
    rng = np.random.default_rng(rounding)
    for _ in range(15):
        fields = random_geometry(rng) | {"in_c": draw(rng, 1, 5), "rounding": rounding, "zero_out": draw(rng, -20, 20)}
        n, zero_in = draw(rng, 2, 7), draw(rng, -128, 127)
        trained, fraction = draw(rng, 1, n - 1), draw(rng, 0, 7)
        x = rng.integers(-128, 127, (fields["in_h"], fields["in_w"], fields["in_c"]), endpoint=True)
        weights = rng.integers(-127, 127, (n, fields["kernel_h"] * fields["kernel_w"] * fields["in_c"]), endpoint=True)
        bias, shift = rng.integers(-20000, 20000, n), rng.integers(-9, -5, n)
        multiplier, lower = rng.integers(HALF, LARGEST, n), rng.integers(0, 65536, n)
        stored = bias - zero_in * weights.sum(axis=1)
        fields["zero_in"] = zero_in

        def scale(part: slice, upper: np.ndarray = multiplier, lower: np.ndarray = lower) -> np.ndarray:
            return np.concatenate([upper[part], lower[part]])

        size = fields["out_h"] * fields["out_w"] * n
        every, first, last = slice(0, n), slice(0, n - trained), slice(n - trained, n)
        frozen = fields | {"w_dtype": DTYPE_UINT8}
        whole = layer(byte_rows(weights), stored, scale(every), shift)
        wanted = np.reshape(run(CONV, x, whole, size, out_c=n, **frozen), (-1, n))
        half = layer(byte_rows(weights[first]), stored[first], scale(first), shift[first])
        got = np.reshape(run(CONV, x, half, size, out_c=n - trained, scale_mant=n, **frozen), (-1, n))
        assert np.array_equal(got[:, first], wanted[:, first]) and np.all(got[:, last] == BLANK)

        # With fraction bits that the rounding half up takes off again.
        nudge = rng.integers(-(2**fraction) // 2, 2**fraction // 2, weights.shape) if fraction else 0
        own = typed(weights[last] * 2**fraction + (nudge[last] if fraction else 0), np.int16)
        half = layer(own, bias[last], scale(last), shift[last])
        more = {"out_c": trained, "scale_mant": n, "w_dtype": DTYPE_INT16, "fraction": fraction}
        got = np.reshape(run(CONV_TRAINED, x, half, size, **fields, **more), (-1, n))
        assert np.array_equal(got[:, last], wanted[:, last]) and np.all(got[:, first] == BLANK)


def test_sums_keep_fraction_bits() -> None:
    """13/8 * 3 and 13/8 * 6, by hand: with two bits more the weight is 7/4, not 2, and the sum is rounded once."""
    own = layer(typed([13], np.int16), [100], [HALF], [1])
    fields = {"rounding": ROUND_SINGLE, "w_dtype": DTYPE_INT16, "out_c": 1, "scale_mant": 1, "in_w": 2, "out_w": 2}
    for finer, wanted in ((0, [106, 112]), (2, [105, 111]), (3, [105, 110])):
        assert run(CONV_TRAINED, [3, 6], own, 2, fraction=3 + 16 * finer, **fields) == wanted
        deep = {**fields, "rounding": ROUND_DOUBLE, "scale_mant": 0}
        assert run(DEPTHWISE_TRAINED, [3, 6], own, 2, fraction=3 + 16 * finer, **deep) == wanted


def test_conv_trained_refuses() -> None:
    constants = layer(int8([[1], [2]]), [0, 0], [HALF] * 2, [1] * 2)
    fields = {"rounding": ROUND_SINGLE, "w_dtype": DTYPE_INT8, "out_c": 2}
    assert run(CONV_TRAINED, [5], constants, 3, scale_mant=3, **fields) == [BLANK, 5, 10]
    for channels in (0, 1):
        with pytest.raises(ValueError, match="outside"):
            run(CONV_TRAINED, [5], constants, 3, scale_mant=channels, **fields)
    with pytest.raises(ValueError, match="outside"):
        run(CONV, [5], constants, 2, scale_mant=1, **{**fields, "w_dtype": DTYPE_UINT8})
    with pytest.raises(ValueError, match="type 4"):
        run(CONV_TRAINED, [5], constants, 3, scale_mant=3, **{**fields, "w_dtype": DTYPE_UINT8})


def test_depthwise_trained() -> None:
    """As DEPTHWISE, whose bias holds what the zero point contributes."""
    rng = np.random.default_rng(7)
    for _ in range(15):
        fields = random_geometry(rng) | {"rounding": ROUND_DOUBLE, "w_dtype": DTYPE_INT8, "zero_in": draw(rng, -99, 99)}
        channels = draw(rng, 1, 4)
        n = channels * draw(rng, 1, 3)
        fields |= {"in_c": channels, "out_c": n}
        x = rng.integers(-128, 127, (fields["in_h"], fields["in_w"], channels), endpoint=True)
        weights = rng.integers(-127, 127, (n, fields["kernel_h"] * fields["kernel_w"]), endpoint=True)
        bias, shift = rng.integers(-9000, 9000, n), rng.integers(-9, -5, n)
        multiplier, size = rng.integers(HALF, LARGEST, n), fields["out_h"] * fields["out_w"] * n
        stored = bias - fields["zero_in"] * weights.sum(axis=1)
        wanted = run(DEPTHWISE, x, layer(int8(weights), stored, multiplier, shift), size, **fields)
        assert run(DEPTHWISE_TRAINED, x, layer(int8(weights), bias, multiplier, shift), size, **fields) == wanted
        constants = layer(typed(weights * 8 + 3, np.int16), bias, multiplier, shift)
        more = {"w_dtype": DTYPE_INT16, "fraction": 3}
        assert run(DEPTHWISE_TRAINED, x, constants, size, **{**fields, **more}) == wanted


def test_mask() -> None:
    """Ten bits in two bytes, the lowest first."""
    x = [-5, 0, -5, 1, -4, 127, -128, -5, 3, -5]
    assert run(MASK, x, [], 2, in_h=2, in_w=5, act_min=-5) == int8([0b01111010, 1]).tolist()
    assert run(MASK, [3] * 8, [], 2, in_c=8, act_min=-5) == [-1, BLANK]


# ---- Backward: a record on a bench, all of its operands in the ARENA -------------------------------------------------

GAIN = STATE_BYTES  # offset of the only gain
ONE = {"scale_mant": 1024, "scale_exp": -10}  # with the learning rate 1 and the table's entry 0: acc * 2^exponent


class Bench:
    """Runs one record. An operand is bytes, an array or, in place of another one, that one's number."""

    def __init__(
        self, op: int, operands: dict[int, bytes | np.ndarray | int], learned: int = -31, **fields: int
    ) -> None:
        arena, places = b"", [None] * 6
        for index, value in operands.items():
            if isinstance(value, int):
                places[index] = places[value]
                continue
            places[index] = Operand(ARENA, len(arena))
            arena += value if isinstance(value, bytes) else value.tobytes()
            arena += bytes(-len(arena) % 4)
        self.record = replace(EMPTY, op=op, operands=tuple(places), **fields)
        program = Program("train", (0, len(arena), 0, 0, 0, 0, 0), None, 0, 2, 0, [self.record])
        self.machine = Machine(Plan(programs={"train": program}, state=bytes(STATE_BYTES + 4)))
        self.machine.arena[:] = arena
        self.machine.state[GAIN : GAIN + 2] = bytes([learned % 256, 16])
        set_state(self.machine.state, "rng", 1)
        set_learning_rate(self.machine.state, 1024, -10)

    def run(self) -> Bench:
        execute(self.machine, self.record)
        return self

    def gradient(self, n: int) -> tuple[int, list[int]]:
        """Exponent and mantissas at operand 1; the header has to name the largest."""
        place, narrow = self.record.operands[1], bool(self.record.flags & FLAG_NARROW_IN)
        exponent, largest = self.machine.read(place, "h", 1)[0], self.machine.read(place, "H", 1, 2)[0]
        mantissas = self.machine.read(place, "b" if narrow else "h", n, 4)
        assert largest == max((abs(m) for m in mantissas), default=0)
        return exponent, mantissas

    def numbers(self, operand: int, code: str, n: int) -> list[int]:
        return self.machine.read(self.record.operands[operand], code, n)

    def state(self, name: str) -> int:
        return get_state(self.machine.state, name)


def gradient(exponent: int, mantissas: object, narrow: bool = False, largest: int | None = None) -> bytes:
    stored = typed(mantissas, np.int8 if narrow else np.int16).reshape(-1)
    if largest is None:
        largest = int(np.max(np.abs(stored.astype(int)), initial=0))
    return struct.pack("<hH", exponent, largest) + stored.tobytes()


def uint16(values: object) -> np.ndarray:
    return typed(values, np.uint16)


def room(n: int) -> bytes:
    """Space for a gradient, with something in it"""
    return bytes([0x5A]) * (4 + 2 * n)


NARROW = FLAG_NARROW_IN | FLAG_NARROW_OUT


# ---- Losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "label", "mantissas", "exponent"),
    [
        ([10, 10, 10], 0, [-1365, 683, 683], -11),
        ([127, 127, 127], 0, [0, 1365, 1365], -12),  # the right one is as high as it can be
        ([127, 10, 10], 0, [0, 0, 0], 0),
        ([127, 10, 10], 1, [1024, -1024, 0], -10),
        ([-128, -128, -127], 2, [0, 0, -1365], -11),  # the wrong ones are as low as they can be
        ([-128, -128, -128], 1, [0, -1365, 0], -11),
    ],
)
def test_softmax_ce(logits: list[int], label: int, mantissas: list[int], exponent: int) -> None:
    """Two steps of the table: e is 1 at the maximum and one below it, else 0. Each end of int8 stops the push."""
    bench = Bench(SOFTMAX_CE, {0: int8(logits), 1: room(3), 2: uint16([1, 1]), 3: uint16([label])}, out_c=3, extra=2)
    assert bench.run().gradient(3) == (exponent, mantissas)
    assert bench.state("skipped") == int(not any(mantissas))


@pytest.mark.parametrize(
    ("logits", "label", "margin", "rival", "loss"),
    [
        ([5, 3, 4], 0, 2, 2, 1),
        ([5, 3, 4], 0, 1, None, 0),  # just far enough
        ([5, 4, 4], 0, 9, 1, 8),  # the first of two
        ([4, 4, 4], 0, 1, 1, 1),
        ([4, 4, 4], 1, 1, 0, 1),
        ([4, 4, 4], 1, 0, None, 0),
        ([-128, 127], 0, 65536, 1, 65536 + 255),
        ([-128, 127], 1, 255, None, 0),
    ],
)
def test_hinge(logits: list[int], label: int, margin: int, rival: int | None, loss: int) -> None:
    n = len(logits)
    bench = Bench(HINGE, {0: int8(logits), 1: room(n), 3: uint16([label])}, out_c=n, extra=margin)
    set_state(bench.machine.state, "skip_below", 65535)
    mantissas = [0 if rival is None else 1024 * ((i == rival) - (i == label)) for i in range(n)]
    assert bench.run().gradient(n) == (0 if rival is None else -10, mantissas)
    nothing = int(rival is None)
    assert [bench.state(s) for s in ("loss", "step", "flags", "skipped")] == [loss, 1, nothing, nothing]


def test_losses_refuse() -> None:
    operands = {0: int8([1, 2]), 1: room(2), 2: uint16([1] * 9), 3: uint16([2])}
    for op in (SOFTMAX_CE, HINGE):
        with pytest.raises(ValueError, match="label 2"):
            Bench(op, operands, out_c=2, extra=9).run()
    with pytest.raises(ValueError, match="1 classes"):
        Bench(HINGE, operands, out_c=1).run()
    for op in (SOFTMAX_CE, MSE, HINGE):
        with pytest.raises(ValueError, match="narrow"):
            Bench(op, operands | {3: uint16([0])}, out_c=2, extra=9, flags=FLAG_NARROW_IN).run()


# ---- The gradient at a layer's input ---------------------------------------------------------------------------------


def test_dense_back_by_hand() -> None:
    """One frozen row, two trained ones with half a fraction bit; the gain is learned."""
    operands = {
        0: gradient(-3, [100, -200, 300]),
        1: room(2),
        2: byte_rows(np.array([[1, 2]])),
        3: uint16([32768] * 3),  # g = 50, -100, 150
        5: typed([[5, 8], [9, -13]], np.int16),  # wq: 3 4, 5 -6 (-6.5 goes up)
    }
    fields = {"in_c": 2, "out_c": 3, "extra": 2, "w_dtype": DTYPE_INT16, "fraction": 1, "scale_exp": 7, "gain": GAIN}
    # acc = 50 - 300 + 750, 100 - 400 - 900: a = 11, b = 8, gain 3.
    bench = Bench(DENSE_BACK, operands, in_h=0, out_h=0, **fields)
    bench.machine.state[GAIN : GAIN + 2] = bytes([99, 0])
    assert bench.run().gradient(2) == (-3 + 7 + 1, [250, -600])
    assert bytes(bench.machine.state[GAIN : GAIN + 2]) == bytes([3, 1])
    assert bench.run().gradient(2) == (5, [250, -600])
    assert bytes(bench.machine.state[GAIN : GAIN + 2]) == bytes([3, 2])
    narrow = Bench(DENSE_BACK, operands, learned=3, flags=FLAG_NARROW_IN, **fields)
    assert narrow.run().gradient(2) == (-3 + 7 + 5, [16, -37])  # 15.6, -37.5
    cut = Bench(DENSE_BACK, operands, learned=1, flags=FLAG_NARROW_IN, **fields)
    assert cut.run().gradient(2) == (-3 + 7 + 3, [63, -127])  # 62.5, -150
    assert cut.state("saturated") == 1 and bench.state("saturated") == 0
    # A narrow gradient_out: -200 and 300 do not fit, mantissas are cut to +-127.
    operands[0] = gradient(-3, [100, -128, 100], narrow=True)
    narrow = Bench(DENSE_BACK, operands, flags=FLAG_NARROW_OUT, **fields)
    assert narrow.run().gradient(2) == (4, [50 - 63 * 3 + 250, 100 - 63 * 4 - 300])  # -63.5 goes up


def test_back_of_nothing() -> None:
    """All g are 0: so is the exponent, and the gain learns nothing. All acc are 0: the exponent follows the rule."""
    operands = {0: gradient(5, [1, -1]), 1: room(1), 2: byte_rows(np.array([[3], [3]])), 3: uint16([32767, 32768])}
    bench = Bench(DENSE_BACK, operands, gain=GAIN, out_c=2, scale_exp=20)
    bench.machine.state[GAIN : GAIN + 2] = bytes([7, 0])
    assert bench.run().gradient(1) == (0, [0])  # 0.49999 and -0.5
    assert bytes(bench.machine.state[GAIN : GAIN + 2]) == bytes([7, 0])
    operands[0] = gradient(5, [100, -100])
    operands[3] = uint16([32768] * 2)
    bench = Bench(DENSE_BACK, operands, out_c=2, scale_exp=20)
    assert bench.run().gradient(1) == (25, [0])  # without a gain: b = 6
    bench = Bench(DENSE_BACK, operands, out_c=2, scale_exp=32767)
    assert bench.run().gradient(1) == (8192, [0])
    with pytest.raises(ValueError, match="3 of 2"):
        Bench(DENSE_BACK, operands, out_c=2, extra=3).run()


@pytest.mark.parametrize("op", [CONV_BACK, DEPTHWISE_BACK])
def test_adjoint(op: int) -> None:
    """<conv(x), g> = <x, conv_back(g)> in exact integers."""
    rng = np.random.default_rng(op)
    for case in range(30):
        fields = random_geometry(rng)
        channels, m = draw(rng, 1, 4), draw(rng, 1, 3)
        n = channels * m if op == DEPTHWISE_BACK else draw(rng, 1, 5)
        trained = draw(rng, 0, 1) * n if op == DEPTHWISE_BACK else draw(rng, 0, n)
        kernel = (fields["kernel_h"], fields["kernel_w"])
        shape = (n, *kernel) if op == DEPTHWISE_BACK else (n, *kernel, channels)
        weights = rng.integers(-3, 3, shape, endpoint=True)
        g = rng.integers(-5, 5, (fields["out_h"], fields["out_w"], n), endpoint=True)
        g[0, 0, 0] = 5
        first = n - trained
        operands = {
            0: gradient(-7, 2 * g),
            1: room(fields["in_h"] * fields["in_w"] * channels),
            3: uint16([32768] * n),
        }
        if first:
            operands[2] = int8(weights) if op == DEPTHWISE_BACK else byte_rows(weights[:first])
        if trained:
            operands[5] = int8(weights[first:])
        fields |= {"in_c": channels, "out_c": n, "extra": trained, "w_dtype": DTYPE_INT8, "scale_exp": case}
        # The gain -31 makes s = 0.
        bench = Bench(op, operands, gain=GAIN, **fields)
        exponent, back = bench.run().gradient(fields["in_h"] * fields["in_w"] * channels)
        assert exponent == case - 7 and bench.state("saturated") == 0
        x = rng.integers(-50, 50, (fields["in_h"], fields["in_w"], channels), endpoint=True)
        windows = windows_of(x, fields, 0.0)
        if op == DEPTHWISE_BACK:
            y = np.einsum("hwijc,cmij->hwcm", windows, weights.reshape(channels, m, *kernel).astype(np.float64))
            y = y.reshape(g.shape)
        else:
            y = np.einsum("hwijc,nijc->hwn", windows, weights.astype(np.float64))
        assert np.sum(y * g) == np.dot(x.reshape(-1), back)


def test_conv_back_in_place() -> None:
    """1 x 1 with fewer inputs than outputs: the result lies where the gradient was."""
    weights = np.array([[1], [2], [-1]])
    operands = {0: gradient(0, [10, 20, 30, 2, 4, 6], narrow=True), 1: 0, 2: byte_rows(weights), 3: uint16([32768] * 3)}
    fields = {"in_w": 2, "out_w": 2, "out_c": 3, "flags": NARROW}
    # b = 4 and no gain: s = 0; g = 5 10 15 / 1 2 3
    assert Bench(CONV_BACK, operands, **fields).run().gradient(2) == (0, [10, 2])
    with pytest.raises(ValueError, match="all or none"):
        Bench(DEPTHWISE_BACK, operands, extra=1, **fields).run()


def test_accumulators_beyond_32_bits() -> None:
    """A stride of 0 lets 40 windows meet at one cell: 40 * 2 * 2047 * 32767."""
    weights = typed([[32767], [32767]], np.int16)
    operands = {0: gradient(0, [[2047] * 2] * 40), 1: room(1), 3: uint16([65535] * 2), 5: weights}
    fields = {"out_w": 40, "stride_w": 0, "out_c": 2, "extra": 2, "w_dtype": DTYPE_INT16}
    with pytest.raises(ValueError, match="32 bits"):
        Bench(CONV_BACK, operands, **fields).run()


# ---- Updates ---------------------------------------------------------------------------------------------------------


def mixed(v: np.ndarray) -> np.ndarray:
    """lowbias32 in numpy's uint32, which wraps."""
    v = v.astype(np.uint32)
    v = (v ^ (v >> np.uint32(16))) * np.uint32(0x7FEB352D)
    v = (v ^ (v >> np.uint32(15))) * np.uint32(0x846CA68B)
    return v ^ (v >> np.uint32(16))


def test_mix() -> None:
    assert mix(0) == 0
    values = np.random.default_rng(1).integers(0, 2**32, 1000)
    assert [mix(v) for v in values.tolist()] == mixed(values).tolist()


@pytest.mark.parametrize(
    ("p", "s", "quotient"),
    [
        (5, 1, 3),
        (-5, 1, -2),
        (2**40, 5, 2**30),  # cut off
        (-(2**40), 5, -(2**30)),
        (2**40, 31, 512),
        (-(2**61), 62, 0),  # -0.5 goes up
        (2**61, 62, 1),
        (2**62, 63, 0),
        (-(2**63), 63, 0),
        (7, -2, 28),
        (7, 0, 7),
        (-(2**20), -11, -(2**30)),
    ],
)
def test_rshift(p: int, s: int, quotient: int) -> None:
    assert rshift(p, s) == quotient


@pytest.mark.parametrize(
    ("p", "s", "r", "quotient"),
    [
        (3, 2, 2**30 - 1, 0),
        (3, 2, 2**30, 1),
        (-1, 2, 2**30 - 1, -1),
        (-1, 2, 2**30, 0),
        (2**50, 1, 0, 2**30),
        (-(2**50), 1, 0, -(2**30)),
        (5, -1, 2**31, 10),
        (2**40, 40, 0, 1),  # 2^40 / 2^10 / 2^30
        (2**40 - 1, 40, 3, 0),  # 2^30 - 1 after the first shift
        (2**40 - 1, 40, 4, 1),
        (-1, 92, 0, -1),
        (-1, 5000, 3, -1),
        (-1, 5000, 4, 0),
        (2**62, 92, 4, 0),  # 1 and 1
        (2**62, 92, 2**32 - 1, 1),
    ],
)
def test_stochastic_rshift(p: int, s: int, r: int, quotient: int) -> None:
    assert stochastic_rshift(p, s, r) == quotient


def test_update_weight_by_hand() -> None:
    """Rows for the last two of three channels; int16 weights lose acc / 2, halves rounded up, at a rate of 1 / 2."""
    weights = typed([[100, 0, -100], [7, 32767, -32768]], np.int16)
    operands = {0: gradient(-11, [999, 3, 0]), 1: int8([5, 4, 1]), 2: weights, 3: uint16([0, 0])}
    fields = {"in_c": 3, "out_c": 2, "zero_in": 2, "w_dtype": DTYPE_INT16, "extra": 3 + 65536 * 9, **ONE}
    bench = Bench(UPDATE_WEIGHT, operands, in_h=0, out_w=0, **fields).run()
    assert bench.numbers(2, "h", 6) == [95, -3, -99, 7, 32767, -32768]  # 4.5, 3, -1.5; the second row is passed over
    assert bench.state("clipped") == 0 and bench.state("rng") == 1
    operands[0] = gradient(-10, [-1, 2, -1])
    bench = Bench(UPDATE_WEIGHT, operands, **fields).run()
    assert bench.numbers(2, "h", 6) == [94, -4, -98, 10, 32767, -32767]
    assert bench.state("clipped") == 2
    # Entry 1024: twice as much. 1536 / 1024 with 10 more bits: one and a half.
    bench = Bench(UPDATE_WEIGHT, operands | {3: uint16([1024, 512])}, **fields).run()
    assert bench.numbers(2, "h", 3) == [100 - 12, -8, -100 + 4]
    assert bench.numbers(2, "h", 4)[3] == 7 + 4  # -4.5 goes up
    with pytest.raises(ValueError, match="2 rows"):
        Bench(UPDATE_WEIGHT, operands, **{**fields, "extra": 1}).run()
    with pytest.raises(ValueError, match="type 4"):
        Bench(UPDATE_WEIGHT, operands, **{**fields, "w_dtype": DTYPE_UINT8}).run()


def test_update_weight_draws() -> None:
    """int8 weights: the draw of a weight depends on its place in the tensor alone, and a quarter is taken off on
    average."""
    n, k = 40, 50
    mantissas = np.where(np.arange(n) % 3 == 1, 0, 1)
    operands = {0: gradient(-12, mantissas), 1: int8([1] * k), 2: int8(np.zeros(n * k)), 3: uint16([0] * n)}
    bench = Bench(UPDATE_WEIGHT, operands, in_c=k, out_c=n, w_dtype=DTYPE_INT8, extra=n, **ONE).run()
    generator = 1 ^ 2**13
    generator ^= generator >> 17
    generator = (generator ^ generator << 5) % 2**32
    assert bench.state("rng") == generator == xorshift32(1)
    r = mixed((generator + np.arange(n * k) * 2654435769) % 2**32)
    # p = 1024, s = 12: up where r / 2^20 >= 3072.
    wanted = np.where(np.repeat(mantissas, k) == 1, -((1024 + (r >> np.uint32(20))) >> np.uint32(12)).astype(int), 0)
    weights = bench.numbers(2, "b", n * k)
    assert weights == wanted.tolist()
    assert abs(sum(weights) / (k * mantissas.sum()) + 0.25) < 0.04
    # With nothing to do the generator moves all the same, and -128 stays in a row that is passed over.
    operands |= {0: gradient(-12, [0] * n), 2: int8([-128] * (n * k))}
    bench = Bench(UPDATE_WEIGHT, operands, in_c=k, out_c=n, w_dtype=DTYPE_INT8, extra=n, **ONE).run()
    assert bench.numbers(2, "b", n * k) == [-128] * (n * k)
    assert bench.state("rng") == generator and bench.state("clipped") == 0


def test_update_bias_by_hand() -> None:
    """Sums over two positions, of the two channels from the second one on."""
    mantissas = [[9, 2, 5, 7], [9, 3, -5, 7]]
    operands = {0: gradient(-11, mantissas), 2: int32([10, LARGEST]), 3: uint16([0, 0])}
    fields = {"in_c": 1, "out_w": 2, "out_c": 2, "extra": 4, **ONE}
    bench = Bench(UPDATE_BIAS, operands, **fields).run()
    assert bench.numbers(2, "i", 2) == [10 - 3, LARGEST]  # 2.5; a sum of 0 changes nothing
    operands = {0: gradient(-10, mantissas), 2: int32([SMALLEST, LARGEST]), 3: uint16([0, 0])}
    bench = Bench(UPDATE_BIAS, operands, **{**fields, "in_c": 2}).run()
    assert bench.numbers(2, "i", 2) == [SMALLEST, 2**30 - 1 - 14] and bench.state("clipped") == 0
    bench = Bench(UPDATE_BIAS, operands, **{**fields, "in_c": 0}).run()
    assert bench.numbers(2, "i", 2) == [-(2**30) + 1, 2**30 - 1 - 5] and bench.state("clipped") == 1
    with pytest.raises(ValueError, match="outside"):
        Bench(UPDATE_BIAS, operands, **{**fields, "in_c": 3}).run()


@pytest.mark.parametrize("op", [UPDATE_CONV, UPDATE_DEPTHWISE])
def test_update_of_kernels(op: int) -> None:
    """Weights lose exactly the derivative of <conv(x - zero_in), gradient>, in float64."""
    rng = np.random.default_rng(op)
    for dtype in [np.int16, np.int8] * 15:
        fields = random_geometry(rng)
        channels, m = draw(rng, 1, 4), draw(rng, 1, 3)
        n = channels * m if op == UPDATE_DEPTHWISE else draw(rng, 1, 4)
        others = 0 if op == UPDATE_DEPTHWISE else draw(rng, 0, 3)
        zero_in = draw(rng, -5, 5)
        x = zero_in + rng.integers(-2, 2, (fields["in_h"], fields["in_w"], channels), endpoint=True)
        g = rng.integers(-1, 1, (fields["out_h"], fields["out_w"], others + n), endpoint=True)
        windows = windows_of(x - zero_in, fields, 0.0)
        own = g[:, :, others:].astype(np.float64)
        if op == UPDATE_DEPTHWISE:
            acc = np.einsum("hwijc,hwcm->cmij", windows, own.reshape(*g.shape[:2], channels, m))
        else:
            acc = np.einsum("hwijc,hwn->nijc", windows, own)
        weights = rng.integers(-20, 20, acc.size, endpoint=True)
        operands = {0: gradient(-10, g), 1: int8(x), 2: typed(weights, dtype), 3: uint16([0] * n)}
        fields |= {"in_c": channels, "out_c": n, "zero_in": zero_in, "extra": others + n, **ONE}
        fields["w_dtype"] = DTYPE_INT8 if dtype == np.int8 else DTYPE_INT16
        bench = Bench(op, operands, **fields).run()
        wanted = weights - acc.reshape(-1).astype(int)
        limit = 127 if dtype == np.int8 else 32767
        assert bench.numbers(2, "b" if dtype == np.int8 else "h", acc.size) == np.clip(wanted, -limit, limit).tolist()
        assert bench.state("clipped") == np.sum(np.abs(wanted) > limit)
        assert bench.state("rng") == (xorshift32(1) if dtype == np.int8 else 1)
    if op == UPDATE_DEPTHWISE:
        with pytest.raises(ValueError, match="extra"):
            Bench(op, operands, **{**fields, "extra": 0}).run()


# ---- Pooling, backward -----------------------------------------------------------------------------------------------


def test_average_back_by_hand() -> None:
    """Windows of 2, a border cell before the first: 1 cell and 2 cells, then thirds in units of 2^-4."""
    fields = {"in_w": 3, "out_w": 2, "kernel_w": 2, "stride_w": 2, "pad_left": 1}
    operands = {0: gradient(3, [100, 7]), 1: room(3)}
    bench = Bench(AVERAGE_BACK, operands, extra=4, scale_mant=3, **fields).run()
    assert bench.gradient(3) == (3 - 4 + 3, [200, 7, 7])  # 1600 / 8, 7 * 8 / 8
    third = Bench(AVERAGE_BACK, {0: gradient(3, [100]), 1: room(3)}, extra=4, in_w=3, kernel_w=3).run()
    assert third.gradient(3) == (-1, [500] * 3)  # floor((16 + 1) / 3) = 5
    cut = Bench(AVERAGE_BACK, operands, extra=5, flags=FLAG_NARROW_IN, **fields).run()
    assert cut.gradient(3) == (-2, [127, 112, 112]) and cut.state("saturated") == 1
    with pytest.raises(ValueError, match="no cell"):
        Bench(AVERAGE_BACK, operands, **{**fields, "in_w": 1, "pad_left": 0}).run()
    with pytest.raises(ValueError, match="channels"):
        Bench(AVERAGE_BACK, operands, **{**fields, "in_c": 2}).run()
    for name in ("extra", "scale_mant"):
        with pytest.raises(ValueError, match="31"):
            Bench(AVERAGE_BACK, operands, **{**fields, name: 31}).run()


def test_max_back_by_hand() -> None:
    """Windows that overlap; of two largest the first one, row by row."""
    x = int8([[5, 9, 1], [9, 2, 9]])
    fields = {"in_h": 2, "in_w": 3, "out_w": 2, "kernel_h": 2, "kernel_w": 2}
    operands = {0: gradient(-4, [10, 2000]), 1: room(6), 4: x}
    assert Bench(MAX_BACK, operands, **fields).run().gradient(6) == (-4, [0, 2010, 0, 0, 0, 0])
    bench = Bench(MAX_BACK, operands, scale_mant=2, **fields).run()
    assert bench.gradient(6) == (-2, [0, 503, 0, 0, 0, 0])  # 502.5
    with pytest.raises(ValueError, match="extra 1"):
        Bench(MAX_BACK, operands, extra=1, **fields).run()


@pytest.mark.parametrize("op", [AVERAGE_BACK, MAX_BACK])
def test_pooling_adjoint(op: int) -> None:
    """<pool(x), g> = <x, pool_back(g)>; of the average with a share of 2^6 / n, rounded as the record has it."""
    rng = np.random.default_rng(op)
    for _ in range(30):
        fields = random_geometry(rng)
        channels = draw(rng, 1, 3)
        x = rng.integers(-128, 127, (fields["in_h"], fields["in_w"], channels), endpoint=True)
        g = rng.integers(-1, 1, (fields["out_h"], fields["out_w"], channels), endpoint=True)
        seen = windows_of(x, fields, np.nan)
        if op == MAX_BACK:
            y = np.nanmax(seen, axis=(2, 3))
        else:
            count = np.sum(~np.isnan(seen), axis=(2, 3))
            y = np.nansum(seen, axis=(2, 3)) * np.floor(64 / count + np.floor(count / 2) / count + 1e-9)
        operands = {0: gradient(0, g, narrow=True), 1: room(x.size), 4: int8(x)}
        fields |= {"in_c": channels, "out_c": channels, "extra": 6 if op == AVERAGE_BACK else 0}
        bench = Bench(op, operands, flags=FLAG_NARROW_OUT, **fields).run()
        exponent, back = bench.gradient(x.size)
        assert exponent == -fields["extra"] and np.dot(x.reshape(-1), back) == np.sum(y * g)


# ---- Element by element, backward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [room(4), 0])
def test_scale_back(place: bytes | int) -> None:
    """Times 1 / 2 and -3 in turns, the table in units of 2^-11; in place as well."""
    operands = {0: gradient(-5, [3, 3, -3, 2000]), 1: place, 2: typed([1024, -6144], np.int16)}
    fields = {"in_h": 2, "in_w": 2, "out_c": 4, "extra": 2, "scale_exp": -10}
    bench = Bench(SCALE_BACK, operands, **fields).run()
    assert bench.gradient(4) == (-5 - 10 + 11, [2, -9, -1, -2047]) and bench.state("saturated") == 1
    operands = {0: gradient(-5, [3, 3, -3, 100], narrow=True), 1: place, 2: typed([1024, -6144], np.int16)}
    assert Bench(SCALE_BACK, operands, flags=NARROW, **fields).run().gradient(4) == (-4, [2, -9, -1, -127])
    with pytest.raises(ValueError, match="widths"):
        Bench(SCALE_BACK, operands, flags=FLAG_NARROW_IN, **fields).run()
    with pytest.raises(ValueError, match="another size"):
        Bench(SCALE_BACK, operands, **{**fields, "out_c": 5}).run()
    with pytest.raises(ValueError, match="no entry"):
        Bench(SCALE_BACK, operands, **{**fields, "extra": 0}).run()


def test_crop() -> None:
    """A part of a 3 x 3 x 2 output; flat pieces of a row."""
    out = np.arange(18)
    fields = {"in_h": 2, "in_w": 2, "out_h": 3, "out_w": 3, "out_c": 2, "pad_top": 1, "pad_left": 1, "extra": 1}
    bench = Bench(CROP, {0: gradient(9999, out), 1: room(4)}, **fields).run()
    assert bench.gradient(4) == (9999, [9, 11, 15, 17])
    flat = {"in_w": 1, "in_c": 4, "out_w": 18, "pad_left": 3, "extra": 2}
    narrow = Bench(CROP, {0: gradient(1, out, narrow=True), 1: room(4)}, flags=NARROW, **flat).run()
    assert narrow.gradient(4) == (1, [5, 6, 7, 8])
    with pytest.raises(ValueError, match="beyond"):
        Bench(CROP, {0: gradient(9, out), 1: room(4)}, **{**fields, "pad_top": 2}).run()
    wider = Bench(CROP, {0: gradient(1, out, narrow=True), 1: room(4)}, flags=FLAG_NARROW_OUT, **flat).run()
    assert wider.gradient(4) == (1, [5, 6, 7, 8])
    with pytest.raises(ValueError, match="does not fit"):
        Bench(CROP, {0: gradient(9, out), 1: room(4)}, flags=FLAG_NARROW_IN, **fields).run()


@pytest.mark.parametrize("place", [room(2), 0, 4])
def test_sum(place: bytes | int) -> None:
    """Wide and narrow; where one is 0 the other passes as it is."""
    fields = {"in_c": 2, "out_c": 2}

    def total(a: bytes, b: bytes, flags: int = 0) -> tuple[int, list[int], int]:
        bench = Bench(SUM, {0: a, 4: b, 1: place}, flags=flags, **fields).run()
        return *bench.gradient(2), bench.state("saturated")

    # E = max(3 + 7, 5 + 4) + 1 - 11 = 0: a * 2^3, b * 2^5
    assert total(gradient(3, [100, -3]), gradient(5, [-10, 15])) == (0, [480, 456], 0)
    # E = max(0 + 11, -3 + 11) - 10 = 1: halves up each, then added
    assert total(gradient(0, [2047, -1]), gradient(-3, [2047, -24])) == (1, [1024 + 128, -1], 0)
    assert total(gradient(7, [0, 0]), gradient(9000, [1, 2])) == (9000, [1, 2], 0)
    assert total(gradient(-9000, [1, 2]), gradient(7, [0, 0])) == (-9000, [1, 2], 0)
    assert total(gradient(3, [0, 0]), gradient(7, [0, 0])) == (7, [0, 0], 0)
    # Far apart: b is 0 in units of 2^E. E = 8000 + 1 - 10.
    assert total(gradient(8000, [1, -1]), gradient(-8000, [2047, -2047])) == (7991, [512, -512], 0)
    assert total(gradient(9000, [1024, 0]), gradient(-8000, [2047, 0])) == (8192, [512, 0], 0)
    # E = 7 + 1 - 7: 127 / 2 -> 64, twice 64 does not fit.
    assert total(gradient(0, [127, -127], True), gradient(0, [127, -1], True), NARROW) == (1, [127, -63], 1)
    # The headers say what is 0.
    assert total(gradient(3, [5, 6], largest=0), gradient(5, [-10, 15])) == (5, [-10, 15], 0)


@pytest.mark.parametrize("place", [room(10), 0])
@pytest.mark.parametrize("narrow", [False, True])
def test_relu_back(place: bytes | int, narrow: bool) -> None:
    """By activations or by bits; the header stays, and so does what is not stopped."""
    top = 127 if narrow else 2047
    stored = [-top - 1, 2, 3, 4, 5, 6, 7, 8, 9, -top - 1]
    x = [5, 1, 0, 5, 1, 9, 5, 2, 5, 5]
    out = gradient(-9000, stored, narrow)
    fields = {"in_h": 2, "in_w": 5, "out_w": 5, "out_c": 2, "act_min": 5}
    wanted = (-9000, top + 1, [0, 2, 3, 0, 5, 6, 0, 8, 0, 0])

    def left(bench: Bench) -> tuple[int, int, list[int]]:
        at = bench.run().record.operands[1]
        return (*bench.machine.read(at, "h", 2), bench.machine.read(at, "b" if narrow else "h", 10, 4))

    flags = NARROW if narrow else 0
    assert left(Bench(RELU_BACK, {0: out, 1: place, 4: int8(x)}, flags=flags, **fields)) == wanted
    packed = np.packbits(np.not_equal(x, 5), bitorder="little")
    bench = Bench(RELU_BACK, {0: out, 1: place, 4: packed}, flags=flags | FLAG_BITS, **fields)
    assert left(bench) == wanted
    # A mantissa beyond the range is passed on like any: whoever reads it cuts it.
    bench = Bench(RELU_BACK, {0: out, 1: place, 4: int8(x)}, flags=flags, **{**fields, "act_min": -128})
    assert left(bench) == (-9000, top + 1, stored)


# ---- What all of them share ------------------------------------------------------------------------------------------


def test_backward_records_stop() -> None:
    """Where a loss found nothing to learn, and at a closed gate."""
    operands = {0: gradient(0, [7]), 1: gradient(0, [9]), 4: int8([1])}
    for flag, gate, passed in ((0, 0, 7), (1, 0, 9), (0, 1, 9)):
        bench = Bench(RELU_BACK, operands, gate=gate * (STATE_BYTES + 2))
        set_state(bench.machine.state, "flags", flag)
        assert bench.run().gradient(1) == (0, [passed])
    assert sorted(BACKWARD) == [5, 6, 7, *range(32, 42)]


def test_forward_records_always_run() -> None:
    """A loss that found nothing to learn does not stop the operators; a gate does."""
    record = replace(EMPTY, op=MAX_POOL, gate=STATE_BYTES)
    machine = machine_for(record, [], 1)
    assert machine.predict(int8([5]).tobytes()) == int8([BLANK]).tobytes()
    set_gate(machine.state, 0, 1)
    set_state(machine.state, "flags", 1)
    assert machine.predict(int8([5]).tobytes()) == int8([5]).tobytes()


def test_unknown_records() -> None:
    for op in (0, 9, 15, 30, 31, 42, 200):
        with pytest.raises(ValueError, match="unknown"):
            run(op, [1], [], 1)
