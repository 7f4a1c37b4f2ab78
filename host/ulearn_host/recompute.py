"""Work for memory: activations that a backward pass needs are computed again instead of kept (Chen et al. 2016,
"Training Deep Nets with Sublinear Memory Cost").

A training program is a list of records, so to compute an activation again is to repeat the forward records that made
it, from the nearest activation that is still there. Nothing below a layer has been updated when its gradient is due, so
what is computed again is what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ulearn_host import memory
from ulearn_host import numbers as n
from ulearn_host.lowering import Record

Lives = Callable[[list[Record]], list[memory.Life]]
_AGAIN = "\0again"  # no layer is called so
_WORK = 2  # so many times the forward records may be repeated


def original(tensor: str) -> str:
    """The name of an arena tensor before it was made again."""
    return tensor.partition(_AGAIN)[0]


def fewest_bytes(forward: list[Record], backward: list[Record], lives: Lives) -> list[Record]:
    """The records of a training program that keeps only those activations whose keeping does not make it larger.

    lives: of a program's records, when each arena tensor is in use. Greedy: one activation after the other is given up,
    always the one that saves most, as long as the bytes alive at the worst moment become fewer and no more than twice
    the forward pass is computed again.
    """
    best = forward + backward
    needed = memory.lower_bound(lives(best))
    given_up: list[str] = []
    candidates = _kept(forward, backward)
    while candidates:
        trials = []
        for name in candidates:
            records = _without(forward, backward, [*given_up, name])
            if len(records) <= len(backward) + (1 + _WORK) * len(forward):
                trials.append((memory.lower_bound(lives(records)), name, records))
        size, name, records = min(trials, key=lambda trial: trial[0], default=(needed, "", best))
        if size >= needed:
            break
        best, needed = records, size
        given_up.append(name)
        candidates.remove(name)
    return best


def _kept(forward: list[Record], backward: list[Record]) -> list[str]:
    """Activations that the forward pass makes and the backward pass reads."""
    made = {name for record in forward for name in record.writes if name.startswith("act ")}
    read = {name for record in backward[1:] for name in record.reads()}
    return sorted(made & read)


def _without(forward: list[Record], backward: list[Record], given_up: list[str]) -> list[Record]:
    """The program that computes some activations again, right before they are first read."""
    makers: dict[str, list[Record]] = {}
    for record in forward:
        for name in record.writes:
            makers.setdefault(name, []).append(record)
    last_read = {name: at for at, record in enumerate(backward) for name in record.reads()}
    renamed: dict[str, str] = {}
    result = list(forward)
    for at, record in enumerate(backward):
        for name in record.reads():
            if name in given_up and name not in renamed:
                result += _again(name, at, makers, last_read, given_up, renamed)
        result.append(_rename(record, renamed))
    return result


def _again(
    name: str,
    at: int,
    makers: dict[str, list[Record]],
    last_read: dict[str, int],
    given_up: list[str],
    known: dict[str, str],
) -> list[Record]:
    """The records that make a tensor once more; what they need is there, or made once more itself.

    known: tensors that were made again, with their new names; what was made on the way is not added to it.
    """
    records: list[Record] = []
    local = dict(known)

    def make(tensor: str) -> None:
        if tensor in local:
            return
        if tensor not in given_up and last_read.get(tensor, -1) >= at:
            return  # kept, and not yet given back
        for record in makers[tensor]:
            for source in record.reads():
                if source != tensor and source in makers:
                    make(source)
        local[tensor] = tensor + _AGAIN if tensor == name else f"{tensor}{_AGAIN} for {name[4:]}"
        records.extend(_repeated(record, local) for record in makers[tensor])

    make(name)
    known[name] = local[name]
    return records


def _repeated(record: Record, names: dict[str, str]) -> Record:
    """A forward record as part of the backward pass: where that is skipped, so is it."""
    again = _rename(record, names)
    return replace(again, fields=record.fields | {"flags": record.fields.get("flags", 0) | n.FLAG_AGAIN})


def _rename(record: Record, names: dict[str, str]) -> Record:
    operands = {i: names.get(o, o) if isinstance(o, str) else o for i, o in record.operands.items()}
    writes = tuple(names.get(w, w) for w in record.writes)
    if operands == record.operands and writes == record.writes:
        return record  # the same object: its gate may still be filled in
    in_place = tuple(names.get(p, p) for p in record.in_place)
    return replace(record, operands=operands, writes=writes, in_place=in_place, fields=record.fields)
