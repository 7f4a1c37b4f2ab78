"""What a job may ask for besides: late updates, weights, last layers of one's own, ways down; and a full disk."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet_boards import JOB, Board, Clock, asked, begun, check, finish, fleet
from test_trainer import plan as small_plan
from ulearn_host import aggregate, rules
from ulearn_host.errors import UserError
from ulearn_host.federation.core import MODEL
from ulearn_host.federation.down import stored
from ulearn_host.federation.journal import JournalError
from ulearn_host.federation.rounds import Federation


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small perceptron that trains whole."""
    return Path(small_plan(tmp_path_factory.mktemp("plan"), "full"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def one_round(
    federation: Federation, boards: list[Board], clock: Clock, *left_out: str, passing_s: float = 1.5
) -> dict[str, Any]:
    """All that are asked answer but some, at once; the tasks. passing_s: before, so that nobody is waited for."""
    clock.now += passing_s
    tasks = asked(federation, boards, clock.now)
    for board in boards:
        if board.name in tasks and board.name not in left_out:
            federation.submit(board.name, board.answer(tasks[board.name]), clock.now, tasks[board.name].nonce)
    return tasks


def test_a_late_update_counts_less(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """One commit late: (1 + 1)^-1 of its samples, in the next round, in the place of the board's own part in it."""
    job = replace(JOB, goal=4, over=1.0, quorum=0.75, stale=1, stale_exponent=1.0, deadline_s=20.0)
    federation, boards = begun(tmp_path, plan, clock, job, 4)
    tasks = asked(federation, boards, clock.now)
    bodies = {board.name: board.answer(tasks[board.name]) for board in boards}
    for board in boards[1:]:
        federation.submit(board.name, bodies[board.name], clock.now, tasks[board.name].nonce)
    clock.now += 20
    federation.tick(clock.now)
    assert federation.commits() == 1
    verdict = federation.submit("b00", bodies["b00"], clock.now, tasks["b00"].nonce)
    assert verdict.accepted and verdict.reason == "counted in round 2"
    base = bytes(federation.model["blob"])
    second = one_round(federation, boards[1:], clock, passing_s=0)
    assert federation.commits() == 2 and "b00" not in second
    rows = federation.journal.rows("SELECT * FROM updates WHERE entered = 2 ORDER BY board")
    assert [(row["board"], row["round"], row["stale"]) for row in rows] == [
        ("b00", 1, 1), ("b01", 2, 0), ("b02", 2, 0), ("b03", 2, 0)]  # fmt: skip
    assert federation.submit("b00", bodies["b00"], clock.now, tasks["b00"].nonce) == verdict
    table, steps = federation.plan.table, federation.plan.steps
    real = np.stack([aggregate.decode(bytes(row["body"]), table).values * steps for row in rows])
    mean = rules.mean(real, [row["samples"] / (1 + row["stale"]) for row in rows]) / steps
    moved = stored(bytes(federation.model["blob"]), table) - stored(base, table)
    assert np.array_equal(moved, np.sign(mean) * np.floor(np.abs(mean) + 0.5))
    check(federation)


def test_too_late_is_late(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """Two commits where one is allowed; and what was refused once stays refused."""
    job = replace(JOB, goal=3, over=1.3, quorum=1.0, stale=1, rounds=9)
    federation, boards = begun(tmp_path, plan, clock, job, 4)
    tasks = asked(federation, boards, clock.now)
    body = boards[0].answer(tasks["b00"])
    one_round(federation, boards, clock, "b00")
    one_round(federation, boards[1:], clock)
    assert federation.commits() == 2
    for _ in range(3):
        verdict = federation.submit("b00", body, clock.now, tasks["b00"].nonce)
        assert not verdict.accepted and verdict.reason.startswith("late: round 1 is over")
    assert federation.status()["history"][0]["late"] == 1
    check(federation)


def test_what_was_refused_stays_refused(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """An update comes late in a round that its board has part in already; in the next one it would have counted."""
    job = replace(JOB, goal=3, over=1.3, quorum=0.6, stale=5, rounds=9)
    federation, boards = begun(tmp_path, plan, clock, job, 4)
    tasks = asked(federation, boards, clock.now)
    late = boards[0].answer(tasks["b00"])
    one_round(federation, boards, clock, "b00")
    second = asked(federation, boards, clock.now)
    body = boards[0].answer(second["b00"])
    assert federation.submit("b00", body, clock.now, second["b00"].nonce).accepted
    refused = federation.submit("b00", late, clock.now, tasks["b00"].nonce)
    assert not refused.accepted and federation.commits() == 1
    one_round(federation, boards, clock, "b00")
    assert federation.commits() == 2
    assert federation.submit("b00", late, clock.now, tasks["b00"].nonce) == refused
    assert federation.submit("b00", body, clock.now, second["b00"].nonce).accepted
    check(federation)


def test_quality_weighs(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """A board of quality 0 moves nothing; with all at 0 the round is given up, and says why."""
    federation, boards = begun(tmp_path, plan, clock, replace(JOB, goal=2, over=1.0, quality=True, rounds=9), 2)
    federation.weigh("b00", 0)
    federation.weigh("b01", 0.25)
    base = bytes(federation.model["blob"])
    tasks = one_round(federation, boards, clock)
    (row,) = federation.journal.rows("SELECT * FROM updates WHERE board = 'b01'")
    alone = aggregate.decode(bytes(row["body"]), federation.plan.table).values
    moved = stored(bytes(federation.model["blob"]), federation.plan.table) - stored(base, federation.plan.table)
    assert tasks and np.array_equal(moved, alone)
    federation.weigh("b01", 0)
    one_round(federation, boards, clock)
    last = federation.status()["history"][-1]
    assert last["state"] == "abandoned" and "weigh" in last["reason"]
    with pytest.raises(UserError, match="quality of -1"):
        federation.weigh("b00", -1)
    with pytest.raises(UserError, match="not enrolled"):
        federation.weigh("z", 1)


def test_last_layers_stay_on_their_boards(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """The fleet agrees on a base in which the last layer is the plan's, and every board has another."""
    federation, boards = begun(tmp_path, plan, clock, replace(JOB, personal=True, rounds=4), 5)
    finish(federation, boards, clock)
    check(federation)
    first = bytes(federation.journal.value("SELECT blob FROM models WHERE round = 0"))
    last = bytes(federation.model["blob"])
    cut = [t[2] for t in aggregate.wire.tensors(federation.plan.table)][federation.tensors]
    assert 0 < cut < len(first) and last[:cut] != first[:cut] and last[cut:] == first[cut:]
    owns = set()
    for board in boards:
        board.follow(federation)
        assert bytes(board.model.base_id) == bytes(federation.model["base"])
        assert bytes(board.model.train_blob[:cut]) == last[:cut]
        owns.add(bytes(board.model.train_blob[cut:]))
    assert len(owns) == 5
    head = Path(small_plan(tmp_path, "last"))
    with pytest.raises(UserError, match="last layer of each board's own: the plan trains nothing else"):
        Federation.create(tmp_path / "other", head, replace(JOB, personal=True))


@pytest.mark.parametrize("way", ["full", "difference", "int8"])
def test_any_base_comes_to_the_last_one(way: str, tmp_path: Path, plan: Path, clock: Clock) -> None:
    """From wherever a board stopped, by the shortest that gives the bits; of what it never had, the whole."""
    federation, boards = begun(tmp_path, plan, clock, replace(JOB, down=way, rounds=5), 5)
    sleepers = [Board(f"s{i}", tmp_path, plan) for i in range(6)]
    for board in sleepers:
        federation.enrol(board.name, b"a secret of a board", "test")
    for i in range(5):
        one_round(federation, boards, clock)
        assert federation.commits() == i + 1
        for board in sleepers[i + 1 :]:
            board.follow(federation)
    blob = bytes(federation.model["blob"])
    kinds = []
    for board in sleepers:
        kind, data = federation.down(board.name, bytes(board.model.base_id))
        kinds.append(kind)
        assert len(data) <= len(blob)
        board.follow(federation)
        assert bytes(board.model.train_blob) == blob
        assert federation.down(board.name, bytes(board.model.base_id)) == ("none", b"")
    assert kinds[5] == "none" and kinds[4] == ("update" if way == "int8" else "full")  # 120 numbers: headers count
    assert federation.down("b00", bytes(16)) == ("full", blob)
    check(federation)


def test_the_int8_way_down_leaves_nothing_out_for_ever(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """What was not told is held, to the unit: told and held together are all exact means."""
    federation, boards = begun(tmp_path, plan, clock, replace(JOB, down="int8", rounds=6), 5)
    table = federation.plan.table
    start = stored(bytes(federation.model["blob"]), table)
    exact = np.zeros(len(start), np.int64)
    for turn in range(1, 7):
        one_round(federation, boards, clock)
        rows = federation.journal.rows("SELECT * FROM updates WHERE entered = ?", turn)
        exact += aggregate.fedavg([aggregate.decode(bytes(row["body"]), table) for row in rows]).values
        moved = stored(bytes(federation.model["blob"]), table) - start
        assert np.array_equal(moved + federation.held().residual, exact), turn
    assert np.any(federation.held().residual)


def test_a_disk_that_takes_no_model_file(
    tmp_path: Path, plan: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit lasts, boards go on, and the file follows as soon as it can."""
    federation, boards = begun(tmp_path, plan, clock, replace(JOB, goal=3), 4)
    model = federation.folder / MODEL
    before = model.read_bytes()
    events: list[str] = []
    federation.observe = lambda event, details: events.append(event)

    def full(old: Path, new: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        one_round(federation, boards, clock)
        assert federation.commits() == 1 and model.read_bytes() == before and "publish failed" in events
    federation.tick(clock.now)
    assert events[-1] == "publish" and model.read_bytes() != before
    check(federation)


def test_a_disk_that_fills_up(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """That is no fault of the boards': nothing is refused, nothing half done, and with room again it goes on."""
    federation, boards = begun(tmp_path, plan, clock, replace(JOB, rounds=8), 5)
    limit = federation.journal.value("PRAGMA max_page_count")
    stopped = 0
    for more in range(1, 12):
        pages = federation.journal.value("PRAGMA page_count")
        federation.journal.value(f"PRAGMA max_page_count = {pages + more % 3}")
        try:
            finish(federation, boards, clock)
        except JournalError as fault:
            assert "full; nothing was changed" in str(fault)
            stopped += 1
        check(federation)
    federation.journal.value(f"PRAGMA max_page_count = {limit}")
    finish(federation, boards, clock)
    check(federation)
    assert stopped > 5 and not federation.status()["refused"]


def test_status_is_plain_and_bounded(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """Six hundred rounds that were given up; what is told of them fits, and is JSON."""
    federation, boards = begun(tmp_path, plan, clock, replace(JOB, goal=3, deadline_s=1.0, retry_s=1000.0), 4)
    for _ in range(600):
        clock.now += 1
        federation.tick(clock.now)
    status = json.loads(json.dumps(federation.status()))
    assert len(status["history"]) == 500 and status["history"][-1]["round"] == 600
    assert status["round"] == 601 and status["boards"][0]["state"] in ("idle", "training")
    assert federation.commits() == 0 and len(boards) == 4


def test_a_fleet_that_is_enrolled_twice(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """The same again changes nothing; another secret takes the place of the first."""
    federation = Federation.create(tmp_path / "job", plan, JOB, clock)
    fleet(federation, tmp_path, plan, 2)
    count = federation.journal.value("SELECT count(*) FROM audit")
    fleet(federation, tmp_path, plan, 2)
    assert federation.journal.value("SELECT count(*) FROM audit") == count
    federation.enrol("b00", b"another secret of it", "usb")
    assert federation.secret("b00") == b"another secret of it" and federation.boards() == ["b00", "b01"]
    assert federation.status()["boards"][0]["link"] == "usb"
