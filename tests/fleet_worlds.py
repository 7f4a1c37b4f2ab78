"""What simulated fleets learn from in tests and measurements: spoken keywords by speaker, and tilted digits.

Whatever a scheme leaves frozen needs to be computed but once a sample: a plan of what comes behind it gives the same
bits as the whole one (tests/test_simulation.py), with the codes at the border as its samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import speakers
import ulearn
from adaptation import orders
from float_network import FloatNetwork
from ulearn_host import demo
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.federation.job import Job
from ulearn_host.fleet import Samples
from ulearn_host.importers import from_sklearn
from ulearn_host.network import Network
from ulearn_host.prepare import from_network, prepare
from ulearn_host.schemes import Selection
from ulearn_host.tflite_import import load_tflite

TILT = 28.0  # degrees
UPRIGHT = 3  # a third of the digits is pretrained on

Indices = NDArray[np.int64]


class Once:
    """Rows of numbers that are computed when they are first asked for: known[which]."""

    def __init__(self, count: int, compute: Callable[[Indices], NDArray[Any]]) -> None:
        self.compute, self.there = compute, np.zeros(count, bool)
        self.rows: NDArray[Any] = np.zeros((0,))

    def __getitem__(self, which: Indices) -> NDArray[Any]:
        left = np.unique(which[~self.there[which]])
        if len(left):
            new = self.compute(left)
            if not self.rows.size:
                self.rows = np.zeros((len(self.there), *new.shape[1:]), new.dtype)
            self.rows[left] = new
            self.there[left] = True
        return self.rows[which]


@dataclass(frozen=True)
class Data:
    """A plan, and samples for it: codes int8 [n, inputs], labels [n]."""

    plan: bytes
    codes: NDArray[np.int8] | Once
    labels: NDArray[np.int64]

    def samples(self, which: Indices) -> Samples:
        """Some of them, as a board takes them."""
        return Samples(self.codes[which], self.labels[which].astype(np.uint16))

    def right(self, blob: bytes, which: Indices) -> float:
        """Percent that the board's code names rightly with these trainable weights."""
        model = ulearn.load(self.plan)
        model.train_blob[:] = blob
        pairs = zip(self.codes[which], self.labels[which], strict=True)
        return float(100 * np.mean([model.predict(x) == label for x, label in pairs]))


# ---- Keywords --------------------------------------------------------------------------------------------------------


@cache
def clips() -> speakers.Clips:
    """Every keyword clip."""
    return speakers.load(speakers.data_files()[0])


@cache
def network(anew: bool = False) -> Network:
    """MLPerf Tiny's keyword network. anew: its last layer knows nothing."""
    known = load_tflite(speakers.data_files()[1])
    last = known.layers[-1]
    if not anew:
        return known
    empty = replace(last, weights=np.zeros_like(last.weights), bias=np.zeros_like(last.bias))
    return replace(known, ops=tuple(empty if op is last else op for op in known.ops))


def cut(network: Network, parts: Selection) -> int:
    """How many of the first operators no training changes."""
    trained = {id(layer) for layer, part in zip(network.layers, parts, strict=True) if part.any}
    return next(i for i, op in enumerate(network.ops) if id(op) in trained)


@cache
def behind(scheme: str) -> Once:
    """The codes of clips where the scheme begins to train, [n, features], computed by the board's code."""
    whole = network()
    first = cut(whole, speakers.options(whole, scheme).parts(whole))
    model = ulearn.load(compile_plan(Network(whole.ops[:first]), Options("none")).data)

    def compute(which: Indices) -> NDArray[np.int8]:
        return np.array([np.frombuffer(bytes(model.output(x)), np.int8) for x in clips().codes[which]])

    return Once(len(clips().codes), compute)


@cache
def behind_float(scheme: str) -> tuple[str, Once]:
    """The same in float32, and what the tensor there is called."""
    net = FloatNetwork(network())
    parts = speakers.options(network(), scheme).parts(network())
    (name,) = net.frozen(network().input.real(clips().codes[:1]), parts)

    def compute(which: Indices) -> NDArray[np.float32]:
        return np.concatenate(
            [net.frozen(network().input.real(clips().codes[i : i + 1]), parts)[name] for i in which.tolist()]
        )

    return name, Once(len(clips().codes), compute)


def _shown() -> Indices:
    """Clips that gains are calibrated with: of speakers who are not among the frequent ones."""
    others = np.flatnonzero(~np.isin(clips().speakers, speakers.frequent(clips())))
    return np.random.default_rng(0).permutation(others)[: speakers.CALIBRATION]


