"""Whether a plan fits on a board, with its frozen weights in RAM or streamed, and how long an inference takes there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ulearn_host import costs

if TYPE_CHECKING:
    from ulearn_host.report import Report

# Heap that the package and the native module take once imported, with the trainer (README, "What it costs").
CODE_BYTES = 33_000


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
        heap = facts[name].get("heap_bytes")
        fits, left = "unknown", None
        if heap is not None:
            fits, need = _fit(read, heap - CODE_BYTES, facts[name].get("largest_block_bytes") or heap)
            left = max(0, heap - CODE_BYTES - need)
        result.append(Prediction(name, fits, left, instructions, seconds, note))
    return result


def _fit(read: Report, room: int, block: int) -> tuple[str, int]:
    """How it fits, and the bytes it takes then."""
    held, streamed = read.ram_bytes, read.frozen.ram_streamed
    if held <= room and max(read.buffers["frozen"], read.buffers["arena"]) <= block:
        return "in RAM", held
    if streamed <= room and max(read.frozen.window_bytes, read.buffers["arena"]) <= block:
        return "streamed", streamed
    return "too large", held
