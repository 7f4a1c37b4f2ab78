"""Evaluations between rounds: boards score the last base on samples that they hold back, and only counts come back.

One is opened before the first round, after every so many commits and after the last one. The next round waits for it,
until all that were asked have reported or its own deadline has passed; what comes later is refused.
"""

from __future__ import annotations

import os

from ulearn import task as wire
from ulearn_host.errors import UserError
from ulearn_host.federation import evaluation as pooling
from ulearn_host.federation.core import DISMISSED, Core
from ulearn_host.federation.deadlines import JITTER, MEASURED_ROUNDS, deadline_s
from ulearn_host.federation.facts import BoardFacts
from ulearn_host.federation.journal import Row


class Evaluating(Core):
    """What the machine does between rounds, and what tasks of all kinds share."""

    def task_bytes(self, kind: int, turn: int, **fields: object) -> bytes:
        """A task of this job from the last base."""
        known = {"job": self.job.number, "flags": self.job.flags, "round": turn}
        ids = {"model_id": self.plan.model_id, "base_id": bytes(self.model["base"])}
        return bytes(wire.make(kind=kind, **known, **ids, **fields))

    def deadline_of(self, kind: int) -> float:
        """Seconds for an answer, from the times of earlier ones."""
        times = self.journal.rows(
            "SELECT answered - opened FROM tasks WHERE kind = ? AND answered IS NOT NULL AND outcome != 'replaced' "
            "ORDER BY round DESC LIMIT ?",
            *(kind, MEASURED_ROUNDS * self.job.asked),
        )
        failures = 0
        if kind == wire.TRAIN:
            last = self.journal.value("SELECT coalesce(max(round), 0) FROM rounds WHERE state = 'committed'")
            failures = self.head["round"] - 1 - last
        return deadline_s([t for (t,) in times], self.job.first_deadline_s, 2 * self.job.retry_s, failures)

    def evaluation(self) -> Row | None:
        """The open evaluation."""
        return self.journal.row("SELECT * FROM evaluations WHERE closed IS NULL LIMIT 1")

    def evaluation_due(self) -> bool:
        """Whether the last base is to be evaluated and was not."""
        every, commits = self.job.evaluate_every, self.commits()
        if not every or (commits % every and commits < self.job.rounds):
            return False
        return self.journal.row("SELECT 1 FROM evaluations WHERE round = ?", self.model["round"] + 1) is None

    def testers(self, now: float) -> dict[str, BoardFacts]:
        """The boards that are there and hold samples back."""
        present = self.presence.present(now, self.job.present_s)
        return {b: f for b, f in present.items() if f.held_out and f.model_id == self.plan.model_id}

    def open_evaluation(self, now: float) -> bool:
        """Ask every board that can. Its number is that of the round which would begin with this base."""
        turn, testers = self.model["round"] + 1, self.testers(now)
        seconds = self.job.deadline_s or self.deadline_of(wire.EVALUATE)
        with self.transition("evaluate", now, f"{len(testers)} boards score base {self.model['base'].hex()}"):
            self.journal.insert("evaluations", round=turn, base=self.model["base"], opened=now, deadline=now + seconds)
            for board, facts in testers.items():
                self._ask(turn, board, facts, now)
        return True

    def join_evaluation(self, board: str, facts: BoardFacts, now: float) -> None:
        """A board that came while an evaluation is open scores, too."""
        turn = self.model["round"] + 1
        known = self.journal.row(
            "SELECT 1 FROM tasks WHERE kind = ? AND round = ? AND board = ?", wire.EVALUATE, turn, board
        )
        if known is None and facts.held_out:
            with self.transition("join", now, "scores, too", board):
                self._ask(turn, board, facts, now)

    def _ask(self, turn: int, board: str, facts: BoardFacts, now: float) -> None:
        """One board's task."""
        nonce = os.urandom(16)
        self.journal.insert(
            "tasks",
            **{"kind": wire.EVALUATE, "round": turn, "board": board, "nonce": nonce, "base": self.model["base"]},
            **{"body": self.task_bytes(wire.EVALUATE, turn, nonce=nonce), "opened": now, "samples": facts.held_out},
        )

    def close_evaluation(self, now: float) -> bool:
        """Pool what has come, when it is time."""
        row = self.evaluation()
        assert row is not None
        if now < self.evaluation_until(row):
            return False
        found, waiting = self.reports(row["round"]), self._missing(row)
        accuracy = loss = None
        text = f"{len(found)} reports, {waiting} missing"
        if found:
            pooled = pooling.pool(found, self.job.min_group)
            accuracy, loss = (score.pooled if score else None for score in (pooled.accuracy, pooled.loss))
            text += "; " + (pooled.withheld or _figures(accuracy, loss))
        with self.transition("evaluated", now, text, accuracy=accuracy, loss=loss):
            self.journal.run(
                "UPDATE evaluations SET closed = ?, accuracy = ?, loss = ?, reported = ? WHERE round = ?",
                *(now, accuracy, loss, len(found), row["round"]),
            )
        return True

    def evaluation_until(self, row: Row) -> float:
        """When an evaluation ends: at its deadline; where nobody is missing, once every board has had its turn to come;
        at once when the whole fleet has reported."""
        if self._missing(row):
            return float(row["deadline"])
        missing = "SELECT 1 FROM boards WHERE link != ? AND board NOT IN (SELECT board FROM reports WHERE round = ?)"
        whole = self.journal.row(missing + " LIMIT 1", DISMISSED, row["round"]) is None
        return float(row["opened"] if whole else min(row["deadline"], row["opened"] + self.turn_s))

    def _missing(self, row: Row) -> int:
        """Boards that were asked and have not reported."""
        return int(
            self.journal.value(
                "SELECT count(*) FROM tasks WHERE kind = ? AND round = ? AND answered IS NULL",
                *(wire.EVALUATE, row["round"]),
            )
        )

    @property
    def turn_s(self) -> float:
        """Seconds in which every board that waits asks once."""
        return (1 + JITTER) * self.job.retry_s

    def reports(self, turn: int) -> dict[str, pooling.Report]:
        """What boards have reported in an evaluation, by board."""
        rows = self.journal.rows("SELECT board, body FROM reports WHERE round = ?", turn)
        return {row["board"]: pooling.parse(bytes(row["body"])) for row in rows}

    def check_report(self, report: pooling.Report, task: Row) -> None:
        """Raises UserError where a report is not the answer to a board's task."""
        wanted = self.plan.outputs if self.plan.labelled else 0
        if report.job != self.job.number or report.round != task["round"]:
            raise UserError(
                f"report: of round {report.round} of job {report.job}, expected round {task['round']} of this"
            )
        if report.base_id != bytes(task["base"]):
            raise UserError(f"report: of base {report.base_id.hex()}, expected {bytes(task['base']).hex()}")
        if report.classes != wanted:
            raise UserError(f"report: {report.classes} classes, expected {wanted}")
        if report.samples > self.told(task):
            raise UserError(f"report: scored on {report.samples} samples, the board told of {self.told(task)}")

    def told(self, task: Row) -> int:
        """Of how many samples a board told for a task; the journal does not hold every small rise."""
        seen = self.presence.seen(task["board"])
        if seen is None or seen.facts is None:
            return int(task["samples"])
        return max(int(task["samples"]), seen.facts.held_out if task["kind"] == wire.EVALUATE else seen.facts.samples)


def _figures(accuracy: float | None, loss: float | None) -> str:
    """What an evaluation came to, as text."""
    parts = [] if accuracy is None else [f"accuracy {100 * accuracy:.1f} %"]
    parts += [] if loss is None else [f"loss {loss:.4g}"]
    return ", ".join(parts)
