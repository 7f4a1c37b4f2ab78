"""Static memory planning: every tensor gets an offset, no two that live at the same time overlap."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ALIGNMENT = 4


@dataclass(frozen=True)
class Life:
    """A tensor of `size` bytes, written first by record `start` and read last by record `end` (inclusive)."""

    name: str
    size: int
    start: int
    end: int


def aligned(size: int) -> int:
    """`size` rounded up to a multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def lower_bound(lives: Iterable[Life]) -> int:
    """Bytes alive at the worst moment: no plan can need less."""
    lives = list(lives)
    return max((sum(aligned(b.size) for b in lives if b.start <= a.start <= b.end) for a in lives), default=0)


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


def plan(lives: Iterable[Life]) -> tuple[dict[str, int], int]:
    """Offsets by name and the bytes needed: the best of several greedy orders (Pisarchyk and Lee 2020, section 5)."""
    lives = list(lives)
    orders = [
        sorted(lives, key=lambda t: (-t.size, t.start)),
        sorted(lives, key=lambda t: (t.start, -t.size)),
        sorted(lives, key=lambda t: (-t.end, -t.size)),
        sorted(lives, key=lambda t: (-(t.end - t.start) * t.size, t.start)),
    ]
    return min((_place(order) for order in orders), key=lambda result: result[1])
