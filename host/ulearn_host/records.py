"""The records of a plan as a person reads them, with the extents of their operands as the verifier proved them."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from ulearn import verify
from ulearn_host import numbers as n

RECORD = struct.Struct("<4B2H6I6H6B4b2BHhI")  # UL_R_* in ul_format.h, in order
_NAMES = {value: name[3:].lower() for name, value in vars(n).items() if name.startswith("OP_")}
_BUFFERS = ("input", "arena", "target", "train", "state", "scratch", "frozen")
_CONVS = (n.OP_CONV, n.OP_CONV_TRAINED, n.OP_CONV_BACK, n.OP_UPDATE_CONV)
_DEPTHWISE = (n.OP_DEPTHWISE, n.OP_DEPTHWISE_TRAINED, n.OP_DEPTHWISE_BACK, n.OP_UPDATE_DEPTHWISE)
_DENSE = (n.OP_DENSE, n.OP_DENSE_BACK, n.OP_UPDATE_WEIGHT)
_POOLS = (n.OP_AVERAGE_POOL, n.OP_MAX_POOL, n.OP_AVERAGE_BACK, n.OP_MAX_BACK)
_WINDOWED = (*_CONVS, *_DEPTHWISE, *_POOLS)
_WEIGHTED = (*_CONVS, *_DEPTHWISE, *_DENSE)
_PARTIAL = (n.OP_CONV, n.OP_CONV_TRAINED)
_FROZEN_AND_TRAINED = (n.OP_DENSE_BACK, n.OP_CONV_BACK, n.OP_DEPTHWISE_BACK)  # which have weights at operands 2 and 5
_UPDATES = (n.OP_UPDATE_WEIGHT, n.OP_UPDATE_BIAS, n.OP_UPDATE_CONV, n.OP_UPDATE_DEPTHWISE)
LOSSES = (n.OP_SOFTMAX_CE, n.OP_MSE, n.OP_HINGE)
# What a record is to its layer, where that is not the layer's own operator.
_ROLES = {
    n.OP_MASK: "mask",
    n.OP_RELU_BACK: "masking",
    n.OP_SUM: "sum",
    n.OP_UPDATE_BIAS: "bias",
    **dict.fromkeys(_UPDATES[:1] + _UPDATES[2:], "weights"),
    **dict.fromkeys(
        (
            *_FROZEN_AND_TRAINED,
            *(n.OP_AVERAGE_BACK, n.OP_MAX_BACK, n.OP_SCALE_BACK, n.OP_CROP),
        ),
        "gradient",
    ),
}


@dataclass(frozen=True)
class Use:
    """Bytes [start, end) of a buffer that a record reads or writes. index: which operand of the record it is."""

    index: int
    buffer: int
    start: int
    end: int
    written: bool


@dataclass(frozen=True)
class Weights:
    """Weights that a record reads or updates. place: the buffer's name."""

    use: Use
    dtype: str

    @property
    def bytes(self) -> int:
        """How many they take."""
        return self.use.end - self.use.start

    @property
    def place(self) -> str:
        """The name of their buffer."""
        return _BUFFERS[self.use.buffer]


@dataclass(frozen=True)
class Record:
    """One record. Shapes are (height, width, channels), of layers without images (channels,), and the operator's own:
    a gradient goes from the output to the input. kernel, stride: rows, columns, or empty. rows: which output channels
    [first, last) of how many it computes, passes back or updates; macs: multiply-accumulates; weights: frozen ones
    before trained ones; extra: as the format has it."""

    kind: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    rows: tuple[int, int, int]
    macs: int
    weights: tuple[Weights, ...]
    extra: int
    uses: tuple[Use, ...]

    @property
    def op(self) -> str:
        """What kind of record it is, as the format calls it."""
        return _NAMES[self.kind]

    @property
    def role(self) -> str:
        """What it does for its layer; empty where it is the layer's own operator, or a loss."""
        return _ROLES.get(self.kind, "")

    @property
    def backward(self) -> bool:
        """Whether it belongs behind the loss, or is the loss."""
        return self.kind in LOSSES or (self.kind in _ROLES and self.kind != n.OP_MASK)

    @property
    def updates(self) -> bool:
        """Whether it changes weights or biases."""
        return self.kind in _UPDATES

    @property
    def written_shape(self) -> tuple[int, ...]:
        """The shape of the tensor that it writes, of which its own channels may be a part."""
        if self.backward or self.kind == n.OP_MASK:
            return self.input_shape
        return (*self.output_shape[:-1], self.rows[2]) if self.kind in _PARTIAL else self.output_shape

    def operand(self, index: int) -> Use | None:
        """What it touches as one of its operands, but the target."""
        return next((use for use in self.uses if use.index == index), None)

    def of(self, buffer: int) -> list[Use]:
        """What it touches of a buffer."""
        return [use for use in self.uses if use.buffer == buffer]

    @property
    def frozen_window(self) -> tuple[int, int]:
        """Bytes [start, end) of FROZEN that hold all it reads there, from a multiple of 4 on; (0, 0): it reads none."""
        uses = self.of(n.BUF_FROZEN)
        return (min(u.start for u in uses) & ~3, max(u.end for u in uses)) if uses else (0, 0)


