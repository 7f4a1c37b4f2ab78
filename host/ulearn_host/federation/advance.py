"""From a base and the updates of a round to the next base: one pure function, for a commit as for its replay.

The next base is what `update.add` makes of the base and the difference that goes down, on the host as on every board:
all end a round with the same bits, saturation and quantisation of the difference included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ulearn import checkpoint
from ulearn import update as wire
from ulearn_host import aggregate, momentum, rule_names, rules
from ulearn_host.aggregate import Update
from ulearn_host.errors import UserError
from ulearn_host.federation import split, split_head
from ulearn_host.federation.job import Job, server_step
from ulearn_host.fleet import PlanFacts
from ulearn_host.rules import Vector


@dataclass(frozen=True, eq=False)
class Contribution:
    """One board's part in a commit. samples: what it counts for; quality: a factor; stale: commits since its base."""

    board: str
    body: bytes
    samples: int
    quality: float = 1.0
    stale: int = 0


@dataclass(frozen=True, eq=False)
class Held:
    """What the host holds from round to round. state: float64, the server step's vectors one after the other, empty
    where it has none. residual: int64 [values], what the encoding of the way down has left out so far; empty likewise.
    """

    state: Vector
    residual: NDArray[np.int64]

    def pack(self) -> tuple[bytes, bytes]:
        """Both as little-endian bytes."""
        return self.state.astype("<f8").tobytes(), self.residual.astype("<i8").tobytes()

    @classmethod
    def unpack(cls, state: bytes, residual: bytes) -> Held:
        """The same from bytes."""
        return cls(np.frombuffer(state, "<f8").copy(), np.frombuffer(residual, "<i8").copy())


@dataclass(frozen=True, eq=False)
class Advanced:
    """The next base, its blob and id; the difference that leads there, as it goes down; what the host holds."""

    blob: bytes
    base_id: bytes
    difference: bytes
    held: Held


def start(job: Job, facts: PlanFacts) -> Held:
    """Before the first round."""
    values = len(facts.steps)
    name, numbers = server_step(job.server)
    state: Vector = np.zeros(0)
    if name == "momentum":
        state = momentum.momentum_start(values).velocity
    elif name == "adam":
        first = momentum.adam_start(values, *numbers[1:])
        state = np.concatenate([first.first, first.second])
    return Held(state, np.zeros(values if job.down == "int8" else 0, np.int64))


def advance(base: bytes, parts: Sequence[Contribution], held: Held, job: Job, facts: PlanFacts) -> Advanced:
    """One commit. base: the trainable blob that the boards began with.

    The order of the parts changes no bit. Raises UserError or ValueError where the rule cannot work with these updates:
    too few for it, or of no weight.
    """
    parts = sorted(parts, key=lambda part: part.board)
    if job.split:
        return down(base, split_head.whole(base, [part.body for part in parts], job, facts), held, job, facts)
    current = checkpoint.identity(facts.model_id, base)
    # Of an older base it is as good as a gradient: a difference is added to the base of now.
    updates = [
        replace(aggregate.decode(part.body, facts.table), num_samples=part.samples, base_id=current) for part in parts
    ]
    whole, state = _whole(updates, _weights(parts, job), held, job, facts)
    return down(base, whole, replace(held, state=state), job, facts)


def decoded(body: bytes, job: Job, facts: PlanFacts, tensors: int | None = None) -> Update:
    """What a board has sent, checked. Of activations, which are no update, it has no values. Raises UserError or
    ValueError naming the fault."""
    if not job.split:
        return aggregate.decode(body, facts.table, tensors)
    sent = split.parse(body, facts)
    return Update(sent.model_id, sent.base_id, sent.samples, np.zeros(0, np.int64))


def _weights(parts: Sequence[Contribution], job: Job) -> Vector | None:
    """What each part counts, where that is more than its samples."""
    if not job.quality and not any(part.stale for part in parts):
        return None
    quality = [part.quality for part in parts] if job.quality else None
    return rules.client_weights(
        [part.samples for part in parts], quality, [part.stale for part in parts], job.stale_exponent
    )


def _whole(
    updates: Sequence[Update], weights: Vector | None, held: Held, job: Job, facts: PlanFacts
) -> tuple[Update, Vector]:
    """The fleet's update by the job's rule and server step, and the server's state after it."""
    name, numbers = server_step(job.server)
    if job.rule == "mean" and name == "none" and weights is None:
        return aggregate.fedavg(updates), held.state
    rule, after = rule_names.parse(job.rule), [held.state]

    def combine(rows: ArrayLike, samples: ArrayLike) -> Vector:
        step, after[0] = _step(name, numbers, held.state, rule(rows, samples if weights is None else weights))
        return step

    return aggregate.combined(updates, combine, facts.steps), after[0]


def _step(name: str, numbers: tuple[float, ...], state: Vector, mean: Vector) -> tuple[Vector, Vector]:
    """The server's step for a mean, in real units, and its state after it."""
    if name == "momentum":
        beta, speed = (*numbers, 1.0)[:2]
        step, moving = momentum.fedavgm(momentum.Momentum(state), mean, speed, beta)
        return step, moving.velocity
    if name == "adam":
        speed, tau = (*numbers, 1e-3)[:2]
        first, second = np.split(state, 2)
        step, moments = momentum.fedadam(momentum.Adam(first, second), mean, speed, tau=tau)
        return step, np.concatenate([moments.first, moments.second])
    return mean, state


def down(base: bytes, whole: Update, held: Held, job: Job, facts: PlanFacts) -> Advanced:
    """The difference as it goes down, and the base that it leads to."""
    residual = held.residual
    if job.down == "int8":
        # What a weight at the end of its range cannot take is gone: kept, it would pile up for ever.
        difference, _, residual = aggregate.encode_down(whole, facts.table, "int8", residual)
    else:
        difference = aggregate.encode(whole, facts.table, "sparse")
    blob = added(base, difference, facts)
    return Advanced(blob, checkpoint.identity(facts.model_id, blob), difference, replace(held, residual=residual))


def added(base: bytes, difference: bytes, facts: PlanFacts) -> bytes:
    """The blob that a board has after applying a difference to a base, by the board's own code."""
    blob = bytearray(base)
    wire.add(blob, difference, facts.table)
    return bytes(blob)


def first_blob(facts: PlanFacts) -> bytes:
    """The trainable blob of the plan itself. Raises UserError where it has none."""
    at, size = facts.train_place
    if not size:
        raise UserError(f"{facts.path}: nothing in this plan trains; prepare it with a scheme")
    with open(facts.path, "rb") as file:
        file.seek(at)
        return file.read(size)
