"""What choosing boards brings over drawing them by chance, as a table: scikit-learn's digits, few classes a board.

    python tests/bench_selection.py [--seeds 3]        (scikit-learn; about three minutes)

40 virtual boards (the board's own code) with 27 samples each, classes from Dir(0.1), 30 % of them eight times slower;
6 updates a commit. stale: commits that an update may come late by and still count. early, late: percent right in the
first and the last 8 commits, each with the difference to random on the same boards in points, ± the standard error over
seeds. s: virtual seconds a round. slow: the slow boards' percent of all updates that counted. took: percent of
boards with an update that counted.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from ulearn_host import display
from ulearn_host.compiler import Options
from ulearn_host.federation import selection, simulation, splits
from ulearn_host.federation.job import Job
from ulearn_host.fleet import PlanFacts, Samples
from ulearn_host.importers import from_sklearn
from ulearn_host.prepare import prepare, write

BOARDS, GOAL, ROUNDS, EARLY = 40, 6, 24, 8
ALPHA, STRAGGLERS, EPOCHS, RATE, STALE = 0.1, 0.3, 20, 0.02, 3


def world(folder: Path, seed: int, count: int = BOARDS, each: int = 27, alpha: float = ALPHA) -> simulation.World:
    """A network that has seen 80 digits, boards that have others, `each` so many."""
    images, y = load_digits(return_X_y=True)
    learn, rest = splits.held_out(y, 1 - 80 / len(y), seed)
    train, test = splits.held_out(y[rest], 1 - count * each / len(rest), seed)
    model = MLPClassifier((32,), alpha=1e-3, max_iter=60, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(images[learn] / 16, y[learn])
    layers, loss, labels = from_sklearn(model)
    path = folder / f"digits-{seed}.ulm"
    write(prepare(layers, images[learn] / 16, y[learn], loss=loss, labels=labels, options=Options("full")), path)
    every = PlanFacts(path).samples(images[rest] / 16, y[rest], "digits")
    parts = [train[p] for p in splits.dirichlet(y[rest][train], count, alpha, seed)]
    boards = tuple(Samples(every.x[p], every.y[p]) for p in parts)
    return simulation.World(path, boards, Samples(every.x[test], every.y[test]), stragglers=STRAGGLERS, seed=seed)


def job(policy: str, stale: int, seed: int) -> Job:
    """The same for all but in whom it asks."""
    how = {"epochs": EPOCHS, "learning_rate": RATE, "retry_s": 0.5, "seed": seed, "histogram": True, "stale": stale}
    return Job(f"selection {seed}", ROUNDS, GOAL, selection=policy, **how)  # type: ignore[arg-type]


def rows(seeds: int) -> list[list[str]]:
    """A row a policy."""
    found: dict[tuple[str, int], list[Sequence[float]]] = {
        (policy, stale): [] for stale in (0, STALE) for policy in selection.POLICIES
    }
    with TemporaryDirectory() as temporary, display.steps() as steps:
        tick = steps.counter("simulating", seeds * len(found))
        for seed in range(seeds):
            fleet = world(Path(temporary), seed)
            for which, measured in found.items():
                result = simulation.run(fleet, job(*which, seed))
                took = Counter(board for one in result.committed for board in one.boards)
                slow = np.argsort(fleet.slowness)[-round(STRAGGLERS * BOARDS) :]
                share = sum(took[simulation.name_of(i)] for i in slow) / sum(took.values())
                early, late = (float(np.mean([r.score for r in part])) for part in _parts(result))
                seconds = float(np.mean([r.seconds for r in result.committed]))
                measured.append((result.before, early, late, seconds, share, len(took) / BOARDS))
                tick()
    by_chance = np.array(found["random", 0])
    return [[policy, str(stale), *_cells(np.array(measured), by_chance)] for (policy, stale), measured in found.items()]


def _parts(result: simulation.Result) -> tuple[list[simulation.Round], list[simulation.Round]]:
    """The first and the last commits."""
    return result.committed[:EARLY], result.committed[-EARLY:]


def _cells(measured: np.ndarray, by_chance: np.ndarray) -> list[str]:
    """Means; accuracy early and late as differences to random, seed by seed."""
    cells = []
    for column in (1, 2):
        gain = 100 * (measured[:, column] - by_chance[:, column])
        error = np.std(gain, ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else np.nan
        cells += [
            f"{100 * measured[:, column].mean():.1f}",
            f"{gain.mean():+.1f} ± {error:.1f}" if gain.any() else "",
        ]
    seconds, slow, taken = measured[:, 3:].mean(axis=0)
    return [*cells, f"{seconds:.1f}", f"{100 * slow:.1f}", f"{100 * taken:.1f}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    columns = ["stale", "early", "points", "late", "points", "s", "slow", "took"]
    title = f"{BOARDS} boards, {GOAL} updates a commit, {given.seeds} seeds"
    display.plain_table(title, ["selection", *columns], rows(given.seeds), range(1, 9), {})


if __name__ == "__main__":
    main()
