"""What brings a board to the last base: the shortest of what gives exactly its bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ulearn import update as wire
from ulearn_host import aggregate
from ulearn_host.federation import advance
from ulearn_host.federation.core import Core
from ulearn_host.fleet import PlanFacts

KEPT = 8  # answers made for one base: boards are mostly a commit or two behind


class Down:
    """Answers what goes down, and remembers those for the last base."""

    def __init__(self, core: Core) -> None:
        """Nothing is made before it is asked for."""
        self._core, self._base = core, b""
        self._made: dict[bytes, tuple[str, bytes]] = {}

    def to(self, have: bytes) -> tuple[str, bytes]:
        """From base `have`: ("update", a difference), ("full", the trainable blob) or ("none", b"")."""
        base = bytes(self._core.model["base"])
        if have == base:
            return "none", b""
        if base != self._base or len(self._made) >= KEPT:
            self._base, self._made = base, {}
        if have not in self._made:
            self._made[have] = self._make(have)
        return self._made[have]

    def _make(self, have: bytes) -> tuple[str, bytes]:
        """The shortest; the blob where they are equally long, since it needs no base to start from."""
        model, plan = self._core.model, self._core.plan
        blob = bytes(model["blob"])
        choices = [("full", blob)]
        if self._core.job.down != "full":
            if model["parent"] is not None and bytes(model["parent"]) == have:
                choices.append(("update", bytes(model["difference"])))
            old = self._core.journal.value("SELECT blob FROM models WHERE base = ? LIMIT 1", have)
            if old is not None:
                choices += [("update", data) for data in exact(bytes(old), have, blob, plan, self._core.tensors)]
        return min(choices, key=lambda choice: len(choice[1]))


def exact(old: bytes, have: bytes, new: bytes, plan: PlanFacts, tensors: int) -> list[bytes]:
    """The updates that lead from one blob to another to the bit: several commits' differences as one."""
    values = stored(new, plan.table) - stored(old, plan.table)
    update = aggregate.Update(plan.model_id, have, 1, values, tensors=tensors)
    tries = [aggregate.encode(update, plan.table, encoding) for encoding in ("int8", "sparse")]
    return [data for data in tries if advance.added(old, data, plan) == new]


def stored(blob: bytes, table: bytes) -> NDArray[np.int64]:
    """The stored integers of a trainable blob, [values], in canonical order."""
    kinds = {1: "<i1", 2: "<i2", 3: "<i4"}
    parts = [np.frombuffer(blob, kinds[dtype], count, offset) for dtype, count, offset in wire.tensors(table)]
    values: NDArray[np.int64] = np.concatenate(parts).astype(np.int64)
    return values
