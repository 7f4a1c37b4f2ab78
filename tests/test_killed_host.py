"""A host in a process of its own, killed by SIGKILL before and after every transition, in every rename, anywhere."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet_boards import JOB, Board, check, independent
from fleet_traffic import ALL_WELL, SHARES, Traffic
from mortal_host import MortalHost
from test_trainer import plan as small_plan
from ulearn.checkpoint import identity
from ulearn_host.federation.advance import first_blob
from ulearn_host.federation.core import MODEL
from ulearn_host.federation.job import Job
from ulearn_host.federation.rounds import Federation
from ulearn_host.fleet import PlanFacts

BOARDS = int(os.environ.get("ULEARN_FLEET_BOARDS", "5"))
ROUNDS = int(os.environ.get("ULEARN_FLEET_ROUNDS", "2"))
TRANSITIONS = {"create", "enrol", "resume", "select", "configure", "task", "update", "commit", "done"}
REFUSALS = {"late", "refuse"}
PUBLISHED = {"before publish", "publish written", "publish renamed"}
EVALUATIONS = {"evaluate", "report", "evaluated"}


def run(
    folder: Path, job: Job, boards: int, seed: int, lives: Any = None, shares: tuple[float, ...] = SHARES
) -> tuple[MortalHost, Federation, Traffic]:
    """Until the job is done, however often the host dies; then the journal, opened once more."""
    plan = Path(small_plan(folder, "full"))
    host = MortalHost(folder / "job", plan, job, lives)
    fleet = [Board(f"b{i:02d}", folder, plan) for i in range(boards)]

    def pass_time(now: float) -> None:
        host.now = now

    traffic = Traffic(host, fleet, plan, folder, seed, pass_time)
    traffic.shares = shares

    def autopsy() -> None:
        """The model file is whole at any moment, and nothing that was not committed before."""
        if (folder / "job" / MODEL).exists() and lives is None:
            left = PlanFacts(folder / "job" / MODEL)
            told = {details["base_id"] for event, details in host.events if event == "commit"}
            base = identity(left.model_id, first_blob(left)).hex()
            assert base in told or base == identity(left.model_id, first_blob(PlanFacts(plan))).hex()

    host.autopsy = autopsy
    try:
        traffic.run(1000.0)
    finally:
        host.end()
    federation = Federation(folder / "job", lambda: host.now)
    check(federation)
    traffic.check(federation)
    assert federation.head["state"] == "done" and federation.commits() == job.rounds
    # What was told to have been committed is there, and in its place.
    committed = {d["round"]: d["base_id"] for event, d in host.events if event == "commit"}
    chain = {row["round"]: row["base"].hex() for row in federation.journal.rows("SELECT * FROM models")}
    assert committed.items() <= chain.items() and len(chain) == job.rounds + 1
    for board in fleet:
        board.follow(federation)
        assert bytes(board.model.train_blob) == bytes(federation.model["blob"])
    return host, federation, traffic


@pytest.mark.parametrize("way", ["mean", "adam"])
def test_killed_at_every_transition(way: str, tmp_path: Path) -> None:
    """Each event of each round and board is the death of one life, before it and after it. 20 boards and 30 rounds with
    ULEARN_FLEET_BOARDS=20 ULEARN_FLEET_ROUNDS=30, which takes minutes."""
    job = replace(JOB, rounds=ROUNDS, goal=BOARDS * 7 // 10, first_deadline_s=20.0, evaluate_every=2, min_group=1)
    if way == "adam":
        job = replace(job, server="adam:0.002:0.01", down="int8", up="int8", error_feedback=True, evaluate_every=0)
    host, federation, _ = run(tmp_path, job, BOARDS, 1)
    told = {event for event, _ in host.events}
    wanted = TRANSITIONS if way == "adam" else TRANSITIONS | EVALUATIONS | REFUSALS
    assert told >= wanted | {f"before {event}" for event in wanted} | PUBLISHED
    assert host.deaths == len(host.killed) > 60
    if way == "mean":
        assert independent(federation) == bytes(federation.model["blob"])


def test_killed_between_any_two_statements(tmp_path: Path) -> None:
    """In the middle of transactions, too: lives of random length, counted in SQL statements."""
    rng = np.random.default_rng(4)
    job = replace(JOB, rounds=3, goal=3, first_deadline_s=20.0, server="momentum:0.9")
    host, _, _ = run(tmp_path, job, 5, 2, lambda: int(rng.integers(10, 120)))
    assert host.deaths > 20


def test_the_same_model_without_deaths(tmp_path: Path) -> None:
    """Where the same boards answer, a host that dies at every step ends at the bits of one that lives."""
    job = replace(JOB, rounds=2, goal=4, over=1.0, quorum=1.0, first_deadline_s=1e5)
    blobs = []
    for name, lives in (("mortal", None), ("immortal", lambda: 10**9)):
        folder = tmp_path / name
        folder.mkdir()
        _, federation, _ = run(folder, job, 4, 3, lives, ALL_WELL)
        assert [row["state"] for row in federation.status()["history"]] == ["committed"] * 2
        blobs.append(bytes(federation.model["blob"]))
    assert blobs[0] == blobs[1]
