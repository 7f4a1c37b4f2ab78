"""Operators of a quantised network as records of the forward program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulearn_host import fixedpoint, memory, scales
from ulearn_host import numbers as n
from ulearn_host import scratch as share
from ulearn_host.network import (
    Concat,
    Conv,
    Dense,
    Depthwise,
    Elementwise,
    Mean,
    Op,
    Pad,
    Pool,
    Quantisation,
    Reshape,
    Softmax,
    Table,
    Tensor,
    Weighted,
    Window,
)

_ADD_SHIFT = 20
_WORTH_SHARING = 256  # bytes
_POINT = Window((1, 1))


@dataclass
class Blob:
    """A buffer that grows by aligned pieces."""

    buffer: int
    data: bytearray = field(default_factory=bytearray)
    known: dict[bytes, int] = field(default_factory=dict)

    def add(self, values: NDArray[Any], shared: bool = True) -> int:
        """Append an array (or find it again) and return its operand.

        What is small is never shared: an operator's constants lie together, so that a board can stream them.
        """
        raw = values.tobytes()
        if shared and len(raw) >= _WORTH_SHARING and raw in self.known:
            return self.known[raw]
        self.data += bytes(-len(self.data) % memory.ALIGNMENT)
        operand = self.buffer << 28 | len(self.data)
        self.data += raw
        self.known[raw] = operand
        return operand


@dataclass
class Record:
    """One record before its arena operands are known; operands are numbers or names of arena tensors.

    in_place: the tensor, if any, whose place its output may take. scratch: bytes of SCRATCH.
    """

    op: int
    name: str
    operands: dict[int, int | str]
    writes: tuple[str, ...] = ()
    fields: dict[str, int] = field(default_factory=dict)
    in_place: tuple[str, ...] = ()
    scratch: int = 0

    def reads(self) -> list[str]:
        """Names of the arena tensors it touches."""
        return [o for o in self.operands.values() if isinstance(o, str)]


def shapes(taken: tuple[int, ...], given: tuple[int, ...]) -> dict[str, int]:
    """Two shapes (height, width, channels) as a record's fields."""
    names = ("in_h", "in_w", "in_c", "out_h", "out_w", "out_c")
    return dict(zip(names, (*taken, *given), strict=True))


def walk(window: Window) -> dict[str, int]:
    """Kernel, stride and padding as a record's fields."""
    names = ("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_top", "pad_left")
    return dict(zip(names, (*window.kernel, *window.stride, *window.pad), strict=True))


def _bounds(activation: tuple[int, int]) -> dict[str, int]:
    return {"act_min": activation[0], "act_max": activation[1]}


def dimensions(op: Op) -> dict[str, int]:
    """The shapes of the first input and the output as a record's fields."""
    return shapes(op.input.shape, op.output.shape)


def vector_shape(op: Op) -> dict[str, int]:
    """The fields of a dense layer's record of its own, which has no height and width."""
    return {"in_h": 0, "in_w": 0, "in_c": op.input.size, "out_h": 0, "out_w": 0}


def conv_geometry(op: Op) -> dict[str, int]:
    """Kernel, stride and padding as fields; a dense layer is a convolution over its rows."""
    if isinstance(op, Dense):
        return walk(_POINT) | {"in_h": 1, "in_w": op.rows, "in_c": op.weights.shape[1]}
    if isinstance(op, Conv | Depthwise | Pool):
        return walk(op.window)
    raise TypeError(type(op).__name__)


def concat_slices(op: Concat) -> list[tuple[dict[str, int], int]]:
    """For each input the shapes that COPY and CROP have, and where it lies in each of the output's rows."""
    height, width, channels = op.output.shape
    slices, at = [], 0
    for x in op.inputs:
        h, w, c = x.shape
        if op.axis == 2:
            shape = shapes((h * w, 1, c), (h * w, 1, channels))
        elif op.axis == 1:
            shape = shapes(x.shape, (h, width, channels))
        else:
            shape = shapes((1, h * w, c), (1, height * width, channels))
        slices.append((shape, at))
        at += (c, w * c, h * w * c)[2 - op.axis]
    return slices


