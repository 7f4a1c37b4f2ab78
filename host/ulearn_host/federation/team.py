"""The processes that virtual boards live in. A board stays in one of them, since it holds what it has learned."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ulearn
from ulearn_host import workers
from ulearn_host.federation.attacks import Attack
from ulearn_host.federation.virtual import VirtualBoard, store
from ulearn_host.fleet import Samples

if TYPE_CHECKING:
    from ulearn_host.federation.simulation import World

Score = Callable[[], float]


@dataclass
class Crew:
    """The boards of one process, and the part of the test samples that it judges with.

    boards: by number samples to learn from and to test on, how it lies if it does, microseconds of a step. link: bytes
    a second.
    """

    plan: Path
    folder: Path
    boards: dict[int, tuple[Samples, Samples | None, Attack | None, int]]
    test: Samples
    link: int
    histogram: bool
    _made: dict[int, VirtualBoard] = field(default_factory=dict)
    _judge: Any = None

    def board(self, index: int) -> VirtualBoard:
        """A board, made when it is first needed."""
        if index not in self._made:
            train, test, attack, step_us = self.boards[index]
            folder = self.folder / f"board-{index}"
            told = {"step_us": step_us, "link": self.link}
            self._made[index] = VirtualBoard(folder, self.plan, train, test, attack=attack, **told)
        return self._made[index]

    def facts(self) -> dict[int, bytes]:
        """What each board tells of itself."""
        return {index: self.board(index).facts(self.histogram) for index in self.boards}

    def work(self, index: int, kind: str, data: bytes, base_id: bytes, task: bytes) -> tuple[bytes, bytes]:
        """A board takes what comes down and carries out its task; its answer, and its facts."""
        board = self.board(index)
        board.take(kind, data, base_id)
        answer = board.answer(task)
        return answer, board.facts(self.histogram)

    def score(self, blob: bytes) -> float:
        """How many of its test samples are right with these weights; of a regression the sum of mean squared errors."""
        if not len(self.test):
            return 0.0
        if self._judge is None:
            model = ulearn.load(str(self.plan))
            self._judge = model, store(model, self.test.x, self.test.y)
        model, samples = self._judge
        model.train_blob[:] = blob
        from ulearn.evaluation import evaluate

        total = float(evaluate(model, samples)) * len(samples)
        return round(total) if model.labelled else total


class Team:
    """All boards of a world, in one process or several. What they answer does not depend on how many."""

    def __init__(
        self, world: World, folder: Path, step_us: Sequence[int], link: int, histogram: bool, processes: int
    ) -> None:
        """folder: where the boards' folders are made. step_us, link, histogram: what boards tell of themselves.
        processes: 1: no other than this one."""
        self._all, self._test = len(world.boards), len(world.test)
        count = self._count = max(1, min(processes, self._all))
        liars, tests = world.liars, world.tests or [None] * self._all
        labelled = world.test.y.ndim == 1
        self._hands: list[Executor] = []
        for hand in range(count):
            boards = {
                i: (world.boards[i], tests[i], world.attack if i in liars else None, step_us[i])
                for i in range(hand, self._all, count)
            }
            # Real numbers are summed in one place, since the order of their sum matters.
            part = slice(hand, None, count) if labelled else slice(None if hand == 0 else 0)
            test = Samples(world.test.x[part], world.test.y[part])
            crew = Crew(world.plan, folder / "boards", boards, test, link, histogram)
            self._hands.append(_Here(crew) if count == 1 else _process(crew))

    def __enter__(self) -> Team:
        """Ended at the end of a with statement."""
        return self

    def __exit__(self, *fault: object) -> None:
        for hand in self._hands:
            hand.shutdown(cancel_futures=True)

    def facts(self) -> list[bytes]:
        """What each board tells of itself, in order."""
        told: dict[int, bytes] = {}
        for future in [hand.submit(_call, "facts") for hand in self._hands]:
            told |= future.result()
        return [told[i] for i in range(self._all)]

    def work(self, index: int, *given: Any) -> Future[tuple[bytes, bytes]]:
        """Crew.work of a board, begun."""
        return self._hands[index % self._count].submit(_call, "work", index, *given)

    def score(self, blob: bytes) -> Score:
        """Begin to judge weights; what is returned is called for the share right, or the mean squared error."""
        parts: Sequence[Future[float]] = [hand.submit(_call, "score", blob) for hand in self._hands]
        return lambda: sum(part.result() for part in parts) / max(1, self._test)


class _Here(Executor):
    """Does at once what it is asked for."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew

    def submit(self, call: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        """_call, of a crew of its own: two teams may live in one process."""
        name, *rest = given
        done: Future[Any] = Future()
        done.set_result(getattr(self._crew, name)(*rest))
        return done


def _process(crew: Crew) -> Executor:
    """A process for a crew."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (crew,))


_crew: Crew | None = None  # of a worker process


def _begin(crew: Crew) -> None:
    """Of a worker, once. It ends with who started it, even where that one was killed."""
    global _crew
    _crew = crew
    workers.end_with_parent()


def _call(name: str, *given: Any) -> Any:
    assert _crew is not None
    return getattr(_crew, name)(*given)
