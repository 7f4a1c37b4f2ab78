"""What passes between hosts of one fleet: an ask down, an answer up. A header in JSON, then bytes that it tells of.

What goes up is the sum of value · samples as int64 and the count of samples: whoever adds sums and divides once ends at
the bits of one host that has all boards (aggregate.weighted_sum, aggregate.divide). Rules that must see every update
get the updates themselves.
"""

from __future__ import annotations

import json
import struct
from binascii import crc32
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ulearn_host.errors import UserError
from ulearn_host.federation.advance import Contribution

HEAD_LARGEST = 1 << 24
_FRAME = struct.Struct("<4sII")  # magic, bytes of the header, CRC-32 of all that follows
_ASK, _ANSWER = b"uLG?", b"uLG!"
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Ask:
    """What a gateway is asked for. base: the trainable blob that the round begins with. counted: of each gateway the
    last round whose commit took its answer. updates: they are wanted one by one, not as a sum. done: there is no round;
    base is what the job ended with."""

    job: int
    round: int
    model_id: bytes
    base: bytes
    counted: Mapping[str, int]
    updates: bool = False
    done: bool = False

    def pack(self) -> bytes:
        """As bytes."""
        head = {"job": self.job, "round": self.round, "model": self.model_id.hex(), "counted": dict(self.counted)}
        return _pack(_ASK, head | {"updates": self.updates, "done": self.done}, [self.base])

    @classmethod
    def unpack(cls, data: bytes) -> Ask:
        """The same from bytes. Raises UserError naming the fault."""
        head, (base,) = _unpack(_ASK, data, 1)
        return _made(
            lambda: cls(
                *(_whole(head["job"]), _whole(head["round"]), bytes.fromhex(head["model"]), base),
                {str(name): _whole(turn) for name, turn in head["counted"].items()},
                *(bool(head["updates"]), bool(head["done"])),
            )
        )


@dataclass(frozen=True, eq=False)
class Answer:
    """What a gateway has collected. boards: whose updates are in it; samples: how many they count for; total: int64
    [values], the sum of value · samples, or None where parts holds the updates themselves. reason: why there is
    nothing."""

    job: int
    round: int
    gateway: str
    base_id: bytes
    boards: Sequence[str]
    samples: int
    total: NDArray[np.int64] | None
    parts: Sequence[Contribution] = ()
    reason: str = ""

    def pack(self) -> bytes:
        """As bytes."""
        head = {"job": self.job, "round": self.round, "gateway": self.gateway, "base": self.base_id.hex()}
        head |= {
            "boards": list(self.boards),
            "samples": self.samples,
            "sum": self.total is not None,
            "reason": self.reason,
        }
        head["parts"] = [[part.board, part.samples, part.quality, part.stale] for part in self.parts]
        bodies = [part.body for part in self.parts]
        return _pack(_ANSWER, head, bodies if self.total is None else [self.total.astype("<i8").tobytes(), *bodies])

    @classmethod
    def unpack(cls, data: bytes) -> Answer:
        """The same from bytes. Raises UserError naming the fault."""
        head, bodies = _unpack(_ANSWER, data)
        return _made(lambda: cls._read(head, bodies))

    @classmethod
    def _read(cls, head: Mapping[str, Any], bodies: Sequence[bytes]) -> Answer:
        total = np.frombuffer(bodies[0], "<i8").astype(np.int64) if head["sum"] else None
        rows, bodies = head["parts"], bodies[1:] if head["sum"] else bodies
        parts = [
            Contribution(_words(board), body, _whole(samples), _factor(quality), _whole(stale))
            for (board, samples, quality, stale), body in zip(rows, bodies, strict=True)
        ]
        names = [_words(board) for board in head["boards"]]
        ids = (_whole(head["job"]), _whole(head["round"]), _words(head["gateway"]), bytes.fromhex(head["base"]))
        return cls(*ids, names, _whole(head["samples"]), total, parts, _words(head["reason"]))


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def _words(value: Any) -> str:
    """Text that can be written down: JSON knows halves of characters."""
    return str(value).encode("utf-8", "replace").decode()


def _factor(value: Any) -> float:
    if not 0 <= float(value) <= 1e6:
        raise ValueError(f"{value!r} is no factor of 0 to 1000000")
    return float(value)


def _made(make: Callable[[], T]) -> T:
    """What a header says, or one sentence on why it says nothing."""
    try:
        return make()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as fault:
        raise UserError(f"message between hosts: {fault!r}; expected one of this version of ulearn") from None


def _pack(magic: bytes, head: Mapping[str, Any], bodies: Sequence[bytes]) -> bytes:
    text = json.dumps({**head, "bytes": [len(body) for body in bodies]}).encode()
    rest = b"".join([text, *bodies])
    return _FRAME.pack(magic, len(text), crc32(rest)) + rest


def _unpack(magic: bytes, data: bytes, count: int | None = None) -> tuple[dict[str, Any], list[bytes]]:
    if len(data) < _FRAME.size:
        raise UserError(f"message between hosts: cut short: {len(data)} bytes")
    found, length, check = _FRAME.unpack_from(data)
    rest = memoryview(data)[_FRAME.size :]
    if found != magic or length > HEAD_LARGEST:
        raise UserError(f"message between hosts: it begins with {found!r}, expected {magic!r}")
    if crc32(rest) != check:
        raise UserError("message between hosts: damaged: its checksum does not match")
    try:
        head = json.loads(bytes(rest[:length]))
        sizes = [_whole(size) for size in head["bytes"]]
    except (ValueError, KeyError, TypeError, RecursionError) as fault:
        raise UserError(f"message between hosts: {fault!r}; expected one of this version of ulearn") from None
    if length + sum(sizes) != len(rest) or (count is not None and len(sizes) != count):
        raise UserError(f"message between hosts: {len(rest)} bytes, its header says {length + sum(sizes)}")
    bodies, at = [], length
    for size in sizes:
        bodies.append(bytes(rest[at : at + size]))
        at += size
    return head, bodies
