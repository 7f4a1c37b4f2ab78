"""What a plan costs and does: read from the plan file alone, as a board would."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ulearn import loader
from ulearn import plan as plan_file
from ulearn_host import numbers as n
from ulearn_host import placement, records
from ulearn_host.errors import UserError
from ulearn_host.timeline import Timeline, trace

# MicroPython on a 32-bit chip: the heap is dealt out in blocks of 16 bytes, a bytearray costs one block besides its
# data; the model, the trainer, the views of a plan read in place and the window of each streamed record cost what was
# measured on the Cortex-M0 (tests/test_board.py, tests/test_memory.py). A trainer has a tuple of a tuple of three for
# each training program, the model a list of them with room for 4, 8, 16...
_BLOCK = 16
_WORD = 4
_MODEL_BYTES = 720
_TRAINER_BYTES = 32
_VIEWS_BYTES = 48
_STREAM_BYTES = 160
_FILE_BYTES = 1152  # of a file that stays open while a trainer streams: littlefs with its buffers
_LOSSES = {
    n.LOSS_NONE: "none",
    n.LOSS_SOFTMAX_CE: "softmax cross-entropy",
    n.LOSS_MSE: "mean squared error",
    n.LOSS_HINGE: "hinge loss",
}


def _blocks(size: int) -> int:
    """What so many bytes take of the heap."""
    return -(-size // _BLOCK) * _BLOCK


@dataclass(frozen=True)
class Operation:
    """One record as a person reads it.

    Shapes are (height, width, channels) or (channels,), those of the layer's input and output; kernel, stride: (rows,
    columns) or empty; macs: multiply-accumulates; weights: how they are kept, and in which buffer; alive_bytes: of the
    arena, while it runs; frozen_bytes: what of FROZEN must be at hand for it. role: what it does for the layer `name`,
    empty where it is the layer itself; rows: the output channels it is about, from, to, of how many.
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
    role: str
    rows: tuple[int, int, int]


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
    modules: list[str]  # native modules that know all its records, the one to take first

    @property
    def programs(self) -> list[str]:
        """Their names, in the file's order."""
        return [timeline.program for timeline in self.timelines]

    @property
    def ram_bytes(self) -> int:
        """Heap of a 32-bit MicroPython for the model loaded from a file, and its trainer; code is not counted."""
        copied = [self.buffers[name] for name in ("frozen", "tables", "cuts")]
        return self._ram(self._program_bytes + copied, len(self.timelines) - 1)

    @property
    def _program_bytes(self) -> list[int]:
        return [n.PROGRAM_BYTES + n.RECORD_BYTES * len(timeline.labels) for timeline in self.timelines]

    def _ram(self, copied: list[int], trainings: int) -> int:
        """The same for a model that holds copies of so many bytes besides what every model has."""
        held = [self.buffers[name] for name in ("train", "state", "state", "arena", "scratch")] + copied
        total = sum(_BLOCK + _blocks(size) for size in held) + _MODEL_BYTES
        if trainings:
            room = max(4, 1 << (trainings - 1).bit_length())
            total += _blocks(_WORD * room) - _BLOCK
            total += _TRAINER_BYTES + _blocks(_WORD * (2 + trainings)) + trainings * _blocks(6 * _WORD)
        return total

    @property
    def frozen(self) -> Frozen:
        """Where the frozen weights may lie, and at what price."""
        parts = [o.frozen_bytes for o in self.operations]
        forward = [o.frozen_bytes for o in self.operations if o.program == "forward"]
        window = max(parts)
        copied = [*self._program_bytes, window, self.buffers["tables"], self.buffers["cuts"]]
        trainings = len(self.timelines) - 1
        copied += [2 * _WORD * len(timeline.labels) for timeline in self.timelines]  # what each record needs of it
        return Frozen(
            size=self.buffers["frozen"],
            window_bytes=window,
            window_record=parts.index(window),
            streamed_bytes=sum(forward),
            ram_in_place=self._ram([], len(self.timelines) - 1) + _VIEWS_BYTES + _BLOCK * len(self.timelines),
            ram_held=self.ram_bytes,
            ram_streamed=self._ram(copied, trainings) + _STREAM_BYTES + (_FILE_BYTES if trainings else 0),
        )

    def of(self, program: str) -> list[Operation]:
        """The records of one program."""
        return [o for o in self.operations if o.program == program]

    def macs(self, program: str) -> int:
        """Multiply-accumulates of one run of a program."""
        return sum(o.macs for o in self.of(program))

    def ratio(self, program: str) -> float | None:
        """The same in those of an inference; None where that has none."""
        inference = self.macs("forward")
        return self.macs(program) / inference if inference else None

    @property
    def trains(self) -> bool:
        """Whether there is a training program."""
        return len(self.timelines) > 1

    def as_json(self) -> dict[str, Any]:
        """Everything for `--json`. memory: the arena over the records, by program; tensors: what is trainable;
        native_module: what it loads; code_bytes: heap of it and the package on an RP2040."""
        return {
            "path": self.path,
            "model_id": self.model_id,
            "flash_bytes": self.flash_bytes,
            "ram_bytes": self.ram_bytes,
            "native_module": self.modules[0],
            "code_bytes": placement.code_bytes(self.modules[0], self.trains, False),
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
        output = struct.unpack_from("<I", program, n.P_OUTPUT)[0] & 0x0FFFFFFF
        timeline = trace("", decoded, _texts(meta.get("layers")), output, sizes[n.BUF_ARENA])
        timelines.append(replace(timeline, program=_unique(_title(program, decoded, timeline), timelines)))
        operations += _operations(decoded, timelines[-1])
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
    return Report(
        modules=loader.modules(plan.programs),
        path=str(path),
        model_id=plan.model_id.hex(),
        flash_bytes=len(data),
        buffers=buffers,
        operations=operations,
        timelines=timelines,
        tensors=_tensors(tensors, _texts(meta.get("tensors")), programs),
        cuts=_cuts(cuts),
        meta=meta,
        loss=_LOSSES[fields[12]],
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


def _title(program: bytes, decoded: list[records.Record], timeline: Timeline) -> str:
    """What a program is called: 'forward', 'train', or 'train' and a name."""
    if program[n.P_KIND] == n.KIND_FORWARD:
        return "forward"
    name = bytes(program[: n.P_SIZES]).rstrip(b"\0")
    # A file's names are cut, or numbers where that leaves them alike; the one layer that a program trains has its own.
    layers = {layer for layer, record in zip(timeline.names, decoded, strict=True) if record.updates}
    whole = f"train {layers.pop()}" if len(layers) == 1 else ""
    if whole and (len(name) == n.P_SIZES and whole.encode().startswith(name) or name[len("train ") :].isdigit()):
        return whole
    text = printable(name.decode("utf-8", "replace"))
    return text if text.split(" ")[0] == "train" else f"train {text}".rstrip()


def _unique(title: str, timelines: list[Timeline]) -> str:
    """A title that no other program has."""
    taken = [timeline.program for timeline in timelines]
    result, number = title, 2
    while result in taken:
        result, number = f"{title} ({number})", number + 1
    return result


def _operations(decoded: list[records.Record], timeline: Timeline) -> list[Operation]:
    return [
        Operation(
            program=timeline.program,
            record=at,
            op=record.op,
            name=timeline.names[at],
            input_shape=record.input_shape,
            output_shape=record.output_shape,
            kernel=record.kernel,
            stride=record.stride,
            macs=record.macs,
            weights=", ".join(f"{w.dtype} in {w.place}" for w in record.weights),
            weight_bytes=sum(w.bytes for w in record.weights),
            alive_bytes=timeline.alive[at],
            frozen_bytes=record.frozen_window[1] - record.frozen_window[0],
            role=record.role,
            rows=record.rows,
        )
        for at, record in enumerate(decoded)
    ]


def _tensors(table: bytes, names: list[str], programs: list[list[records.Record]]) -> list[dict[str, Any]]:
    """What is trainable. first_row, layer_rows: from which of how many output channels of the layer on it is for."""
    rows = {}
    for record in (r for program in programs for r in program if r.updates):
        updated = record.operand(2)
        if updated:
            rows[updated.start] = record.rows
    kinds = {n.DTYPE_INT8: "int8", n.DTYPE_INT16: "int16", n.DTYPE_INT32: "int32"}
    result = []
    for i, at in enumerate(range(0, len(table), n.TENSOR_BYTES)):
        ident, dtype, fraction = struct.unpack_from("<HBB", table, at)
        shape = struct.unpack_from("<4H", table, at + n.T_SHAPE)
        first, _, whole = rows.get(struct.unpack_from("<I", table, at + n.T_OFFSET)[0], (None, 0, None))
        result.append(
            {
                "name": names[i] if i < len(names) else f"tensor {ident}",
                "dtype": kinds[dtype],
                "fraction": fraction,
                "shape": list(shape),
                "bytes": math.prod(shape) << (dtype - 1),
                "first_row": first,
                "layer_rows": whole,
            }
        )
    return result


def _cuts(table: bytes) -> list[dict[str, Any]]:
    result = []
    for at in range(0, len(table), n.CUT_BYTES):
        name, _, record, _, size = struct.unpack_from("<16sHHII", table, at)
        title = printable(name.rstrip(b"\0").decode("utf-8", "replace"))
        result.append({"name": title, "record": record, "bytes": size})
    return result
