"""Boards on serial lines, asked side by side: local training, evaluation, rounds of federated averaging."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ulearn import plan as plan_file
from ulearn_host import aggregate
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
        except FileNotFoundError:
            raise UserError(f"{path}: there is no such file") from None
        except ValueError as fault:
            raise UserError(str(fault)) from None
        self.path = path
        self.model_id = plan.model_id
        self.table = bytes(plan.section(n.SECTION_TENSORS))
        self.train_place = plan.offsets.get(n.SECTION_TRAIN, (0, 0))
        mantissa, exponent = struct.unpack_from("<Hh", plan.section(n.SECTION_STATE), n.S_LR_MANT)
        self.learning_rate = mantissa * 2.0**exponent
        fields = struct.unpack("<4Hfi4HfiHHf", plan.section(n.SECTION_IO))
        self.input = Quantisation(fields[4], fields[5])
        self.output = Quantisation(fields[10], fields[11])
        self.labelled = fields[12] == n.LOSS_SOFTMAX_CE
        self.inputs = int(np.prod([d for d in fields[:3] if d]))
        self.outputs = int(np.prod([d for d in fields[6:9] if d]))

    def samples(self, x: NDArray[np.floating], y: NDArray[Any] | None, source: str) -> Samples:
        """Real samples as the board takes them. Raises UserError when they do not fit the plan."""
        if x.shape[1] != self.inputs:
            raise UserError(f"{source}: samples of {x.shape[1]} numbers, {self.path.name} takes {self.inputs}")
        if y is None:
            raise UserError(f"{source}: holds no targets, expected them under the name y")
        if not self.labelled:
            targets = np.asarray(y, dtype=np.float64).reshape(len(y), -1)
            if targets.shape[1] != self.outputs:
                raise UserError(f"{source}: targets of {targets.shape[1]} numbers, expected {self.outputs}")
            return Samples(self.input.codes(x), self.output.codes(targets))
        if np.any(np.asarray(y) < 0) or np.any(np.asarray(y) >= self.outputs):
            raise UserError(f"{source}: labels from {np.min(y)} to {np.max(y)}, expected 0 to {self.outputs - 1}")
        return Samples(self.input.codes(x), np.asarray(y).astype(np.uint16))

    def with_update(self, updates: Sequence[bytes]) -> bytes:
        """The plan's bytes with updates added to its trainable weights, one after the other."""
        from ulearn import update as wire

        data = bytearray(self.path.read_bytes())
        at, size = self.train_place
        blob = bytearray(data[at : at + size])
        for update in updates:
            wire.add(blob, update, self.table)
        data[at : at + size] = blob
        return seal(self.model_id, [bytes(data[n.HEADER_BYTES :])], struct.unpack_from("<H", data, n.H_SECTIONS)[0])


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


def together(members: Sequence[Member], do: Callable[[Member], T]) -> list[T]:
    """Do something on every board at once; results in the order of the members, the first error is raised."""
    with ThreadPoolExecutor(max_workers=max(1, len(members))) as pool:
        return list(pool.map(do, members))


def federated_round(
    members: Sequence[Member], facts: PlanFacts, how: Hyperparameters, done: Callable[[], None] = lambda: None
) -> bytes:
    """One round of federated averaging: all train from the base, the mean becomes everybody's base.

    done is called, from any thread, when a board has trained. Returns the averaged update that every board has applied.
    """

    def train(member: Member) -> bytes:
        member.learn(how)
        done()
        return member.link.update_get(len(member.train))

    updates = [aggregate.decode(data, facts.table) for data in together(members, train)]
    mean = aggregate.encode(aggregate.fedavg(updates), facts.table)
    bases = together(members, lambda member: member.link.update_put(mean))
    if len(set(bases)) != 1:
        raise UserError("the boards ended the round with different weights; deploy the plan to all of them again")
    return mean


def accuracy(members: Sequence[Member], rights: Sequence[int]) -> float:
    """Share of all members' test samples that were right."""
    return sum(rights) / max(1, sum(len(m.test) for m in members))
