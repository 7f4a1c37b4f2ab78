"""The top of a fleet of several hosts: it adds what gateways pass up, and divides once.

It owns no board. Its journal holds the gateways' answers in the place of updates, so that it goes on where it was
killed and can be replayed. Whatever moves the messages (Flower here) is no part of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path

from ulearn_host import aggregate
from ulearn_host.errors import UserError
from ulearn_host.federation import advance
from ulearn_host.federation.advance import Advanced, Contribution, Held
from ulearn_host.federation.core import Observe, nobody
from ulearn_host.federation.rounds import Federation
from ulearn_host.federation.upward import Answer, Ask


class Root(Federation):
    """Rounds over gateways; Root.create begins one in a folder, with the whole fleet's job."""

    def __init__(
        self,
        folder: Path,
        clock: Callable[[], float] = time.time,
        observe: Observe = nobody,
        updates: bool = False,
    ) -> None:
        """updates: have gateways pass all updates up where their sum would do; other rules than the exact mean need
        them anyway."""
        super().__init__(folder, clock, observe)
        job = self.job
        self.sums = not (updates or job.split) and (job.rule, job.server, job.quality, job.stale) == (
            "mean",
            "none",
            False,
            0,
        )

    def step(self, now: float) -> bool:
        """Nothing happens by itself."""
        return False

    @property
    def over(self) -> bool:
        """Whether all rounds are committed."""
        return self.commits() >= self.job.rounds

    def ask(self) -> bytes:
        """What every gateway is asked now, the same for all: a round, or that there is none any more."""
        counted = self.journal.rows(
            "SELECT board, max(entered) AS turn FROM updates JOIN models ON models.round = entered GROUP BY board"
        )
        names = {row["board"]: row["turn"] for row in counted}
        ids = (self.job.number, self.head["round"], self.plan.model_id, bytes(self.model["blob"]))
        return Ask(*ids, names, not self.sums, self.over).pack()

    def collect(self, bodies: Iterable[bytes], now: float) -> bool:
        """The gateways' answers: commit, or give the round up where they hold fewer updates than the job's quorum.

        An answer that is no good is left out and the reason is in the audit log. Returns whether it was a commit.
        """
        answers: dict[str, tuple[Answer, bytes]] = {}
        for body in bodies:
            try:
                answer = self._checked(body, [known for known, _ in answers.values()])
            except (UserError, ValueError) as fault:
                with self.transition("refuse", now, str(fault)):
                    pass
                continue
            if answer.boards:
                answers[answer.gateway] = answer, body
        count = sum(len(answer.boards) for answer, _ in answers.values())
        self._keep(answers, now)
        if count < self.job.least:
            self._abandon(f"{count} updates in time, expected {self.job.least} or more", now)
            return False
        kept = [answers[name][0] for name in sorted(answers)]
        try:
            advanced = self._advanced(bytes(self.model["blob"]), kept, self.held())
        except (UserError, ValueError, ArithmeticError) as fault:
            self._abandon(str(fault), now)
            return False
        boards = [Contribution(board, b"", 0) for answer in kept for board in answer.boards]
        return self._commit(boards, advanced, now)

    def _checked(self, body: bytes, others: Sequence[Answer]) -> Answer:
        """An answer that fits the round and the others. Raises UserError or ValueError."""
        answer = Answer.unpack(body)
        name = f"gateway {answer.gateway}"
        if answer.reason:
            raise UserError(answer.reason)
        if (answer.job, answer.round) != (self.job.number, self.head["round"]):
            raise UserError(f"{name}: answers round {answer.round} of job {answer.job}, expected {self.head['round']}")
        if answer.base_id != bytes(self.model["base"]):
            raise UserError(f"{name}: counts from base {answer.base_id.hex()}, expected {self.model['base'].hex()}")
        taken = {board for other in others for board in other.boards}
        if answer.gateway in {other.gateway for other in others} or taken & set(answer.boards):
            raise UserError(f"{name}: it, or a board of its, is there twice; give each host boards of its own")
        if len(set(answer.boards)) != len(answer.boards):
            raise UserError(f"{name}: counts a board twice")
        if self.sums:
            self._check_sum(answer, name)
        elif [part.board for part in answer.parts] != list(answer.boards) or answer.total is not None:
            raise UserError(f"{name}: passes a sum up, expected the updates of {len(answer.boards)} boards")
        elif answer.samples != sum(part.samples for part in answer.parts):
            raise UserError(f"{name}: counts {answer.samples} samples, its updates hold others")
        else:
            for part in answer.parts:
                self._check_part(part, name)
        return answer

    def _check_sum(self, answer: Answer, name: str) -> None:
        """No sum can be larger than its samples' largest differences."""
        largest = len(answer.boards) * self.job.samples_largest
        if not len(answer.boards) <= answer.samples <= largest:
            raise UserError(f"{name}: counts {answer.samples} samples of {len(answer.boards)} boards")
        if not answer.boards:
            return
        if answer.total is None or len(answer.total) != len(self.plan.steps):
            raise UserError(f"{name}: expected the sum of {len(self.plan.steps)} values")
        # As a Python integer: a hostile sum must not wrap.
        if max(-int(answer.total.min()), int(answer.total.max())) > answer.samples << 31:
            raise UserError(f"{name}: a sum beyond what {answer.samples} samples can come to")

    def _check_part(self, part: Contribution, name: str) -> None:
        """An update that goes up whole is what its board sent."""
        update = advance.decoded(part.body, self.job, self.plan, self.tensors)
        if update.model_id != self.plan.model_id or not 1 <= part.samples <= self.job.samples_largest:
            raise UserError(f"{name}: an update of {part.board} for another model, or of {part.samples} samples")
        if not part.stale and update.base_id != bytes(self.model["base"]):
            raise UserError(f"{name}: an update of {part.board} from another base")
        if self.job.split:
            self.check_features(part.body, self.head["round"])

    def _keep(self, answers: dict[str, tuple[Answer, bytes]], now: float) -> None:
        """Into the journal, in the place of what an earlier try of this round left there."""
        turn = self.head["round"]
        with self.transition("collect", now, f"answers of {len(answers)} gateways"):
            self.journal.run("DELETE FROM updates WHERE entered = ?", turn)
            for name, (answer, body) in answers.items():
                self.journal.insert(
                    "updates",
                    **{"round": turn, "board": name, "entered": turn, "sha256": sha256(body).digest()},
                    **{"samples": answer.samples, "quality": 1.0, "stale": 0, "received": now, "body": body},
                )
            asked = sum(len(answer.boards) for answer, _ in answers.values())
            self.journal.run("UPDATE rounds SET asked = ? WHERE round = ?", asked, turn)

    def _advanced(self, base: bytes, answers: Sequence[Answer], held: Held) -> Advanced:
        """The next base. Raises UserError or ValueError as advance.advance."""
        if any(answer.total is None for answer in answers):
            parts = [part for answer in answers for part in answer.parts]
            return advance.advance(base, parts, held, self.job, self.plan)
        samples = sum(answer.samples for answer in answers)
        if not 0 < samples < aggregate.SAMPLES_MAX:
            raise ValueError(f"the sums count {samples} samples, expected 1 to {aggregate.SAMPLES_MAX - 1}")
        total = aggregate.weighted_sum((answer.total, 1) for answer in answers if answer.total is not None)
        mean = aggregate.divide(total, samples)
        whole = aggregate.Update(self.plan.model_id, answers[0].base_id, samples, mean, tensors=self.tensors)
        return advance.down(base, whole, held, self.job, self.plan)

    def replay(self) -> bytes:
        """The trainable blob, computed once more from the plan and the gateways' answers in the journal.

        Raises UserError naming the round whose base differs from the one committed.
        """
        blob, held = advance.first_blob(self.plan), advance.start(self.job, self.plan)
        for row in self.journal.rows("SELECT round, base FROM models WHERE round > 0 ORDER BY round"):
            rows = self.journal.rows("SELECT body FROM updates WHERE entered = ? ORDER BY board", row["round"])
            made = self._advanced(blob, [Answer.unpack(bytes(r["body"])) for r in rows], held)
            if made.base_id != bytes(row["base"]):
                raise UserError(f"round {row['round']}: the answers give {made.base_id.hex()}, not {row['base'].hex()}")
            blob, held = made.blob, made.held
        return blob

    def finish(self, told: int, now: float) -> None:
        """All rounds are committed, and so many gateways know it."""
        if self.head["state"] != "done":
            with self.transition("done", now, f"{self.job.rounds} rounds are committed, {told} gateways were told"):
                self.journal.run("UPDATE rounds SET state = 'done', ended = ? WHERE round = ?", now, self.head["round"])
