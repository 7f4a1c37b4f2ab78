"""How well a board adapts to a person it never saw: integer training beside float32 SGD on accelerometer windows.

    python tests/adaptation.py [--short] [--json FILE]

For every subject a float network is pretrained on all others and adapted to one half of that subject's executions, in
float32 and by the board's own integer code, on the same samples in the same order; the other half judges both. The
halves are the earlier and the later executions (no window overlaps both), and each is trained on once. All of it is
repeated with SEEDS (of the pretraining and of the order) and averaged, since one pretrained network moves a scheme's
gap by half a point. The learning rate of a subject is the one of RATES that served other subjects best, chosen for
float and integer apart: in DIVISIONS of the subjects into two halves the rate of each half is chosen on the other one,
and what comes out is averaged. (Chosen on all but one, two rates that do equally well take turns, always against the
one left out, which cost half a point with no change of the arithmetic.)
Float32 is plain SGD; the integer step keeps its default of skipping what is right already.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits

import ulearn
from ulearn.fitting import shuffle
from ulearn_host.compiler import Options
from ulearn_host.importers import from_sklearn
from ulearn_host.prepare import prepare
from ulearn_host.quantise import FloatDense, forward
from ulearn_host.schemes import TRAINING_SCHEMES, Part, named_part

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DIVISIONS = 200
SHOWN = 0.05  # a rate that is chosen more rarely is not named
SEEDS = (1, 2, 3)
EPOCHS = 4
HIDDEN = (64, 32)
PRETRAIN_EPOCHS = 20
# 64 readings at 50 Hz become 16 means of 4: as good as all of them, and a board does it while it samples.
DECIMATE = 4
REACH = 4.0  # standard deviations that a feature may reach: a knock must not cost the others their resolution
FILE = Path("har") / "geotec_sp_windows_50hz_64x6_int16.npz"

Floats = NDArray[np.floating]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """Features [n, inputs] before standardisation, and for each window its activity, person and execution."""

    features: Floats
    labels: Labels
    subjects: NDArray[np.int64]
    executions: NDArray[np.int64]


@dataclass(frozen=True)
class Settings:
    """What is tried. skip: the integer step's threshold for samples that are right already; float32 has none."""

    schemes: tuple[str, ...] = TRAINING_SCHEMES
    rates: tuple[float, ...] = RATES
    epochs: int = EPOCHS
    seeds: tuple[int, ...] = SEEDS
    skip: float = 1 / 16


@dataclass(frozen=True)
class Subject:
    """Accuracies of one subject, each the mean of both halves, at last of all seeds too. after: [schemes, rates]."""

    subject: int
    before_float: float
    before_int: float
    after_float: Floats
    after_int: Floats


@dataclass(frozen=True)
class Row:
    """One scheme over all subjects, in percent and points; gap: float less integer; errors: standard errors."""

    scheme: str
    before_float: float
    before_int: float
    after_float: float
    after_int: float
    gap: float
    gap_error: float
    gain: float
    gain_error: float
    rates_float: dict[float, float]
    rates_int: dict[float, float]


