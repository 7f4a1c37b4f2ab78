"""Aggregation of updates: pure functions on integer arrays. An int64 sum and one rounding, so that neither the order
nor the place of summing changes a bit."""

from __future__ import annotations

import struct
from binascii import crc32
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulearn import update as wire
from ulearn_host import numbers as n
from ulearn_host.rule_names import Combine

SAMPLES_MAX = 2**31  # of 32-bit differences: their weighted sum stays within 63 bits


@dataclass(frozen=True)
class Update:
    """A parsed update. values: int64, one a trainable number in canonical order, in units of the stored integers."""

    model_id: bytes
    base_id: bytes
    num_samples: int
    values: NDArray[np.int64]
    saturated: int = 0


def _spans(table: bytes) -> list[tuple[int, int]]:
    """(dtype, number of values) of each trainable tensor in order."""
    return [(dtype, count) for dtype, count, _ in wire.tensors(table)]


def decode(data: bytes, table: bytes) -> Update:
    """An update's bytes, checked against a model's tensor table. Raises ValueError naming the fault."""
    model_id, base_id, samples, saturated = wire.parse(data, table)
    parts, at = [], wire.HEADER_BYTES
    for dtype, count in _spans(table):
        kind = "<i4" if dtype == n.DTYPE_INT32 else "<i2"
        parts.append(np.frombuffer(data, kind, count, at).astype(np.int64))
        at += count * np.dtype(kind).itemsize
    return Update(model_id, base_id, samples, np.concatenate(parts), saturated)


def encode(update: Update, table: bytes) -> bytes:
    """The bytes of an update, dense. Differences beyond int16 (weights) or int32 (biases) saturate and are counted."""
    parts, at, saturated = [], 0, 0
    for dtype, count in _spans(table):
        kind, limit = ("<i4", 2**31 - 1) if dtype == n.DTYPE_INT32 else ("<i2", 32767)
        values = update.values[at : at + count]
        cut = np.clip(values, -limit, limit)
        saturated += int(np.count_nonzero(cut != values))
        parts.append(cut.astype(kind).tobytes())
        at += count
    payload = b"".join(parts)
    size = wire.HEADER_BYTES + len(payload) + 4
    head = struct.pack(
        wire.HEADER,
        *(wire.MAGIC, wire.VERSION, wire.DENSE, size, update.model_id, update.base_id),
        *(update.num_samples, len(update.values), saturated, 16, 32, 0),
    )
    return head + payload + struct.pack("<I", crc32(head + payload))


def divide(total: NDArray[np.int64], weight: int) -> NDArray[np.int64]:
    """total / weight, rounded to nearest, halves away from zero: the one rounding of an aggregation."""
    quotient, rest = np.divmod(np.abs(total), weight)
    rounded: NDArray[np.int64] = np.sign(total) * (quotient + (rest >= weight - rest))
    return rounded


def fedavg(updates: Sequence[Update]) -> Update:
    """Federated averaging (McMahan et al. 2017, algorithm 1): the mean of the updates weighted by sample counts.

    All must be counted from the same base of the same model. Raises ValueError otherwise, or when no sample counts.
    """
    first, samples = _common(updates)
    total = weighted_sum((u.values, u.num_samples) for u in updates)
    return Update(first.model_id, first.base_id, samples, divide(total, samples))


def combined(updates: Sequence[Update], rule: Combine, steps: NDArray[np.float64]) -> Update:
    """Another rule than the mean (rule_names.parse): in real units, since distances and norms are of these.

    Args:
        updates: as for fedavg.
        rule: (differences [clients, values], sample counts [clients]) to the fleet's difference [values].
        steps: what one unit of each stored integer is, [values].

    Raises:
        ValueError: as fedavg; UserError: the rule has too few clients, or the difference is no number.
    """
    first, samples = _common(updates)
    real = rule(np.stack([u.values * steps for u in updates]), np.array([u.num_samples for u in updates], np.float64))
    units = real / steps
    values = (np.sign(units) * np.floor(np.abs(units) + 0.5)).astype(np.int64)  # halves away from zero, as `divide`
    return Update(first.model_id, first.base_id, samples, values)


def _common(updates: Sequence[Update]) -> tuple[Update, int]:
    """The first update, and the samples of all. Raises ValueError unless they fit together."""
    if not updates:
        raise ValueError("no update to average")
    first = updates[0]
    if any((u.model_id, u.base_id) != (first.model_id, first.base_id) for u in updates):
        raise ValueError("updates of different models or bases cannot be averaged")
    samples = sum(u.num_samples for u in updates)
    if not samples:
        raise ValueError("the updates count no sample")
    if samples >= SAMPLES_MAX:
        raise ValueError(f"the updates count {samples} samples, the exact sum holds fewer than {SAMPLES_MAX}")
    return first, samples


def weighted_sum(parts: Iterable[tuple[NDArray[Any], int]]) -> NDArray[np.int64]:
    """sum of values * weight in int64: what a gateway passes up."""
    total: NDArray[np.int64] | None = None
    for values, weight in parts:
        product = values.astype(np.int64) * weight
        total = product if total is None else total + product
    assert total is not None
    return total
