"""What every part of a federation stands on: its folder, journal and plan, and the one way to change anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from ulearn_host import aggregate
from ulearn_host.errors import UserError
from ulearn_host.federation import split_head
from ulearn_host.federation.facts import pack
from ulearn_host.federation.job import Job
from ulearn_host.federation.journal import Journal, Row
from ulearn_host.federation.presence import Presence
from ulearn_host.federation.published import holds, publish
from ulearn_host.fleet import PlanFacts

Observe = Callable[[str, dict[str, Any]], None]
JOURNAL, PLAN, MODEL = "journal.db", "plan.ulm", "model.ulm"
DISMISSED = "dismissed"  # the link of a board that has no say any more


def nobody(event: str, details: dict[str, Any]) -> None:
    """Observes nothing."""


def shared(job: Job, plan: PlanFacts) -> int:
    """How many of a plan's tensors a job's updates are about, 0 for all. Raises UserError where that cannot be."""
    if job.split:
        split_head.upper(plan)
    try:
        return aggregate.shared_tensors(plan.path) if job.personal else 0
    except ValueError as fault:
        raise UserError(f"job {job.name}: {fault}") from None


class Core:
    """An open job. `now` is seconds of the clock that `clock` is; times in the journal are of the same."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time, observe: Observe = nobody) -> None:
        """Open what `create` made. Raises UserError where there is no job, or its files do not fit together."""
        self.folder, self.clock, self.observe = Path(folder), clock, observe
        if not (self.folder / JOURNAL).exists():
            raise UserError(f"{folder}: no job lies there; begin one first")
        self.journal = Journal(self.folder / JOURNAL)
        try:
            self._read()
        except BaseException:
            self.journal.close()
            raise
        self.presence = Presence()

    def _read(self) -> None:
        """The job and its plan."""
        row = self.journal.row("SELECT text, plan FROM job")
        if row is None:
            raise UserError(f"{self.folder}: the job was not begun to the end; begin it again")
        self.job = Job.from_json(row["text"])
        self.plan = PlanFacts(self.folder / PLAN)
        if sha256(self.plan.path.read_bytes()).digest() != row["plan"]:
            raise UserError(f"{self.plan.path}: not the plan that the job was begun with; put that one back")
        self.tensors = shared(self.job, self.plan)
        self._head: Row | None = None
        self._model: Row | None = None
        self.published = True

    def close(self) -> None:
        """Give the journal back. What is not in it is known to boards alone, and they will tell again."""
        self.journal.close()

    @property
    def head(self) -> Row:
        """The round that is not over."""
        if self._head is None:
            self._head = self.journal.row("SELECT * FROM rounds ORDER BY round DESC LIMIT 1")
        assert self._head is not None
        return self._head

    @property
    def model(self) -> Row:
        """The last committed model: round, base, parent, difference, blob."""
        if self._model is None:
            self._model = self.journal.row("SELECT * FROM models ORDER BY round DESC LIMIT 1")
        assert self._model is not None
        return self._model

    def commits(self) -> int:
        """How many rounds were committed."""
        return int(self.journal.value("SELECT count(*) FROM models WHERE round > 0"))

    @contextmanager
    def transition(self, event: str, now: float, text: str, board: str | None = None, **details: Any) -> Iterator[None]:
        """One step of the machine: all of it is in the journal when this returns, or nothing is.

        observe is told "before EVENT" and then, when it lasts, EVENT.
        """
        told = {"round": self.head["round"], "text": text, **({"board": board} if board else {}), **details}
        self.observe("before " + event, told)
        with self.journal.transaction():
            self._write_moved()
            yield
            self.audit(event, now, text, board)
            self._head = self._model = None
        self.presence.moved.clear()
        self.observe(event, told)

    def audit(self, event: str, now: float, text: str, board: str | None = None) -> None:
        """A line of the log."""
        self.journal.insert("audit", time=now, event=event, board=board, text=text)

    def _write_moved(self) -> None:
        """Bytes and refusals since the last transition."""
        for board, moved in self.presence.moved.items():
            seen = self.presence.seen(board)
            facts = pack(seen.facts) if seen and seen.facts else None
            self.journal.run(
                "UPDATE boards SET bytes_up = bytes_up + ?, bytes_down = bytes_down + ?, refused = refused + ?, "
                "seen = coalesce(?, seen), facts = coalesce(?, facts) WHERE board = ?",
                *(moved.up, moved.down, moved.refused, seen.when_s if seen else None, facts, board),
            )
            self.journal.run(
                "UPDATE rounds SET bytes_up = bytes_up + ?, bytes_down = bytes_down + ?, refused = refused + ? "
                "WHERE round = (SELECT max(round) FROM rounds)",
                *(moved.up, moved.down, moved.refused),
            )

    def publish(self) -> None:
        """Bring model.ulm to what the journal says, if it is not there yet."""
        data = self.plan.with_weights(bytes(self.model["blob"]))
        path = self.folder / MODEL
        if holds(path, data):
            return
        told = {"round": self.model["round"], "base_id": self.model["base"].hex()}
        self.observe("before publish", told)
        self.published = False
        try:
            publish(path, data, lambda stage: self.observe("publish " + stage, told))
        except OSError as fault:  # the commit lasts all the same; `tick` tries again
            self.observe("publish failed", {**told, "text": f"{path}: {fault.strerror}"})
            return
        self.published = True
        self.observe("publish", told)