@cache
def keywords(scheme: str, anew: bool = False, whole: bool = False) -> Data:
    """The clips and a plan of what a scheme trains; whole: of all of the network, which gives the same bits."""
    net = network(anew)
    options = speakers.options(net, scheme)
    codes: NDArray[np.int8] | Once = clips().codes
    if not whole:
        parts = options.parts(net)
        net = replace(net, ops=net.ops[cut(net, parts) :])
        codes = behind(scheme)
        if options.selection is not None:
            options = replace(options, selection=parts[-len(net.layers) :])
    shown = _shown()
    plan = from_network(net, codes[shown], clips().labels[shown], options=options)
    return Data(plan.data, codes, clips().labels)


def halves(chosen: Sequence[int], seed: int) -> tuple[list[Indices], list[Indices]]:
    """Of each speaker the clips to learn from, and those that judge."""
    learned, judged = [], []
    for speaker in chosen:
        own = np.flatnonzero(clips().speakers == speaker)
        train, test = speakers.halves(clips().labels[own], seed)
        learned.append(own[train])
        judged.append(own[test])
    return learned, judged


class FloatBoards:
    """The keyword network in float32, for float_fleet: it stands in for one board after the other."""

    def __init__(self, scheme: str, boards: Sequence[Indices], job: Job) -> None:
        self.net, self.boards, self.job = FloatNetwork(network()), boards, job
        self.parts = speakers.options(network(), scheme).parts(network())
        self.name, self.known = behind_float(scheme)

    def _tensors(self) -> list[NDArray[np.float32]]:
        """What trains, as views."""
        found = []
        for layer, (rows, bias) in zip(self.net.layers, self.parts, strict=True):
            found += [layer.weights[-rows:]] if rows else []
            found += [layer.bias] if bias else []
        return found

    def weights(self) -> NDArray[np.float32]:
        """As a Learner."""
        return np.concatenate([tensor.ravel() for tensor in self._tensors()])

    def load(self, weights: NDArray[np.float32]) -> None:
        """As a Learner."""
        at = 0
        for tensor in self._tensors():
            tensor[...] = weights[at : at + tensor.size].reshape(tensor.shape)
            at += tensor.size

    def learn(self, board: int, seed: int) -> None:
        """Plain stochastic gradient descent, one sample a step, the rate halved after every epoch."""
        own = self.boards[board]
        x, y = self.known[own], clips().labels[own]
        for epoch, order in enumerate(orders(len(own), self.job.epochs, seed)):
            for i in order:
                rate = self.job.learning_rate * 0.5**epoch
                self.net.step({self.name: x[i : i + 1]}, int(y[i]), rate, self.parts)

    def right(self, which: Indices) -> float:
        """Percent named rightly."""
        logits = self.net.forward({self.name: self.known[which]})
        return float(100 * np.mean(logits.argmax(axis=1) == clips().labels[which]))


# ---- Digits ----------------------------------------------------------------------------------------------------------


@cache
def digits(seed: int, scheme: str = "full") -> Data:
    """A perceptron pretrained on a third of scikit-learn's upright digits, and the others, tilted."""
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    images, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    images, y = images[order].reshape(-1, 8, 8) / 16, y[order].astype(np.int64)
    upright = len(y) // UPRIGHT
    model = MLPClassifier((demo.HIDDEN,), alpha=1e-3, max_iter=80, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(images[:upright].reshape(upright, -1), y[:upright])
    layers, loss, labels = from_sklearn(model)
    shown = np.concatenate([tilted(images[:60], angle) for angle in (0.0, 15.0, -15.0, 30.0, -30.0)])
    plan = prepare(layers, shown, np.tile(y[:60], 5), loss=loss, labels=labels, options=Options(scheme))  # type: ignore[arg-type]
    assert plan.network is not None
    return Data(plan.data, plan.network.input.codes(tilted(images[upright:], TILT)), y[upright:])


def tilted(images: NDArray[np.float64], angle: float) -> NDArray[np.float64]:
    """Images [n, 8, 8] turned by degrees, [n, 64]."""
    return demo.tilted(images, demo.World("", "", angle, 0.0, ())).reshape(len(images), -1)


def put(data: Data, folder: Path) -> Path:
    """The plan as a file, in a folder."""
    path = folder / "fleet.ulm"
    path.write_bytes(data.plan)
    return path
