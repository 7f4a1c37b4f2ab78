"""What a plan costs and does: read from the plan file alone, as a board would."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ulearn import plan as plan_file
from ulearn import verify
from ulearn_host import numbers as n
from ulearn_host.errors import UserError

_OPERATIONS = {value: name[3:].lower() for name, value in vars(n).items() if name.startswith("OP_")}
_BUFFERS = ("input", "arena", "frozen", "train", "state", "scratch", "target")

# MicroPython on a 32-bit chip: the heap is dealt out in blocks of 16 bytes, a bytearray costs one block besides its
# data; the model and the trainer with their attributes cost what tests/test_board.py measures on the Cortex-M0.
_BLOCK = 16
_OBJECT_BYTES = 672


@dataclass(frozen=True)
class Operation:
    """One record as a person reads it. macs: multiply-accumulates."""

    program: str
    name: str
    shape: str
    macs: int
    weights: str


@dataclass(frozen=True)
class Report:
    """Bytes are what the plan's buffers take; ram_bytes adds the heap's rounding and the objects around them."""

    path: str
    model_id: str
    flash_bytes: int
    buffers: dict[str, int]
    operations: list[Operation]
    tensors: list[dict[str, Any]]
    cuts: list[dict[str, Any]]
    meta: dict[str, Any]
    loss: str
    input: dict[str, Any]
    output: dict[str, Any]

    @property
    def ram_bytes(self) -> int:
        """Heap of a 32-bit MicroPython for the loaded model and its trainer, code not counted."""
        held = [self.buffers[name] for name in ("programs", "frozen", "train", "state", "state", "arena", "scratch")]
        held += [self.buffers["tables"], self.buffers["cuts"]]
        blocks = sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for size in held)
        return blocks + _OBJECT_BYTES

    def macs(self, program: str) -> int:
        """Multiply-accumulates of one run of a program."""
        return sum(o.macs for o in self.operations if o.program == program)

    def as_json(self) -> dict[str, Any]:
        """Everything for `--json`."""
        return {
            "path": self.path,
            "model_id": self.model_id,
            "flash_bytes": self.flash_bytes,
            "ram_bytes": self.ram_bytes,
            "buffers": self.buffers,
            "macs": {name: self.macs(name) for name in dict.fromkeys(o.program for o in self.operations)},
            "operations": [vars(o) for o in self.operations],
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
        kinds = (n.SECTION_IO, n.SECTION_TENSORS, n.SECTION_CUTS, n.SECTION_FROZEN, n.SECTION_TRAIN, n.SECTION_STATE)
        io, tensors, cuts, frozen, train, state = sections = tuple(bytes(plan.section(kind)) for kind in kinds)
        verify.verify(plan, sections)
    except OSError as fault:
        raise UserError(f"{path}: {fault.strerror}; expected a plan file") from None
    except ValueError as fault:
        raise UserError(str(fault)) from None
    data = path.read_bytes()
    offset, size = plan.offsets.get(n.SECTION_META, (0, 0))
    meta = json.loads(data[offset : offset + size]) if size else {}
    names = meta.get("layers", [])
    operations, arena, scratch = [], 0, 0
    for program in plan.programs:
        sizes = struct.unpack_from("<7I", program, n.P_SIZES)
        arena, scratch = max(arena, sizes[n.BUF_ARENA]), max(scratch, sizes[n.BUF_SCRATCH])
        operations += _operations(bytes(program), names)
    fields = struct.unpack("<4Hfi4HfiHHf", io)
    buffers = {
        "programs": sum(len(p) for p in plan.programs),
        "frozen": len(frozen),
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
        tensors=_tensors(tensors, meta.get("tensors", [])),
        cuts=_cuts(cuts),
        meta=meta,
        loss=loss[fields[12]],
        input={"shape": [d for d in fields[:4] if d], "scale": fields[4], "zero_point": fields[5]},
        output={"shape": [d for d in fields[6:10] if d], "scale": fields[10], "zero_point": fields[11]},
    )


def _operations(program: bytes, names: list[str]) -> list[Operation]:
    title = program[:16].rstrip(b"\0").decode()
    result = []
    dense = 0
    for at in range(n.PROGRAM_BYTES, len(program), n.RECORD_BYTES):
        f = struct.unpack_from("<4B2H6I6H6B4b2BHhI", program, at)
        op, inputs, outputs, dtype = f[0], f[14], f[17], f[28]
        name = _OPERATIONS[op]
        if op == n.OP_DENSE and dense < len(names):
            name += " " + names[dense]
            dense += 1
        with_weights = op in (n.OP_DENSE, n.OP_DENSE_BACK, n.OP_UPDATE_WEIGHT)
        weights = f"{'int16' if dtype == n.DTYPE_INT16 else 'int8'} in {_BUFFERS[f[8] >> 28]}" if with_weights else ""
        shape = f"{inputs} → {outputs}" if inputs and outputs else str(inputs or outputs)
        result.append(Operation(title, name, shape, inputs * outputs if with_weights else 0, weights))
    return result


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
        result.append({"name": name.rstrip(b"\0").decode(), "record": record, "bytes": size})
    return result
