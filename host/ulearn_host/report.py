"""What a plan costs and does: read from the plan file alone, as a board would."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ulearn import plan as plan_file
from ulearn_host import numbers as n
from ulearn_host import placement, records
from ulearn_host.errors import UserError
from ulearn_host.timeline import Timeline, trace

# MicroPython on a 32-bit chip: the heap is dealt out in blocks of 16 bytes, a bytearray costs one block besides its
# data; the model, the trainer, the views of a plan read in place and the window of each streamed record cost what was
# measured on the Cortex-M0 (tests/test_board.py).
_BLOCK = 16
_MODEL_BYTES = 608
_TRAINER_BYTES = 64
_VIEWS_BYTES = 80
_WINDOW_BYTES = 64


@dataclass(frozen=True)
class Operation:
    """One record as a person reads it.

    Shapes are (height, width, channels) or (channels,); kernel, stride: (rows, columns) or empty; macs:
    multiply-accumulates; weights: how they are kept, and in which buffer; alive_bytes: of the arena, while it runs;
    frozen_bytes: what of FROZEN must be at hand for it.
    """

    program: str
    record: int
    op: str
    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    macs: int
    weights: str
    weight_bytes: int
    alive_bytes: int
    frozen_bytes: int


@dataclass(frozen=True)
class Frozen:
    """What it costs to keep the frozen weights in one place or another, in bytes of a 32-bit board's heap.

    ram_in_place: the plan lies in flash that can be read as memory (ROMFS, frozen bytes) or in a buffer, and is read
    there; ram_held: it is a file of another file system, and copied into RAM; ram_streamed: read from the file record
    by record into a window as large as the largest record needs, which the forward program alone can do.
    streamed_bytes: read from flash for each inference then.
    """

    size: int
    window_bytes: int
    window_record: int
    streamed_bytes: int
    ram_in_place: int
    ram_held: int
    ram_streamed: int

    def as_json(self) -> dict[str, Any]:
        """For `--json`; place: where they lie when a plan is loaded from a file and nothing else is said."""
        return {
            "bytes": self.size,
            "place": "ram",
            "ram_bytes": {"in_place": self.ram_in_place, "ram": self.ram_held, "stream": self.ram_streamed},
            "window_bytes": self.window_bytes,
            "window_record": self.window_record,
            "streamed_bytes": self.streamed_bytes,
        }


@dataclass(frozen=True)
class Report:
    """Bytes are what the plan's buffers take; ram_bytes adds the heap's rounding and the objects around them."""

    path: str
    model_id: str
    flash_bytes: int
    buffers: dict[str, int]
    operations: list[Operation]
    timelines: list[Timeline]
    tensors: list[dict[str, Any]]
    cuts: list[dict[str, Any]]
    meta: dict[str, Any]
    loss: str
    input: dict[str, Any]
    output: dict[str, Any]

    @property
    def programs(self) -> list[str]:
        """Their names, in the file's order."""
        return [timeline.program for timeline in self.timelines]

    @property
    def ram_bytes(self) -> int:
        """Heap of a 32-bit MicroPython for the model loaded from a file, and its trainer; code is not counted."""
        copied = [self.buffers[name] for name in ("programs", "frozen", "tables", "cuts")]
        return self._ram(copied, len(self.programs) > 1)

    def _ram(self, copied: list[int], trains: bool) -> int:
        """The same for a model that holds copies of so many bytes besides what every model has."""
        held = [self.buffers[name] for name in ("train", "state", "state", "arena", "scratch")] + copied
        blocks = sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for size in held)
        return blocks + _MODEL_BYTES + (_TRAINER_BYTES if trains else 0)

    @property
    def frozen(self) -> Frozen:
        """Where the frozen weights may lie, and at what price."""
        forward = [o.frozen_bytes for o in self.operations if o.program == "forward"]
        window = max(forward)
        copied = [n.PROGRAM_BYTES + len(forward) * n.RECORD_BYTES, window, self.buffers["tables"], self.buffers["cuts"]]
        return Frozen(
            size=self.buffers["frozen"],
            window_bytes=window,
            window_record=forward.index(window),
            streamed_bytes=sum(forward),
            ram_in_place=self._ram([], len(self.programs) > 1) + _VIEWS_BYTES,
            ram_held=self.ram_bytes,
            ram_streamed=self._ram(copied, False) + _WINDOW_BYTES * len(forward),
        )

    def of(self, program: str) -> list[Operation]:
        """The records of one program."""
        return [o for o in self.operations if o.program == program]

    def macs(self, program: str) -> int:
        """Multiply-accumulates of one run of a program."""
        return sum(o.macs for o in self.of(program))

    def as_json(self) -> dict[str, Any]:
        """Everything for `--json`. memory: the arena over the records, by program; tensors: what is trainable."""
        return {
            "path": self.path,
            "model_id": self.model_id,
            "flash_bytes": self.flash_bytes,
            "ram_bytes": self.ram_bytes,
            "buffers": self.buffers,
            "macs": {name: self.macs(name) for name in self.programs},
            "operations": [vars(o) for o in self.operations],
            "memory": {t.program: t.as_json() for t in self.timelines},
            "frozen": self.frozen.as_json(),
            "boards": [vars(p) for p in placement.predictions(self)],
            "tensors": self.tensors,
            "cuts": self.cuts,
            "loss": self.loss,
            "input": self.input,
            "output": self.output,
            "meta": self.meta,
        }


