"""What a board tells of itself before it is given a task."""

from __future__ import annotations

import struct
from binascii import crc32
from dataclasses import dataclass, field

from ulearn import task as wire
from ulearn_host.errors import UserError

BATTERY_UNKNOWN = 255
CLASSES_LARGEST = 4096
BYTES_LARGEST = wire.FACTS_BYTES + 2 * CLASSES_LARGEST + 4
_HISTOGRAM = 1


@dataclass(frozen=True)
class BoardFacts:
    """A board's report on itself. samples, held_out: how many it learns from and is tested on. step_us: microseconds of
    a training step, link: bytes a second, both 0 where not measured. battery: percent, 255 unknown. histogram: samples
    of each label where its owner lets it tell."""

    model_id: bytes
    base_id: bytes
    samples: int
    held_out: int = 0
    step_us: int = 0
    link: int = 0
    battery: int = BATTERY_UNKNOWN
    histogram: tuple[int, ...] | None = field(default=None)


def parse(data: bytes) -> BoardFacts:
    """The bytes of task.facts. Raises UserError naming the fault."""
    if not wire.FACTS_BYTES + 4 <= len(data) <= BYTES_LARGEST:
        raise UserError(f"facts: {len(data)} bytes, expected {wire.FACTS_BYTES + 4} to {BYTES_LARGEST}")
    magic, version, flags, battery, zero, model_id, base_id, samples, held_out, step_us, link, classes = (
        struct.unpack_from(wire.FACTS, data)
    )
    if magic != wire.FACTS_MAGIC:
        raise UserError("facts: they do not begin with 'uLBF', expected what a board tells of itself")
    if struct.unpack_from("<I", data, len(data) - 4)[0] != crc32(data[:-4]):
        raise UserError("facts: damaged: their checksum does not match; ask the board again")
    if version != wire.VERSION or flags & ~_HISTOGRAM or zero:
        raise UserError(f"facts: version {version}, flags {flags}, expected version {wire.VERSION}; deploy ulearn anew")
    if len(data) != wire.FACTS_BYTES + 2 * classes + 4 or bool(classes) != bool(flags & _HISTOGRAM):
        raise UserError(f"facts: {len(data)} bytes with a histogram of {classes} labels, which do not fit together")
    if battery > 100 and battery != BATTERY_UNKNOWN:
        raise UserError(f"facts: a battery of {battery} %, expected 0 to 100, or {BATTERY_UNKNOWN} where unknown")
    counts = struct.unpack_from(f"<{classes}H", data, wire.FACTS_BYTES) if classes else None
    if counts is not None and sum(counts) != samples:
        raise UserError(f"facts: a histogram of {sum(counts)} samples, expected {samples}")
    return BoardFacts(model_id, base_id, samples, held_out, step_us, link, battery, counts)


def pack(facts: BoardFacts) -> bytes:
    """The same as bytes, as a board would send them."""
    counts = facts.histogram or ()
    head = struct.pack(
        wire.FACTS,
        *(wire.FACTS_MAGIC, wire.VERSION, _HISTOGRAM if counts else 0, facts.battery, 0),
        *(facts.model_id, facts.base_id, facts.samples, facts.held_out, facts.step_us, facts.link, len(counts)),
    )
    body = head + struct.pack(f"<{len(counts)}H", *counts)
    return body + struct.pack("<I", crc32(body))
