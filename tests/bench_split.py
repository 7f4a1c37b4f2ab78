"""What split training costs and brings: bytes up from a board, and right answers, beside federated rounds.

    python tests/bench_split.py [--seeds 8]

On tilted digits (test_split.Digits): four boards of 120 samples each, of which they send the activations of a few. How
they choose is compared with chance, with farthest points (Gonzalez 1985), and with principal components before k-means
as Shi and Radu have it; all of them give every class the same share.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

sys.path.insert(0, str(Path(__file__).parent / "device"))

from test_split import Digits  # noqa: E402
from ulearn_host import aggregate  # noqa: E402
from ulearn_host.federation import advance, split, split_head  # noqa: E402
from ulearn_host.federation.job import Job  # noqa: E402

KEPT = (10, 20, 40, 120)
ROUNDS = (1, 2, 5, 10, 20)
SPLIT = split_head.Training(learning_rate=0.03)
Choice = Callable[[NDArray[np.int8], int], list[int]]


def farthest(x: NDArray[np.int8], count: int) -> list[int]:
    """From the middle on, each the farthest from all before it."""
    points = x.astype(np.float64)
    chosen = [int(np.argmin(np.sum((points - points.mean(axis=0)) ** 2, axis=1)))]
    while len(chosen) < count:
        apart = np.min([np.sum((points - points[i]) ** 2, axis=1) for i in chosen], axis=0)
        chosen.append(int(np.argmax(apart)))
    return chosen


def components(x: NDArray[np.int8], count: int) -> list[int]:
    """k-means on principal components; the sample nearest each middle."""
    points = PCA(min(10, len(x))).fit_transform(x.astype(np.float64))
    left, chosen = list(range(len(x))), []
    for middle in KMeans(count, n_init=4, random_state=0).fit(points).cluster_centers_:
        chosen.append(left.pop(int(np.argmin([np.sum((points[i] - middle) ** 2) for i in left]))))
    return chosen


def part(sent: split.Features, kept: int, choose: Choice) -> split.Features:
    """Of all a board's activations those that `choose` takes of each class."""
    groups = [np.flatnonzero(sent.y == label) for label in np.unique(sent.y)]
    groups.sort(key=len, reverse=True)
    chosen: list[int] = []
    for group, share in zip(groups, shares([len(group) for group in groups], kept), strict=True):
        if share:
            chosen += group[choose(sent.x[group], share)].tolist()
    rows = sorted(chosen)
    return split.Features(sent.job, sent.round, sent.model_id, sent.base_id, 0, len(sent), sent.x[rows], sent.y[rows])


def shares(sizes: list[int], kept: int) -> list[int]:
    """How many of each class, as ulearn.features.choose has it."""
    found = [0] * len(sizes)
    while kept:
        for i, size in enumerate(sizes):
            if kept and found[i] < size:
                found[i] += 1
                kept -= 1
    return found


def measured(folder: Path, seed: int) -> dict[str, tuple[int, float]]:
    """Of each way the bytes up from a board, and the share of right answers."""
    fleet = Digits(folder / str(seed), seed)
    base = advance.first_blob(fleet.facts)
    found = {"frozen": (0, fleet.right(base))}

    def learned(answers: list[split.Features], floating: bool = False) -> float:
        make = split_head.train_float if floating else lambda *given: split_head.train(*given, SPLIT)
        return fleet.right(advance.added(base, make(fleet.facts, base, answers), fleet.facts))

    def told(way: str, kept: int) -> tuple[list[split.Features], int]:
        answers = []
        for board in fleet.boards.values():
            ids = {"model_id": board.model.model_id, "base_id": board.base_id, "round": 1, "seed": seed + 1}
            answers.append(board.answer(split.ask(kept, way, **ids)))
        return [split.parse(answer, fleet.facts) for answer in answers], len(answers[0])

    whole, _ = told("features", 120)
    for kept in KEPT:
        answers, size = told("features", kept)
        found[f"{kept} activations"] = size, learned(answers)
        found[f"{kept} activations, trained in float"] = size, learned(answers, True)
        found[f"{kept} activations by chance"] = size, learned(told("random-features", kept)[0])
        if kept < 120:
            for name, choose in (("farthest points", farthest), ("components and k-means", components)):
                answers = [part(sent, kept, choose) for sent in whole]
                found[f"{kept} activations, {name}"] = size, learned(answers)
        found[f"{kept} samples as they are"] = kept * (fleet.facts.inputs + 2), float("nan")
    size = aggregate.update_bytes(fleet.facts.table, "dense")
    for rounds in ROUNDS:
        job = Job(f"rounds-{rounds}", rounds, 4, learning_rate=0.1, quorum=1)
        with fleet.run(folder / f"{seed}-{rounds}", job) as federation:
            found[f"{rounds} federated rounds"] = rounds * size, fleet.right(bytes(federation.model["blob"]))
        for board in fleet.boards.values():
            board.take("full", base, whole[0].base_id)
    return found


def main() -> None:
    """Measure and print."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--seeds", type=int, default=8)
    seeds = asked.parse_args().seeds
    with tempfile.TemporaryDirectory() as folder:
        rows = [measured(Path(folder), seed) for seed in range(seeds)]
    for name in rows[0]:
        right = np.array([row[name][1] for row in rows])
        error = right.std(ddof=1) / len(right) ** 0.5 if len(right) > 1 else 0.0
        shown = "" if np.isnan(right).any() else f"{right.mean():7.1%} ± {error:.1%}"
        print(f"{name:45} {rows[0][name][0]:7,} bytes {shown}")


if __name__ == "__main__":
    main()
