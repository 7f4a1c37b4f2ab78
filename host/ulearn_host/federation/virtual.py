"""A board without a board: the board's own code under CPython, on a plan in a folder of its own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ulearn
from ulearn import checkpoint, update
from ulearn import task as wire
from ulearn_host import numbers as n
from ulearn_host.federation.attacks import Attack
from ulearn_host.fleet import Samples

PLAN = "plan.ulm"
_STORED = {n.DTYPE_INT8: ("<i1", 127), n.DTYPE_INT16: ("<i2", 32767), n.DTYPE_INT32: ("<i4", 2**30 - 1)}


class VirtualBoard:
    """A board of a simulated fleet. Whoever calls it is the link: bytes in, bytes out, as over a line.

    What it has applied lies in its folder, as on a board's flash: made anew in the same folder, it goes on from there.
    A liar (attack) learns from wrong labels, or multiplies what it has learned before it sends it.
    """

    def __init__(
        self,
        folder: Path,
        plan: Path,
        train: Samples,
        test: Samples | None = None,
        *,
        step_us: int = 0,
        link: int = 0,
        attack: Attack | None = None,
    ) -> None:
        """Put a plan into the folder, if there is none, and samples into the board.

        step_us, link: what it tells of its step, in microseconds, and its link, in bytes a second. Raises ValueError
        for a plan that is none.
        """
        folder.mkdir(parents=True, exist_ok=True)
        place = folder / PLAN
        if not place.exists():
            _copy(plan, place)
        self.model = ulearn.load(str(place))
        self.model.gives_features = True  # nobody's data
        self.attack, self.step_us, self.link = attack, step_us, link
        labels = attack.labels(train.y, self.model.classes) if attack and self.model.labelled else train.y
        self.samples = store(self.model, train.x, labels)
        self.held_out = store(self.model, test.x, test.y) if test is not None and len(test) else None

    @property
    def base_id(self) -> bytes:
        """Which weights its updates are counted from."""
        return bytes(self.model.base_id)

    def facts(self, histogram: bool = False) -> bytes:
        """What it tells of itself before it is given a task."""
        told: bytes = wire.facts(
            self.model,
            self.samples,
            self.held_out,
            self.step_us,
            self.link,
            histogram=histogram and self.model.labelled,
        )
        return told

    def take(self, kind: str, data: bytes, base_id: bytes) -> None:
        """A new base, as Federation.down gives it: "update", "full" or "none". Raises ValueError naming the fault."""
        if kind == "update":
            self.model.apply(data)
        elif kind == "full":
            wire.replace(self.model, data, base_id)

    def answer(self, task: bytes) -> bytes:
        """Carry out a task and return the answer. Raises ValueError naming the fault."""
        asked = wire.parse(task)
        lies = self.attack is not None and self.attack.factor != 1 and asked.kind == wire.TRAIN
        return bytes(wire.carry_out(self.model, self.samples, asked, self.held_out, self._exaggerate if lies else None))

    def _exaggerate(self, done: int, total: int) -> None:
        """After the last step, before the update is made: what was learned, times the attack's factor."""
        assert self.attack is not None
        if done < total:
            return
        base = b"".join(bytes(chunk) for chunk in checkpoint.base_chunks(self.model))
        for dtype, count, offset in update.tensors(self.model.tensors):
            kind, limit = _STORED[dtype]
            before = np.frombuffer(base, kind, count, offset).astype(np.int64)
            weights = np.frombuffer(self.model.train_blob, kind, count, offset)
            weights[:] = np.clip(before + self.attack.lie(weights - before), -limit, limit)


def store(model: Any, x: NDArray[np.int8], y: NDArray[Any]) -> Any:
    """Samples in a board's store. x: int8 codes [n, inputs]; y: labels [n] or int8 codes [n, outputs]."""
    samples = ulearn.Samples(model, max(1, len(x)))
    for one, target in zip(x, y, strict=True):
        samples.add(one, int(target) if y.ndim == 1 else target.tobytes())
    return samples


def _copy(plan: Path, place: Path) -> None:
    """A board's plan never changes: where the file system can, all boards share one."""
    try:
        os.link(plan, place)
    except OSError:
        shutil.copyfile(plan, place)
