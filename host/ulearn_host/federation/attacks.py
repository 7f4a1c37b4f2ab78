"""Boards that lie, for simulations: what share of them, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulearn_host import rules
from ulearn_host.errors import UserError

USAGE = "label-flip:SHARE, label-flip:BOOST:SHARE or scale:FACTOR:SHARE"


@dataclass(frozen=True)
class Attack:
    """kind: 'label-flip', a liar learns from wrong labels; 'scale', it learns honestly. factor: by which it multiplies
    what it has learned. share: of the boards that lie."""

    kind: str
    factor: float
    share: float

    def liars(self, boards: int, seed: int) -> frozenset[int]:
        """Which of the boards lie: the share, rounded, at least one."""
        count = max(1, round(self.share * boards))
        return frozenset(np.random.default_rng([seed, 3]).permutation(boards)[:count].tolist())

    def labels(self, y: NDArray[Any], classes: int) -> NDArray[Any]:
        """The labels [n] that a liar learns from: of 'label-flip' classes − 1 − y (Fang et al. 2020), else the true."""
        return (classes - 1 - y).astype(y.dtype) if self.kind == "label-flip" else y

    def lie(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """What a liar says it has learned: differences [values], in stored integers, times the factor.

        A factor above 1 is the boosting of model replacement (Bagdasaryan et al. 2020), a negative one drives the
        fleet away from what it wants to learn.
        """
        scaled = self.factor * values.astype(np.float64)
        lie: NDArray[np.int64] = (np.sign(scaled) * np.floor(np.abs(scaled) + 0.5)).astype(np.int64)
        return lie


def parse(text: str) -> Attack:
    """The attack that "label-flip:0.2" or "scale:-10:0.2" names. Raises UserError naming what was expected."""
    kind, *given = text.split(":")
    counts = {"label-flip": (1, 2), "scale": (2,)}
    if len(given) not in counts.get(kind, ()):
        raise UserError(f"attack {text}: expected {USAGE}")
    try:
        *factor, share = [float(word) for word in given]
    except ValueError:
        raise UserError(f"attack {text}: not the numbers it takes; expected {USAGE}") from None
    value = factor[0] if factor else 1.0
    if not abs(value) <= 1e6:
        raise UserError(f"attack {text}: factor {value:g}, expected −1,000,000 to 1,000,000")
    return Attack(kind, value, rules.within(share, f"attack {text}: share of liars", 1e-9, 1))
