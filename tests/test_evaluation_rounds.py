"""Evaluations between rounds: who is asked, what is told, and that training does not wait for long."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fleet_boards import JOB, Board, Clock, begun, check, finish, fleet
from test_trainer import plan as small_plan
from ulearn import task as wire
from ulearn_host.federation.rounds import Federation

EVERY = replace(JOB, rounds=2, goal=4, evaluate_every=1, min_group=3, first_deadline_s=50.0)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small perceptron that trains whole."""
    return Path(small_plan(tmp_path_factory.mktemp("plan"), "full"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def scoring(federation: Federation, boards: list[Board], now: float) -> dict[str, Any]:
    """The tasks of an evaluation by board."""
    tasks = {board.name: board.ask(federation, now) for board in boards}
    assert {task.kind for task in tasks.values()} <= {wire.EVALUATE, wire.WAIT}
    return {name: task for name, task in tasks.items() if task.kind == wire.EVALUATE}


def test_before_the_first_round_and_after_the_last(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """Pooled over all boards' samples, of the base that the figure stands beside."""
    federation, boards = begun(tmp_path, plan, clock, EVERY, 5)
    finish(federation, boards, clock)
    check(federation)
    status = json.loads(json.dumps(federation.status()))
    rows = federation.journal.rows("SELECT * FROM evaluations ORDER BY round")
    assert [row["round"] for row in rows] == [1, 2, 3] and all(row["reported"] == 5 for row in rows)
    assert [row["accuracy"] for row in status["history"]] == [rows[1]["accuracy"], rows[2]["accuracy"]]
    for turn, row in enumerate(rows):
        blob = federation.journal.value("SELECT blob FROM models WHERE round = ?", turn)
        right = count = 0
        for board in boards:
            alone = Board(board.name, tmp_path / f"alone{turn}", plan)
            wire.replace(alone.model, blob, bytes(row["base"]))
            alone.model.reset()
            held = alone.held_out
            hits = sum(alone.model.predict(held.x(i)) == held.target(i) for i in range(len(held)))
            told = next(b for b in status["boards"] if b["id"] == board.name)["accuracy"]
            assert told[turn] == [turn, hits / len(held)]
            right, count = right + hits, count + len(held)
        assert row["accuracy"] == pytest.approx(right / count)


def test_every_other_commit(tmp_path: Path, plan: Path, clock: Clock) -> None:
    federation, boards = begun(tmp_path, plan, clock, replace(EVERY, rounds=5, evaluate_every=2), 5)
    finish(federation, boards, clock)
    rows = federation.journal.rows("SELECT round FROM evaluations ORDER BY round")
    assert [row["round"] - 1 for row in rows] == [0, 2, 4, 5]  # commits before it


def test_a_plan_that_is_only_evaluated(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """No round at all: boards score the plan, and the job is done."""
    federation, boards = begun(tmp_path, plan, clock, replace(EVERY, rounds=0), 5)
    finish(federation, boards, clock)
    check(federation)
    assert federation.commits() == 0 and federation.journal.value("SELECT reported FROM evaluations") == 5


def test_nothing_is_told_of_few(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """Two boards reported, three were wanted: neither the pooled figure nor theirs."""
    federation, boards = begun(tmp_path, plan, clock, EVERY, 5)
    tasks = scoring(federation, boards, clock.now)
    for board in boards[:2]:
        assert federation.submit(
            board.name, board.answer(tasks[board.name]), clock.now, tasks[board.name].nonce
        ).accepted
    clock.now += 50
    federation.tick(clock.now)
    row = federation.journal.row("SELECT * FROM evaluations")
    assert row is not None and row["closed"] and row["reported"] == 2 and row["accuracy"] is None
    assert all(board["accuracy"] == [] for board in federation.status()["boards"])


def test_training_waits_until_the_deadline_and_no_longer(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """Boards that never report cost one deadline, which is measured, too; what comes after it is refused."""
    federation, boards = begun(tmp_path, plan, clock, EVERY, 5)
    tasks = scoring(federation, boards, clock.now)
    reports = {board.name: board.answer(tasks[board.name]) for board in boards}
    for board in boards[:4]:
        clock.now += 1
        assert federation.submit(board.name, reports[board.name], clock.now).accepted
    assert federation.tick(clock.now) == pytest.approx(46.0)
    assert federation.evaluation() is not None
    clock.now += 46
    for board in boards:
        board.ask(federation, clock.now)
    assert federation.evaluation() is None and federation.head["state"] == "collect"
    verdict = federation.submit("b04", reports["b04"], clock.now)
    assert not verdict.accepted and verdict.reason.startswith("late: the evaluation before round 1 is over")
    assert federation.submit("b03", reports["b03"], clock.now).accepted  # it was counted, and is told so again
    for board in boards:
        board.turn(federation, clock.now)
    row = federation.evaluation()  # five answers after 1, 2, 3, 4 and 50 s
    assert row is not None and row["deadline"] - row["opened"] == pytest.approx(1.5 * 10 * 3)


def test_a_large_fleet_is_asked_whole(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """A round begins with the first boards that are there; an evaluation stays open for a turn of all of them."""
    federation = Federation.create(tmp_path / "job", plan, EVERY, clock)
    boards = fleet(federation, tmp_path, plan, 12)
    for board in boards[:6]:
        board.ask(federation, clock.now)
    for board in boards[:6]:
        assert board.turn(federation, clock.now).accepted  # type: ignore[union-attr]
    assert federation.evaluation() is not None and federation.tick(clock.now) == pytest.approx(1.25)
    clock.now += 1
    for board in boards[6:]:
        assert board.turn(federation, clock.now).accepted  # type: ignore[union-attr]
    assert federation.evaluation() is None
    assert federation.journal.value("SELECT reported FROM evaluations") == 12


def test_a_board_that_comes_later_scores_too(tmp_path: Path, plan: Path, clock: Clock) -> None:
    federation, boards = begun(tmp_path, plan, clock, EVERY, 6)
    federation.enrol("z", b"a secret of a board", "test")
    late = Board("z", tmp_path, plan)
    assert late.ask(federation, clock.now).kind == wire.EVALUATE
    late.held_out.clear()
    nobody = Board("b00", tmp_path, plan)
    nobody.held_out.clear()
    assert nobody.ask(federation, clock.now).kind == wire.EVALUATE  # asked before it lost its samples
    assert federation.journal.value("SELECT count(*) FROM tasks WHERE kind = 2") == 7


def test_who_cannot_score_does_not_keep_others_from_it(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """Four of five boards hold samples back: they are asked, after the turn in which more might have come."""
    federation = Federation.create(tmp_path / "job", plan, EVERY, clock)
    boards = fleet(federation, tmp_path, plan, 5)
    boards[2].held_out.clear()
    for board in boards:
        assert board.ask(federation, clock.now).kind == wire.WAIT
    clock.now += 1.25
    assert len(scoring(federation, boards, clock.now)) == 4


def test_a_fleet_without_held_out_samples_trains(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """Nobody can be asked: rounds go on, and the job comes to its end."""
    federation = Federation.create(tmp_path / "job", plan, EVERY, clock)
    boards = [Board(f"b{i}", tmp_path, plan) for i in range(5)]
    for board in boards:
        federation.enrol(board.name, b"a secret of a board", "test")
        board.held_out.clear()
    finish(federation, boards, clock)
    assert federation.commits() == 2 and not federation.journal.value("SELECT sum(reported) FROM evaluations")


def test_wrong_reports_change_nothing(tmp_path: Path, plan: Path, clock: Clock) -> None:
    federation, boards = begun(tmp_path, plan, clock, EVERY, 5)
    tasks = scoring(federation, boards, clock.now)
    board, task = boards[0], tasks["b00"]
    body = board.answer(task)

    def other(**fields: Any) -> bytes:
        names = ("magic", "version", "zero", "classes", "job", "round", "base", "samples", "right", "loss")
        values = dict(zip(names, wire.struct.unpack_from(wire.EVALUATION, body), strict=True)) | fields
        return bytes(wire._closed(wire.struct.pack(wire.EVALUATION, *values.values())))

    wrong = [
        (body[:-1], "bytes, expected"),
        (body[:20] + b"\xff" + body[21:], "damaged"),
        (other(classes=3), "3 classes, expected 4"),
        (other(job=1), "of job 1, expected"),
        (other(round=2), "round 2"),
        (other(base=bytes(16)), "of base 0000"),
        (other(samples=6), "scored on 6 samples, the board told of 5"),
        (other(samples=0, right=0), "0 of 0 samples"),
        (other(right=6), "6 of 5 samples"),
    ]
    for data, reason in wrong:
        verdict = federation.submit("b00", data, clock.now, task.nonce)
        assert not verdict.accepted and reason in verdict.reason, verdict
    assert "not asked for it" in federation.submit("b00", other(round=9), clock.now).reason
    assert "not asked for it" in federation.submit("b01", body, clock.now, task.nonce).reason
    assert not federation.journal.rows("SELECT * FROM reports")
    assert federation.submit("b00", body, clock.now, task.nonce).accepted
    assert federation.submit("b00", body, clock.now, task.nonce).accepted
    assert "another one of this board" in federation.submit("b00", other(loss=1), clock.now, task.nonce).reason
    assert federation.journal.value("SELECT count(*) FROM reports") == 1