_FINE_BITS = 47


def _dense_multipliers(op: Dense) -> tuple[list[int], list[int], int]:
    """Multipliers, shifts and the rounding that give TFLite's answers for every sum a dense layer can reach."""
    reals = op.multipliers
    sizes = np.abs(op.weights.astype(np.int64)).sum(axis=1)
    reach = 1 + int((255 * sizes + np.abs(op.bias.astype(np.int64))).max())
    steps = max(op.output.zero - op.activation[0], op.activation[1] - op.output.zero, 1)
    pairs = [scales.dense_requantisation(real, reach, steps, 31) for real in reals]
    if None not in pairs:
        return [p[0] for p in pairs if p], [p[1] for p in pairs if p], n.ROUND_SINGLE
    # Rarely 31 bits are too few; more rarely float64 itself breaks ties unevenly, and the nearest multiplier must do.
    fine = [scales.dense_requantisation(r, reach, steps, _FINE_BITS) or scales.fraction(r, _FINE_BITS) for r in reals]
    upper, lower = [m >> 16 for m, _ in fine], [m & 0xFFFF for m, _ in fine]
    return upper + lower, [s for _, s in fine], n.ROUND_AWAY


def offset_rows(weights: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Weights [channels, ...] as CONV wants them: rows of bytes, weight + 128, up to a multiple of 4 with 128."""
    rows = weights.reshape(len(weights), -1)
    padded = np.pad(rows.astype(np.int16), ((0, 0), (0, -rows.shape[1] % 4))) + 128
    return padded.astype(np.uint8)


def folded_bias(op: Weighted) -> NDArray[np.int32]:
    """The bias with what the input's zero point contributes to every sum (modulo 2^32)."""
    rows = op.weights.reshape(len(op.weights), -1).astype(np.int64)
    folded: NDArray[np.int32] = (op.bias.astype(np.int64) - op.input.zero * rows.sum(axis=1)).astype(np.int32)
    return folded


class Lowering:
    """Turns operators into records; constants go into FROZEN."""

    def __init__(self, frozen: Blob, place: Callable[[Tensor], int | str]) -> None:
        """place: where a tensor lies: an operand, or the name of an arena tensor."""
        self.frozen, self.place = frozen, place
        self.biases: dict[str, int] = {}  # by output: operands of those that train, folded like the frozen ones

    def records(self, op: Op) -> list[Record]:
        """The records of an operator whose weights are not trained."""
        if isinstance(op, Reshape):
            return []
        if isinstance(op, Concat):
            return self._concat(op)
        makers: dict[type[Op], Callable[[Any], Record]] = {
            Conv: self._conv,
            Dense: self._conv,
            Depthwise: self._depthwise,
            Pool: self._pool,
            Mean: self._mean,
            Elementwise: self._elementwise,
            Pad: self._pad,
            Table: self._table,
            Softmax: self._softmax,
        }
        return [makers[type(op)](op)]

    def record(self, kind: int, op: Op, more: dict[int, int | str], fields: dict[str, int], **rest: Any) -> Record:
        """A record that reads the operator's first input and writes its output."""
        output = self.place(op.output)
        operands: dict[int, int | str] = {0: self.place(op.input), 1: output, **more}
        writes = (output,) if isinstance(output, str) else ()
        fields = {"zero_in": op.input.zero, "zero_out": op.output.zero} | fields
        return Record(kind, op.name, operands, writes, dimensions(op) | fields, **rest)

    def _whole(self, op: Op) -> tuple[str, ...]:
        place = self.place(op.input)
        return (place,) if isinstance(place, str) else ()

    def quantised_sums(self, op: Weighted) -> tuple[dict[int, int | str], dict[str, int]]:
        """Operands 4 and 5, multipliers and shifts of every channel or of all, and fields that say how they round."""
        if isinstance(op, Dense):
            multipliers, shifts, rounding = _dense_multipliers(op)
        else:
            pairs = [scales.requantisation(real) for real in op.multipliers]
            multipliers, shifts, rounding = [m for m, _ in pairs], [s for _, s in pairs], n.ROUND_DOUBLE
        operands: dict[int, int | str] = {
            4: self.frozen.add(np.array(multipliers, dtype=np.int32)),
            5: self.frozen.add(np.array(shifts, dtype=np.int8)),
        }
        return operands, {"rounding": rounding, "flags": n.FLAG_ONE_SCALE if len(op.multipliers) == 1 else 0}

    def _weighted(self, op: Weighted, stored: NDArray[Any]) -> tuple[dict[int, int | str], dict[str, int]]:
        """Weights and what becomes of their sums."""
        operands: dict[int, int | str] = {2: self.frozen.add(stored)}
        trained = self.biases.get(op.output.name)
        operands[3] = self.frozen.add(folded_bias(op)) if trained is None else trained
        more, fields = self.quantised_sums(op)
        if (op.weights == -128).any():
            fields["flags"] |= n.FLAG_FULL_RANGE
        return operands | more, _bounds(op.activation) | fields

    def first_rows(self, op: Conv | Dense, count: int) -> Record:
        """The first `count` output channels of a layer, beside which another record writes the rest."""
        part = replace(op, weights=op.weights[:count], bias=op.bias[:count], weight_scales=op.weight_scales[:count])
        record = self._conv(part)
        fields = record.fields | {"out_c": count, "scale_mant": op.output.shape[2]}
        return replace(record, fields=fields, in_place=())

    def trained(self, op: Weighted, rows: int, operands: dict[int, int | str], fields: dict[str, int]) -> Record:
        """The last `rows` output channels of a layer whose weights are trained. operands: weights and bias; fields: how
        the weights are kept."""
        first = len(op.weights) - rows
        part = replace(op, weights=op.weights[first:], bias=op.bias[first:], weight_scales=op.weight_scales[first:])
        more, rounding = self.quantised_sums(part)
        fields = fields | rounding | _bounds(op.activation) | {"out_c": rows}
        if isinstance(op, Dense) and op.rows == 1 and first == 0:
            fields |= vector_shape(op)
            return self.record(n.OP_DENSE, op, operands | more, fields)
        if isinstance(op, Depthwise):
            fields |= walk(op.window)
            return self.record(n.OP_DEPTHWISE_TRAINED, op, operands | more, fields)
        extra, size = share.trained(op.weights[0].size, rows)
        fields |= conv_geometry(op) | {"extra": extra, "scale_mant": op.output.shape[2]}
        return self.record(n.OP_CONV_TRAINED, op, operands | more, fields, scratch=size)

    def _conv(self, op: Conv | Dense) -> Record:
        operands, fields = self._weighted(op, offset_rows(op.weights))
        extra, size = share.conv(op)
        window = op.window if isinstance(op, Conv) else _POINT
        fields |= conv_geometry(op) | {"w_dtype": n.DTYPE_UINT8, "extra": extra}
        point = window == _POINT and op.output.shape[2] <= op.weights.shape[-1]
        alone = op.output.shape[:2] == (1, 1)
        place = self._whole(op) if point or alone else ()
        return self.record(n.OP_CONV, op, operands, fields, in_place=place, scratch=size)

    def _depthwise(self, op: Depthwise) -> Record:
        operands, fields = self._weighted(op, op.weights)
        extra, size = share.depthwise(op)
        fields |= walk(op.window) | {"w_dtype": n.DTYPE_INT8, "extra": extra}
        whole = op.input.shape == op.output.shape and extra >= op.output.shape[0]
        place = self._whole(op) if whole else ()
        return self.record(n.OP_DEPTHWISE, op, operands, fields, in_place=place, scratch=size)

    def _pool(self, op: Pool) -> Record:
        kind = n.OP_MAX_POOL if op.kind == "max" else n.OP_AVERAGE_POOL
        return self.record(kind, op, {}, walk(op.window) | _bounds(op.activation) | {"zero_in": 0, "zero_out": 0})

    def _mean(self, op: Mean) -> Record:
        pair = scales.mean(op.input.scale, op.output.scale, op.input.shape[0] * op.input.shape[1])
        operand = self.frozen.add(np.array(pair, dtype=np.int32))
        return self.record(n.OP_MEAN, op, {2: operand}, _bounds((-128, 127)) | {"rounding": n.ROUND_DOUBLE})

    def _elementwise(self, op: Elementwise) -> Record:
        if op.constant is not None:
            b: int | str = self.frozen.add(op.constant)
            count = op.constant.size
        else:
            b = self.place(op.inputs[1])
            count = op.inputs[1].size
        if op.kind == "add":
            kind, parameters = n.OP_ADD, _add_parameters(op.input, op.second, op.output)
        else:
            # TFLite takes this quotient in float32, unlike the others.
            product = np.float32(op.input.scale) * np.float32(op.second.scale)
            pair = scales.requantisation(float(product / np.float32(op.output.scale)))
            kind, parameters = n.OP_MUL, [op.second.zero, *pair]
        operands: dict[int, int | str] = {2: b, 3: self.frozen.add(np.array(parameters, dtype=np.int32))}
        places = self._whole(op)
        if isinstance(b, str) and count == op.output.size:
            places += (b,)
        fields = _bounds(op.activation) | {"rounding": n.ROUND_DOUBLE, "extra": count}
        scratch = 4 * n.ADD_BLOCK if op.kind == "add" else 0
        return self.record(kind, op, operands, fields, in_place=places, scratch=scratch)

    def _pad(self, op: Pad) -> Record:
        top, left, front = op.before
        fields = {"pad_top": top, "pad_left": left, "extra": front, "zero_in": op.value, "zero_out": 0}
        return self.record(n.OP_PAD, op, {}, fields)

    def _table(self, op: Table) -> Record:
        fields = {"zero_in": 0, "zero_out": 0}
        return self.record(n.OP_TABLE, op, {2: self.frozen.add(op.table)}, fields, in_place=self._whole(op))

    def _softmax(self, op: Softmax) -> Record:
        table = fixedpoint.softmax_exponentials(op.input.scale, op.beta)
        operand = self.frozen.add(table)
        fields = {"zero_in": 0, "zero_out": 0, "extra": len(table)}
        return self.record(n.OP_SOFTMAX, op, {2: operand}, fields, in_place=self._whole(op))

    def _concat(self, op: Concat) -> list[Record]:
        records = []
        output = self.place(op.output)
        for i, (x, (shape, at)) in enumerate(zip(op.inputs, concat_slices(op), strict=True)):
            constant = op.constants[i] if op.constants else None
            source = self.place(x) if constant is None else self.frozen.add(constant)
            operands: dict[int, int | str] = {0: source, 1: output}
            writes = (output,) if isinstance(output, str) else ()
            records.append(Record(n.OP_COPY, op.name, operands, writes, shape | {"extra": at}))
        return records


def _add_parameters(a: Quantisation, b: Quantisation, y: Quantisation) -> list[int]:
    """Zero point of b, then multiplier and shift of a, of b and of the sum, as TFLite's ADD derives them."""
    twice = 2 * max(a.scale, b.scale)
    pairs = [a.scale / twice, b.scale / twice, twice / (2.0**_ADD_SHIFT * y.scale)]
    return [b.zero, *(number for value in pairs for number in scales.requantisation(value))]
