"""Whether a plan fits on a board, with its frozen weights in RAM or streamed, and how long an inference takes there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ulearn_host import costs

if TYPE_CHECKING:
    from ulearn_host.report import Report


@dataclass(frozen=True)
class Code:
    """Heap of the package with the native modules, once a plan is loaded and the loader's own code is forgotten.

    inference, head, training: with frozen weights in RAM or in place, and streamed from a file. The last two have the
    trainer, the module of a sample store and a second native module: ulab_head, where nothing but dense layers trains,
    or ulab_training.
    """

    inference: tuple[int, int]
    head: tuple[int, int]
    training: tuple[int, int]


# Heap in use after a load (and a fit) on the emulated Cortex-M0 and -M3, without the plan, the samples and BASE_BYTES:
# tests/test_search.py, test_code_on_the_heap, measures it again on the M0. The M3's heap is too small to train in RAM:
# that figure is the streamed one less what streaming adds on the M0.
CODE = {
    "armv6m": Code((23_200, 25_500), (36_400, 37_500), (46_200, 47_300)),
    "armv7m": Code((19_000, 21_000), (31_700, 32_800), (40_700, 41_800)),
}
# MicroPython's own, after a soft reset: what boards/*.json call heap_bytes is without it.
BASE_BYTES = 3_800
DEFAULT = "armv6m"  # of the two the larger


def measured(architecture: str) -> str:
    """The architecture whose code is measured, and that another one is taken for."""
    return "armv7m" if architecture.startswith("armv7") else DEFAULT


def code_bytes(needs: bool | None, streamed: bool, architecture: str = DEFAULT) -> int:
    """Heap that the code takes on a board. needs: None for inference, else whether more than dense layers trains."""
    code = CODE[measured(architecture)]
    return (code.inference if needs is None else code.training if needs else code.head)[streamed]


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
                note += f"; code counted as {DEFAULT}'s, unmeasured on {board['arch']}"
        result.append(Prediction(name, fits, left, instructions, seconds, note))
    return result


def _fit(read: Report, heap: int, block: int, architecture: str) -> tuple[str, int]:
    """How it fits, and the bytes it takes then with its code."""
    held = read.ram_bytes + code_bytes(read.needs, False, architecture)
    if held <= heap and max(read.buffers["frozen"], read.buffers["arena"]) <= block:
        return "in RAM", held
    streamed = read.frozen.ram_streamed + code_bytes(read.needs, True, architecture)
    if streamed <= heap and max(read.frozen.window_bytes, read.buffers["arena"]) <= block:
        return "streamed", streamed
    return "too large", held
