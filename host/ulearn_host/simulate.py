"""A board's training repeated on the host, to the bit: adapt to one part of a user's samples, judge on the other.

The simulation is the board's own code (ulearn.Trainer over the same C core), so what is measured here is what a board
will do with the same samples in the same order.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ulearn
from ulearn_host import workers
from ulearn_host.compiler import Options, compile_plan, model_identity
from ulearn_host.errors import UserError
from ulearn_host.network import Network
from ulearn_host.prepare import calibrated_state, target_codes

# The best rate of a choice lies anywhere here (kws01: 0.3 for the last layer, 0.01 for biases, 0.0003 for everything),
# and a board has one rate for all that trains: every choice is judged at its own best.
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_FIRST = 3  # of RATES, where the walk to the best begins
_CALIBRATION = 64
_GROUP_SIZE = 20  # samples from which on a group judges well enough; of fewer if there are not two such groups
_LEAST = 4
_METHOD = 1  # raised when what a measurement means has changed, so that no old one is taken for it
_SHORT = 6.0  # seconds of all that is left up to which starting processes does not pay
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Samples:
    """A user's data. x: int8 codes [n, inputs]; y: labels [n], or for a regression float targets [n, outputs] in real
    units; group: [n], whose a sample is (a speaker, a machine), None where that is unknown."""

    x: NDArray[np.int8]
    y: NDArray[Any]
    group: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        for name, values in (("y", self.y), ("group", self.group)):
            if values is not None and len(values) != len(self.x):
                raise UserError(f"{name} has {len(values)} entries, expected one for each of {len(self.x)} samples")


@dataclass(frozen=True)
class Settings:
    """How adaptation is tried.

    learning_rate: of the first epoch, halved after each; None: for each choice the one of RATES that serves the first
    `pilots` groups best. groups: so many of them, drawn by chance, or where there are none so many random splits.
    seeds: each so often, split and ordered anew. most: samples to learn from, and to judge on, at most, for each.
    split: another number, other halves.
    """

    learning_rate: float | None = None
    epochs: int = 4
    seeds: int = 1
    groups: int = 24
    pilots: int = 8
    most: int = 48
    split: int = 0

    def __post_init__(self) -> None:
        if self.groups < 2 or min(self.epochs, self.seeds, self.pilots, self.most) < 1:
            raise UserError(f"{self}: expected 2 groups or more, and at least 1 of epochs, seeds, pilots and most")


@dataclass(frozen=True)
class Fold:
    """unit: whose number; seed: of the order; train, test: which samples, in the order that the board is shown them."""

    unit: int
    seed: int
    train: NDArray[np.int64]
    test: NDArray[np.int64]


def halves(y: NDArray[Any], rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of two halves in random order; of labels every other one of each class, as far as may be."""
    mixed = rng.permutation(len(y))
    if y.ndim == 1 and y.dtype.kind in "iub":
        mixed = mixed[np.argsort(y[mixed], kind="stable")]
    begin = int(rng.integers(2))
    return rng.permutation(mixed[begin::2]), rng.permutation(mixed[1 - begin :: 2])


def folds(samples: Samples, settings: Settings) -> list[Fold]:
    """What is learned from and what judges: both halves are of one group where groups are known.

    Raises UserError where no group, or all samples together, are too few to split.
    """
    units = _units(samples, settings)
    result = []
    for number, members in enumerate(units):
        for seed in range(1, settings.seeds + 1):
            rng = np.random.default_rng([settings.split, number, seed])
            train, test = halves(samples.y[members], rng)
            order = settings.seeds * number + seed
            result.append(Fold(number, order, members[train[: settings.most]], members[test[: settings.most]]))
    return result


def _units(samples: Samples, settings: Settings) -> list[NDArray[np.int64]]:
    if samples.group is None:
        if len(samples.x) < _LEAST:
            raise UserError(f"{len(samples.x)} samples are too few to learn from some and judge on others; give more")
        return [np.arange(len(samples.x))] * settings.groups
    numbers, counts = np.unique(samples.group, return_counts=True)
    large = numbers[counts >= _GROUP_SIZE]
    if len(large) < 2:
        large = numbers[counts >= _LEAST]
    if not len(large):
        raise UserError(f"no group has {_LEAST} samples or more, so none can be adapted to; leave the groups out")
    if len(large) == 1:
        return [np.flatnonzero(samples.group == large[0])] * settings.groups
    drawn = np.random.default_rng(0).permutation(large)[: settings.groups]
    return [np.flatnonzero(samples.group == number) for number in drawn]


