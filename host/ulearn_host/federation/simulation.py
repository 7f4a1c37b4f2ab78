"""Hundreds of virtual boards in one job: the real state machine and the board's own code, in virtual time.

A run is a pure function of world and job. Time is virtual: events happen one after the other in the order of their
times, and what boards compute meanwhile is computed in processes, whose number changes nothing. Boards differ in speed,
some are slow (stragglers), some get a task and are not heard of for a while (dropouts).
"""

from __future__ import annotations

import heapq
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ulearn import task as wire
from ulearn_host import costs
from ulearn_host import numbers as n
from ulearn_host.errors import UserError
from ulearn_host.federation import facts as board_facts
from ulearn_host.federation.attacks import Attack
from ulearn_host.federation.job import Job
from ulearn_host.federation.rounds import Federation
from ulearn_host.federation.team import Team
from ulearn_host.fleet import PlanFacts, Samples

Progress = Callable[[int, int], None]

NS_PER_MAC = 50  # about what the emulated Cortex-M0 at a Pico's clock needs (README, "What it costs")
STEP_US = 300  # of MicroPython, a step
LINK = 20_000  # bytes a second
LATENCY_S = 0.2  # of a question and its answer
SPREAD = 0.25  # σ of the logarithm of boards' speeds
SLOWNESS = 8.0  # of a straggler
JITTER = 0.1  # σ of the logarithm of one task's time
AWAY = 4.0  # median of how long a board stays away, in times of a task
_ROOM = 2**30
PATIENCE = 3  # rounds that may be given up, for each that is to be committed


@dataclass(frozen=True)
class World:
    """Who learns from what. plan: a file; boards: each one's samples; test: samples that nobody learns from.

    tests: samples that each board holds back itself, or none. dropout: share of tasks after which a board is not heard
    of in time; stragglers: share of the boards that are SLOWNESS times slower; attack: boards that lie, if any. seed:
    of speeds, dropouts, and who lies.
    """

    plan: Path
    boards: tuple[Samples, ...]
    test: Samples
    tests: tuple[Samples, ...] = ()
    dropout: float = 0.0
    stragglers: float = 0.0
    attack: Attack | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        """Check what would fail late. Raises UserError."""
        if not self.boards:
            raise UserError("a simulation of no board; expected one or more")
        if self.tests and len(self.tests) != len(self.boards):
            raise UserError(f"{len(self.tests)} sets of samples to test {len(self.boards)} boards on; expected as many")
        for what, share in (("dropout", self.dropout), ("stragglers", self.stragglers)):
            if not 0 <= share < 1:
                raise UserError(f"{what}: {share}, expected 0 or more and below 1")

    @property
    def slowness(self) -> tuple[float, ...]:
        """How much longer each board takes than a Pico would."""
        rng, count = np.random.default_rng([self.seed, 4]), len(self.boards)
        times = np.exp(rng.normal(0, SPREAD, count))
        times[rng.permutation(count)[: round(self.stragglers * count)]] *= SLOWNESS
        return tuple(times.tolist())

    @property
    def liars(self) -> frozenset[int]:
        """The boards that lie."""
        return self.attack.liars(len(self.boards), self.seed) if self.attack else frozenset()


@dataclass(frozen=True)
class Round:
    """One round that is over.

    boards: whose updates it took. bytes_up, bytes_down: all that moved while it was open, questions of boards that had
    nothing to do included; update_bytes, longest: of the updates it took, in all and of the longest; base_bytes: of the
    bases that boards fetched. seconds: of virtual time. score: share of test samples right with the base it ended with,
    of a regression the mean squared error.
    """

    round: int
    state: str
    boards: tuple[str, ...]
    asked: int
    late: int
    bytes_up: int
    bytes_down: int
    update_bytes: int
    longest: int
    base_bytes: int
    seconds: float
    score: float


@dataclass
class Result:
    """A run. before: the frozen plan's score on the same samples; blob: the trainable weights at its end; samples: that
    judge; parameters: numbers that train."""

    labelled: bool
    before: float
    rounds: list[Round] = field(default_factory=list)
    blob: bytes = b""
    samples: int = 0
    parameters: int = 0

    @property
    def committed(self) -> list[Round]:
        """The rounds that changed the model."""
        return [r for r in self.rounds if r.state == "committed"]

    @property
    def after(self) -> float:
        """The last score."""
        return self.rounds[-1].score if self.rounds else self.before

    def late_mean(self, count: int) -> float:
        """The mean score over the last `count` commits: one alone moves by a point from round to round."""
        return float(np.mean([r.score for r in self.committed[-count:]] or [self.before]))


