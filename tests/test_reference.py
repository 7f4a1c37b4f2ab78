"""The judge judged: tests/reference.py against numbers worked out by hand and against numpy's own formulations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from reference import DENSE, Machine, set_gate, set_state
from reference_arithmetic import requantise, round_half_away
from reference_forward import (
    ADD,
    AVERAGE_POOL,
    CONV,
    COPY,
    DEPTHWISE,
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
    DTYPE_UINT8,
    FLAG_FULL_RANGE,
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


# ---- What all of them share ------------------------------------------------------------------------------------------


def test_forward_records_always_run() -> None:
    """A loss that found nothing to learn does not stop the operators; a gate does."""
    record = replace(EMPTY, op=MAX_POOL, gate=STATE_BYTES)
    machine = machine_for(record, [], 1)
    assert machine.predict(int8([5]).tobytes()) == int8([BLANK]).tobytes()
    set_gate(machine.state, 0, 1)
    set_state(machine.state, "flags", 1)
    assert machine.predict(int8([5]).tobytes()) == int8([5]).tobytes()


def test_unknown_records() -> None:
    for op in (0, 8, 15, 200):
        with pytest.raises(ValueError, match="unknown"):
            run(op, [1], [], 1)
