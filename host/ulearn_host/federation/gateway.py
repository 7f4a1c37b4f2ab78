"""A host among several: it drives the boards that it owns through a round, and passes what they learned up.

Its rounds are those of a Federation, so boards, links, deadlines and journal are the same; but a round begins when it
is asked for from above, with the base and the number from there, and where one host would commit, it is closed and
waits for what the whole fleet has made of it. Asked for the same round again, a gateway gives the same answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Self

from ulearn import checkpoint
from ulearn import task as wire
from ulearn_host import aggregate
from ulearn_host.errors import UserError
from ulearn_host.federation.core import Observe, nobody
from ulearn_host.federation.job import Job
from ulearn_host.federation.machine import PARTS, contribution
from ulearn_host.federation.rounds import Federation
from ulearn_host.federation.upward import Answer, Ask

CLOSED = "commit"  # which is made above
_NEVER = 1_000_000  # rounds of a job that ends when it is told to


class Gateway(Federation):
    """A federation whose commits are made above it."""

    @classmethod
    def begin(
        cls,
        folder: Path,
        plan: Path,
        job: Job,
        goal: int,
        clock: Callable[[], float] = time.time,
        observe: Observe = nobody,
    ) -> Self:
        """Begin in a folder, whose name is the gateway's, or go on there. job: the whole fleet's; goal: how many of the
        gateway's own boards are wanted in a round."""
        own = replace(job, goal=goal, rounds=_NEVER, evaluate_every=0)
        Federation.create(folder, plan, own, clock, observe).close()
        return cls(folder, clock, observe)

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time, observe: Observe = nobody) -> None:
        """Open it. Until it is asked for a round, its boards are told to wait."""
        self._asked = 0
        super().__init__(folder, clock, observe)

    @property
    def name(self) -> str:
        """What it is called above."""
        return self.folder.resolve().name

    def step(self, now: float) -> bool:
        """As a federation's, in rounds that were asked for."""
        return self.head["round"] == self._asked and super().step(now)

    def _collecting(self, now: float) -> bool:
        """Close, or go on waiting."""
        turn, deadline = self.head["round"], self.head["deadline"]
        received = int(self.journal.value("SELECT count(*) FROM updates WHERE entered = ?", turn))
        waiting = self.journal.value(
            "SELECT count(*) FROM tasks WHERE kind = ? AND round = ? AND answered IS NULL", wire.TRAIN, turn
        )
        if received < self.job.goal and waiting and now < deadline:
            return False
        with self.transition("closed", now, f"{received} updates, to be passed up"):
            self.journal.run("UPDATE rounds SET state = ? WHERE round = ?", CLOSED, turn)
        return True

    def ask(self, asked: Ask, now: float) -> None:
        """Begin a round, or go on with it. Raises UserError for another job or model, and for a round that is over."""
        if (asked.job, asked.model_id) != (self.job.number, self.plan.model_id):
            raise UserError(f"gateway {self.name}: asked for another job or plan than its own; begin it with the same")
        if len(asked.base) != self.plan.train_place[1]:
            raise UserError(
                f"gateway {self.name}: a base of {len(asked.base)} bytes, expected {self.plan.train_place[1]}"
            )
        head = self.head
        if asked.done and head["state"] == "done":
            return
        base = checkpoint.identity(asked.model_id, asked.base)
        if head["state"] == "done" or asked.round < head["round"]:
            raise UserError(f"gateway {self.name}: asked for round {asked.round}, it has come to {head['round']}")
        if asked.round > head["round"] or bytes(head["before"]) != base or asked.done:
            if asked.round == head["round"] and head["state"] != "select":
                raise UserError(f"gateway {self.name}: round {asked.round} has begun with another base")
            self._move(asked, base, now)
        self._asked = 0 if asked.done else asked.round
        self.settle(now)

    def _move(self, asked: Ask, base: bytes, now: float) -> None:
        """To the base from above and the round that begins with it."""
        old, turn = self.model, self.head["round"]
        known = self.journal.value("SELECT base FROM models WHERE round = ?", asked.round - 1)
        if known is not None and bytes(known) != base:
            raise UserError(f"gateway {self.name}: round {asked.round} has another base here; use the same plan")
        counted = asked.counted.get(self.name) == turn
        text = f"round {asked.round} from base {base.hex()}, before {old['base'].hex()}"
        with self.transition("done" if asked.done else "begin", now, text):
            if bytes(old["base"]) != base:
                # Down finds what leads there from older bases; without a parent it knows of no shorter way.
                self.journal.insert("models", round=asked.round - 1, base=base, blob=asked.base)
            if counted:
                self.journal.run(
                    "UPDATE boards SET done = done + 1, committed = ? WHERE board IN "
                    "(SELECT board FROM updates WHERE entered = ?)",
                    *(turn, turn),
                )
            state = "committed" if counted else "abandoned"
            if asked.round == turn:
                self.journal.run("UPDATE rounds SET before = ?, began = ? WHERE round = ?", base, now, turn)
            else:
                self.journal.run(
                    "UPDATE rounds SET state = ?, after = ?, ended = ? WHERE round = ?", state, base, now, turn
                )
                self.journal.insert("rounds", round=asked.round, state="select", before=base, began=now)
            if asked.done:
                self.journal.run("UPDATE rounds SET state = 'done', ended = ? WHERE round = ?", now, asked.round)
        self.publish()

    def answer(self, asked: Ask) -> Answer | None:
        """What is passed up, once the round is closed. Raises UserError where it has gone on without."""
        head = self.head
        ids = (self.job.number, asked.round, self.name, bytes(head["before"]))
        if asked.done:
            return Answer(*ids, [], 0, None)
        if head["round"] != asked.round:
            raise UserError(f"gateway {self.name}: round {asked.round} is over, it is at {head['round']}")
        if head["state"] != CLOSED:
            return None
        parts = [contribution(row) for row in self.journal.rows(PARTS, asked.round)]
        boards, samples = [part.board for part in parts], sum(part.samples for part in parts)
        if asked.updates or not parts:
            return Answer(*ids, boards, samples, None, parts)
        values = ((aggregate.decode(part.body, self.plan.table).values, part.samples) for part in parts)
        return Answer(*ids, boards, samples, aggregate.weighted_sum(values))