@dataclass(frozen=True)
class Scores:
    """Of each fold, before training and after it at `rate`: accuracy, 0 to 1, or for a regression the mean squared
    error."""

    before: list[float]
    after: list[float]
    rate: float


class Simulation:
    """A network, samples, and how they are split: what every choice is judged with. Processes share it by pickling."""

    def __init__(self, network: Network, samples: Samples, settings: Settings) -> None:
        self.network, self.settings = network, settings
        self.x = np.ascontiguousarray(samples.x.reshape(len(samples.x), -1))
        self.y = target_codes(network, samples.y)
        self.folds = folds(samples, settings)
        self.error = network.loss == "mse"
        used = np.concatenate([np.concatenate([fold.train, fold.test]) for fold in self.folds])
        others = np.setdiff1d(np.arange(len(self.x)), used)
        # Gains come from samples that judge nothing, where there are enough.
        pool = others if len(others) >= _CALIBRATION else np.arange(len(self.x))
        self.calibration = np.random.default_rng(1).permutation(pool)[:_CALIBRATION]

    @property
    def units(self) -> list[int]:
        """Of each fold, whose it is."""
        return [fold.unit for fold in self.folds]

    def plan(self, options: Options) -> bytes:
        """A choice compiled and calibrated. Raises UserError where it cannot be trained."""
        plan = compile_plan(self.network, options)
        shown = self.calibration
        return compile_plan(self.network, options, calibrated_state(plan, self.x[shown], self.y[shown])).data

    def measure(
        self, options: Options, thorough: bool = False, progress: Progress = lambda done, total: None
    ) -> Scores:
        """Adapts to every fold from the same start. Raises UserError where the choice cannot be trained.

        thorough: every rate is tried on every group; else the groups that do not help to find the rate see one.
        progress: of trying every rate on every group, of which most is not needed.
        """
        model = ulearn.load(self.plan(options))
        stores = [(self._store(model, fold.train), self._store(model, fold.test)) for fold in self.folds]
        trainer = ulearn.Trainer(model)
        before = [float(trainer.evaluate(test)) for _, test in stores]
        done: list[float] = []
        pilots = sum(unit < self.settings.pilots for unit in self.units)

        def at(rate: float, first: int, end: int) -> list[float]:
            result = []
            for fold, (train, test) in list(zip(self.folds, stores, strict=True))[first:end]:
                model.reset()
                trainer = ulearn.Trainer(model, learning_rate=rate, seed=fold.seed)
                trainer.fit(train, epochs=self.settings.epochs)
                result.append(float(trainer.evaluate(test)))
                done.append(rate)
                progress(len(done), len(RATES) * len(self.folds))
            return result

        sign = -1 if self.error else 1
        if self.settings.learning_rate is not None:
            rate = self.settings.learning_rate
        elif thorough:
            every = {rate: at(rate, 0, len(stores)) for rate in RATES}
            rate = max(every, key=lambda rate: sign * float(np.mean(every[rate])))
            return Scores(before, every[rate], rate)
        else:
            rate, after = _walk(lambda rate: at(rate, 0, pilots), sign)
            return Scores(before, after + at(rate, pilots, len(stores)), rate)
        return Scores(before, at(rate, 0, len(stores)), rate)

    def _store(self, model: Any, which: NDArray[np.int64]) -> Any:
        store = ulearn.Samples(model, len(which))
        for i in which:
            store.add(self.x[i], int(self.y[i]) if self.y.ndim == 1 else self.y[i].tobytes())
        return store