def name_of(board: int) -> str:
    """What the federation calls a board."""
    return f"board-{board:04d}"


def steps_us(plan: PlanFacts) -> int:
    """About how long a Pico needs for a training step, in microseconds: by its multiply-accumulates."""
    from ulearn import plan as plan_file

    programs = [p for p in plan_file.read(str(plan.path)).programs if p[n.P_KIND] == n.KIND_TRAIN]
    macs = sum(costs.macs(costs.records_of(bytes(p))) for p in programs) / max(1, len(programs))
    return STEP_US + round(macs * NS_PER_MAC / 1000)


def run(world: World, job: Job, processes: int | None = None, progress: Progress = lambda done, total: None) -> Result:
    """Carry a job out in a simulated fleet. processes: None: as many as there are cores; 1: this one.

    Raises UserError where the plan cannot train, or the rounds do not come to an end.
    """
    with TemporaryDirectory(prefix="ulearn-", dir=_fast_place()) as temporary:
        folder = Path(temporary)
        plan = folder / "fleet.ulm"
        shutil.copyfile(world.plan, plan)
        world = replace(world, plan=plan)  # beside the boards, who share it
        step_us = steps_us(PlanFacts(world.plan))
        told = [round(step_us * slow) for slow in world.slowness]
        with Team(world, folder, told, LINK, job.histogram, processes or os.cpu_count() or 1) as team:
            return _Clockwork(world, job, folder, team, progress).run(step_us)


def _fast_place() -> str | None:
    """Where files that nobody needs later are written without waiting for a disk."""
    place = "/dev/shm"
    return place if os.access(place, os.W_OK) and shutil.disk_usage(place).free > _ROOM else None


@dataclass(order=True)
class _Event:
    """What happens when. number: what comes first of two that happen at once."""

    time: float
    number: int
    what: Callable[[], None] = field(compare=False)


@dataclass
class _Board:
    """How a board is doing in virtual time. step_s: seconds that it takes for a training step."""

    name: str
    samples: int
    held_out: int
    step_s: float
    rng: np.random.Generator
    facts: bytes
    base_id: bytes = b""


