"""Aggregation of updates: pure functions on integer arrays. An int64 sum and one rounding, so that neither the order
nor the place of summing changes a bit."""

from __future__ import annotations

import struct
from binascii import crc32
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulearn import encodings, personal
from ulearn import plan as plan_file
from ulearn import update as wire
from ulearn_host import numbers as n
from ulearn_host.rule_names import Combine

SAMPLES_MAX = 2**31  # of 32-bit differences: their weighted sum stays within 63 bits


ENCODINGS = {"dense": wire.DENSE, "int8": encodings.INT8, "random-k": encodings.RANDOM_K, "top-k": encodings.TOP_K}
_DOWN = ("dense", "int8", "sparse")
_SHUT: int = wire.HEADER_BYTES + 4  # bytes around a payload


@dataclass(frozen=True)
class Update:
    """A parsed update. values: int64, one a trainable number in canonical order, in units of the stored integers; 0
    where nothing was sent. tensors: it is about so many of the first ones alone, and says nothing of the rest; 0: all.
    """

    model_id: bytes
    base_id: bytes
    num_samples: int
    values: NDArray[np.int64]
    saturated: int = 0
    tensors: int = 0


def _spans(table: bytes) -> list[tuple[int, int]]:
    """(dtype, number of values) of each trainable tensor in order."""
    return [(dtype, count) for dtype, count, _ in wire.tensors(table)]


def _first(table: bytes, tensors: int) -> bytes:
    """The table's part that an update is about."""
    return table[: tensors * n.TENSOR_BYTES] if tensors else table


def _count(table: bytes) -> int:
    """How many values its tensors have."""
    return sum(count for _, count in _spans(table))


def shared_tensors(path: Path) -> int:
    """How many tensors of a plan's table are shared where each board keeps its last layer: Update.tensors.

    Raises ValueError where the plan trains nothing but its last layer, or all but it, or is no plan.
    """
    plan = plan_file.read(str(path))
    forward = next(p for p in plan.programs if p[n.P_KIND] == n.KIND_FORWARD)
    return len(personal.shared(bytes(plan.section(n.SECTION_TENSORS)), forward)) // n.TENSOR_BYTES


def update_bytes(table: bytes, encoding: str, kept: int = 0, tensors: int = 0) -> int:
    """How long an update up is at most, in bytes.

    Args:
        table: the plan's tensor table.
        encoding: one of ENCODINGS.
        kept: how many values a sparse one holds.
        tensors: it is about so many of the first ones; 0: all.
    """
    table = _first(table, tensors)
    count, head = _count(table), _SHUT + len(table) // n.TENSOR_BYTES
    if encoding == "dense":
        return _SHUT + sum(size * (4 if dtype == n.DTYPE_INT32 else 2) for dtype, size in _spans(table))
    if encoding == "int8":
        return head + count
    kept = min(kept, count)
    if encoding == "random-k":
        return head + 8 + kept
    # A gap takes a byte more from 128 places on, and another from 128 * 128 on.
    return head + 2 * kept + sum(min(kept, (count - kept) >> bits) for bits in (7, 14, 21))


def most_kept(table: bytes, encoding: str, limit: int, tensors: int = 0) -> int:
    """The most values of a sparse encoding with which no update is longer than `limit` bytes; 0 where none fits."""
    most = _count(_first(table, tensors))
    return bisect_right(range(1, most + 1), limit, key=lambda kept: update_bytes(table, encoding, kept, tensors))


def decode(data: bytes, table: bytes, tensors: int | None = None) -> Update:
    """An update's bytes in any encoding, checked against a model's tensor table.

    tensors: what Update.tensors has to be, where that is known. Raises ValueError naming the fault.
    """
    model_id, base_id, samples, saturated = wire.parse(data, table)
    encoding, about = struct.unpack_from("<H", data, 6)[0], struct.unpack_from("<I", data, wire.HEADER_BYTES - 4)[0]
    if tensors is not None and about != tensors:
        raise ValueError(f"update: of {about or 'all'} tensors, expected {tensors or 'all'}")
    values = np.zeros(_count(table), np.int64)
    covered = _first(table, about)
    if encoding in (wire.DENSE, encodings.INT8):
        every = _dense(data, covered) if encoding == wire.DENSE else _int8(data, covered)
        values[: len(every)] = every
    else:
        for place, change in encodings.changes(data, covered):
            values[place] = change
    return Update(model_id, base_id, samples, values, saturated, about)


def _dense(data: bytes, table: bytes) -> NDArray[np.int64]:
    parts, at = [], wire.HEADER_BYTES
    for dtype, count in _spans(table):
        kind = "<i4" if dtype == n.DTYPE_INT32 else "<i2"
        parts.append(np.frombuffer(data, kind, count, at).astype(np.int64))
        at += count * np.dtype(kind).itemsize
    return np.concatenate(parts)


def _int8(data: bytes, table: bytes) -> NDArray[np.int64]:
    spans = _spans(table)
    shifts = np.frombuffer(data, np.uint8, len(spans), wire.HEADER_BYTES)
    codes = np.frombuffer(data, np.int8, _count(table), wire.HEADER_BYTES + len(spans))
    scaled: NDArray[np.int64] = codes.astype(np.int64) << np.repeat(shifts, [count for _, count in spans])
    return scaled