def read(path: Path) -> Report:
    """Read and verify a plan file. Raises UserError naming the file and the fault."""
    try:
        plan = plan_file.read(str(path))
        kinds = (n.SECTION_IO, n.SECTION_TENSORS, n.SECTION_CUTS, n.SECTION_TRAIN, n.SECTION_STATE)
        io, tensors, cuts, train, state = (bytes(plan.section(kind)) for kind in kinds)
        frozen = len(plan.section(n.SECTION_FROZEN))
        programs = records.read(plan, (io, tensors, cuts, frozen, train, state))
    except OSError as fault:
        raise UserError(f"{path}: {fault.strerror}; expected a plan file") from None
    except ValueError as fault:
        raise UserError(str(fault)) from None
    data = path.read_bytes()
    meta = _meta(path, data, plan)
    operations: list[Operation] = []
    timelines: list[Timeline] = []
    arena, scratch = 0, 0
    for program, decoded in zip(plan.programs, programs, strict=True):
        sizes = struct.unpack_from("<7I", program, n.P_SIZES)
        arena, scratch = max(arena, sizes[n.BUF_ARENA]), max(scratch, sizes[n.BUF_SCRATCH])
        title = "forward" if program[n.P_KIND] == n.KIND_FORWARD else "train"
        names = records.names(decoded, _texts(meta.get("layers")))
        labels = records.labels(decoded, names)
        output = struct.unpack_from("<I", program, n.P_OUTPUT)[0] & 0x0FFFFFFF
        timelines.append(trace(title, decoded, labels, output, sizes[n.BUF_ARENA]))
        operations += _operations(decoded, names, timelines[-1])
    fields = struct.unpack("<4Hfi4HfiHHf", io)
    buffers = {
        "programs": sum(len(p) for p in plan.programs),
        "frozen": frozen,
        "train": len(train),
        "state": len(state),
        "arena": arena,
        "scratch": scratch,
        "tables": len(tensors),
        "cuts": len(cuts),
    }
    loss = {n.LOSS_NONE: "none", n.LOSS_SOFTMAX_CE: "softmax cross-entropy", n.LOSS_MSE: "mean squared error"}
    return Report(
        path=str(path),
        model_id=plan.model_id.hex(),
        flash_bytes=len(data),
        buffers=buffers,
        operations=operations,
        timelines=timelines,
        tensors=_tensors(tensors, _texts(meta.get("tensors"))),
        cuts=_cuts(cuts),
        meta=meta,
        loss=loss[fields[12]],
        input={"shape": [d for d in fields[:4] if d], "scale": fields[4], "zero_point": fields[5]},
        output={"shape": [d for d in fields[6:10] if d], "scale": fields[10], "zero_point": fields[11]},
    )


def _meta(path: Path, data: bytes, plan: Any) -> dict[str, Any]:
    """The metadata section: no board believes in it, so nothing but its being a JSON object is expected."""
    offset, size = plan.offsets.get(n.SECTION_META, (0, 0))
    try:
        meta = json.loads(data[offset : offset + size]) if size else {}
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        raise UserError(f"{path}: its metadata are damaged; expected a JSON object")
    return meta


def _texts(names: Any) -> list[str]:
    """Names out of the metadata."""
    return [printable(str(name)) for name in names] if isinstance(names, list) else []


def printable(text: str) -> str:
    """Text out of a plan without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _operations(decoded: list[records.Record], names: list[str], timeline: Timeline) -> list[Operation]:
    return [
        Operation(
            program=timeline.program,
            record=at,
            op=record.op,
            name=names[at],
            input_shape=record.input_shape,
            output_shape=record.output_shape,
            kernel=record.kernel,
            stride=record.stride,
            macs=record.macs,
            weights=f"{record.weight_dtype} in {record.weight_place}" if record.weight_bytes else "",
            weight_bytes=record.weight_bytes,
            alive_bytes=timeline.alive[at],
            frozen_bytes=record.frozen_window[1] - record.frozen_window[0],
        )
        for at, record in enumerate(decoded)
    ]


def _tensors(table: bytes, names: list[str]) -> list[dict[str, Any]]:
    kinds = {n.DTYPE_INT8: "int8", n.DTYPE_INT16: "int16", n.DTYPE_INT32: "int32"}
    result = []
    for i, at in enumerate(range(0, len(table), n.TENSOR_BYTES)):
        ident, dtype, fraction = struct.unpack_from("<HBB", table, at)
        shape = struct.unpack_from("<4H", table, at + n.T_SHAPE)
        name = names[i] if i < len(names) else f"tensor {ident}"
        count = shape[0] * shape[1] * shape[2] * shape[3]
        size = count << (dtype - 1)
        result.append({"name": name, "dtype": kinds[dtype], "fraction": fraction, "shape": list(shape), "bytes": size})
    return result


def _cuts(table: bytes) -> list[dict[str, Any]]:
    result = []
    for at in range(0, len(table), n.CUT_BYTES):
        name, _, record, _, size = struct.unpack_from("<16sHHII", table, at)
        title = printable(name.rstrip(b"\0").decode("utf-8", "replace"))
        result.append({"name": title, "record": record, "bytes": size})
    return result
