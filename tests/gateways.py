"""Fleets of virtual boards behind one host or several, and a gateway's process for tests/test_flower.py.

python tests/gateways.py FOLDER NUMBER
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ulearn import task as wire
from ulearn_host import fleet
from ulearn_host.federation.desk import Desk
from ulearn_host.federation.facts import parse
from ulearn_host.federation.gateway import Gateway
from ulearn_host.federation.job import Job
from ulearn_host.federation.rounds import Federation
from ulearn_host.federation.virtual import VirtualBoard

SIZES = (3, 1, 2, 4)  # boards of each gateway
DROPPED = {(2, "board-3"), (2, "board-4"), (4, "board-0")}  # (round, board): its answer never comes
SECRET = b"of nobody's concern"
Clock = Callable[[], float]


class Time:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def names(gateway: int | None = None) -> list[str]:
    """The boards of a gateway, or of all."""
    first = sum(SIZES[:gateway]) if gateway is not None else 0
    return (
        [f"board-{i}" for i in range(first, first + SIZES[gateway])]
        if gateway is not None
        else [f"board-{i}" for i in range(sum(SIZES))]
    )


def board(folder: Path, plan: Path, name: str) -> VirtualBoard:
    """A board with samples of its own, of which each has another number."""
    facts, number = fleet.PlanFacts(plan), int(name.split("-")[1])
    rng = np.random.default_rng([5, number])
    count = 4 + 3 * number
    x = rng.normal(size=(count, facts.inputs)) + 0.2 * number
    return VirtualBoard(folder / name, plan, facts.samples(x, rng.integers(0, facts.outputs, count), name))


def enrol(federation: Federation, folder: Path, plan: Path, boards: Sequence[str]) -> dict[str, VirtualBoard]:
    """Boards, known to a host."""
    for name in boards:
        federation.enrol(name, SECRET, "test")
    return {name: board(folder, plan, name) for name in boards}


def visit(federation: Federation, boards: dict[str, VirtualBoard], clock: Clock) -> None:
    """Every board comes once: asks for a task, takes the last base, answers; but for those that drop out."""
    for name, one in boards.items():
        given = federation.task(name, parse(one.facts()), clock())
        task = wire.parse(given)
        one.take(*federation.down(name, one.base_id), task.base_id)
        if task.kind in (wire.TRAIN, wire.FEATURES) and (task.round, name) not in DROPPED:
            verdict = federation.submit(name, one.answer(given), clock(), task.nonce)
            assert verdict.accepted, verdict.reason
    federation.tick(clock())


def main(folder: Path, number: int) -> None:
    """A gateway with its boards, until the job is over."""
    job = Job.from_json((folder / "job.json").read_text())
    lock, plan = threading.Lock(), folder / "plan.ulm"
    with Gateway.begin(folder / f"gateway-{number}", plan, job, SIZES[number]) as gateway:
        boards = enrol(gateway, folder / f"boards-{number}", plan, names(number))

        def call(do: Callable[[], bytes | None]) -> bytes | None:
            with lock:
                return do()

        with Desk(gateway, folder / f"{number}.sock", call):
            while gateway.head["state"] != "done":
                with lock:
                    visit(gateway, boards, time.time)
                time.sleep(0.2)
            with lock:
                visit(gateway, boards, time.time)
            time.sleep(1)  # for the last answer
    (folder / f"{number}.json").write_text(json.dumps({name: one.base_id.hex() for name, one in boards.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
