"""Memory over the operations: when each arena tensor of a program lives, found from its records alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ulearn_host import numbers as n
from ulearn_host.memory import aligned
from ulearn_host.records import LOSSES, Record, Use

# The forward record whose gradient a backward record without weights passes on.
_FORWARD = {
    n.OP_AVERAGE_BACK: (n.OP_AVERAGE_POOL, n.OP_MEAN),
    n.OP_MAX_BACK: (n.OP_MAX_POOL,),
    n.OP_SCALE_BACK: (n.OP_MUL,),
    n.OP_CROP: (n.OP_PAD, n.OP_COPY),
}


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
    """The arena over the records of a program; alive: bytes of each record, tensors rounded up to multiples of 4.

    names: the layer that each record belongs to; labels: the same with what the record does for it.
    """

    program: str
    names: list[str]
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


def trace(program: str, records: list[Record], layers: list[str], output: int, arena_bytes: int) -> Timeline:
    """Follow a program through its arena. output: where its answer lies; layers: of each forward record, or fewer."""
    follower = _Follower(records, layers)
    for at in range(len(records)):
        follower.step(at)
    follower.tensors[follower.holder(output)].last = len(records)
    alive = [_alive(follower.tensors, at) for at in range(len(records))]
    labels = [f"{name} {r.role}".rstrip() for name, r in zip(follower.names, records, strict=True)]
    return Timeline(program, follower.names, labels, follower.tensors, arena_bytes, alive)


class _Follower:
    """Walks over records and keeps which tensor lies where, and what a gradient is the gradient of.

    Tensors are known by their index. A sum of two branches hands its gradient to both as it is: so one gradient may
    stand at several tensors.
    """

    def __init__(self, records: list[Record], layers: list[str]) -> None:
        self.records, self.layers = records, iter(layers)
        self.names: list[str] = []
        self.tensors: list[ArenaTensor] = []
        self.unread: set[int] = set()  # tensors that COPY, or the rest of a layer, still fills
        self.makers: dict[int, list[int]] = {}  # of each tensor, the records that wrote it
        self.read: list[dict[int, int]] = []  # of each record, by operand, the tensors it read
        self.stands_at: dict[int, frozenset[int]] = {}  # of each gradient

    def step(self, at: int) -> None:
        """Record `at` reads and writes."""
        record = self.records[at]
        uses = record.of(n.BUF_ARENA)
        self.read.append({use.index: self._read(at, record, use) for use in uses if not use.written})
        owner = self._owner(at, record)
        self.names.append(self._name(at, record, owner))
        for use in uses:
            if use.written:
                self._write(at, record, use, owner)

    def holder(self, offset: int, size: int = 1) -> int:
        """Which tensor holds a byte: the one written last. What no record wrote counts as there from the start."""
        for index in reversed(range(len(self.tensors))):
            if self.tensors[index].offset <= offset < self.tensors[index].end:
                return index
        self.tensors.append(ArenaTensor("unwritten", "activation", (size,), offset, size, 0, 0))
        return len(self.tensors) - 1

    def _read(self, at: int, record: Record, use: Use) -> int:
        index = self.holder(use.start, use.end - use.start)
        tensor = self.tensors[index]
        tensor.last = at
        self.unread.discard(index)
        # COPY knows rows of bytes; what shape they have, the operator knows that takes them.
        copied = self.records[tensor.first].kind == n.OP_COPY and not record.backward
        if copied and use.index == 0 and record.kind >= n.OP_CONV and record.kind != n.OP_COPY:
            tensor.shape = record.input_shape
        return index

    def _write(self, at: int, record: Record, use: Use, owner: int | None) -> None:
        shape, size = record.written_shape, use.end - use.start
        if record.kind == n.OP_COPY or record.rows[:2] != (0, record.rows[2]):
            for index in self.unread:
                tensor = self.tensors[index]
                if tensor.offset == use.start and (tensor.size == size or tensor.shape == shape):
                    tensor.size, tensor.last = max(tensor.size, size), at
                    self.makers[index].append(at)
                    return
            self.unread.add(len(self.tensors))
        kind, name, index = "activation", self.names[at], len(self.tensors)
        if record.kind == n.OP_MASK:
            kind, name = "mask", f"mask of {name}"
        elif record.backward:
            kind = "gradient"
            name, shape = self._gradient(at, record, owner, index)
        self.tensors.append(ArenaTensor(name, kind, shape, use.start, size, at, at))
        self.makers[index] = [at]

    # Of which layer a record is.

    def _name(self, at: int, record: Record, owner: int | None) -> str:
        if record.kind in LOSSES:
            return "loss"
        if owner is None:
            return record.op
        return next(self.layers, record.op) if owner == at else self.names[owner]

    def _owner(self, at: int, record: Record) -> int | None:
        """The forward record that a record belongs to: itself, if it is one; None where none is found."""
        if record.kind in LOSSES:
            return None
        if record.kind == n.OP_MASK:
            return self._maker(self.read[at].get(0))
        if not record.backward:
            return self._first_time(at, record)
        if record.kind == n.OP_RELU_BACK:
            return self._maker(self._masked(at))
        if record.kind == n.OP_SUM:
            return self._maker(self._summed(at))
        before = [i for i in range(at) if not self.records[i].backward and self._belongs(record, self.records[i])]
        reached = self.stands_at.get(self.read[at].get(0, -1), frozenset())
        near = [i for i in before if any(i in self.makers.get(tensor, ()) for tensor in reached)]
        # Parameters of one content may be kept once for several layers, and operators have shapes in common.
        return max(near or (before if record.kind not in _FORWARD else []), default=None)

    def _first_time(self, at: int, record: Record) -> int:
        """Of a forward record behind the loss, which computes again what was not kept: the one that it repeats."""
        if not any(other.kind in LOSSES for other in self.records[:at]):
            return at
        alike = (i for i in range(at) if _constants(self.records[i]) == _constants(record))
        return next(alike, at)

    def _belongs(self, record: Record, other: Record) -> bool:
        """Whether a backward record can be that of a forward record."""
        if record.kind in _FORWARD:
            alike = (record.input_shape, record.output_shape) == (other.input_shape, other.output_shape)
            # Pieces that are put together side by side may have shapes in common.
            place = record.kind != n.OP_CROP or record.extra == other.extra
            return other.kind in _FORWARD[record.kind] and alike and place
        places = {(w.use.buffer, w.use.start) for w in record.weights}
        index = 2
        if record.kind == n.OP_UPDATE_BIAS:
            index = 3
            places = {(u.buffer, u.start) for u in record.uses if u.index == 2}
        use = other.operand(index)
        return use is not None and (use.buffer, use.start) in places

    def _maker(self, tensor: int | None) -> int | None:
        """The record that first wrote a tensor; of a mask, that which wrote what it was made of."""
        maker = None
        while tensor in self.makers:
            maker = self.makers[tensor][0]
            tensor = self.read[maker].get(0) if self.records[maker].kind == n.OP_MASK else None
        return maker

    # Of which tensor a gradient is.

    def _masked(self, at: int) -> int | None:
        """The tensor whose codes or bits decide where a gradient passes."""
        tensor = self.read[at].get(4)
        if tensor in self.makers and self.tensors[tensor].kind == "mask":
            return self.read[self.makers[tensor][0]].get(0)
        return tensor

    def _summed(self, at: int) -> int | None:
        """The tensor at which both addends stand."""
        a, b = self.read[at].get(0, -1), self.read[at].get(4, -1)
        both = self.stands_at.get(a, frozenset()) & self.stands_at.get(b, frozenset())
        last = max(both, default=None)
        if a != b or last not in self.makers:
            return last
        return self.read[self.makers[last][0]].get(0)  # of a tensor added to itself; the sum itself is not meant

    def _behind(self, tensor: int | None) -> frozenset[int]:
        """A tensor, and those that a gradient at it stands at, too: what was added up to make it."""
        found: set[int] = set()
        open_ = [tensor]
        while open_:
            tensor = open_.pop()
            if tensor is None or tensor in found:
                continue
            found.add(tensor)
            for maker in self.makers.get(tensor, ()):
                if self.records[maker].kind == n.OP_ADD:
                    open_ += [self.read[maker].get(0), self.read[maker].get(2)]
        return frozenset(found)

    def _gradient(self, at: int, record: Record, owner: int | None, index: int) -> tuple[str, tuple[int, ...]]:
        """Name and shape of the gradient that becomes tensor `index`."""
        if record.kind == n.OP_SUM:
            tensor, title = self._summed(at), "summed gradient"
        elif record.kind == n.OP_RELU_BACK:
            tensor, title = self._masked(at), "masked gradient"
        else:
            source = at if record.kind in LOSSES else owner
            tensor, title = None if source is None else self.read[source].get(0), "gradient"
        self.stands_at[index] = self._behind(tensor)
        if tensor is None:
            return f"{title} at {self.names[at]}'s input", record.written_shape
        found = self.tensors[tensor]
        return f"{title} at {found.name}", found.shape


def _alive(tensors: list[ArenaTensor], at: int) -> int:
    """Bytes of the arena that are in use while record `at` runs; tensors in one place count once."""
    total = reached = 0
    for tensor in sorted((t for t in tensors if t.first <= at <= t.last), key=lambda t: t.offset):
        end = tensor.offset + aligned(tensor.size)
        total += max(0, end - max(reached, tensor.offset))
        reached = max(reached, end)
    return total


def _constants(record: Record) -> tuple[object, ...]:
    """What two runs of one forward record have in common."""
    fixed = [(u.index, u.buffer, u.start, u.end) for u in record.uses if u.buffer != n.BUF_ARENA]
    return record.kind, record.input_shape, record.output_shape, record.kernel, record.stride, record.rows, *fixed
