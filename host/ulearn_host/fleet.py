"""Boards on serial lines, asked side by side: samples, local training, evaluation."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ulearn import plan as plan_file
from ulearn_host import importers
from ulearn_host import numbers as n
from ulearn_host.compiler import seal
from ulearn_host.errors import UserError
from ulearn_host.link import Counters, Link
from ulearn_host.network import Quantisation

Tick = Callable[[int, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Samples:
    """What a board learns from or is tested on. x: int8 [n, inputs]; y: uint16 [n] or int8 [n, outputs]."""

    x: NDArray[np.int8]
    y: NDArray[Any]

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Hyperparameters:
    """How a board trains. learning_rate is halved after every epoch."""

    epochs: int = 4
    learning_rate: float = 0.03
    seed: int = 1
    skip: float = 1 / 16


class PlanFacts:
    """What the host needs to know of a plan file: tensors that train, the rate they start with, quantisation."""

    def __init__(self, path: Path) -> None:
        """Read and check the plan. Raises UserError naming the file and the fault."""
        try:
            plan = plan_file.read(str(path))
        except OSError as fault:
            raise UserError(f"{path}: {fault.strerror}; expected a plan file") from None
        except ValueError as fault:
            raise UserError(str(fault)) from None
        self.path = path
        self.model_id = plan.model_id
        self.table = bytes(plan.section(n.SECTION_TENSORS))
        self.train_place = plan.offsets.get(n.SECTION_TRAIN, (0, 0))
        at, size = plan.offsets.get(n.SECTION_SCALES, (0, 0))  # which a board has no use for
        self.steps = _steps(self.table, path.read_bytes()[at : at + size])
        mantissa, exponent = struct.unpack_from("<Hh", plan.section(n.SECTION_STATE), n.S_LR_MANT)
        self.learning_rate = mantissa * 2.0**exponent
        fields = struct.unpack("<4Hfi4HfiHHf", plan.section(n.SECTION_IO))
        self.input = Quantisation(fields[4], fields[5])
        self.output = Quantisation(fields[10], fields[11])
        self.labelled = fields[12] == n.LOSS_SOFTMAX_CE
        self.shape = fields[:3]
        self.inputs = int(np.prod(self.shape))
        self.outputs = int(np.prod([d for d in fields[6:9] if d]))

    def samples(self, x: NDArray[np.floating], y: NDArray[Any] | None, source: str) -> Samples:
        """Real samples as the board takes them. Raises UserError when they do not fit the plan."""
        x = importers.rows(x, self.shape, source)
        if y is None:
            raise UserError(f"{source}: holds no targets, expected them under the name y")
        if not self.labelled:
            targets = np.asarray(y, dtype=np.float64).reshape(len(y), -1)
            if targets.shape[1] != self.outputs:
                raise UserError(
                    f"{source}: targets y of {targets.shape[1]} numbers, expected {self.outputs}; where y holds class "
                    f"labels, prepare the plan with --loss softmax_ce"
                )
            return Samples(self.input.codes(x), self.output.codes(targets))
        if not np.array_equal(y, np.rint(y)):
            raise UserError(f"{source}: y holds numbers that are no labels, expected 0 to {self.outputs - 1}")
        if np.any(np.asarray(y) < 0) or np.any(np.asarray(y) >= self.outputs):
            raise UserError(f"{source}: labels from {np.min(y)} to {np.max(y)}, expected 0 to {self.outputs - 1}")
        return Samples(self.input.codes(x), np.asarray(y).astype(np.uint16))

    def with_weights(self, blob: bytes) -> bytes:
        """The plan's bytes with other trainable weights, in canonical order."""
        data = bytearray(self.path.read_bytes())
        at, size = self.train_place
        if len(blob) != size:
            raise UserError(f"{self.path}: {len(blob)} bytes of weights, expected {size}")
        data[at : at + size] = blob
        return seal(self.model_id, [bytes(data[n.HEADER_BYTES :])], struct.unpack_from("<H", data, n.H_SECTIONS)[0])


def _steps(table: bytes, scales: bytes) -> NDArray[np.float64]:
    """What one unit of each stored trainable number is, in canonical order."""
    parts = []
    for at in range(0, len(table), n.TENSOR_BYTES):
        channels, *others, _, place = struct.unpack_from("<4HII", table, at + n.T_SHAPE)
        steps = np.frombuffer(scales, "<f4", channels, place).astype(np.float64)
        parts.append(np.repeat(steps, int(np.prod(others))))
    return np.concatenate(parts) if parts else np.zeros(0)


class Member:
    """A board of the fleet: its link, its own samples to learn from, and samples it is tested on."""

    def __init__(self, name: str, link: Link, train: Samples, test: Samples) -> None:
        """Take over an open link whose model is loaded."""
        self.name, self.link, self.train, self.test = name, link, train, test

    def send(self, tick: Tick | None = None) -> None:
        """Give the board its samples."""
        self.link.data_reset(len(self.train))
        self.link.data_add(self.train.x, self.train.y, tick)

    def learn(self, how: Hyperparameters, tick: Tick | None = None) -> Counters:
        """Train from the base on the board's own samples: the same base, data and seed end at the same bits."""
        self.link.reset()
        counters = self.link.train(how.epochs, how.learning_rate, how.seed, how.skip, tick)
        if tick:
            tick(how.epochs * len(self.train), how.epochs * len(self.train))
        return counters

    def right(self, test: Samples | None = None, tick: Tick | None = None) -> int:
        """How many of the test samples the board gets right now."""
        test = test or self.test
        return self.link.score(test.x, test.y, tick).right if len(test) else 0


def split(samples: Samples, holdout: float, seed: int) -> tuple[Samples, Samples]:
    """Samples to learn from and samples to test on, drawn by `seed`. Raises UserError when none is left."""
    order = np.random.default_rng(seed).permutation(len(samples))
    kept = round(holdout * len(samples))
    if kept == len(samples):
        raise UserError(f"{len(samples)} samples leave none to learn from; give more, or a smaller --holdout")
    test, train = order[:kept], order[kept:]
    return Samples(samples.x[train], samples.y[train]), Samples(samples.x[test], samples.y[test])


def together(members: Sequence[Member], do: Callable[[Member], T]) -> list[T]:
    """Do something on every board at once; results in the order of the members, the first error is raised.

    Ctrl-C closes the lines, so that no thread goes on waiting for a board.
    """
    with ThreadPoolExecutor(max_workers=max(1, len(members))) as pool:
        futures = [pool.submit(do, member) for member in members]
        try:
            return [future.result() for future in futures]
        except KeyboardInterrupt:
            for member in members:
                member.link.close()
            raise


def opened(port: str, facts: PlanFacts) -> Link:
    """A session with a board, this plan loaded from its files; a context manager. Raises UserError or LinkError.

    The largest frame has room for a sample with its target, twice.
    """
    room = max(2048, 2 * (facts.inputs + max(2, facts.outputs) + 64))
    with ExitStack() as stack:
        link = stack.enter_context(Link.open(port, buffer_bytes=room))
        loaded = link.load(facts.path.name)
        if loaded is None or loaded.model_id != facts.model_id:
            raise UserError(f"{port}: {facts.path.name} on the board is another model; run ulearn deploy first")
        stack.pop_all()
        return link
