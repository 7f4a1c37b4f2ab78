"""The state machine of rounds: select → configure → collect → commit or abandon, each step one transaction.

select: once enough boards are there, some are drawn. configure: each gets a nonce and its task, the round its deadline.
collect: a round commits as soon as `goal` updates are there; at its deadline, or when nobody is left to wait for, it
commits with a quorum and is given up without. A round that is given up changes nothing: the next one has the same base
and a number of its own, since a number is part of every training's seed.
"""

from __future__ import annotations

import os
import random
import struct
from binascii import crc32
from collections.abc import Sequence

from ulearn import task as wire
from ulearn.rates import rate
from ulearn_host import aggregate
from ulearn_host.errors import UserError
from ulearn_host.federation import advance, selection
from ulearn_host.federation.advance import Advanced, Contribution, Held
from ulearn_host.federation.core import DISMISSED
from ulearn_host.federation.deadlines import retry_ms
from ulearn_host.federation.evaluating import Evaluating
from ulearn_host.federation.selection import Candidate

LONGEST_TICK_S = 60.0


class Machine(Evaluating):
    """A federation's steps. Every one looks at the journal alone, so that it goes on where a killed host stopped."""

    _latest = 0.0  # the last time that a caller gave
    _since = 0.0  # when this host began to wait for boards, which it knows nothing of

    def step(self, now: float) -> bool:
        """The next transition, if it is time for one."""
        states = {"select": self._selecting, "configure": self._configure, "collect": self._collecting}
        step = states.get(self.head["state"])
        return step(now) if step else False

    def settle(self, now: float) -> None:
        """All transitions whose time has come. A clock that was set back takes what waits for it along."""
        if now < self._latest - 1:
            self.resume(now)
        self._latest = now
        while self.step(now):
            now = self._latest = max(now, self.clock())  # a commit may take long: what follows begins after it

    def wait_s(self, now: float) -> float:
        """Seconds until time alone may bring the next transition."""
        head = self.head
        until = now + LONGEST_TICK_S
        if head["state"] == "collect":
            until = head["deadline"]
        elif head["state"] == "select":
            evaluation = self.evaluation()
            until = self.evaluation_until(evaluation) if evaluation else self._gathered_at()
            if until <= now:
                until = now + self.job.retry_s
        return float(min(LONGEST_TICK_S, max(0.0, until - now)))

    def resume(self, now: float) -> None:
        """After the host was away, or its clock was set back: that time counts for no deadline."""
        head, evaluation = self.head, self.evaluation()
        self._since = now
        last = self.journal.value("SELECT time FROM audit ORDER BY n DESC LIMIT 1")
        gone = now - float(last if last is not None else now)
        with self.transition("resume", now, f"goes on after {gone:.1f} s"):
            self.journal.run(
                "UPDATE rounds SET began = began + ?, opened = opened + ?, deadline = deadline + ? WHERE round = ?",
                *(gone, gone, gone, head["round"]),
            )
            self.journal.run(
                "UPDATE tasks SET opened = opened + ? WHERE answered IS NULL AND round >= ?",
                *(gone, min(head["round"], evaluation["round"] if evaluation else head["round"])),
            )
            self.journal.run(
                "UPDATE evaluations SET opened = opened + ?, deadline = deadline + ? WHERE closed IS NULL", gone, gone
            )

    def _gathered_at(self) -> float:
        """When every board that asks at all has had its turn to ask, since the last round and since the host began."""
        return max(float(self.head["began"]), self._since) + self.turn_s

    def _wanted(self, least: int, now: float) -> int:
        """How many boards to go on with: as many as are asked, or enough once no more are to come."""
        if now >= self._gathered_at():
            return least
        return max(least, min(self.job.asked, self.fleet_size()))

    def _selecting(self, now: float) -> bool:
        """An evaluation where one is due, then the boards of a round, or the end."""
        if self.evaluation():
            return self.close_evaluation(now)
        over = self.commits() >= self.job.rounds
        if self.evaluation_due():
            testers = len(self.testers(now))
            # After the last commit nobody waits for boards that have left.
            if testers >= self._wanted(1, now) or (over and now >= self._gathered_at() + self.job.present_s):
                return self.open_evaluation(now)
            if over or now < self._gathered_at():
                return False
        if over:
            with self.transition("done", now, f"{self.job.rounds} rounds are committed"):
                self.journal.run("UPDATE rounds SET state = 'done', ended = ? WHERE round = ?", now, self.head["round"])
            return False
        wanted = self._wanted(self.job.least, now) - self.received()
        if len(self.presence) < wanted:  # of a large fleet, most of those who ask find it so
            return False
        candidates = self._candidates(now)
        return len(candidates) >= wanted and self._select(candidates, now)

    def fleet_size(self) -> int:
        """How many boards are enrolled."""
        return int(self.journal.value("SELECT count(*) FROM boards WHERE link != ?", DISMISSED))

    def received(self) -> int:
        """Updates for the round that is not over."""
        return int(self.journal.value("SELECT count(*) FROM updates WHERE entered = ?", self.head["round"]))

    def _candidates(self, now: float) -> list[Candidate]:
        """The boards that are there, have samples, and have sent nothing for this round (what came late may count)."""
        turn = self.head["round"]
        known = {
            row["board"]: row
            for row in self.journal.rows(
                "SELECT * FROM boards WHERE board NOT IN (SELECT board FROM updates WHERE entered = ?)", turn
            )
        }
        candidates = []
        for board, facts in self.presence.present(now, self.job.present_s).items():
            row = known.get(board)
            if row is None or not facts.samples or facts.model_id != self.plan.model_id:
                continue
            share = row["in_time"] / row["asked"] if row["asked"] else 1.0
            candidates.append(Candidate(board, facts, turn - row["asked_round"] - 1, row["done"], share))
        return candidates

    def _select(self, candidates: Sequence[Candidate], now: float) -> bool:
        """Draw boards, by a generator that job and round alone decide."""
        turn, job = self.head["round"], self.job
        rng = random.Random(crc32(struct.pack("<III", job.number, job.seed, turn)))
        moved = self.moved_bytes()
        chosen = sorted(selection.choose(candidates, job.asked, job, rng, moved))
        if len(chosen) + self.received() < job.least:
            return False  # the others' batteries are low
        samples = {c.board: c.facts.samples for c in candidates}
        text = f"{len(chosen)} of {len(candidates)} boards that are there"
        with self.transition("select", now, text, boards=chosen):
            for board in chosen:
                row = {"kind": wire.TRAIN, "round": turn, "board": board, "base": self.model["base"]}
                self.journal.insert("tasks", **row, samples=samples[board])
                self.journal.run("UPDATE boards SET asked = asked + 1, asked_round = ? WHERE board = ?", turn, board)
            self.journal.run("UPDATE rounds SET state = 'configure', asked = ? WHERE round = ?", len(chosen), turn)
        return True

    def _configure(self, now: float) -> bool:
        """Nonces, tasks and the deadline."""
        turn = self.head["round"]
        rows = self.journal.rows("SELECT board FROM tasks WHERE kind = ? AND round = ?", wire.TRAIN, turn)
        seconds = self.job.deadline_s or self.deadline_of(wire.TRAIN)
        with self.transition("configure", now, f"{len(rows)} tasks, {seconds:.1f} s to answer", deadline_s=seconds):
            for (board,) in rows:
                nonce = os.urandom(16)
                self.journal.run(
                    "UPDATE tasks SET nonce = ?, body = ?, opened = ? WHERE kind = ? AND round = ? AND board = ?",
                    *(nonce, self._training(turn, board, nonce), now, wire.TRAIN, turn, board),
                )
            self.journal.run(
                "UPDATE rounds SET state = 'collect', opened = ?, deadline = ? WHERE round = ?",
                *(now, now + seconds, turn),
            )
        return True

    def _training(self, turn: int, board: str, nonce: bytes) -> bytes:
        """A board's task of a round."""
        job = self.job
        mantissa, exponent = rate(job.learning_rate)
        committed = self.journal.value("SELECT committed FROM boards WHERE board = ?", board)
        seed = job.training_seed(turn, board)
        how = {"epochs": job.epochs, "rate_mantissa": mantissa, "rate_exponent": exponent, "committed": committed}
        how |= {"skip": min(int(job.skip * 65536), 65535), "kept": job.kept, "proximal": job.proximal_step}
        retry = retry_ms(job.retry_s, random.Random(seed))
        kind = wire.FEATURES if job.split else wire.TRAIN
        return self.task_bytes(kind, turn, nonce=nonce, encoding=job.encoding, seed=seed, retry_ms=retry, **how)

    def _collecting(self, now: float) -> bool:
        """Commit, give up, or go on waiting."""
        turn, deadline = self.head["round"], self.head["deadline"]
        received = self.received()
        waiting = self.journal.value(
            "SELECT count(*) FROM tasks WHERE kind = ? AND round = ? AND answered IS NULL", wire.TRAIN, turn
        )
        if received < self.job.goal and waiting and now < deadline:
            return False
        if received < self.job.least:
            return self._abandon(f"{received} updates in time, expected {self.job.least} or more", now)
        parts = [contribution(row) for row in self.journal.rows(PARTS, turn)]
        try:
            advanced = advance.advance(bytes(self.model["blob"]), parts, self.held(), self.job, self.plan)
        except (UserError, ValueError, ArithmeticError) as fault:  # what is journalled must not stop the host for ever
            return self._abandon(str(fault), now)
        return self._commit(parts, advanced, now)

    def moved_bytes(self) -> int:
        """What a round moves over a board's link, up and down: as in the last committed round, else both dense."""
        last = self.journal.row(
            "SELECT bytes_up + bytes_down, asked FROM rounds WHERE state = 'committed' ORDER BY round DESC LIMIT 1"
        )
        return int(last[0] // last[1]) if last else 2 * aggregate.update_bytes(self.plan.table, "dense")

    def held(self) -> Held:
        """What the host holds after the last commit."""
        row = self.journal.row("SELECT state, residual FROM server ORDER BY round DESC LIMIT 1")
        assert row is not None
        return Held.unpack(row["state"], row["residual"])

    def _commit(self, parts: Sequence[Contribution], advanced: Advanced, now: float) -> bool:
        """The next base, and the next round."""
        turn, before = self.head["round"], bytes(self.model["base"])
        text = f"{len(parts)} updates make base {advanced.base_id.hex()} of {before.hex()}"
        with self.transition("commit", now, text, base_id=advanced.base_id.hex(), updates=len(parts)):
            self.journal.insert(
                "models",
                **{"round": turn, "base": advanced.base_id, "parent": before},
                **{"difference": advanced.difference, "blob": advanced.blob},
            )
            self.journal.run("DELETE FROM server")
            state, residual = advanced.held.pack()
            self.journal.insert("server", round=turn, state=state, residual=residual)
            self.journal.run(
                "UPDATE boards SET done = done + 1, committed = max(committed, (SELECT round FROM updates "
                "WHERE entered = ? AND updates.board = boards.board)) "
                "WHERE board IN (SELECT board FROM updates WHERE entered = ?)",
                *(turn, turn),
            )
            self._next("committed", advanced.base_id, None, now)
        self.publish()
        return True

    def _abandon(self, reason: str, now: float) -> bool:
        """Nothing changes but the number of the round."""
        with self.transition("abandon", now, reason):
            self._next("abandoned", bytes(self.head["before"]), reason, now)
        return True

    def _next(self, state: str, base: bytes, reason: str | None, now: float) -> None:
        """End a round and begin the next."""
        turn = self.head["round"]
        self.journal.run(
            "UPDATE rounds SET state = ?, after = ?, ended = ?, reason = ? WHERE round = ?",
            *(state, base, now, reason, turn),
        )
        self.journal.insert("rounds", round=turn + 1, state="select", before=base, began=now)


PARTS = "SELECT board, body, samples, quality, stale FROM updates WHERE entered = ? ORDER BY board"


def contribution(row: Sequence[object]) -> Contribution:
    """A row of PARTS."""
    return Contribution(*row)  # type: ignore[arg-type]
