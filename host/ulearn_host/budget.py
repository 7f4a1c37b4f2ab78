"""The heap of a board that trains: MicroPython and code, a plan, samples that are kept, and where it all may lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from ulearn_host import report
from ulearn_host.compiler import Plan
from ulearn_host.errors import UserError
from ulearn_host.network import Network

# What a heap must have beside what stays: room for the loader's code, which is forgotten again, and for the pieces that
# it leaves. The emulated Cortex-M0 needed 15,000 to 17,300 bytes for ten plans of kws01 (tests/test_search.py,
# test_it_fits_the_board, tries two); a conservative collector may keep another 4 KB by chance.
LOADING_BYTES = 21_500
STORE_BYTES = 96  # of ulearn.Samples, besides its samples
# Where frozen weights lie: copied from a file, read from it record by record, or where the plan lies (ROMFS).
Place = Literal["ram", "stream", "in-place"]
PLACES: tuple[Place, ...] = get_args(Place)  # the quickest that a file allows first


@dataclass(frozen=True)
class Footprint:
    """Bytes of a 32-bit board's heap.

    code: MicroPython's own objects, the package and the native modules; plan: programs, tables, objects; frozen: what
    of the frozen weights is in RAM at a time; weights: trained ones; data: the samples that are kept; margin: what
    loading takes for a while, and gaps.
    """

    code: int
    plan: int
    frozen: int
    weights: int
    arena: int
    data: int
    margin: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Each with its name."""
        return {
            "MicroPython and code": self.code,
            "plan": self.plan,
            "frozen weights": self.frozen,
            "trained weights": self.weights,
            "arena": self.arena,
            "data buffer": self.data,
            "margin, to load it": self.margin,
        }

    def __str__(self) -> str:
        return ", ".join(f"{name} {size:,}" for name, size in self.parts().items())


class Heap(NamedTuple):
    """Of a plan with its trainer; the parts as in Footprint. total: without the margin; arena: with scratch."""

    total: int
    frozen: int
    weights: int
    arena: int
    margin: int

    @property
    def needed(self) -> int:
        """To load it."""
        return self.total + self.margin


def bytes_of(text: str) -> int:
    """'96k', '96kB' or '96000' as bytes; k: 1024. Raises UserError."""
    number = text.lower().removesuffix("b").removesuffix("k")
    unit = {"": 1, "k": 1024, "kb": 1024}.get(text.lower()[len(number) :])
    if unit is None or not number.isascii() or not number.isdigit() or not int(number):
        raise UserError(f"'{text}' is no amount of memory; expected bytes or kilobytes, e.g. 96k")
    return int(number) * unit


def buffer_bytes(network: Network, count: int) -> int:
    """Heap of ulearn.Samples with room for so many samples; 0 for none."""
    target = network.logits.size if network.loss == "mse" else 2
    return count * (network.input.size + target) + STORE_BYTES if count else 0


def heap(plan: Plan, path: Path, place: Place = "ram") -> Heap:
    """What a compiled plan takes with its trainer, as `inspect` shows it. path: a file that is written for that."""
    path.write_bytes(plan.data)
    read = report.read(path)
    f = read.frozen
    total = {"ram": f.ram_held, "stream": f.ram_streamed, "in-place": f.ram_in_place}[place]
    frozen = {"ram": f.size, "stream": f.window_bytes, "in-place": 0}[place]
    arena = read.buffers["arena"] + read.buffers["scratch"]
    return Heap(total, frozen, read.buffers["train"], arena, LOADING_BYTES)