class _Listener(verify._Verifier):  # type: ignore[misc]  # the board's code has no types
    """The board's verifier, asked what it found: there is one definition of how far each operand reaches."""

    touched: list[tuple[Use, ...]]

    def check_overlap(self, inherits: Any) -> None:
        """Called once for each record, when the extents of its operands are known."""
        super().check_overlap(inherits)
        low = 0x0FFFFFFF
        spans = [(index, start >> 28, start & low, end - start, bool(to)) for start, end, to, index in self.spans]
        self.touched.append(tuple(Use(i, buffer, at, at + size, to) for i, buffer, at, size, to in spans))


def read(plan: Any, sections: tuple[Any, ...]) -> list[list[Record]]:
    """The records of each program of a ulearn.plan.Plan. Raises ValueError where the plan does not verify.

    sections: what the verifier takes.
    """
    verify.verify(plan, sections)
    listener = _Listener(plan, sections)
    listener.check_io()
    listener.check_state()
    listener.check_tensors()
    programs = []
    for program in plan.programs:
        listener.touched = []
        listener.check_program(program)
        places = range(n.PROGRAM_BYTES, len(program), n.RECORD_BYTES)
        programs.append([_record(program, at, uses) for at, uses in zip(places, listener.touched, strict=True)])
    return programs


def _record(program: bytes, at: int, uses: tuple[Use, ...]) -> Record:
    f = RECORD.unpack_from(program, at)
    kind = f[0]
    taken, given = _shapes(kind, f)
    windowed = kind in _WINDOWED
    return Record(
        kind=kind,
        input_shape=taken,
        output_shape=given,
        kernel=f[18:20] if windowed else (),
        stride=f[20:22] if windowed else (),
        rows=_rows(kind, f),
        macs=_macs(kind, f),
        weights=_weights(kind, f, uses),
        extra=f[32],
        uses=uses,
    )


def _shapes(kind: int, f: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Layers without images have channels only; a loss has as many in as out; a bias has a gradient before it."""
    taken, given = f[12:15], f[15:18]
    if kind == n.OP_UPDATE_BIAS:
        return (*given[:2], f[32] & 0xFFFF), given[2:]
    if kind >= n.OP_CONV:
        return taken, given
    return (taken[2] or given[2],), (given[2] or taken[2],)


def _rows(kind: int, f: tuple[int, ...]) -> tuple[int, int, int]:
    count = whole = f[17]
    first = 0
    if kind in _PARTIAL:
        whole = f[30] or count
        first = whole - count if kind == n.OP_CONV_TRAINED else 0
    elif kind in _UPDATES:
        whole = f[32] & 0xFFFF
        first = f[14] if kind == n.OP_UPDATE_BIAS else whole - count
    return first, first + count, whole


def _macs(kind: int, f: tuple[int, ...]) -> int:
    inputs, (out_h, out_w, outputs), taps = f[14], f[15:18], f[18] * f[19]
    if kind in _CONVS:
        return out_h * out_w * outputs * taps * inputs
    if kind in _DEPTHWISE:
        return out_h * out_w * outputs * taps
    return inputs * outputs if kind in _DENSE else 0


def _weights(kind: int, f: tuple[int, ...], uses: tuple[Use, ...]) -> tuple[Weights, ...]:
    if kind not in _WEIGHTED:
        return ()
    trained = "int16" if f[28] == n.DTYPE_INT16 else "int8"
    frozen = "int8" if kind in _FROZEN_AND_TRAINED else trained
    dtypes = {2: frozen, 5: trained} if kind in _FROZEN_AND_TRAINED else {2: frozen}
    return tuple(Weights(use, dtypes[use.index]) for use in uses if use.index in dtypes)
