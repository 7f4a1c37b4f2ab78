"""The records of a plan as a person reads them, with the extents of their operands as the verifier proved them."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from ulearn import verify
from ulearn_host import numbers as n

RECORD = struct.Struct("<4B2H6I6H6B4b2BHhI")  # UL_R_* in ul_format.h, in order
_NAMES = {value: name[3:].lower() for name, value in vars(n).items() if name.startswith("OP_")}
_BUFFERS = ("input", "arena", "frozen", "train", "state", "scratch", "target")
_WINDOWED = (n.OP_CONV, n.OP_DEPTHWISE, n.OP_AVERAGE_POOL, n.OP_MAX_POOL)
_WEIGHTED = (n.OP_CONV, n.OP_DEPTHWISE, n.OP_DENSE, n.OP_DENSE_BACK, n.OP_UPDATE_WEIGHT)
_ROLES = {n.OP_DENSE_BACK: " gradient", n.OP_UPDATE_WEIGHT: " weights", n.OP_UPDATE_BIAS: " bias"}
LOSSES = (n.OP_SOFTMAX_CE, n.OP_MSE)


@dataclass(frozen=True)
class Use:
    """Bytes [start, end) of a buffer that a record reads or writes. index: which operand of the record it is."""

    index: int
    buffer: int
    start: int
    end: int
    written: bool


@dataclass(frozen=True)
class Record:
    """One record. Shapes are (height, width, channels), of layers without images (channels,); kernel, stride: rows,
    columns, or empty. weights: operand, 0 where it has none, with weight_bytes; macs: multiply-accumulates."""

    kind: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    macs: int
    weights: int
    weight_bytes: int
    weight_dtype: str
    uses: tuple[Use, ...]

    @property
    def op(self) -> str:
        """What kind of record it is, as the format calls it."""
        return _NAMES[self.kind]

    @property
    def weight_place(self) -> str:
        """The buffer that its weights lie in; empty where it has none."""
        return _BUFFERS[self.weights >> 28] if self.weight_bytes else ""

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
    kind, dtype = f[0], f[28]
    taken, given = _shapes(kind, f[12:15], f[15:18])
    windowed, weighted = kind in _WINDOWED, kind in _WEIGHTED
    return Record(
        kind=kind,
        input_shape=taken,
        output_shape=given,
        kernel=f[18:20] if windowed else (),
        stride=f[20:22] if windowed else (),
        macs=_macs(kind, f),
        weights=f[8] if weighted else 0,
        weight_bytes=sum(u.end - u.start for u in uses if u.index == 2) if weighted else 0,
        weight_dtype=("int16" if dtype == n.DTYPE_INT16 else "int8") if weighted else "",
        uses=uses,
    )


def _shapes(kind: int, taken: tuple[int, ...], given: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Layers of the training programs have channels only; a loss and the update of a bias have as many in as out."""
    if kind >= n.OP_CONV:
        return taken, given
    inputs, outputs = taken[2], given[2]
    return (inputs or outputs,), (outputs or inputs,)


def _macs(kind: int, f: tuple[int, ...]) -> int:
    inputs, (out_h, out_w, outputs), taps = f[14], f[15:18], f[18] * f[19]
    if kind == n.OP_CONV:
        return out_h * out_w * outputs * taps * inputs
    if kind == n.OP_DEPTHWISE:
        return out_h * out_w * outputs * taps
    return inputs * outputs if kind in _WEIGHTED else 0


def names(program: list[Record], layers: list[str]) -> list[str]:
    """What a user calls the layer of each record. layers: of each record of the forward program, or fewer."""
    loss = next((i for i, record in enumerate(program) if record.kind in LOSSES), len(program))
    result = [layers[i] if i < len(layers) else record.op for i, record in enumerate(program[:loss])]
    layer_of = {_parameter(r, index): name for r, name in zip(program, result, strict=False) for index in (3, 2)}
    for record in program[loss:]:
        result.append("loss" if record.kind in LOSSES else layer_of.get(_parameter(record, 2), record.op))
    return result


def labels(program: list[Record], named: list[str]) -> list[str]:
    """The same, with what a backward record does for its layer: one layer has several. named: what `names` says."""
    return [name + _ROLES.get(record.kind, "") for record, name in zip(program, named, strict=True)]


def _parameter(record: Record, index: int) -> tuple[int, int] | None:
    """Where an operand lies: what tells which layer a backward record belongs to."""
    return next(((u.buffer, u.start) for u in record.uses if u.index == index), None)
