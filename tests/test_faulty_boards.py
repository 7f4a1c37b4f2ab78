"""Twenty boards whose answers are lost, late, doubled and damaged, by seed: what holds of their journal and model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fleet_boards import JOB, Board, Clock, check, independent
from fleet_traffic import FATES, Traffic
from test_trainer import plan as small_plan
from ulearn_host.federation.rounds import Federation

WAYS: list[dict[str, Any]] = [
    {},
    {"evaluate_every": 2, "min_group": 3},
    {"up": "int8", "error_feedback": True, "down": "int8"},
    {"up": "top-k:20", "error_feedback": True, "server": "momentum:0.9"},
    {"up": "random-k:20", "rule": "clipped-mean", "stale": 2},
    {"personal": True, "rule": "trimmed-mean:0.2", "down": "int8", "evaluate_every": 3},
    {"deadline_s": 4.0, "retry_s": 0.5, "stale": 3, "server": "adam:0.002:0.01"},
    {"deadline_s": 6.0, "over": 1.0, "quorum": 0.6},
]


@pytest.mark.parametrize("seed", range(8))
def test_twenty_boards(seed: int, tmp_path: Path) -> None:
    plan, clock = Path(small_plan(tmp_path, "full")), Clock()
    job = replace(JOB, rounds=6, goal=8, first_deadline_s=20.0, **WAYS[seed % len(WAYS)])
    federation = Federation.create(tmp_path / "job", plan, job, clock)
    boards = [Board(f"b{i:02d}", tmp_path, plan) for i in range(20)]

    def pass_time(now: float) -> None:
        clock.now = now

    traffic = Traffic(federation, boards, plan, tmp_path, seed, pass_time)
    traffic.run(clock.now)
    check(federation)
    traffic.check(federation)
    status = federation.status()
    assert status["state"] == "done" and federation.commits() == 6
    assert len([row for row in status["history"] if row["state"] == "committed"]) == 6
    assert set(Counter(traffic.fates)) == set(FATES)
    stale = federation.journal.value("SELECT count(*) FROM updates WHERE entered > round")
    assert stale if job.stale else sum(row["late"] for row in status["history"])
    assert status["refused"]
    if not seed:
        assert independent(federation) == bytes(federation.model["blob"])
    for board in boards:
        board.follow(federation)
        assert bytes(board.model.base_id) == bytes(federation.model["base"])
