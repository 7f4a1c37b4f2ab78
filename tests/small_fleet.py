"""A few virtual boards in a real job, turn by turn: the board's own code, the host's own state machine and journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ulearn import task as wire
from ulearn_host.compiler import Options
from ulearn_host.federation import facts
from ulearn_host.federation.core import nobody
from ulearn_host.federation.job import Job
from ulearn_host.federation.rounds import Federation
from ulearn_host.federation.virtual import VirtualBoard
from ulearn_host.fleet import PlanFacts, Samples
from ulearn_host.prepare import prepare
from ulearn_host.quantise import FloatDense

BEGIN = 1_800_000_000.0  # seconds since 1970
TURN_S = 0.5


def made_up(folder: Path, names: Sequence[str]) -> tuple[Path, Sequence[tuple[Samples, Samples]]]:
    """A small plan, and of each board 40 samples to learn from and 20 to test on, of classes around common centres."""
    rng = np.random.default_rng(4)
    widths = (9, 8, 4)
    layers = [
        FloatDense(rng.normal(size=(n, k)) / k**0.5, rng.normal(size=n) / 4, i == 0)
        for i, (k, n) in enumerate(zip(widths, widths[1:], strict=False))
    ]
    path = folder / "made_up.ulm"
    plan = prepare(layers, rng.normal(size=(40, widths[0])), None, loss="softmax_ce", options=Options("last"))
    path.write_bytes(plan.data)
    shape = PlanFacts(path)
    centres = rng.normal(0, 1.2, (shape.outputs, shape.inputs))
    parts = []
    for name in names:
        y = rng.integers(0, shape.outputs, 60)
        all_ = shape.samples(centres[y] + rng.normal(0, 0.7, (60, shape.inputs)), y, name)
        parts.append((Samples(all_.x[:40], all_.y[:40]), Samples(all_.x[40:], all_.y[40:])))
    return path, parts


class SmallFleet:
    """Boards that take turns to ask, on a clock that goes on by a turn."""

    def __init__(
        self,
        folder: Path,
        boards: int | list[str] = 6,
        rounds: int = 3,
        observe: Callable[[str, Mapping[str, Any]], None] = nobody,
        world: tuple[Path, Sequence[tuple[Samples, Samples]]] | None = None,
        name: str = "small fleet",
        **terms: Any,
    ) -> None:
        """A job in a folder; terms: more of it; world: a plan, and what each board learns from and is tested on."""
        names = [f"board-{i}" for i in range(boards)] if isinstance(boards, int) else boards
        folder.mkdir(exist_ok=True)
        path, given = world or made_up(folder, names)
        known = {"goal": len(names), "over": 1.0, "retry_s": 2.0, "learning_rate": 0.1, "evaluate_every": 1}
        self.now = BEGIN
        job = Job(name, rounds, **(known | {"min_group": 3} | terms))
        self.federation = Federation.create(folder / "job", path, job, lambda: self.now, observe)
        self.boards = {}
        for i, (name, (train, test)) in enumerate(zip(names, given, strict=True)):
            self.federation.enrol(name, bytes(16), "virtual")
            self.boards[name] = VirtualBoard(folder / f"b{i}", path, train, test, step_us=900 + i, link=20_000)

    def ask(self, name: str) -> bytes:
        """One board's task."""
        self.now += TURN_S
        return self.federation.task(name, facts.parse(self.boards[name].facts()), self.now)

    def turn(self, name: str) -> int:
        """One board asks, and carries out what it is told; the kind of its task."""
        board, host, body = self.boards[name], self.federation, self.ask(name)
        task = wire.parse(body)
        if task.kind in (wire.TRAIN, wire.EVALUATE):
            board.take(*host.down(name, board.base_id), task.base_id)
            self.now += TURN_S
            verdict = host.submit(name, board.answer(body), self.now, task.nonce)
            assert verdict.accepted, verdict.reason
        return int(task.kind)

    def run(self, rounds: int | None = None) -> None:
        """Turns until so many rounds are committed, or the job is done."""
        while self.federation.head["state"] != "done":
            for name in self.boards:
                self.turn(name)
                if rounds is not None and self.federation.commits() >= rounds:
                    return

    def close(self) -> None:
        """Give the journal back."""
        self.federation.close()
