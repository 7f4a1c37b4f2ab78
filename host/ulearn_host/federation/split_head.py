"""The part of a network above a cut, trained on activations: by the board's own integer code, or in float."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ulearn
from ulearn import plan as plan_file
from ulearn_host import aggregate, records
from ulearn_host import numbers as n
from ulearn_host.errors import UserError
from ulearn_host.federation.job import Job
from ulearn_host.federation.split import Features, parse, together
from ulearn_host.fleet import PlanFacts


@dataclass(frozen=True)
class Upper:
    """What of a training program is run on activations: `count` records from `first` on; they lie at [at, at + size) of
    the arena, with the quantisation (scale, zero). tensors: offsets in TRAIN of what it updates."""

    program: int
    first: int
    count: int
    at: int
    size: int
    scale: float
    zero: int
    tensors: tuple[int, ...]


@dataclass(frozen=True)
class Training:
    """How the host trains. learning_rate: None: the one that the plan starts with; halved every `halve_every` epochs;
    skip: as a board's Trainer has it."""

    epochs: int = 48
    learning_rate: float | None = None
    halve_every: int = 16
    seed: int = 1
    skip: float = 1 / 16


def upper(plan: PlanFacts, cut: int = 0) -> Upper:
    """The part above the cut that is `cut` before the plan's last one.

    Raises UserError where the plan has no such cut, nothing above it trains, or what lies above also reads activations
    from below, as across a residual connection.
    """
    read = plan_file.read(str(plan.path))
    kinds = (n.SECTION_IO, n.SECTION_TENSORS, n.SECTION_CUTS, n.SECTION_TRAIN, n.SECTION_STATE)
    io, tensors, cuts, train, state = (bytes(read.section(kind)) for kind in kinds)
    place = len(cuts) - n.CUT_BYTES * (cut + 1)
    if place < 0 or cut < 0:
        raise UserError(f"{plan.path}: cut {cut} from the end, it has {len(cuts) // n.CUT_BYTES}")
    frozen = len(read.section(n.SECTION_FROZEN))
    decoded = records.read(read, (io, tensors, cuts, frozen, train, state))
    below = struct.unpack_from("<H", cuts, place + n.C_RECORD)[0]
    scale, zero = struct.unpack_from("<fi", cuts, place + n.C_SCALE)
    found = []
    trainings = [p for p, kind in zip(decoded, map(_kind, read.programs), strict=True) if kind == n.KIND_TRAIN]
    for number, program in enumerate(trainings):
        span = _span(program, below)
        if span is not None:
            found.append(Upper(number, *span[:4], scale, zero, span[4]))
    if not found:
        raise UserError(
            f"{plan.path}: what lies above cut {cut} from the end cannot be trained by itself; expected a plan that "
            f"trains its last layer, prepared without --recompute, and a cut that no connection passes by"
        )
    return max(found, key=lambda part: len(part.tensors))


def _kind(program: bytes) -> int:
    return program[n.P_KIND]


def _span(program: Sequence[records.Record], below: int) -> tuple[int, int, int, int, tuple[int, ...]] | None:
    """(first, count, at, size, tensors) of what runs above the first `below` forward records; None where it cannot."""
    forward = [i for i, r in enumerate(program) if not r.backward and r.kind != n.OP_MASK]
    if not 0 < below < len(forward):
        return None
    written = next((use for use in program[forward[below - 1]].uses if use.written), None)
    if written is None or written.buffer != n.BUF_ARENA:
        return None
    first = forward[below]
    parameters = {use.start for i in forward[below:] for use in program[i].of(n.BUF_TRAIN)}
    updates = [i for i, r in enumerate(program) if r.updates and r.of(n.BUF_TRAIN)[0].start in parameters]
    if not updates:
        return None
    tensors = tuple(program[i].of(n.BUF_TRAIN)[0].start for i in updates)
    last = max(updates)
    if sum(r.updates for r in program[first : last + 1]) != len(updates):
        return None  # what lies below would change under the activations
    known = np.zeros(max(use.end for r in program for use in r.of(n.BUF_ARENA)), bool)
    known[written.start : written.end] = True
    for record in program[first : last + 1]:
        for use in record.uses:
            inside = known[use.start : use.end] if use.buffer == n.BUF_ARENA else None
            if use.buffer == n.BUF_INPUT or (inside is not None and not use.written and not inside.all()):
                return None
        for use in record.of(n.BUF_ARENA):
            if use.written:
                known[use.start : use.end] = True
    return first, last + 1 - first, written.start, written.end - written.start, tensors


class _Trainer(ulearn.Trainer):  # type: ignore[misc]  # the board's code has no types
    """A board's trainer whose samples are activations: a step begins above the cut."""

    def __init__(self, model: Any, part: Upper, how: Training) -> None:
        super().__init__(model, how.learning_rate, how.seed, how.skip)
        self.part, self.training = part, self.programs[part.program][0]
        model.table[n.BUF_INPUT] = bytes(model.input_bytes)  # which must be there, though nothing reads it

    def step_of(self, samples: Any, index: int, program: int = 0) -> int:
        model, part = self.model, self.part
        model.arena[part.at : part.at + part.size] = samples[0][index].tobytes()
        model.table[n.BUF_TARGET] = samples[1][index].tobytes()
        code = model.executor.run(self.training, model.table, part.first, part.count)
        if code < 0:
            model.fail(code)
        return int(struct.unpack_from("<i", model.state, n.S_LOSS)[0])


