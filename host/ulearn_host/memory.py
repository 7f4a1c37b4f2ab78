"""Static memory planning: every tensor gets an offset, no two that live at the same time overlap."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

ALIGNMENT = 4


@dataclass(frozen=True)
class Life:
    """A tensor of `size` bytes, written first by record `start` and read last by record `end` (inclusive).

    heir: the tensor that takes its place from record `end` on, if any.
    """

    name: str
    size: int
    start: int
    end: int
    heir: str | None = None


def aligned(size: int) -> int:
    """`size` rounded up to a multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _inherited(lives: Iterable[Life]) -> tuple[list[Life], dict[str, str]]:
    """Tensors in one place as one life each; and of every tensor the name of the first in its place."""
    by_name = {life.name: life for life in lives}
    heirs = {life.heir for life in by_name.values()}
    places: list[Life] = []
    first_of: dict[str, str] = {}
    for life in by_name.values():
        if life.name in heirs:
            continue
        chain = [life]
        while chain[-1].heir:
            chain.append(by_name[chain[-1].heir])
        first_of |= {other.name: life.name for other in chain}
        places.append(Life(life.name, max(c.size for c in chain), life.start, chain[-1].end))
    return places, first_of


def lower_bound(lives: Iterable[Life]) -> int:
    """Bytes alive at the worst moment: no plan can need less."""
    places, _ = _inherited(lives)
    return max((sum(aligned(b.size) for b in places if b.start <= a.start <= b.end) for a in places), default=0)


def _place(lives: list[Life]) -> tuple[dict[str, int], int]:
    """Each in turn at the lowest offset that is free for its whole life (greedy by order)."""
    placed: list[tuple[int, Life]] = []
    for life in lives:
        at = 0
        for offset, other in sorted(placed, key=lambda p: p[0]):
            if other.start <= life.end and life.start <= other.end:
                if at + aligned(life.size) <= offset:
                    break
                at = max(at, offset + aligned(other.size))
        placed.append((at, life))
    return {life.name: at for at, life in placed}, max((at + aligned(life.size) for at, life in placed), default=0)


_TRIES = 400


def plan(lives: Iterable[Life]) -> tuple[dict[str, int], int]:
    """Offsets by name and the bytes needed.

    The best of several greedy orders (Pisarchyk and Lee 2020, section 5); where none reaches the lower bound, a seeded
    search that moves single tensors forward in the best order so far.
    """
    lives = list(lives)
    places, first_of = _inherited(lives)
    bound = lower_bound(lives)
    orders = [
        sorted(places, key=lambda t: (-t.size, t.start)),
        sorted(places, key=lambda t: (t.start, -t.size)),
        sorted(places, key=lambda t: (-t.end, -t.size)),
        sorted(places, key=lambda t: (-(t.end - t.start) * t.size, t.start)),
    ]
    found = [(_place(order), order) for order in orders]
    (best, size), order = min(found, key=lambda f: f[0][1])
    rng = random.Random(0)
    for _ in range(_TRIES if size > bound else 0):
        trial = order.copy()
        trial.insert(rng.randrange(len(trial)), trial.pop(rng.randrange(len(trial))))
        offsets, needed = _place(trial)
        if needed <= size:
            (best, size), order = (offsets, needed), trial
        if size == bound:
            break
    return {name: best[first] for name, first in first_of.items()}, size
