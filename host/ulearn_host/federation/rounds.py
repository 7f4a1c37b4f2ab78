"""Rounds of federated training over any transport: a state machine in a journal, which may be killed at any point."""

from __future__ import annotations

import random
import re
import secrets
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from ulearn import checkpoint
from ulearn import task as wire
from ulearn_host.errors import UserError
from ulearn_host.federation import advance
from ulearn_host.federation.core import DISMISSED, JOURNAL, PLAN, Observe, nobody, shared
from ulearn_host.federation.deadlines import retry_ms
from ulearn_host.federation.down import Down
from ulearn_host.federation.facts import BoardFacts
from ulearn_host.federation.intake import Intake, Verdict
from ulearn_host.federation.job import Job
from ulearn_host.federation.journal import Journal, Row
from ulearn_host.federation.published import publish, sync_folder
from ulearn_host.federation.replaying import replay
from ulearn_host.federation.status import status
from ulearn_host.fleet import PlanFacts

__all__ = ["Federation", "Verdict"]

SECRET_BYTES = 16  # the shortest
RISE_LEAST = 8
_BOARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")


class Federation(Intake):
    """A job's rounds. Boards ask for tasks and submit answers through whatever link they have; one thread calls.

    `now` is seconds of `clock`. observe(event, details) is told of every transition before it ("before commit") and
    after it ("commit"); from then on it lasts. Several answers that come at once are taken one after the other.
    """

    @classmethod
    def create(
        cls,
        folder: Path,
        plan: Path,
        job: Job,
        clock: Callable[[], float] = time.time,
        observe: Observe = nobody,
    ) -> Federation:
        """Begin a job in a folder, or go on with it where the same one was begun there before.

        Raises UserError for a plan that nothing trains in, or a folder that holds another job.
        """
        folder = Path(folder)
        facts = PlanFacts(Path(plan))
        blob, data = advance.first_blob(facts), Path(plan).read_bytes()
        shared(job, facts)
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
        journal = Journal(folder / JOURNAL)
        try:
            row = journal.row("SELECT text, plan FROM job")
            if row is None:
                observe("before create", {"text": job.name})
                publish(folder / PLAN, data)
                _begin(journal, job, facts, blob, sha256(data).digest(), clock())
                observe("create", {"text": job.name})
            elif (row["text"], bytes(row["plan"])) != (job.to_json(), sha256(data).digest()):
                raise UserError(
                    f"{folder}: another job or plan lies there; go on with that one, or give this one a name of its own"
                )
        finally:
            journal.close()
        return cls(folder, clock, observe)

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time, observe: Observe = nobody) -> None:
        """Open a job and go on where its journal ends. Raises UserError where none lies, or another host has it."""
        super().__init__(folder, clock, observe)
        try:
            self._rng, self._down = random.Random(), Down(self)
            self.publish()
            if self.journal.value("SELECT event FROM audit ORDER BY n DESC LIMIT 1") != "create":
                self.resume(clock())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Federation:
        """Closed at the end of a with statement."""
        return self

    def __exit__(self, *fault: object) -> None:
        self.close()

    def enrol(self, board: str, secret: bytes, link: str) -> None:
        """Take a board into the fleet, or give one another secret or link. Raises UserError for a senseless name."""
        if not _BOARD.fullmatch(board):
            raise UserError(f"board {board!r}: expected a name of 1 to 64 letters, digits, '.', '_', ':' or '-'")
        if len(secret) < SECRET_BYTES:
            raise UserError(f"board {board}: a secret of {len(secret)} bytes, expected {SECRET_BYTES} or more")
        row = self.journal.row("SELECT secret, link FROM boards WHERE board = ?", board)
        if row is not None and (bytes(row["secret"]), row["link"]) == (secret, link):
            return
        now = self.clock()
        with self.transition("enrol", now, f"over {link}", board):
            self.journal.run(
                "INSERT INTO boards (board, secret, link, enrolled) VALUES (?, ?, ?, ?) ON CONFLICT (board) "
                "DO UPDATE SET secret = excluded.secret, link = excluded.link",
                *(board, secret, link, now),
            )

    def dismiss(self, board: str) -> None:
        """Let a board no longer speak: its secret is forgotten, what it did stays. `enrol` takes it in again."""
        self._check_enrolled(board)
        with self.transition("dismiss", self.clock(), "its card is gone", board):
            self.journal.run(
                "UPDATE boards SET link = ?, secret = ? WHERE board = ?",
                *(DISMISSED, secrets.token_bytes(SECRET_BYTES), board),
            )
        self.presence.lost(board)

    def secret(self, board: str) -> bytes | None:
        """What a board proves itself with; None of a stranger."""
        found = self.journal.value("SELECT secret FROM boards WHERE board = ?", board)
        return None if found is None else bytes(found)

    def boards(self, link: str | None = None) -> list[str]:
        """The names of the fleet, or of those on one kind of link."""
        rows = self.journal.rows("SELECT board, link FROM boards ORDER BY board")
        return [row["board"] for row in rows if link in (None, row["link"])]

    def weigh(self, board: str, quality: float) -> None:
        """How much a board's samples count, where the job says quality: a factor of 0 or more."""
        self._check_enrolled(board)
        if not 0 <= quality <= 1e6:
            raise UserError(f"board {board}: a quality of {quality}, expected 0 to 1000000")
        with self.transition("weigh", self.clock(), f"quality {quality}", board):
            self.journal.run("UPDATE boards SET quality = ? WHERE board = ?", float(quality), board)

    def task(self, board: str, facts: BoardFacts, now: float) -> bytes:
        """What a board is to do now, as task.parse reads it. The same until it is done or its round is over.

        Raises UserError for a stranger, another model, or more samples than any board may have.
        """
        self._check_enrolled(board)
        if facts.model_id != self.plan.model_id:
            raise UserError(
                f"{board}: has model {facts.model_id.hex()}, the job {self.plan.model_id.hex()}; deploy its plan"
            )
        most = max(facts.samples, facts.held_out)
        if most > self.job.samples_largest:
            raise UserError(f"{board}: {most} samples, expected at most {self.job.samples_largest}")
        labels = self.plan.outputs if self.plan.labelled else 0
        if facts.histogram is not None and len(facts.histogram) != labels:
            raise UserError(f"{board}: a histogram of {len(facts.histogram)} labels, the plan has {labels}")
        self.presence.asked(board, facts, now)
        self.settle(now)
        if self.evaluation():
            self.join_evaluation(board, facts, now)
        row = self._open_task(board)
        body = self._idle() if row is None else self._hand_out(row, facts, now)
        self.presence.move(board, down=len(body))
        return body

    def _open_task(self, board: str) -> Row | None:
        """The task that a board has not answered: an evaluation first."""
        evaluation, head = self.evaluation(), self.head
        query = "SELECT * FROM tasks WHERE kind = ? AND round = ? AND board = ? AND answered IS NULL"
        if evaluation:
            return self.journal.row(query, wire.EVALUATE, evaluation["round"], board)
        return self.journal.row(query, wire.TRAIN, head["round"], board) if head["state"] == "collect" else None

    def _hand_out(self, row: Row, facts: BoardFacts, now: float) -> bytes:
        """Its bytes; that it was sent, and of how many samples the board told, is written down."""
        samples = facts.held_out if row["kind"] == wire.EVALUATE else facts.samples
        # More by a quarter at least: whoever claims one more with every question does not fill the host's disk.
        if row["sent"] is None or samples > row["samples"] + row["samples"] // 4 + RISE_LEAST:
            with self.transition("task", now, f"kind {row['kind']}, {samples} samples", row["board"]):
                self.journal.run(
                    "UPDATE tasks SET sent = coalesce(sent, ?), samples = max(samples, ?) WHERE nonce = ?",
                    *(now, samples, row["nonce"]),
                )
        return bytes(row["body"])

    def _idle(self) -> bytes:
        """Nothing to do now, or any more."""
        kind = wire.DONE if self.head["state"] == "done" else wire.WAIT
        return self.task_bytes(kind, self.head["round"], retry_ms=retry_ms(self.job.retry_s, self._rng))

    def down(self, board: str, have: bytes) -> tuple[str, bytes]:
        """What brings a board from base `have` to the last one: ("update", a difference for model.apply), ("full", a
        blob for task.replace) or ("none", b""), whichever is shortest."""
        self._check_enrolled(board)
        kind, data = self._down.to(bytes(have))
        self.presence.move(board, down=len(data))
        return kind, data

    def submit(self, board: str, body: bytes, now: float, nonce: bytes | None = None) -> Verdict:
        """A board's answer, an update or a report. nonce: of the task that it answers; without one it is taken to
        answer the board's last task from the same base. Raises UserError for a stranger."""
        self._check_enrolled(board)
        body = bytes(body)
        self.presence.touched(board, now)
        self.presence.move(board, up=len(body))
        self.settle(now)
        return self.take(board, body, max(now, self._latest), None if nonce is None else bytes(nonce))

    def lost(self, board: str, now: float) -> None:
        """Its link broke: it is not drawn for a round until it is heard of again. A task that it has stays its own."""
        self.presence.lost(board)

    def tick(self, now: float) -> float:
        """Carry out what it is time for; returns seconds until time alone may bring more. At any time, and not only
        then, tasks and answers bring the machine on by themselves."""
        if not self.published:
            self.publish()
        self.settle(now)
        return self.wait_s(max(now, self._latest))

    def status(self) -> dict[str, Any]:
        """What there is to see, of bounded size."""
        return status(self, self.clock())

    def replay(self) -> bytes:
        """The trainable blob, computed once more from the plan and the journal's accepted updates alone.

        Raises UserError naming the round whose base differs from the one committed.
        """
        return replay(self)

    def _check_enrolled(self, board: str) -> None:
        """Strangers have no say."""
        if self.journal.row("SELECT 1 FROM boards WHERE board = ?", board) is None:
            raise UserError(f"board {board!r}: not enrolled; enrol it over USB first")


def _begin(journal: Journal, job: Job, facts: PlanFacts, blob: bytes, plan: bytes, now: float) -> None:
    """A journal's first lines."""
    base = checkpoint.identity(facts.model_id, blob)
    state, residual = advance.start(job, facts).pack()
    with journal.transaction():
        journal.insert("job", one=1, text=job.to_json(), plan=plan, created=now)
        journal.insert("models", round=0, base=base, blob=blob)
        journal.insert("server", round=0, state=state, residual=residual)
        journal.insert("rounds", round=1, state="select", before=base, began=now)
        journal.insert("audit", time=now, event="create", text=job.to_json())