def train(plan: PlanFacts, base: bytes, answers: Sequence[Features], how: Training | None = None) -> bytes:
    """An update from `base` (the trainable blob) by a board's own steps on activations: to the bit what a board would
    come to that trained this part alone on the same samples.

    Raises UserError where the answers are not of this base, or the plan has no such part.
    """
    how = how or Training()
    x, y, part, model = _begin(plan, base, answers)
    _Trainer(model, part, how).fit((x, y), how.epochs, halve_every=how.halve_every)
    return bytes(model.update(len(x)))


def _begin(
    plan: PlanFacts, base: bytes, answers: Sequence[Features]
) -> tuple[NDArray[np.int8], NDArray[Any], Upper, Any]:
    x, y = together(answers)
    part = upper(plan, answers[0].cut)
    model = ulearn.load(plan.with_weights(base))
    if answers[0].base_id != model.base_id:
        raise UserError("features of another base than the host's; ask the boards again")
    if x.shape[1] != part.size:
        raise UserError(f"features of {x.shape[1]} numbers, expected {part.size}")
    return x, y, part, model


def whole(base: bytes, bodies: Sequence[bytes], job: Job, plan: PlanFacts) -> aggregate.Update:
    """The fleet's update of a round of a split job: from all boards' answers, in order of their names. The host trains
    with the job's epochs, rate, seed and skip; the rate is halved twice. Raises UserError as `train`."""
    how = Training(job.epochs, job.learning_rate, -(-job.epochs // 3), job.seed, job.skip)
    return aggregate.decode(train(plan, base, [parse(body, plan) for body in bodies], how), plan.table)


def train_float(
    plan: PlanFacts, base: bytes, answers: Sequence[Features], decay: float = 1e-3, iterations: int = 300
) -> bytes:
    """The same in float: softmax regression from the base on, quantised at the end.

    Minimises the mean cross-entropy + decay · ‖w − w_base‖² by Nesterov's accelerated gradient (1983), its step the
    inverse of Böhning's bound (1992) of the curvature. Raises UserError as `train`, and where what lies above the cut
    is not one dense layer before a softmax, all of whose weights and biases train.
    """
    x, y, part, model = _begin(plan, base, answers)
    spans = _spans(plan.table, part.tensors)
    if not plan.labelled or len(spans) != 2 or spans[0][2] != plan.outputs * part.size or spans[1][2] != plan.outputs:
        raise UserError(
            f"{plan.path}: training in float is for one dense layer behind a softmax, weights and biases; leave it out"
        )
    values = np.concatenate([np.frombuffer(base, kind, count, at) for kind, at, count in _all_spans(plan.table)])
    real = values * plan.steps
    (w_at, _, w_count), (b_at, _, b_count) = spans
    inputs = (x.astype(np.float64) - part.zero) * part.scale
    start = np.column_stack([real[w_at : w_at + w_count].reshape(plan.outputs, -1), real[b_at : b_at + b_count]])
    found = _softmax_regression(np.column_stack([inputs, np.ones(len(x))]), y, start, decay, iterations)
    real[w_at : w_at + w_count], real[b_at : b_at + b_count] = found[:, :-1].ravel(), found[:, -1]
    difference = np.rint(real / plan.steps).astype(np.int64) - values
    return aggregate.encode(aggregate.Update(plan.model_id, model.base_id, len(x), difference), plan.table)


def _all_spans(table: bytes) -> list[tuple[str, int, int]]:
    """(numpy's type, offset in TRAIN, numbers) of every trainable tensor."""
    kinds = {n.DTYPE_INT8: "<i1", n.DTYPE_INT16: "<i2", n.DTYPE_INT32: "<i4"}
    result = []
    for at in range(0, len(table), n.TENSOR_BYTES):
        *shape, offset = struct.unpack_from("<4HI", table, at + n.T_SHAPE)
        result.append((kinds[table[at + n.T_DTYPE]], offset, int(np.prod(shape))))
    return result


def _spans(table: bytes, tensors: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first number in canonical order, offset in TRAIN, numbers) of the tensors at these offsets."""
    result, first = [], 0
    for _, offset, count in _all_spans(table):
        if offset in tensors:
            result.append((first, offset, count))
        first += count
    return result


def _softmax_regression(
    x: NDArray[np.float64], y: NDArray[Any], start: NDArray[np.float64], decay: float, iterations: int
) -> NDArray[np.float64]:
    """Weights [classes, numbers] from x [samples, numbers], labels y and the weights to start from and stay near."""
    wanted = np.eye(len(start))[y]
    step = 1 / (0.5 * np.linalg.norm(x, 2) ** 2 / len(x) + 2 * decay)
    w = ahead = start
    for i in range(iterations):
        z = x @ ahead.T
        p = np.exp(z - z.max(axis=1, keepdims=True))
        gradient = (p / p.sum(axis=1, keepdims=True) - wanted).T @ x / len(x) + 2 * decay * (ahead - start)
        fresh = ahead - step * gradient
        ahead, w = fresh + i / (i + 3) * (fresh - w), fresh
    return w