def data_file() -> Path:
    """Where the windows are, or would be."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("ULEARN_DATA") or beside) / FILE


def load(path: Path) -> Windows:
    """The windows of a file, decimated and flattened."""
    with np.load(path) as archive:
        x = archive["X"].astype(np.float64)
        count, length, axes = x.shape
        means = x.reshape(count, length // DECIMATE, DECIMATE, axes).mean(axis=2)
        labels, subjects, executions = (archive[k].astype(np.int64) for k in ("y", "subject", "execution"))
    return Windows(means.reshape(count, -1), labels, subjects, executions)


def pretrain(x: Floats, y: Labels, seed: int) -> list[FloatDense]:
    """A multi-layer perceptron trained in float, as a user brings it."""
    network = MLPClassifier(HIDDEN, random_state=seed)
    for _ in range(PRETRAIN_EPOCHS):
        network.partial_fit(x, y, classes=np.unique(y))
    return from_sklearn(network)[0]


def orders(count: int, epochs: int, seed: int) -> Iterator[array[int]]:
    """The order of the samples in every epoch, as Trainer.fit has it."""
    order = array("H", range(count))
    for epoch in range(epochs):
        shuffle(order, seed + epoch)
        yield order


@dataclass(frozen=True)
class Course:
    """One adaptation: what trains, how fast, how long and in which order."""

    scheme: str
    rate: float
    epochs: int
    seed: int
    skip: float


def parts(layers: Sequence[FloatDense], scheme: str) -> tuple[Part, ...]:
    """What of each layer trains; 'sparse': the last layer, half of the one before with its biases."""
    sizes = [len(layer.weights) for layer in layers]
    if scheme == "sparse":
        rows = [0] * (len(sizes) - 2) + [sizes[-2] // 2, sizes[-1]]
        return tuple(Part(r, r > 0) for r in rows)
    trains = [named_part(i, len(sizes), scheme) for i in range(len(sizes))]
    return tuple(Part(size if weights else 0, bias) for size, (weights, bias) in zip(sizes, trains, strict=True))


def options(layers: Sequence[FloatDense], scheme: str) -> Options:
    """The same for the board."""
    return Options(scheme, selection=parts(layers, scheme) if scheme == "sparse" else None)  # type: ignore[arg-type]


def adapt_float(layers: Sequence[FloatDense], x: Floats, y: Labels, course: Course) -> list[FloatDense]:
    """Plain stochastic gradient descent in float32, one sample a step, the rate halved after every epoch."""
    x = x.astype(np.float32)
    weights = [layer.weights.astype(np.float32) for layer in layers]
    biases = [layer.bias.astype(np.float32) for layer in layers]
    trains = parts(layers, course.scheme)
    deepest = min(i for i, part in enumerate(trains) if part.any)
    for epoch, order in enumerate(orders(len(x), course.epochs, course.seed)):
        step = np.float32(course.rate * 0.5**epoch)
        for index in order:
            inputs = [x[index]]
            for w, b, layer in zip(weights, biases, layers, strict=True):
                output = w @ inputs[-1] + b
                inputs.append(np.maximum(output, 0) if layer.relu else output)
            gradient = np.exp(inputs[-1] - inputs[-1].max())
            gradient /= gradient.sum()
            gradient[y[index]] -= 1
            for i in reversed(range(deepest, len(layers))):
                below = (gradient @ weights[i]) * (inputs[i] > 0) if i > deepest else gradient
                if trains[i].rows:
                    rows = slice(len(weights[i]) - trains[i].rows, None)
                    weights[i][rows] -= np.outer(step * gradient[rows], inputs[i])
                if trains[i].bias:
                    biases[i] -= step * gradient
                gradient = below
    return [FloatDense(w, b, layer.relu) for w, b, layer in zip(weights, biases, layers, strict=True)]


def adapt_int(model: Any, codes: NDArray[np.int8], y: Labels, course: Course) -> None:
    """The same by the board's code: samples into the store, then fit. Starts from the plan's weights and STATE."""
    model.reset()
    samples = ulearn.Samples(model, len(codes))
    for x, label in zip(codes, y.tolist(), strict=True):
        samples.add(x, label)
    ulearn.Trainer(model, learning_rate=course.rate, seed=course.seed, skip=course.skip).fit(samples, course.epochs)


def accuracy_float(layers: Sequence[FloatDense], x: Floats, y: Labels) -> float:
    """Percent of the windows that the float network names rightly."""
    return float(100 * np.mean(forward(layers, x)[-1].argmax(axis=1) == y))


def accuracy_int(model: Any, codes: NDArray[np.int8], y: Labels) -> float:
    """Percent of the windows that the board names rightly."""
    return float(100 * np.mean([model.predict(x) == label for x, label in zip(codes, y, strict=True)]))


def run_subject(windows: Windows, settings: Settings, subject: int, seed: int) -> Subject:
    """Leave a subject out, pretrain, and adapt on either half of its executions with every scheme and rate."""
    # Float32 may diverge at the highest rates; that is a result, not a fault.
    with threadpool_limits(1), np.errstate(over="ignore", invalid="ignore"):
        others = windows.subjects != subject
        mean, spread = windows.features[others].mean(axis=0), windows.features[others].std(axis=0)
        x, y = np.clip((windows.features - mean) / spread, -REACH, REACH), windows.labels
        layers = pretrain(x[others], y[others], seed)
        plans = [prepare(layers, x[others], y[others], options=options(layers, scheme)) for scheme in settings.schemes]
        models = [ulearn.load(plan.data) for plan in plans]
        x, y, executions = x[~others], y[~others], windows.executions[~others]
        codes = plans[0].network.input.codes(x)
        early = executions <= np.median(np.unique(executions))
        before, after = np.zeros((2, 2)), np.zeros((2, 2, len(settings.schemes), len(settings.rates)))
        for half, train in enumerate((early, ~early)):
            test = ~train
            models[0].reset()  # the half before has trained it
            before[0, half] = accuracy_float(layers, x[test], y[test])
            before[1, half] = accuracy_int(models[0], codes[test], y[test])
            for s, (scheme, model) in enumerate(zip(settings.schemes, models, strict=True)):
                for r, rate in enumerate(settings.rates):
                    course = Course(scheme, rate, settings.epochs, seed, settings.skip)
                    adapt_int(model, codes[train], y[train], course)
                    adapted = adapt_float(layers, x[train], y[train], course)
                    after[0, half, s, r] = accuracy_float(adapted, x[test], y[test])
                    after[1, half, s, r] = accuracy_int(model, codes[test], y[test])
    return Subject(subject, *map(float, before.mean(axis=1)), *after.mean(axis=1))


def run(windows: Windows, settings: Settings, processes: int = 2) -> list[Subject]:
    """Every subject, averaged over the seeds, on as many cores as there are, at most `processes`."""
    subjects = np.unique(windows.subjects).tolist()
    jobs = list(product(subjects, settings.seeds))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, os.cpu_count() or 1), mp_context=context) as pool:
        parts = list(pool.map(partial(run_subject, windows, settings), *zip(*jobs, strict=True)))
    return [_average([part for part in parts if part.subject == subject]) for subject in subjects]


def _average(parts: Sequence[Subject]) -> Subject:
    columns = zip(*(astuple(part) for part in parts), strict=True)
    subject, *accuracies = (np.mean(column, axis=0) for column in columns)
    return Subject(int(subject), *accuracies)


def chosen(after: Floats) -> Floats:
    """How often a subject gets each rate: chosen on the half of the subjects it is not in. after: [subjects, rates]."""
    shares = np.zeros(after.shape)
    for division in range(DIVISIONS):
        half = np.random.default_rng(division).permutation(len(after)) % 2 == 0
        for part in (half, ~half):
            shares[part, np.argmax(after[~part].sum(axis=0))] += 1 / DIVISIONS
    return shares


def summarise(results: Sequence[Subject], settings: Settings) -> list[Row]:
    """A row a scheme."""
    before = np.array([(r.before_float, r.before_int) for r in results])
    rows = []
    for s, scheme in enumerate(settings.schemes):
        both = np.array([(r.after_float[s], r.after_int[s]) for r in results])
        picks = [chosen(both[:, kind]) for kind in (0, 1)]
        after = np.stack([(both[:, kind] * picks[kind]).sum(axis=1) for kind in (0, 1)], axis=1)
        gap, gain = after[:, 0] - after[:, 1], after[:, 1] - before[:, 1]
        counts = [
            {r: float(share) for r, share in zip(settings.rates, p.mean(axis=0), strict=True) if share >= SHOWN}
            for p in picks
        ]
        means = [*before.mean(axis=0), *after.mean(axis=0), *_mean_and_error(gap), *_mean_and_error(gain)]
        rows.append(Row(scheme, *map(float, means), *counts))
    return rows


def _mean_and_error(values: Floats) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def table(rows: Sequence[Row]) -> str:
    """The rows as text, aligned."""
    lines = [
        f"{'':11}{'before':^16}{'after':^16}{'float - int8':^16}{'gain of int8':^16}{'rates (how often)'}",
        f"{'scheme':11}{'float':>8}{'int8':>8}{'float':>8}{'int8':>8}{'points':^16}{'points':^16}{'float | int8'}",
    ]
    for row in rows:
        accuracies = (row.before_float, row.before_int, row.after_float, row.after_int)
        gap, gain = (f"{v:+.2f} ± {e:.2f}" for v, e in ((row.gap, row.gap_error), (row.gain, row.gain_error)))
        rates = " | ".join(" ".join(f"{r:g} ({n:.0%})" for r, n in c.items()) for c in (row.rates_float, row.rates_int))
        lines.append(f"{row.scheme:11}" + "".join(f"{a:8.2f}" for a in accuracies) + f"{gap:^16}{gain:^16}{rates}")
    return "\n".join(lines)


def main() -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="Integer against float32 adaptation on accelerometer windows.")
    parser.add_argument("--short", action="store_true", help="the first seed only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same numbers to FILE")
    arguments = parser.parse_args()
    path = data_file()
    if not path.exists():
        print(f"{path} is missing; ULEARN_DATA names the folder that holds it", file=sys.stderr)
        return 1
    start = time.monotonic()
    settings = Settings(seeds=SEEDS[:1]) if arguments.short else Settings()
    results = run(load(path), settings)
    rows = summarise(results, settings)
    seconds = time.monotonic() - start
    print(table(rows))
    print(f"{len(results)} subjects, seeds {settings.seeds}, executor {ulearn.executor}, {seconds:.0f} s")
    if arguments.json:
        report = {"subjects": len(results), "settings": asdict(settings), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(report | {"seconds": round(seconds, 1)}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
