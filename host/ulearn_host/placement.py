"""Whether a plan fits on a board, with its frozen weights in RAM or streamed, and how long an inference takes there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ulearn_host import costs
from ulearn_host.emulate import EmulatorError, find_native

if TYPE_CHECKING:
    from ulearn_host.report import Report


# Heap of the package once a plan is loaded and the loader's own code is forgotten, without the native module: to infer,
# and to train with the trainer and the module of a sample store; with frozen weights in RAM or in place, and streamed
# from a file. Of the emulated Cortex-M0, after a load and a fit, without the plan, the samples and BASE_BYTES:
# tests/test_search.py, test_code_on_the_heap, measures it again.
INFERENCE = (6_000, 8_500)
TRAINING = (10_500, 11_500)
# MicroPython's own, after a soft reset: what boards/*.json call heap_bytes is without it.
BASE_BYTES = 3_800
MODULE_BYTES = 120
DEFAULT = "armv6m"


def module_bytes(module: str, architecture: str = DEFAULT) -> int:
    """Heap of a native module: its file's size, and what is around it. Of DEFAULT's, where there is none."""
    try:
        return find_native(architecture, module=module).stat().st_size + MODULE_BYTES
    except EmulatorError:
        return find_native(DEFAULT, module=module).stat().st_size + MODULE_BYTES


def package_bytes(trains: bool, streamed: bool) -> int:
    """Heap that the package takes, to infer or to infer and train."""
    return (TRAINING if trains else INFERENCE)[streamed]


def code_bytes(module: str, trains: bool, streamed: bool, architecture: str = DEFAULT) -> int:
    """Heap that package and native module take on a board."""
    return package_bytes(trains, streamed) + module_bytes(module, architecture)


@dataclass(frozen=True)
class Prediction:
    """What to expect of a plan on a board.

    fits: 'in RAM', 'streamed', 'too large', or 'unknown' where the board's heap is; left_bytes: of the heap, beside
    code and plan; seconds, instructions: of one inference, None where unmeasured; note: where they come from.
    """

    board: str
    fits: str
    left_bytes: int | None
    instructions: int | None
    seconds: float | None
    note: str


def predictions(read: Report) -> list[Prediction]:
    """For every board in boards/, real ones first."""
    facts = {board["board"]: board for board in costs.boards()}
    result = []
    for name, instructions, seconds, note in costs.predictions(read.path):
        board = facts[name]
        heap = board.get("heap_bytes")
        fits, left = "unknown", None
        if heap is not None:
            fits, need = _fit(read, heap, board.get("largest_block_bytes") or heap, board["arch"])
            left = max(0, heap - need)
            if not board["arch"].startswith("armv"):
                note += f"; the package's code counted as {DEFAULT}'s, unmeasured on {board['arch']}"
        result.append(Prediction(name, fits, left, instructions, seconds, note))
    return result


def _fit(read: Report, heap: int, block: int, architecture: str) -> tuple[str, int]:
    """How it fits, and the bytes it takes then with its code."""
    held = read.ram_bytes + code_bytes(read.modules[0], read.trains, False, architecture)
    if held <= heap and max(read.buffers["frozen"], read.buffers["arena"]) <= block:
        return "in RAM", held
    streamed = read.frozen.ram_streamed + code_bytes(read.modules[0], read.trains, True, architecture)
    if streamed <= heap and max(read.frozen.window_bytes, read.buffers["arena"]) <= block:
        return "streamed", streamed
    return "too large", held
