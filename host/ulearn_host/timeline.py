"""Memory over the operations: when each arena tensor of a program lives, found from its records alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ulearn_host import numbers as n
from ulearn_host.memory import aligned
from ulearn_host.records import LOSSES, Record, Use


@dataclass
class ArenaTensor:
    """`size` bytes of the arena from `offset` on. first, last: the records that touch it first and last; what lives on
    after the end has the number of records as its last. shape: of its numbers; a gradient has a header besides."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int
    first: int
    last: int

    @property
    def end(self) -> int:
        """The byte behind its last."""
        return self.offset + self.size


@dataclass(frozen=True)
class Timeline:
    """The arena over the records of a program; alive: bytes of each record, tensors rounded up to multiples of 4."""

    program: str
    labels: list[str]
    tensors: list[ArenaTensor]
    arena_bytes: int
    alive: list[int] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once."""
        return max(self.alive, default=0)

    @property
    def peak_record(self) -> int:
        """The first record at which the most bytes are alive."""
        return self.alive.index(self.peak_bytes)

    def as_json(self) -> dict[str, Any]:
        """For `--json`: last_record of a tensor that outlives the program is the number of its records."""
        return {
            "arena_bytes": self.arena_bytes,
            "peak_bytes": self.peak_bytes,
            "peak_record": self.peak_record,
            "alive_bytes": self.alive,
            "tensors": [
                {
                    "name": t.name,
                    "kind": t.kind,
                    "shape": list(t.shape),
                    "offset": t.offset,
                    "bytes": t.size,
                    "first_record": t.first,
                    "last_record": t.last,
                }
                for t in self.tensors
            ],
        }


def trace(program: str, records: list[Record], labels: list[str], output: int, arena_bytes: int) -> Timeline:
    """Follow a program through its arena. output: offset of what it answers; labels: the layer of each record."""
    follower = _Follower(records, labels)
    for at in range(len(records)):
        follower.step(at)
    follower.tensors[follower.holder(output)].last = len(records)
    alive = [_alive(follower.tensors, at) for at in range(len(records))]
    return Timeline(program, labels, follower.tensors, arena_bytes, alive)


class _Follower:
    """Walks over records and keeps which tensor lies where."""

    def __init__(self, records: list[Record], labels: list[str]) -> None:
        self.records, self.labels = records, labels
        self.tensors: list[ArenaTensor] = []
        self.unread: set[int] = set()  # tensors that COPY still fills, by index
        self.input_of: dict[int, str] = {}  # by the weights of a forward record: whose output goes in

    def step(self, at: int) -> None:
        """Record `at` reads and writes."""
        record = self.records[at]
        uses = record.of(n.BUF_ARENA)
        for use in uses:
            if not use.written:
                self._read(at, record, use)
        for use in uses:
            if use.written:
                self._write(at, record, use)

    def holder(self, offset: int, size: int = 1) -> int:
        """Which tensor holds a byte: the one written last. What no record wrote counts as there from the start."""
        for index in reversed(range(len(self.tensors))):
            if self.tensors[index].offset <= offset < self.tensors[index].end:
                return index
        self.tensors.append(ArenaTensor("unwritten", "activation", (size,), offset, size, 0, 0))
        return len(self.tensors) - 1

    def _read(self, at: int, record: Record, use: Use) -> None:
        index = self.holder(use.start, use.end - use.start)
        tensor = self.tensors[index]
        tensor.last = at
        self.unread.discard(index)
        if record.weights and use.index == 0 and tensor.kind == "activation":
            self.input_of[record.weights] = tensor.name
        # COPY knows rows of bytes; what shape they have, the operator knows that takes them.
        copied = self.records[tensor.first].kind == n.OP_COPY
        if copied and use.index == 0 and record.kind >= n.OP_CONV and record.kind != n.OP_COPY:
            tensor.shape = record.input_shape

    def _write(self, at: int, record: Record, use: Use) -> None:
        gradient = record.kind in (*LOSSES, n.OP_DENSE_BACK)
        if record.kind == n.OP_COPY:
            for index in self.unread:
                if (self.tensors[index].offset, self.tensors[index].end) == (use.start, use.end):
                    self.tensors[index].last = at
                    return
            self.unread.add(len(self.tensors))
        name = self._gradient_of(at, record) if gradient else self.labels[at]
        # The gradient at a layer's input has that layer's inputs.
        shape = record.input_shape if gradient else record.output_shape
        kind = "gradient" if gradient else "activation"
        self.tensors.append(ArenaTensor(name, kind, shape, use.start, use.end - use.start, at, at))

    def _gradient_of(self, at: int, record: Record) -> str:
        if record.kind in LOSSES:
            logits = next((u for u in record.of(n.BUF_ARENA) if u.index == 0), None)
            return "gradient at " + (self.tensors[self.holder(logits.start)].name if logits else self.labels[at])
        return "gradient at " + self.input_of.get(record.weights, self.labels[at] + "'s input")


def _alive(tensors: list[ArenaTensor], at: int) -> int:
    """Bytes of the arena that are in use while record `at` runs; tensors in one place count once."""
    total = reached = 0
    for tensor in sorted((t for t in tensors if t.first <= at <= t.last), key=lambda t: t.offset):
        end = tensor.offset + aligned(tensor.size)
        total += max(0, end - max(reached, tensor.offset))
        reached = max(reached, end)
    return total