class _Clockwork:
    """One run. Everything that is drawn comes from a generator of the board it is about."""

    def __init__(self, world: World, job: Job, folder: Path, team: Team, progress: Progress) -> None:
        self.world, self.job, self.team, self.progress = world, job, team, progress
        self.now, self.events, self.count = 0.0, list[_Event](), 0
        self.plan = PlanFacts(world.plan)
        self.folder = folder
        self.scores: dict[int, Any] = {}
        self.base_bytes: dict[int, int] = {}

    def run(self, step_us: int) -> Result:
        """All rounds. step_us: microseconds of a step on a board of slowness 1."""
        world, job = self.world, self.job
        told = zip(self.team.facts(), world.slowness, strict=True)
        self.boards = [self._board(i, facts, slow * step_us / 1e6) for i, (facts, slow) in enumerate(told)]
        with Federation.create(self.folder / "job", world.plan, job, clock=lambda: self.now) as federation:
            self.federation = federation
            for index, board in enumerate(self.boards):
                federation.enrol(board.name, os.urandom(16), "virtual")
                first = board.rng.uniform(0, job.retry_s)
                self._at(first, lambda index=index: self._ask(index))  # type: ignore[misc]
            self._score()
            while federation.head["state"] != "done":
                self._next()
            return self._result()

    def _board(self, index: int, facts: bytes, step_s: float) -> _Board:
        known = board_facts.parse(facts)
        rng = np.random.default_rng([self.world.seed, 5, index])
        return _Board(name_of(index), known.samples, known.held_out, step_s, rng, facts, known.base_id)

    # ---- Time --------------------------------------------------------------------------------------------------------

    def _at(self, seconds: float, what: Callable[[], None]) -> None:
        """Something that happens so many seconds from now."""
        self.count += 1
        heapq.heappush(self.events, _Event(self.now + seconds, self.count, what))

    def _next(self) -> None:
        """The next event: a board's, or what time alone brings."""
        federation = self.federation
        alarm = self.now + max(1e-3, federation.wait_s(self.now))
        if self.events and self.events[0].time <= alarm:
            event = heapq.heappop(self.events)
            self.now = event.time
            event.what()
        else:
            self.now = alarm
            federation.tick(self.now)
        if federation.model["round"] not in self.scores:
            self._score()
            self.progress(federation.commits(), self.job.rounds)
        if federation.head["round"] > PATIENCE * self.job.rounds + 20:
            done = federation.commits()
            why = federation.journal.value(
                "SELECT reason FROM rounds WHERE reason IS NOT NULL ORDER BY round DESC LIMIT 1"
            )
            raise UserError(
                f"{done} rounds were committed and {federation.head['round'] - 1 - done} given up, expected "
                f"{self.job.rounds} commits; the last one for this: {why}"
            )

    def _score(self) -> None:
        """Have the last base judged, meanwhile."""
        model = self.federation.model
        self.scores[model["round"]] = self.team.score(bytes(model["blob"]))

    # ---- A board's turn ----------------------------------------------------------------------------------------------

    def _ask(self, index: int) -> None:
        """It asks for a task, and carries it out or comes again."""
        board, federation = self.boards[index], self.federation
        body = federation.task(board.name, board_facts.parse(board.facts), self.now)
        task = wire.parse(body)
        if task.kind == wire.DONE:
            return
        if task.kind == wire.WAIT:
            # When to come back is a chance of its own: the host's is not ours to repeat.
            self._at(self.job.retry_s * board.rng.uniform(0.75, 1.25), lambda: self._ask(index))
            return
        steps = board.samples * task.epochs if task.kind == wire.TRAIN else board.held_out
        seconds = steps * board.step_s * float(np.exp(board.rng.normal(0, JITTER)))
        if board.rng.random() < self.world.dropout:
            away = AWAY * max(seconds, self.job.retry_s) * float(np.exp(board.rng.normal(0, 0.5)))
            self._at(away, lambda: self._ask(index))
            return
        kind, data = federation.down(board.name, board.base_id)
        turn = federation.head["round"]
        self.base_bytes[turn] = self.base_bytes.get(turn, 0) + len(data)
        working = self.team.work(index, kind, data, task.base_id, body)
        board.base_id = task.base_id
        seconds += LATENCY_S + (len(body) + len(data)) / LINK
        self._at(seconds, lambda: self._send(index, working, task.nonce))

    def _send(self, index: int, working: Any, nonce: bytes) -> None:
        """It is done, and its answer is on its way."""
        answer, self.boards[index].facts = working.result()
        self._at(LATENCY_S + len(answer) / LINK, lambda: self._arrive(index, answer, nonce))

    def _arrive(self, index: int, answer: bytes, nonce: bytes) -> None:
        """The host has the answer; the board asks for more."""
        self.federation.submit(self.boards[index].name, answer, self.now, nonce)
        self._at(LATENCY_S, lambda: self._ask(index))

    # ---- What came of it ---------------------------------------------------------------------------------------------

    def _result(self) -> Result:
        scores = {turn: score() for turn, score in self.scores.items()}
        rows = self.federation.journal.rows(
            "SELECT * FROM rounds WHERE state IN ('committed', 'abandoned') ORDER BY round"
        )
        entered: dict[int, list[tuple[str, int]]] = {}
        for row in self.federation.journal.rows("SELECT entered, board, length(body) FROM updates ORDER BY board"):
            entered.setdefault(row[0], []).append((row[1], row[2]))
        result = Result(
            self.plan.labelled,
            scores[0],
            blob=bytes(self.federation.model["blob"]),
            samples=len(self.world.test),
            parameters=len(self.plan.steps),
        )
        score = scores[0]
        for row in rows:
            score = scores.get(row["round"], score)
            took = entered.get(row["round"], []) if row["state"] == "committed" else []
            moved = {key: row[key] for key in ("round", "state", "asked", "late", "bytes_up", "bytes_down")}
            sizes = [size for _, size in took]
            result.rounds.append(
                Round(
                    **moved,
                    boards=tuple(board for board, _ in took),
                    update_bytes=sum(sizes),
                    longest=max(sizes, default=0),
                    base_bytes=self.base_bytes.get(row["round"], 0),
                    seconds=row["ended"] - row["began"],
                    score=score,
                )
            )
        return result
