"""Rounds of federated training: the state machine, its deadlines, its rules, and what a journal says of them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fleet_boards import JOB, SECRET, Clock, asked, begun, check, finish, fleet, independent
from test_trainer import plan as small_plan
from ulearn import task as wire
from ulearn_host.errors import UserError
from ulearn_host.federation import deadlines
from ulearn_host.federation.rounds import Federation


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small perceptron that trains whole."""
    return Path(small_plan(tmp_path_factory.mktemp("plan"), "full"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


# One round.


def test_a_round_asks_more_than_it_needs_and_commits_at_the_goal(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """130 % are asked; the goal's last update commits at once; who comes later is refused, and everybody moves on."""
    federation, boards = begun(tmp_path, plan, clock, replace(JOB, goal=10), 20)
    tasks = asked(federation, boards, clock.now)
    assert len(tasks) == 13 and federation.head["state"] == "collect"
    by_name = {board.name: board for board in boards}
    answers = {name: by_name[name].answer(task) for name, task in tasks.items()}
    first = bytes(federation.model["base"])
    for i, name in enumerate(tasks):
        verdict = federation.submit(name, answers[name], clock.now, tasks[name].nonce)
        assert verdict.accepted == (i < 10)
        assert (bytes(federation.model["base"]) == first) == (i < 9)
        if not verdict.accepted:
            assert verdict.reason == "late: round 1 is over; ask for the next task"
    check(federation)
    assert independent(federation) == bytes(federation.model["blob"])
    (row,) = federation.status()["history"]
    assert (row["state"], row["asked"], row["updates"], row["late"]) == ("committed", 13, 10, 3)
    for board in boards:
        board.ask(federation, clock.now)
        board.follow(federation)
        assert bytes(board.model.base_id) == bytes(federation.model["base"]) != first
        assert bytes(board.model.train_blob) == bytes(federation.model["blob"])


@pytest.mark.parametrize(("answers", "state"), [(3, "abandoned"), (4, "committed"), (0, "abandoned")])
def test_a_deadline_commits_a_quorum(answers: int, state: str, tmp_path: Path, plan: Path, clock: Clock) -> None:
    """80 % of the goal is enough at the deadline and not a moment before; fewer change nothing."""
    federation, boards = begun(tmp_path, plan, clock, replace(JOB, goal=5, deadline_s=30.0), 9)
    tasks = asked(federation, boards, clock.now)
    assert len(tasks) == 7
    base, names = bytes(federation.model["base"]), list(tasks)[:answers]
    for board in boards:
        if board.name in names:
            assert federation.submit(
                board.name, board.answer(tasks[board.name]), clock.now, tasks[board.name].nonce
            ).accepted
    assert federation.tick(clock.now + 29.9) == pytest.approx(0.1)
    assert federation.head["state"] == "collect" and bytes(federation.model["base"]) == base
    federation.tick(clock.now + 30.0)
    row = federation.status()["history"][0]
    assert (row["state"], row["updates"]) == (state, answers)
    assert (bytes(federation.model["base"]) == base) == (state == "abandoned")
    assert federation.head["round"] == 2
    check(federation)


def test_a_round_ends_when_nobody_is_left_to_wait_for(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """Four boards for a goal of five: once all have answered, waiting for a deadline would be idle."""
    federation, boards = begun(tmp_path, plan, clock, replace(JOB, goal=5, deadline_s=1e6), 4)
    for board in boards:
        assert federation.head["round"] == 1
        assert board.turn(federation, clock.now).accepted  # type: ignore[union-attr]
    assert federation.status()["history"][0]["updates"] == 4 and federation.head["round"] == 2


def test_a_round_waits_for_enough_boards(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """Fewer than a quorum: none begins. Enough, and others may come: it waits until all have had their turn to ask."""
    job = replace(JOB, goal=5, retry_s=10.0)
    federation = Federation.create(tmp_path / "job", plan, job, clock)
    boards = fleet(federation, tmp_path, plan, 12)
    for board in boards[:3]:
        assert board.ask(federation, clock.now).kind == wire.WAIT
    clock.now += 100
    assert federation.tick(clock.now) > 0 and federation.head["state"] == "select"
    for board in boards[:4]:
        kind = board.ask(federation, clock.now).kind
    assert kind == wire.TRAIN and federation.head["asked"] == 4  # 100 s were time enough
    second = Federation.create(tmp_path / "other", plan, job, clock)
    for board in boards:
        second.enrol(board.name, SECRET, "test")
    for board in boards[:6]:
        assert board.ask(second, clock.now).kind == wire.WAIT
    assert second.tick(clock.now) == pytest.approx(12.5)
    assert second.tick(clock.now + 12.5) > 0 and second.head["asked"] == 6
    for board in boards:
        board.ask(second, clock.now + 12.5)
    assert second.head["asked"] == 6


def test_who_has_left_is_not_asked(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """Present is who asked of late; a broken link counts at once."""
    federation, boards = begun(tmp_path, plan, clock, replace(JOB, goal=5, quorum=0.4), 4)
    tasks = asked(federation, boards, clock.now)
    assert len(tasks) == 4
    federation.lost("b00", clock.now)
    clock.now += deadlines.LONGEST_S
    federation.tick(clock.now)
    assert federation.head["round"] == 2 and federation.head["state"] == "select"
    for board in boards[1:3]:
        board.ask(federation, clock.now)
    federation.tick(clock.now + 2)
    rows = federation.journal.rows("SELECT board FROM tasks WHERE round = 2")
    assert [row["board"] for row in rows] == ["b01", "b02"]
    states = {row["id"]: row["state"] for row in federation.status()["boards"]}
    assert states == {"b00": "gone", "b01": "idle", "b02": "idle", "b03": "gone"}


def test_a_board_that_asks_twice_gets_the_same_task(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """To the byte, from another host's process, too, until it has answered; its seed is job's, round's and board's."""
    federation, boards = begun(tmp_path, plan, clock, replace(JOB, goal=4))
    tasks = asked(federation, boards, clock.now)
    name = next(iter(tasks))
    board = next(b for b in boards if b.name == name)
    first = federation.task(name, board.facts, clock.now)
    assert federation.task(name, board.facts, clock.now + 3) == first
    federation.close()
    federation = Federation(tmp_path / "job", clock)
    assert federation.task(name, board.facts, clock.now + 5) == first
    task = wire.parse(first)
    assert task.seed == JOB.training_seed(1, name) != JOB.training_seed(2, name) and task.round == 1
    assert len({t.nonce for t in tasks.values()}) == len({t.seed for t in tasks.values()}) == len(tasks)
    body = board.answer(task)
    assert board.answer(wire.parse(first)) == body
    assert federation.submit(name, body, clock.now, task.nonce).accepted
    assert wire.parse(federation.task(name, board.facts, clock.now)).kind == wire.WAIT


def test_waiting_boards_come_back_at_different_times(tmp_path: Path, plan: Path, clock: Clock) -> None:
    federation = Federation.create(tmp_path / "job", plan, replace(JOB, goal=50, retry_s=8.0), clock)
    (board,) = fleet(federation, tmp_path, plan, 1)
    times = [board.ask(federation, clock.now).retry_ms for _ in range(300)]
    assert min(times) >= 6000 and max(times) <= 10000 and len(set(times)) > 200


# Deadlines.


def test_deadlines_are_drawn_from_measured_times() -> None:
    assert deadlines.deadline_s([], 600, 2, 0) == deadlines.deadline_s([1, 2], 600, 2, 0) == 600
    assert deadlines.deadline_s([10.0] * 20, 600, 2, 0) == 15
    assert deadlines.deadline_s([10.0] * 18 + [40.0] * 2, 600, 2, 0) == 60
    assert deadlines.deadline_s([10.0] * 17 + [1e6] * 3, 600, 2, 0) == 150  # three that slept
    assert deadlines.deadline_s([0.001] * 20, 600, 2, 0) == 2
    assert deadlines.deadline_s([10.0] * 20, 600, 2, 3) == 120
    assert deadlines.deadline_s([10.0] * 20, 600, 2, 99) == deadlines.LONGEST_S


def test_a_fleet_that_slows_down_is_waited_for(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """Late answers are measured, too, and rounds that were given up double the deadline: it follows both ways."""
    federation, boards = begun(tmp_path, plan, clock, replace(JOB, rounds=40, goal=4), 5)
    lengths = []
    for turn in range(18):
        slow = 4 <= turn < 9
        tasks = asked(federation, boards, clock.now)
        lengths.append(federation.head["deadline"] - federation.head["opened"])
        answers = {b.name: b.answer(tasks[b.name]) for b in boards if b.name in tasks}
        clock.now += 400.0 if slow else 4.0
        for name, body in answers.items():
            federation.submit(name, body, clock.now, tasks[name].nonce)
        federation.tick(clock.now)
    assert lengths[0] == 600 and lengths[2] == pytest.approx(6)
    states = "".join(row["state"][0] for row in federation.status()["history"])
    assert re.fullmatch("c{4}a{1,4}c+", states), (states, lengths)
    assert lengths[-1] < 61
    check(federation)


def test_a_clock_that_is_set_back(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """By an hour, in the middle of a round: its deadline is as far away as it was."""
    federation, boards = begun(tmp_path, plan, clock, replace(JOB, deadline_s=30.0))
    asked(federation, boards, clock.now)
    clock.now += 10
    assert federation.tick(clock.now) == pytest.approx(20.0)
    clock.now -= 3600
    assert federation.tick(clock.now) == pytest.approx(30.0)  # the round's last line in the log is its beginning
    clock.now += 30
    federation.tick(clock.now)
    assert federation.status()["history"][0]["state"] == "abandoned"


def test_time_away_does_not_count(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """A host that was down for an hour gives boards what was left of the round; a clock set back does no harm."""
    federation, boards = begun(tmp_path, plan, clock, replace(JOB, deadline_s=30.0))
    tasks = asked(federation, boards, clock.now)
    clock.now += 10
    board = next(b for b in boards if b.name in tasks)
    federation.submit(board.name, board.answer(tasks[board.name]), clock.now, tasks[board.name].nonce)
    federation.close()
    for away in (3600.0, -1e6):
        clock.now += away
        with Federation(tmp_path / "job", clock) as federation:
            assert federation.tick(clock.now) == pytest.approx(20.0)
            assert federation.status()["received"] == 1


# Rules, server steps, ways down, and their replay.

WAYS: dict[str, dict[str, Any]] = {
    "mean": {},
    "median": {"rule": "median"},
    "krum": {"rule": "multi-krum:1", "goal": 5, "quorum": 1.0},
    "trimmed": {"rule": "trimmed-mean:0.25"},
    "clipped": {"rule": "clipped-mean", "server": "momentum:0.5:0.7"},
    "momentum": {"server": "momentum:0.9"},
    "adam": {"server": "adam:0.002:0.01"},
    "full": {"down": "full"},
    "quality": {"quality": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_replay_is_the_model_to_the_bit(way: str, tmp_path: Path, plan: Path, clock: Clock) -> None:
    """And so is every board; a journal that was tampered with is found out."""
    federation, boards = begun(tmp_path, plan, clock, replace(JOB, rounds=4, **WAYS[way]), 7)
    if way == "quality":
        for i, board in enumerate(boards):
            federation.weigh(board.name, i / 3)
    finish(federation, boards, clock)
    check(federation)
    for board in boards:
        board.follow(federation)
        assert bytes(board.model.train_blob) == bytes(federation.model["blob"])
    if way == "mean":
        assert independent(federation) == bytes(federation.model["blob"])
    with federation.journal.transaction():
        federation.journal.run("UPDATE updates SET samples = samples + 40 WHERE board = 'b01' AND round = 2")
        federation.journal.run(
            "UPDATE updates SET body = (SELECT body FROM updates WHERE round = 3 LIMIT 1) WHERE round = 2"
        )
    with pytest.raises(UserError, match="round 2: the journal's updates give base"):
        federation.replay()
