"""Boards of a fleet for tests of rounds: the board's own code under CPython, in a folder of its own, without a link;
and what must hold of any journal."""

from __future__ import annotations

import struct
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

import ulearn
from ulearn import task as wire
from ulearn import update as update_wire
from ulearn_host.federation.core import MODEL
from ulearn_host.federation.facts import BoardFacts, parse
from ulearn_host.federation.job import Job
from ulearn_host.federation.rounds import Federation, Verdict

SECRET = b"a secret of a board"
JOB = Job("test", 3, 4, retry_s=1.0)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Board:
    """One board: a plan in a folder, samples that its name decides, and what a person would write in MicroPython."""

    def __init__(self, name: str, folder: Path, plan: Path, count: int = 0) -> None:
        """Start, or start again: the base that was applied last lies beside the plan."""
        self.name = name
        path = folder / name / "m.ulm"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(plan.read_bytes())
        self.model = ulearn.load(str(path))
        self.samples = self._store(count or 6 + sum(name.encode()) % 7, 0)
        self.held_out = self._store(5, 1)

    def _store(self, count: int, part: int) -> ulearn.Samples:
        """Samples that cluster by class, each board's a little elsewhere."""
        model = self.model
        rng = np.random.default_rng([part, *self.name.encode()])
        samples = ulearn.Samples(model, count)
        middles = np.random.default_rng(5).integers(-60, 60, (model.classes, model.input_bytes))
        for _ in range(count):
            label = int(rng.integers(model.classes))
            x = np.clip(middles[label] + rng.integers(-50, 50, model.input_bytes), -128, 127).astype(np.int8)
            samples.add(x.tobytes(), label)
        return samples

    @property
    def facts(self) -> BoardFacts:
        """As they cross a link."""
        return parse(wire.facts(self.model, self.samples, self.held_out))

    def follow(self, federation: Federation) -> None:
        """Fetch the last base."""
        kind, data = federation.down(self.name, bytes(self.model.base_id))
        if kind == "update":
            self.model.apply(data)
        elif kind == "full":
            wire.replace(self.model, data, bytes(federation.model["base"]))

    def ask(self, federation: Federation, now: float) -> Any:
        """The next task, parsed, with its base on the board."""
        task = wire.parse(federation.task(self.name, self.facts, now))
        if task.kind in (wire.TRAIN, wire.EVALUATE):
            self.follow(federation)
        return task

    def answer(self, task: Any) -> bytes:
        """Carry out a task."""
        return bytes(wire.carry_out(self.model, self.samples, task, self.held_out))

    def turn(self, federation: Federation, now: float) -> Verdict | None:
        """One visit: ask, and answer if there is something to do."""
        task = self.ask(federation, now)
        if task.kind not in (wire.TRAIN, wire.EVALUATE):
            return None
        return federation.submit(self.name, self.answer(task), now, task.nonce)


def fleet(federation: Federation, folder: Path, plan: Path, count: int) -> list[Board]:
    """So many enrolled boards."""
    boards = [Board(f"b{i:02d}", folder, plan) for i in range(count)]
    for board in boards:
        federation.enrol(board.name, SECRET, "test")
    return boards


def begun(folder: Path, plan: Path, clock: Clock, job: Job = JOB, count: int = 6) -> tuple[Federation, list[Board]]:
    """A job and its boards, all of them there."""
    federation = Federation.create(folder / "job", plan, job, clock)
    boards = fleet(federation, folder, plan, count)
    for board in boards:
        assert board.ask(federation, clock.now).kind in (wire.WAIT, wire.TRAIN, wire.EVALUATE)
    return federation, boards


def asked(federation: Federation, boards: list[Board], now: float) -> dict[str, Any]:
    """The training tasks of this round by board."""
    for board in boards:
        board.ask(federation, now)  # the last of them may be the one that a round waits for
    tasks = {board.name: board.ask(federation, now) for board in boards}
    return {name: task for name, task in tasks.items() if task.kind == wire.TRAIN}


def finish(federation: Federation, boards: list[Board], clock: Clock, visits: int = 200) -> None:
    """Let all boards come by in turn until the job is done."""
    for _ in range(visits):
        for board in boards:
            board.turn(federation, clock.now)
        clock.now += 0.5
        if federation.head["state"] == "done":
            return
    raise AssertionError(federation.status())


def independent(federation: Federation) -> bytes:
    """The last blob of a job of dense updates and the exact mean, computed with Python's integers from the journal."""
    table, blob = federation.plan.table, b""
    tensors = list(update_wire.tensors(table))
    for model in federation.journal.rows("SELECT * FROM models ORDER BY round"):
        if not model["round"]:
            blob = bytes(model["blob"])
            continue
        rows = federation.journal.rows("SELECT * FROM updates WHERE entered = ?", model["round"])
        sums, at = [], update_wire.HEADER_BYTES
        for dtype, count, _ in tensors:
            code, size = ("i", 4) if dtype == 3 else ("h", 2)
            columns = zip(*(struct.unpack_from(f"<{count}{code}", row["body"], at) for row in rows), strict=True)
            sums.append([sum(d * row["samples"] for d, row in zip(column, rows, strict=True)) for column in columns])
            at += count * size
        weight = sum(row["samples"] for row in rows)
        fresh = bytearray(blob)
        for (dtype, _, offset), column in zip(tensors, sums, strict=True):
            code, size, limit = {1: ("b", 1, 127), 2: ("h", 2, 32767), 3: ("i", 4, 2**30 - 1)}[dtype]
            for i, total in enumerate(column):
                mean = (2 * abs(total) + weight) // (2 * weight) * (1 if total > 0 else -1)
                (value,) = struct.unpack_from("<" + code, blob, offset + i * size)
                struct.pack_into("<" + code, fresh, offset + i * size, max(-limit, min(limit, value + mean)))
        blob = bytes(fresh)
        assert sha256(federation.plan.model_id + blob).digest()[:16] == bytes(model["base"])
    return blob


def check(federation: Federation) -> None:
    """What must hold of any journal, at any time."""
    rows = federation.journal.rows
    rounds = rows("SELECT * FROM rounds ORDER BY round")
    assert [row["round"] for row in rounds] == list(range(1, len(rounds) + 1))
    assert all(row["state"] in ("committed", "abandoned") for row in rounds[:-1])
    models = rows("SELECT * FROM models ORDER BY round")
    assert [m["round"] for m in models[1:]] == [r["round"] for r in rounds if r["state"] == "committed"]
    for before, after in zip(models, models[1:], strict=False):
        assert after["parent"] == before["base"]
    bases = {m["round"]: m["base"] for m in models}
    for row in rounds:
        base = bases[max(r for r in bases if r < row["round"])]
        assert row["before"] == base and (row["state"] != "abandoned" or row["after"] == base)
        if row["state"] == "committed":
            assert row["after"] == bases[row["round"]]
            entered = rows("SELECT * FROM updates WHERE entered = ?", row["round"])
            assert federation.job.least <= len(entered) <= federation.job.goal
            assert len({e["board"] for e in entered}) == len(entered) == len({e["sha256"] for e in entered})
    for task in rows("SELECT * FROM tasks"):
        assert task["base"] == rounds[task["round"] - 1]["before"] or task["kind"] == wire.EVALUATE
    assert federation.replay() == bytes(federation.model["blob"])
    whole = federation.plan.with_weights(bytes(federation.model["blob"]))
    assert (federation.folder / MODEL).read_bytes() == whole