def _walk(at: Callable[[float], list[float]], sign: int) -> tuple[float, list[float]]:
    """The best of RATES and its scores: from the middle uphill, over hollows of one rate, until it goes down."""
    found: dict[int, list[float]] = {}

    def height(i: int) -> float:
        if i not in found:
            found[i] = at(RATES[i])
        return sign * float(np.mean(found[i]))

    here = _FIRST
    while True:
        around = [here + by for by in (0, -1, 1, -2, 2) if 0 <= here + by < len(RATES)]
        there = max(around, key=height)
        if there == here:
            return RATES[here], found[here]
        here = there


def by_unit(values: list[float], units: list[int]) -> NDArray[np.float64]:
    """Means over the seeds: [units] of [folds]."""
    numbers = np.array(units)
    return np.array([np.mean(np.array(values)[numbers == unit]) for unit in np.unique(numbers)])


# ---- Many choices ----------------------------------------------------------------------------------------------------


class _Journal:
    """What is done: a line of JSON a measurement. Lines of other networks, samples or settings are left alone."""

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.key = path, key
        self.done: dict[str, Scores] = {}
        try:
            text = path.read_text() if path and path.exists() else ""
            if path and text and not text.endswith("\n"):
                with path.open("a") as file:  # the line at which the last run was killed
                    file.write("\n")
        except (OSError, UnicodeDecodeError) as fault:
            raise UserError(f"{path}: {fault}; expected a file of measurements, or none") from None
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                if entry["key"] == key:
                    before, after = (list(map(float, entry[when])) for when in ("before", "after"))
                    self.done[entry["choice"]] = Scores(before, after, float(entry["rate"]))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue

    def add(self, choice: str, scores: Scores) -> None:
        """One more."""
        self.done[choice] = scores
        if self.path is None:
            return
        entry = {"key": self.key, "choice": choice} | asdict(scores)
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as fault:
            raise UserError(f"{self.path}: {fault.strerror}; expected a place for a file") from None


def _key(simulation: Simulation) -> str:
    """What a measurement depends on besides the choice."""
    digest = hashlib.sha256(model_identity(simulation.network, [], str(_METHOD)))
    digest.update(json.dumps([asdict(simulation.settings), simulation.units, RATES]).encode())
    parts = [part for fold in simulation.folds for part in (fold.train, fold.test)]
    for values in (simulation.x, simulation.y, simulation.calibration, *parts):
        digest.update(str(values.shape).encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:24]


def run(
    simulation: Simulation,
    choices: Mapping[str, Options],
    *,
    progress: Progress = lambda done, total: None,
    cache: Path | None = None,
    processes: int | None = None,
) -> Mapping[str, Scores]:
    """Scores of every choice by its name; of the first, which the others are compared with, thoroughly.

    cache: a file that each is appended to, and what is in it is not measured again. processes: at most so many; None:
    as many as there are cores.
    """
    journal = _Journal(cache, _key(simulation))
    left = [name for name in choices if name not in journal.done]
    total, count = len(choices), len(choices) - len(left)
    progress(count, total)
    for name, scores in _each(simulation, choices, left, processes or os.cpu_count() or 1):
        journal.add(name, scores)
        count += 1
        progress(count, total)
    return {name: journal.done[name] for name in choices}


def _each(
    simulation: Simulation, choices: Mapping[str, Options], names: list[str], processes: int
) -> Iterator[tuple[str, Scores]]:
    """The first one here, which tells how long it takes; the rest in processes, if that pays."""
    base = next(iter(choices))
    begin = monotonic()
    for i, name in enumerate(names):
        rest = names[i:]
        if i and processes > 1 and len(rest) > 1 and (monotonic() - begin) / i * len(rest) > _SHORT:
            break
        yield name, simulation.measure(choices[name], name == base)
    else:
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(rest)), context, _share, (simulation,))
    try:
        running = {pool.submit(_work, choices[name]): name for name in rest}
        for future in as_completed(running):
            yield running[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


_shared: Simulation | None = None  # of a worker process


def _share(simulation: Simulation) -> None:
    """Of a worker, once: what it measures with. It ends with who started it, even where that one was killed."""
    global _shared
    _shared = simulation
    workers.end_with_parent()


def _work(options: Options) -> Scores:
    assert _shared is not None
    return _shared.measure(options)