def encode(update: Update, table: bytes, encoding: str = "dense") -> bytes:
    """The bytes of an update for the way down to the boards. Raises ValueError for an unknown encoding.

    dense: differences beyond int16 (weights) or int32 (biases) saturate and are counted. int8: codes times a power of
    two, one for each tensor. sparse: as dense, but only the places that change; where that is no shorter, dense.
    """
    if encoding not in _DOWN:
        raise ValueError(f"encoding '{encoding}', expected one of {', '.join(_DOWN)}")
    covered = _first(table, update.tensors)
    values, saturated = _limited(update.values, covered)
    if encoding == "int8":
        payload, changed = _int8_payload(values, covered), len(values)
        return _sealed(update, encodings.INT8, payload, changed, saturated)
    if encoding == "sparse":
        payload, changed = _sparse_payload(values), int(np.count_nonzero(values))
        if len(payload) < len(_dense_payload(values, covered)):
            return _sealed(update, encodings.SPARSE, payload, changed, saturated)
    return _sealed(update, wire.DENSE, _dense_payload(values, covered), len(values), saturated)


def encode_down(
    update: Update, table: bytes, encoding: str = "dense", residual: NDArray[np.int64] | None = None
) -> tuple[bytes, Update, NDArray[np.int64]]:
    """What the fleet is told of a round, and what is left for later rounds (Tang et al. 2019, DoubleSqueeze).

    Args:
        update: the fleet's difference, exact.
        table: the plan's tensor table.
        encoding: as for `encode`.
        residual: what earlier rounds left out, [values]; None: nothing.

    Returns:
        The bytes; the update as every board decodes it, which the host has to apply as well; the new residual.
    """
    whole = update if residual is None else replace(update, values=update.values + residual)
    data = encode(whole, table, encoding)
    told = decode(data, table)
    return data, told, whole.values - told.values


def _limited(values: NDArray[np.int64], table: bytes) -> tuple[NDArray[np.int64], int]:
    """The values of a table's tensors, cut to what a difference may be; how many were."""
    spans = _spans(table)
    limits = np.repeat([2**31 - 1 if dtype == n.DTYPE_INT32 else 32767 for dtype, _ in spans], [c for _, c in spans])
    values = values[: len(limits)]
    cut: NDArray[np.int64] = np.clip(values, -limits, limits)
    return cut, int(np.count_nonzero(cut != values))


def _dense_payload(values: NDArray[np.int64], table: bytes) -> bytes:
    parts, at = [], 0
    for dtype, count in _spans(table):
        parts.append(values[at : at + count].astype("<i4" if dtype == n.DTYPE_INT32 else "<i2").tobytes())
        at += count
    return b"".join(parts)


def _int8_payload(values: NDArray[np.int64], table: bytes) -> bytes:
    shifts, parts, at = [], [], 0
    for dtype, count in _spans(table):
        part = values[at : at + count]
        size = np.abs(part)
        shift = encodings.shift_of(int(size.max(initial=0)), dtype)
        codes = np.sign(part) * np.minimum(size + (1 << shift >> 1) >> shift, 127)
        shifts.append(shift)
        parts.append(codes.astype(np.int8).tobytes())
        at += count
    return bytes(shifts) + b"".join(parts)


def _sparse_payload(values: NDArray[np.int64]) -> bytes:
    out, last = bytearray(), -1
    for place in np.flatnonzero(values):
        value = int(values[place])
        encodings.put_groups(out, int(place) - last - 1)
        encodings.put_groups(out, abs(value) << 1 | (value < 0))
        last = int(place)
    return bytes(out)


def _sealed(update: Update, encoding: int, payload: bytes, values: int, saturated: int) -> bytes:
    head = struct.pack(
        wire.HEADER,
        *(wire.MAGIC, wire.VERSION, encoding, _SHUT + len(payload), update.model_id, update.base_id),
        *(update.num_samples, values, saturated, 16, 32, update.tensors),
    )
    return head + payload + struct.pack("<I", crc32(head + payload))


def divide(total: NDArray[np.int64], weight: int) -> NDArray[np.int64]:
    """total / weight, rounded to nearest, halves away from zero: the one rounding of an aggregation."""
    quotient, rest = np.divmod(np.abs(total), weight)
    rounded: NDArray[np.int64] = np.sign(total) * (quotient + (rest >= weight - rest))
    return rounded


def fedavg(updates: Sequence[Update]) -> Update:
    """Federated averaging (McMahan et al. 2017, algorithm 1): the mean of the updates weighted by sample counts.

    All must be counted from the same base of the same model, and be about the same tensors. Raises ValueError
    otherwise, or when no sample counts.
    """
    first, samples = _common(updates)
    total = weighted_sum((u.values, u.num_samples) for u in updates)
    return Update(first.model_id, first.base_id, samples, divide(total, samples), tensors=first.tensors)


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
    return Update(first.model_id, first.base_id, samples, values, tensors=first.tensors)


def _common(updates: Sequence[Update]) -> tuple[Update, int]:
    """The first update, and the samples of all. Raises ValueError unless they fit together."""
    if not updates:
        raise ValueError("no update to average")
    first = updates[0]
    if any((u.model_id, u.base_id) != (first.model_id, first.base_id) for u in updates):
        raise ValueError("updates of different models or bases cannot be averaged")
    if any(u.tensors != first.tensors for u in updates):
        raise ValueError("updates of all layers and updates without the last one cannot be averaged")
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
