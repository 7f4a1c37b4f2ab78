"""How many instructions and how much time a plan's inference will take on a board, from costs.json.

What a record costs is linear in a few counts of its own: multiply-accumulates, outputs, numbers gathered and so on
(`counts`). `make bench ARGS=--fit` measures records of many shapes on the emulated boards and fits a coefficient of
each count for each kind of record and architecture; costs.json holds them, and what measured them. What was not
measured is not predicted. Weights that are streamed from a file take the time of reading them on top.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ulearn import plan as plan_file
from ulearn_host import emulate
from ulearn_host import numbers as n
from ulearn_host.errors import UserError
from ulearn_host.records import RECORD

COSTS = Path(__file__).with_name("costs.json")
# Architectures without figures of their own whose boards can run the other one's code.
_STANDS_IN = {"armv7em": "armv7m", "armv7emsp": "armv7m", "armv7emdp": "armv7m"}

Counts = dict[str, float]


@dataclass(frozen=True)
class Record:
    """The fields of a record that decide what it costs."""

    op: int
    flags: int
    inputs: tuple[int, int, int]
    outputs: tuple[int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]
    dtype: int
    extra: int
    channels: int = 0  # of the image of which it writes some; 0: all of them

    @property
    def positions(self) -> int:
        """Height times width of the output."""
        return self.outputs[0] * self.outputs[1]

    @property
    def elements(self) -> int:
        """Numbers in the input."""
        return self.inputs[0] * self.inputs[1] * self.inputs[2]


def records_of(program: bytes) -> list[Record]:
    """The records of a PROGRAM section."""
    records = []
    for at in range(n.PROGRAM_BYTES, len(program), n.RECORD_BYTES):
        f = RECORD.unpack_from(program, at)
        channels = f[30] if f[0] in (n.OP_CONV, n.OP_CONV_TRAINED) else 0
        records.append(Record(f[0], f[2], f[12:15], f[15:18], f[18:20], f[20:22], f[22:24], f[28], f[32], channels))
    return records


def macs(records: list[Record]) -> int:
    """Multiply-accumulates of convolutions and dense layers, with those that meet the padding, as is usual."""
    total = 0
    for r in records:
        if r.op in (n.OP_CONV, n.OP_CONV_TRAINED, n.OP_CONV_BACK, n.OP_UPDATE_CONV):
            total += r.positions * r.outputs[2] * r.kernel[0] * r.kernel[1] * r.inputs[2]
        elif r.op in (n.OP_DEPTHWISE, n.OP_DEPTHWISE_TRAINED, n.OP_DEPTHWISE_BACK, n.OP_UPDATE_DEPTHWISE):
            total += r.positions * r.outputs[2] * r.kernel[0] * r.kernel[1]
        elif r.op in (n.OP_DENSE, n.OP_DENSE_BACK, n.OP_UPDATE_WEIGHT):
            total += r.inputs[2] * r.outputs[2]
    return total


def _reach(size: int, out: int, kernel: int, stride: int, pad: int) -> int:
    """Rows (or columns) under a kernel that lie inside the image, added up over all its places."""
    total = 0
    for i in range(out):
        start = i * stride - pad
        total += max(0, min(start + kernel, size) - max(start, 0))
    return total


def _inside(r: Record) -> tuple[int, int]:
    """Of a window over an image: cells that lie inside, and rows that do, each over all places."""
    rows = _reach(r.inputs[0], r.outputs[0], r.kernel[0], r.stride[0], r.pad[0])
    columns = _reach(r.inputs[1], r.outputs[1], r.kernel[1], r.stride[1], r.pad[1])
    return rows * columns, rows * r.outputs[1]


def _groups(r: Record) -> tuple[int, int]:
    """How many taps of one place are gathered in whole groups of four, and how many singly."""
    run, grouped = r.kernel[1] * r.inputs[2], 0
    for row in range(r.kernel[0]):
        grouped += (run - min(run, -row * run % 4)) // 4 * 4
    return grouped, r.kernel[0] * run - grouped


def _conv(r: Record) -> Counts:
    channels, taps = r.outputs[2], r.kernel[0] * r.kernel[1] * r.inputs[2]
    row, chunk, block = -(-taps // 4) * 4, r.extra & 0xFFFF, r.extra >> 16
    pairs = r.positions if r.positions == 1 else -(-r.positions // 2)
    places = 1 if r.positions == 1 else 2 * pairs
    chunks = -(-row // chunk)
    counts: Counts = {
        "macs": places * channels * row,
        "rows": pairs * channels * chunks,
        "calls": pairs * chunks * -(-channels // block),
        "outputs": places * channels,
        "channels": channels,
    }
    if r.kernel == (1, 1):
        return counts | {"places": places, "gathered": places * row}
    grouped, single = _groups(r)
    share = _inside(r)[0] / (r.positions * r.kernel[0] * r.kernel[1])
    return counts | {
        "places": places * chunks,
        "lines": places * r.kernel[0],
        "gathered": places * grouped * share,
        "singly": places * (single * share + taps * (1 - share)),
    }


def _careful(r: Record) -> Counts:
    """A layer with a weight of -128 takes the longer way from sums to codes."""
    return {"careful": r.positions * r.outputs[2]} if r.flags & n.FLAG_FULL_RANGE else {}


def _by_two(r: Record) -> bool:
    """Whether a depthwise convolution makes two outputs at a time."""
    return r.kernel == (3, 3) and r.outputs[0] > 1 and not r.flags & n.FLAG_FULL_RANGE


def _bands(r: Record) -> tuple[list[int], int]:
    """Output rows of each band that a depthwise convolution works on, and the width of its plane."""
    rows = [min(r.extra, r.outputs[0] - first) for first in range(0, r.outputs[0], r.extra)]
    return rows, (r.outputs[1] - 1) * r.stride[1] + r.kernel[1]


def _depthwise_by_two(r: Record) -> Counts:
    (bands, width), channels = _bands(r), r.outputs[2]
    halves = [-(-rows // 2) for rows in bands if rows > 1]
    lines = sum((half - 1) * r.stride[0] + 3 for half in halves)
    return {
        "channels": channels * len(bands),
        "outputs": 2 * sum(halves) * r.outputs[1] * channels,
        "rows": sum(halves) * channels,
        "lines": lines * channels,
        "cells": lines * width * channels,
        "bands": lines * width,
        # A band of one row has no second one to go with it.
        "alone": bands.count(1) * r.outputs[1] * channels,
    }


def _depthwise(r: Record) -> Counts:
    (bands, width), channels = _bands(r), r.outputs[2]
    lines = sum((rows - 1) * r.stride[0] + r.kernel[0] for rows in bands)
    return {
        "channels": channels * len(bands),
        "outputs": r.positions * channels,
        "macs": r.positions * channels * r.kernel[0] * r.kernel[1],
        "rows": r.positions * channels * r.kernel[0],
        "lines": lines * channels,
        "cells": lines * width * channels,
    }


def _window(r: Record) -> Counts:
    cells, rows = _inside(r)
    channels = r.outputs[2]
    return {"macs": cells * channels, "rows": rows * channels, "outputs": r.positions * channels}


def counts(r: Record, architecture: str) -> tuple[str, Counts]:
    """A record's kind and what its cost is linear in. The kind is empty where nothing is known of it."""
    channels = r.outputs[2]
    kind, result = "", Counts()
    if r.op == n.OP_CONV and r.channels in (0, channels):  # what leaves gaps in its output was not measured
        kind = "conv single" if r.positions == 1 else "conv pointwise" if r.kernel == (1, 1) else "conv"
        if r.positions == 1 and r.kernel != (1, 1):
            kind = "conv whole"
        result = _conv(r) | _careful(r)
    elif r.op == n.OP_DENSE:
        kind = "dense int16" if r.dtype == n.DTYPE_INT16 else "dense int8"
        result = {"macs": r.inputs[2] * channels, "outputs": channels}
    elif r.op == n.OP_DEPTHWISE:
        by_two = architecture == "armv6m" and _by_two(r)
        kind = "depthwise 3x3" if by_two else "depthwise"
        result = _depthwise_by_two(r) if by_two else _depthwise(r) | _careful(r)
    elif r.op in (n.OP_AVERAGE_POOL, n.OP_MAX_POOL):
        kind, result = "average pool" if r.op == n.OP_AVERAGE_POOL else "max pool", _window(r)
    elif r.op == n.OP_MEAN:
        kind, result = "mean", {"macs": r.elements, "outputs": channels}
    elif r.op == n.OP_ADD:
        kind = "add" if r.extra == r.elements else "add repeated"
        result = {"outputs": r.elements, "blocks": -(-r.elements // n.ADD_BLOCK), "repeats": r.elements / r.extra}
    elif r.op == n.OP_MUL:
        kind, result = "mul", {"outputs": r.elements}
    elif r.op == n.OP_PAD:
        kind, result = "pad", {"outputs": r.positions * channels, "copied": r.elements, "places": r.positions}
    elif r.op == n.OP_COPY:
        kind, result = "copy", {"outputs": r.elements, "lines": r.inputs[0]}
    elif r.op == n.OP_TABLE:
        kind, result = "table", {"outputs": r.elements}
    elif r.op == n.OP_SOFTMAX:
        kind, result = "softmax", {"outputs": r.elements, "lines": r.inputs[0] * r.inputs[1]}
    return kind, result | {"records": 1}


@cache
def coefficients() -> dict[str, Any]:
    """What costs.json says of each architecture: {'call': number, 'kinds': {kind: {count: coefficient}}}."""
    if not COSTS.is_file():
        return {}
    known: dict[str, Any] = json.loads(COSTS.read_text(encoding="utf-8"))["architectures"]
    return known


def predict(records: list[Record], architecture: str) -> int | None:
    """Instructions of one inference, MicroPython's share of the call included; None where something is unmeasured."""
    known = coefficients().get(architecture)
    if known is None:
        return None
    total = float(known["call"])
    for record in records:
        kind, of = counts(record, architecture)
        if kind not in known["kinds"]:
            return None
        total += sum(known["kinds"][kind].get(name, 0.0) * count for name, count in of.items())
    return round(total)


def time_s(instructions: int | None, board: dict[str, Any]) -> float | None:
    """Seconds on a board; None where its clock or its cycles an instruction are not known."""
    cycles, clock = board.get("cycles_per_instruction"), board.get("clock_hz")
    if instructions is None or cycles is None or clock is None:
        return None
    return float(instructions * cycles / clock)


def boards() -> list[dict[str, Any]]:
    """What boards/*/board.json says, with the folder's name as "board"; real boards first."""
    names = [path.parent.name for path in emulate.BOARDS.glob("*/board.json")]
    facts = [{"board": name, **emulate.board_facts(name)} for name in sorted(names)]
    emulated = set(emulate.emulated_boards())
    return sorted(facts, key=lambda f: f["board"] in emulated)


def _forward(path: Path | str) -> bytes:
    try:
        programs = plan_file.read(str(path)).programs
    except OSError as fault:
        raise UserError(f"{path}: {fault.strerror}; expected a plan file") from None
    except ValueError as fault:
        raise UserError(str(fault)) from None
    return next(bytes(p) for p in programs if p[n.P_KIND] == n.KIND_FORWARD)


def predictions(plan: Path | str | bytes) -> list[tuple[str, int | None, float | None, str]]:
    """For each board: its name, the instructions of an inference, the seconds, and a note on where they come from.

    plan: path of a plan file, or the bytes of its forward program. Raises UserError where a file is no plan.
    """
    records = records_of(plan if isinstance(plan, bytes) else _forward(plan))
    result = []
    for facts in boards():
        architecture = facts["arch"]
        source = architecture if architecture in coefficients() else _STANDS_IN.get(architecture, "")
        instructions = predict(records, source)
        seconds = time_s(instructions, facts)
        if instructions is None:
            note = "unmeasured"
        elif source != architecture:
            note = f"instructions of {source}, {architecture} not measured"
        else:
            note = f"instructions of {source}, measured in the emulator"
        if instructions is not None and seconds is None:
            unknown = "clock" if facts.get("clock_hz") is None else "cycles an instruction"
            note += f"; {unknown} unknown"
        elif seconds is not None:
            note += "; cycles modelled"
        result.append((facts["board"], instructions, seconds, note))
    return result
