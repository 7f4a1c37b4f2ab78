"""The README's tables of kernels and of whole models: what they measure and how they are written."""

from __future__ import annotations

import struct
from functools import cache

import bench_board
import bench_networks as make
from bench_board import Cost
from conftest import data_folder
from ulearn_host import costs
from ulearn_host import numbers as n
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.tflite_import import load_tflite

MODELS = ("kws01_dscnn_int8", "ic01_resnet8_int8", "ad01_int8")
PROCESSORS = {"armv6m": "Cortex-M0", "armv7m": "Cortex-M3", "x64": "x64"}


@cache
def kernels() -> dict[str, bytes]:
    """Plans of one record by what the table calls them."""
    return {
        "dense 256→64": make.plan(make.dense(256, 64)),
        "dense 128→128": make.plan(make.dense(128, 128)),
        "pointwise 64→64, 25×5": make.plan(make.conv((25, 5, 64), 64, (1, 1))),
        "conv 3×3 8→16, 16×16": make.plan(make.conv((16, 16, 8), 16)),
        "conv 3×3 16→16, 32×32": make.plan(make.conv((32, 32, 16), 16)),
        "conv 3×3 64→64, 8×8": make.plan(make.conv((8, 8, 64), 64)),
        "conv 3×3 3→16, 32×32": make.plan(make.conv((32, 32, 3), 16)),
        "conv 10×4 1→64, 49×10, stride 2": make.plan(make.conv((49, 10, 1), 64, (10, 4), 2)),
        "depthwise 3×3 8, 16×16": make.plan(make.depthwise((16, 16, 8))),
        "depthwise 3×3 64, 25×5": make.plan(make.depthwise((25, 5, 64))),
        "depthwise 3×3 64, 25×5, stride 2": make.plan(make.depthwise((25, 5, 64), stride=2)),
        "average pool 64, 25×5 (per input)": make.plan(make.pool((25, 5, 64), (25, 5), 1)),
        "add 16×16×16 (per output)": make.plan(make.elementwise((16, 16, 16), "add")),
    }


@cache
def models() -> dict[str, bytes]:
    """Plans of the shared models by name; none without the shared data."""
    folder = data_folder()
    if folder is None:
        return {}
    none = Options("none")
    return {name: compile_plan(load_tflite(folder / "models" / f"{name}.tflite"), none).data for name in MODELS}


def forward(data: bytes) -> tuple[list[costs.Record], tuple[int, ...]]:
    """The records of a plan's forward program, and what its buffers hold."""
    program = bench_board.forward_program(data)
    return costs.records_of(program), struct.unpack_from("<7I", program, n.P_SIZES)


def work(data: bytes) -> int:
    """Multiply-accumulates of an inference, or numbers gone through where it has none."""
    records, _ = forward(data)
    return costs.macs(records) or records[0].elements


@cache
def measured(architecture: str) -> dict[str, Cost | None]:
    """Every kernel and model on a board, or on x64; nothing where that cannot be."""
    plans = kernels() | models()
    if architecture != "x64":
        return bench_board.on_board(architecture, plans, frozenset(models()))
    return dict(bench_board.on_x64(plans)) if bench_board.has_x64() else {}


def _missing(architecture: str, plan: str) -> str:
    return "does not fit" if plan in measured(architecture) else "needs valgrind"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(columns), " | ".join(["---"] + ["---:"] * (len(columns) - 1))]
    return "\n".join(f"| {line} |" for line in lines + [" | ".join(row) for row in rows])


def kernel_text() -> str:
    """The table of kernels."""
    rows = []
    for name, data in kernels().items():
        row = [name]
        for architecture in PROCESSORS:
            cost = measured(architecture).get(name)
            row.append(f"{cost.records / work(data):.2f}" if cost else _missing(architecture, name))
        rows.append(row)
    return _table(["instructions per MAC", *PROCESSORS.values()], rows)


def model_text() -> str:
    """The table of models; the shared data must be there."""
    folder = data_folder()
    assert folder is not None
    rows = []
    for name, data in models().items():
        size = (folder / "models" / f"{name}.tflite").stat().st_size
        _, sizes = forward(data)
        row = [name, f"{work(data):,}", f"{size:,}", f"{len(data):,}"]
        row += [f"{sizes[n.BUF_ARENA]:,}", f"{sizes[n.BUF_SCRATCH]:,}"]
        on_boards = [measured(a).get(name) for a in bench_board.BOARDS]
        row.append(next((f"{cost.heap:,}" for cost in on_boards if cost), "does not fit"))
        for architecture in PROCESSORS:
            cost = measured(architecture).get(name)
            if cost:
                streamed = "" if cost.records else " (streamed)"
                row += [f"{cost.instructions:,}{streamed}", f"{cost.instructions / work(data):.2f}"]
            else:
                row += [_missing(architecture, name), ""]
        rows.append(row)
    columns = ["model", "MACs", ".tflite bytes", "plan bytes", "arena", "scratch", "heap"]
    for processor in PROCESSORS.values():
        columns += [f"instructions, {processor}", "per MAC"]
    return _table(columns, rows)
