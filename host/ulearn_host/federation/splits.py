"""Who has which samples: splits of a data set among simulated boards. All are pure functions of their arguments."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulearn_host.errors import UserError

Indices = NDArray[np.int64]


def held_out(labels: NDArray[Any], share: float, seed: int) -> tuple[Indices, Indices]:
    """(to learn from, held out) as indices, in random order: of each class the share, rounded, is held out.

    labels: [n], integers; of a regression anything [n, outputs], which is split without classes. Raises UserError when
    one of the two would be empty.
    """
    if not 0 < share < 1:
        raise UserError(f"share held out: {share}, expected above 0 and below 1")
    rng = np.random.default_rng([seed, 1])
    mixed = rng.permutation(len(labels))
    if labels.ndim == 1:
        mixed = mixed[np.argsort(labels[mixed], kind="stable")]
    # Of samples in the order of their classes every 1/share-th: no class is short by more than one.
    marks = np.floor(np.arange(len(mixed) + 1) * share + 0.5)
    kept = np.diff(marks) > 0
    if kept.all() or not kept.any():
        raise UserError(f"{len(labels)} samples cannot be split with a share of {share}; give more samples")
    return rng.permutation(mixed[~kept]), rng.permutation(mixed[kept])


def dirichlet(labels: NDArray[Any], boards: int, alpha: float, seed: int) -> list[Indices]:
    """Indices of each board's samples, as many for each (± 1), classes drawn from Dir(alpha × their shares).

    Hsu, Qi and Brown 2019, section 3: a board's samples are drawn, without replacement, from its own mix of classes; a
    class that is used up is left out of the mixes of those who come after. alpha: above 0; the smaller, the fewer
    classes a board has; math.inf is IID. labels: [n]; where it has two dimensions (a regression) alpha must be inf.
    Raises UserError for other alphas, and for more boards than samples.
    """
    if not alpha > 0:
        raise UserError(f"alpha: {alpha}, expected above 0; inf gives every board the same mix of classes")
    if not 1 <= boards <= len(labels):
        raise UserError(f"{boards} boards for {len(labels)} samples to learn from; expected 1 to {len(labels)}")
    rng = np.random.default_rng([seed, 2])
    sizes = [len(part) for part in np.array_split(np.arange(len(labels)), boards)]
    if math.isinf(alpha):
        return np.split(rng.permutation(len(labels)), np.cumsum(sizes)[:-1])
    if labels.ndim != 1:
        raise UserError("a split by classes needs labels, and there are vectors; give alpha inf")
    classes, counts = np.unique(labels, return_counts=True)
    pools = [rng.permutation(np.flatnonzero(labels == c)) for c in classes]
    left = counts.copy()
    result = []
    for size in sizes:
        drawn = _drawn(rng.dirichlet(alpha * counts / counts.sum()), left, size, rng)
        parts = [pool[rest - take : rest] for pool, rest, take in zip(pools, left, drawn, strict=True)]
        left = left - drawn
        result.append(rng.permutation(np.concatenate(parts)))
    return result


def _drawn(mix: NDArray[np.float64], left: Indices, size: int, rng: np.random.Generator) -> Indices:
    """How many of each class: `size` draws from a mix, of which a class that is used up drops out."""
    drawn = np.zeros_like(left)
    while size:
        mix = np.where(left > drawn, mix, 0.0)
        # A mix of which nothing is left takes what there is.
        weights = mix if mix.sum() > 0 else (left - drawn).astype(np.float64)
        more = np.minimum(rng.multinomial(size, weights / weights.sum()), left - drawn)
        drawn = drawn + more
        size -= int(more.sum())
    return drawn


def by_group(group: NDArray[Any], boards: int | None = None, least: int = 1) -> list[Indices]:
    """Indices of each board's samples where every board is one person, machine or place: the largest groups first.

    group: [n], whose each sample is. boards: how many of them; None: all with `least` samples. Raises UserError when
    there are fewer.
    """
    names, inverse, counts = np.unique(group, return_inverse=True, return_counts=True)
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i] >= least]
    if len(order) < (boards or 1):
        raise UserError(f"{len(order)} groups of {least} samples or more, expected {boards or 1}; give fewer boards")
    return [np.flatnonzero(inverse == i) for i in order[:boards]]


def skew(labels: NDArray[Any], parts: list[Indices]) -> float:
    """How far the boards' mixes of classes are from the mean one: mean total variation distance, 0 to 1."""
    classes = np.unique(labels)
    mixes = np.array([[np.mean(labels[part] == c) for c in classes] for part in parts])
    return float(np.abs(mixes - mixes.mean(axis=0)).sum(axis=1).mean() / 2)
