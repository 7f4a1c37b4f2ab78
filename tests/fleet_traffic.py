"""What happens to boards on real links, in simulated time: answers lost, late, doubled, damaged, boards restarted."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from fleet_boards import SECRET, Board
from mortal_host import Dead
from ulearn import task as wire
from ulearn_host.federation.rounds import Verdict

FATES = ("well", "lost", "late", "doubled", "damaged", "restarted")
SHARES = (0.4, 0.2, 0.1, 0.1, 0.1, 0.1)
ALL_WELL = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
TRAINING_S = (1.0, 4.0)
LATE_S = 60.0
WAIT_S = (0.75, 1.25)


class Traffic:
    """Boards around a host, a Federation or a MortalHost, until the job is done. It remembers what they were told."""

    shares = SHARES

    def __init__(self, host: Any, boards: list[Board], plan: Path, folder: Path, seed: int, pass_time: Any) -> None:
        """pass_time(now) sets the host's clock."""
        self.host, self.boards, self._plan, self._folder = host, boards, plan, folder
        self._rng, self._pass_time = np.random.default_rng(seed), pass_time
        self._queue: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self.tasks: dict[tuple[int, int, str], set[bytes]] = {}
        self.bases: set[bytes] = set()
        self.verdicts: dict[tuple[str, bytes, bytes], list[Verdict]] = {}
        self.fates: list[str] = []
        self.done = False

    def run(self, start: float, longest: float = 1e6) -> None:
        """Until every board has been told that the job is done."""
        for i, board in enumerate(self.boards):
            self._at(start + i / 100, lambda now, b=board: self._enrol(b, now))
        self._at(start, self._tick)
        while self._queue:
            now, _, action = heapq.heappop(self._queue)
            assert now < start + longest, "the job does not come to its end"
            self._pass_time(now)
            try:
                action(now)
            except Dead:
                self._at(now + 0.1, action)  # as a board does: once more

    def _at(self, when: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._queue, (when, next(self._order), action))

    def _tick(self, now: float) -> None:
        wait = self.host.tick(now)
        if not self.done:
            self._at(now + max(wait, 0.01), self._tick)

    def _enrol(self, board: Board, now: float) -> None:
        self.host.enrol(board.name, SECRET, "test")
        self._at(now, lambda then: self._visit(board, then))

    def _visit(self, board: Board, now: float) -> None:
        data = self.host.task(board.name, board.facts, now)
        task = wire.parse(data)
        if task.kind == wire.DONE:
            self.done = True
            return
        again = lambda then: self._visit(board, then)  # noqa: E731
        if task.kind == wire.WAIT:
            self._at(now + float(self._rng.uniform(*WAIT_S)), again)  # by seed, not by the host's own jitter
            return
        self.tasks.setdefault((task.kind, task.round, board.name), set()).add(data)
        self.bases.add(task.base_id)
        board.follow(self.host)
        if task.base_id != bytes(board.model.base_id):
            self._at(now, again)  # its round ended between the two calls
            return
        self._answer(board, task, now, again)

    def _answer(self, board: Board, task: Any, now: float, again: Callable[[float], None]) -> None:
        body = board.answer(task)
        then = now + float(self._rng.uniform(*TRAINING_S))
        fate = str(self._rng.choice(FATES, p=self.shares))
        self.fates.append(fate)
        send = lambda when: self._submit(board, body, task.nonce, when)  # noqa: E731
        if fate == "late":
            self._at(then + LATE_S, send)
            self._at(then + LATE_S, again)
            return
        if fate == "restarted":
            self._at(then, lambda when: self._restart(board, when))
            return
        if fate in ("well", "doubled"):
            self._at(then, send)
        if fate == "doubled":
            for delay in self._rng.uniform(0, 30, 2):
                self._at(then + float(delay), send)
        if fate == "damaged":
            wrong = bytearray(body)
            wrong[int(self._rng.integers(len(body)))] ^= 1 << int(self._rng.integers(8))
            self._at(then, lambda when: self._submit(board, bytes(wrong), task.nonce, when))
            if self._rng.random() < 0.5:
                self._at(then + 0.1, send)
        self._at(then + 0.2, again)

    def _submit(self, board: Board, body: bytes, nonce: bytes, now: float) -> None:
        verdict = self.host.submit(board.name, body, now, nonce)
        self.verdicts.setdefault((board.name, nonce, sha256(body).digest()), []).append(verdict)

    def _restart(self, board: Board, now: float) -> None:
        """A board that loses power while it trains."""
        fresh = Board(board.name, self._folder, self._plan)
        board.model, board.samples, board.held_out = fresh.model, fresh.samples, fresh.held_out
        self._visit(board, now)

    def check(self, federation: Any) -> None:
        """What boards were told agrees with the journal."""
        for key, bodies in self.tasks.items():
            assert len(bodies) == 1, key
        chain = {bytes(row["base"]) for row in federation.journal.rows("SELECT base FROM models")}
        assert self.bases <= chain
        counted = {
            (row["board"], bytes(row["nonce"]), bytes(row["sha256"]))
            for row in federation.journal.rows(
                "SELECT u.*, t.nonce FROM updates u JOIN tasks t USING (round, board) WHERE t.kind = 1"
            )
        } | {
            (row["board"], bytes(row["nonce"]), sha256(row["body"]).digest())
            for row in federation.journal.rows(
                "SELECT r.*, t.nonce FROM reports r JOIN tasks t USING (round, board) WHERE t.kind = 2"
            )
        }
        for key, verdicts in self.verdicts.items():
            assert len({v.accepted for v in verdicts}) == 1, verdicts
            assert verdicts[0].accepted == (key in counted), (key, verdicts)
            assert len({v.reason for v in verdicts}) == 1, verdicts
