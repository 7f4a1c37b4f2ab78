"""What boards send: updates and reports, checked whole before anything changes. What is refused is told why, counted
and audited, and changes nothing else."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

from ulearn import task as wire
from ulearn import update as update_wire
from ulearn_host import aggregate
from ulearn_host.errors import UserError
from ulearn_host.federation import advance, evaluation, split, split_head
from ulearn_host.federation.journal import JournalError, Row
from ulearn_host.federation.machine import Machine

REFUSALS_TOLD = 20  # of a board in a round; those beyond are counted, so that nobody fills the host's disk


@dataclass(frozen=True)
class Verdict:
    """Whether a board's answer counts, and why not."""

    accepted: bool
    reason: str


class Intake(Machine):
    """What a federation does with answers. The same answer twice gets the same verdict and counts once."""

    @cached_property
    def body_largest(self) -> int:
        """Bytes of the longest answer that is looked at."""
        if self.job.split:
            return max(split.longest(self.plan, self.job.kept), int(wire.EVALUATION_BYTES) + 4)
        name = self.job.up.partition(":")[0]
        longest = aggregate.update_bytes(self.plan.table, name, self.job.kept, self.tensors)
        return max(longest, int(wire.EVALUATION_BYTES) + 4)

    @cached_property
    def _features_bytes(self) -> int:
        """Numbers of one sample at the plan's last cut."""
        return split_head.upper(self.plan).size

    def take(self, board: str, body: bytes, now: float, nonce: bytes | None) -> Verdict:
        """An answer of an enrolled board."""
        try:
            if len(body) > self.body_largest:
                raise UserError(f"answer of {len(body)} bytes, expected at most {self.body_largest}")
            if body[:4] == wire.EVALUATION_MAGIC:
                return self._report(board, body, now, nonce)
            return self._update(board, body, now, nonce)
        except JournalError:
            raise  # no fault of the board's; it will send its answer again
        except (UserError, ValueError) as fault:
            return self.reject(board, sha256(body).digest(), str(fault), now)

    def _update(self, board: str, body: bytes, now: float, nonce: bytes | None) -> Verdict:
        """An update: the first sound one of a board in a round counts."""
        digest = sha256(body).digest()
        earlier = self._earlier(board, digest, nonce)
        if earlier is not None:
            return Verdict(True, f"counted in round {earlier}")
        update = advance.decoded(body, self.job, self.plan, self.tensors)
        if update.model_id != self.plan.model_id:
            raise UserError(f"update: of model {update.model_id.hex()}, expected {self.plan.model_id.hex()}")
        task = self._training_task(board, update.base_id, nonce)
        samples = self._check(update, body, task)
        if self.journal.row("SELECT 1 FROM updates WHERE round = ? AND board = ?", task["round"], board):
            raise UserError(f"update: another one of this board is counted in round {task['round']}")
        stale = self._stale(task)
        if stale is None:
            return self._late(board, task, now)
        return self._accept(board, body, digest, task, samples, stale, now)

    def _earlier(self, board: str, digest: bytes, nonce: bytes | None) -> int | None:
        """The round that this very answer was counted in."""
        query = "SELECT entered FROM updates WHERE board = ? AND sha256 = ?"
        if nonce is None:
            found = self.journal.value(query + " ORDER BY round DESC LIMIT 1", board, digest)
        else:
            of_task = " AND round = (SELECT round FROM tasks WHERE kind = 1 AND nonce = ?)"
            found = self.journal.value(query + of_task, board, digest, nonce)
        return None if found is None else int(found)

    def _training_task(self, board: str, base: bytes, nonce: bytes | None) -> Row:
        """The task that an update answers: that of the nonce, else the board's last one from the same base."""
        if nonce is not None:
            row = self.journal.row("SELECT * FROM tasks WHERE nonce = ? AND board = ? AND kind = 1", nonce, board)
            if row is None:
                raise UserError("update: its nonce is of no task that this board was given")
            return row
        row = self.journal.row(
            "SELECT * FROM tasks WHERE board = ? AND kind = 1 AND base = ? AND nonce IS NOT NULL "
            "ORDER BY round DESC LIMIT 1",
            *(board, base),
        )
        if row is None:
            raise UserError(f"update: this board was not asked to train from base {base.hex()}; ask for a task first")
        return row

    def _check(self, update: aggregate.Update, body: bytes, task: Row) -> int:
        """The samples that a sound update counts for. Raises UserError for one that is not."""
        if update.base_id != bytes(task["base"]):
            raise UserError(f"update: from base {update.base_id.hex()}, expected {bytes(task['base']).hex()}")
        encoding = int.from_bytes(body[6:8], "little")
        if self.job.split:
            self.check_features(body, task["round"])
        if encoding != self.job.encoding:
            raise UserError(f"update: encoding {encoding}, expected {self.job.encoding} ({self.job.up})")
        if encoding == aggregate.ENCODINGS["random-k"]:
            job, turn = struct.unpack_from("<II", body, update_wire.HEADER_BYTES)
            if (job, turn) != (self.job.number, task["round"]):
                raise UserError(f"update: places of round {turn} of job {job}, expected round {task['round']} of this")
        if not 1 <= update.num_samples <= self.job.samples_largest:
            raise UserError(f"update: counts {update.num_samples} samples, expected 1 to {self.job.samples_largest}")
        if update.num_samples > self.told(task):
            raise UserError(f"update: counts {update.num_samples} samples, the board told of {self.told(task)}")
        return update.num_samples

    def check_features(self, body: bytes, turn: int) -> None:
        """Activations: those that were asked for, so that one answer cannot spoil all."""
        sent, wanted = split.parse(body, self.plan), self._features_bytes
        if (sent.job, sent.round) != (self.job.number, turn):
            raise UserError(f"features: of round {sent.round} of job {sent.job}, expected round {turn} of this")
        if sent.cut or sent.x.shape[1] != wanted:
            raise UserError(
                f"features: {sent.x.shape[1]} numbers at cut {sent.cut} from the end, expected {wanted} at the last"
            )
        if len(sent) > self.job.kept:
            raise UserError(f"features: of {len(sent)} samples, expected at most {self.job.kept}")

    def _stale(self, task: Row) -> int | None:
        """Commits since the update's base, where the round that is not over takes it; else None."""
        head = self.head
        entered = "SELECT 1 FROM updates WHERE entered = ? AND board = ?"
        if task["outcome"] == "late" or self.journal.row(entered, head["round"], task["board"]):
            return None  # what was refused once stays so; one of each board is counted
        if task["round"] == head["round"]:
            return 0 if head["state"] == "collect" else None
        commits = int(self.journal.value("SELECT count(*) FROM models WHERE round >= ?", task["round"]))
        return commits if head["state"] != "done" and self.job.stale and commits <= self.job.stale else None

    def _accept(
        self, board: str, body: bytes, digest: bytes, task: Row, samples: int, stale: int, now: float
    ) -> Verdict:
        """Into the journal, and into the commit of the round that collects now."""
        turn = self.head["round"]
        text = f"{samples} samples, {len(body)} bytes, sha256 {digest.hex()}" + (
            f", {stale} commits late" * bool(stale)
        )
        with self.transition("update", now, text, board):
            quality = self.journal.value("SELECT quality FROM boards WHERE board = ?", board)
            self.journal.insert(
                "updates",
                **{"round": task["round"], "board": board, "entered": turn, "sha256": digest, "samples": samples},
                **{"quality": quality, "stale": stale, "received": now, "body": body},
            )
            self._answered(task, "accepted", now)
            # What is counted late takes the place of the board's own task in this round.
            self.journal.run(
                "UPDATE tasks SET outcome = 'replaced', answered = ? WHERE kind = 1 AND round = ? AND board = ? AND "
                "answered IS NULL",
                *(now, turn, board),
            )
            if task["round"] == turn:
                self.journal.run("UPDATE boards SET in_time = in_time + 1 WHERE board = ?", board)
        self.settle(now)
        return Verdict(True, f"counted in round {turn}")

    def _answered(self, task: Row, outcome: str, now: float) -> None:
        """The first answer's time is what deadlines are drawn from."""
        self.journal.run(
            "UPDATE tasks SET answered = coalesce(answered, ?), outcome = ? WHERE kind = ? AND round = ? AND board = ?",
            *(now, outcome, task["kind"], task["round"], task["board"]),
        )

    def _late(self, board: str, task: Row, now: float) -> Verdict:
        """Refused and counted, once a task: its round is over. Its time still tells how long boards need."""
        reason = f"late: round {task['round']} is over; ask for the next task"
        if task["answered"] is None:
            with self.transition("late", now, reason, board):
                self._answered(task, "late", now)
                self.journal.run("UPDATE rounds SET late = late + 1 WHERE round = ?", task["round"])
        return Verdict(False, reason)

    def _report(self, board: str, body: bytes, now: float, nonce: bytes | None) -> Verdict:
        """A report of an evaluation: the first sound one of a board counts."""
        report = evaluation.parse(body)
        query = "SELECT * FROM tasks WHERE kind = 2 AND board = ? AND " + (
            "round = ?" if nonce is None else "nonce = ?"
        )
        task = self.journal.row(query, board, report.round if nonce is None else nonce)
        if task is None:
            raise UserError("report: this board was not asked for it")
        self.check_report(report, task)
        earlier = self.journal.value("SELECT body FROM reports WHERE round = ? AND board = ?", task["round"], board)
        if earlier is not None:
            if bytes(earlier) != body:
                raise UserError(f"report: another one of this board is counted for round {task['round']}")
            return Verdict(True, f"counted for round {task['round']}")
        row = self.evaluation()
        if row is None or row["round"] != task["round"]:
            return self._late_report(board, task, now)
        with self.transition("report", now, f"{report.samples} samples scored", board):
            self.journal.insert("reports", round=task["round"], board=board, body=body, received=now)
            self._answered(task, "accepted", now)
        self.settle(now)
        return Verdict(True, f"counted for round {task['round']}")

    def _late_report(self, board: str, task: Row, now: float) -> Verdict:
        """The evaluation is over."""
        reason = f"late: the evaluation before round {task['round']} is over; ask for the next task"
        if task["answered"] is None:
            with self.transition("late", now, reason, board):
                self._answered(task, "late", now)
        return Verdict(False, reason)

    def reject(self, board: str, digest: bytes, reason: str, now: float) -> Verdict:
        """Told, counted once a round and body, and audited while there are few."""
        told = self.presence.refusals(board, self.head["round"])
        if digest in told:
            return Verdict(False, reason)
        self.presence.move(board, refused=1)
        if len(told) < REFUSALS_TOLD:
            told.add(digest)
            with self.transition("refuse", now, reason, board):
                pass
        return Verdict(False, reason)
