"""What boards send to a round: what counts, and what is refused, told, counted and changes nothing."""

from __future__ import annotations

import struct
from binascii import crc32
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fleet_boards import JOB, SECRET, Board, Clock, asked, begun, check
from test_trainer import plan as small_plan
from ulearn import update as update_wire
from ulearn_host.errors import UserError


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small perceptron that trains whole."""
    return Path(small_plan(tmp_path_factory.mktemp("plan"), "full"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


# What is refused.


def damaged(body: bytes, **fields: int) -> bytes:
    """An update with other header fields and a checksum that fits."""
    names = (
        "magic",
        "version",
        "encoding",
        "size",
        "model",
        "base",
        "samples",
        "values",
        "saturated",
        "b",
        "w",
        "about",
    )
    values = dict(zip(names, struct.unpack_from(update_wire.HEADER, body), strict=True)) | fields
    fresh = struct.pack(update_wire.HEADER, *values.values()) + body[update_wire.HEADER_BYTES : -4]
    return fresh + struct.pack("<I", crc32(fresh))


def test_wrong_updates_change_nothing(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """Each is refused with its reason, audited and counted; then the right one still counts."""
    federation, boards = begun(tmp_path, plan, clock)
    tasks = asked(federation, boards, clock.now)
    name, task = next(iter(tasks.items()))
    board = next(b for b in boards if b.name == name)
    body = board.answer(task)
    other = next(t for n, t in tasks.items() if n != name)
    wrong: list[tuple[bytes, bytes | None, str]] = [
        (b"", task.nonce, "cut short: 0 bytes"),
        (body[:-1], task.nonce, "its header says"),
        (body[:70] + b"\xff" + body[71:], task.nonce, "damaged"),
        (body + bytes(100000), task.nonce, "bytes, expected at most"),
        (b"uLXX" + body[4:], task.nonce, "does not begin with"),
        (damaged(body, samples=0), task.nonce, "counts 0 samples"),
        (damaged(body, samples=2**32 - 1), task.nonce, "counts 4294967295 samples"),
        (damaged(body, samples=len(board.samples) + 1), task.nonce, "the board told of"),
        (damaged(body, model=bytes(16)), task.nonce, "of model 0000"),
        (damaged(body, base=bytes(16)), task.nonce, "from base 0000"),
        (damaged(body, base=bytes(16)), None, "not asked to train from base 0000"),
        (body, other.nonce, "of no task that this board was given"),
        (body, bytes(16), "of no task that this board was given"),
        (damaged(body, encoding=9), task.nonce, "encoding 9"),
    ]
    before = federation.status()
    for i, (data, nonce, reason) in enumerate(wrong):
        for _ in range(2):  # told twice, counted once
            verdict = federation.submit(name, data, clock.now, nonce)
            assert not verdict.accepted and reason in verdict.reason, verdict
        status = federation.status()
        assert [status[key] for key in ("round", "state", "received", "model")] == [
            before[key] for key in ("round", "state", "received", "model")
        ]
        assert next(b for b in status["boards"] if b["id"] == name)["refused"] <= i + 1
        assert status["refused"][-1]["board"] == name
    told = {row["reason"] for row in federation.status()["refused"]}
    assert len(told) >= 10
    assert federation.submit(name, body, clock.now, task.nonce).accepted
    assert federation.submit(name, body, clock.now, task.nonce).accepted
    assert federation.status()["received"] == 1
    another = damaged(body, samples=1)
    assert "another one of this board is counted" in federation.submit(name, another, clock.now, task.nonce).reason
    check(federation)


def test_refusals_do_not_fill_the_disk(tmp_path: Path, plan: Path, clock: Clock) -> None:
    federation, boards = begun(tmp_path, plan, clock)
    rng = np.random.default_rng(3)
    for _ in range(300):
        assert not federation.submit("b00", b"uLUP" + rng.bytes(90), clock.now).accepted
    assert federation.journal.value("SELECT count(*) FROM audit WHERE event = 'refuse'") == 20
    assert federation.status()["boards"][0]["refused"] == 300


def test_strangers_have_no_say(tmp_path: Path, plan: Path, clock: Clock) -> None:
    federation, (board, *_) = begun(tmp_path, plan, clock)
    stranger = Board("stranger", tmp_path, plan)
    with pytest.raises(UserError, match="not enrolled"):
        stranger.ask(federation, clock.now)
    with pytest.raises(UserError, match="not enrolled"):
        federation.submit("stranger", b"", clock.now)
    assert federation.secret("stranger") is None and federation.secret("b00") == SECRET
    with pytest.raises(UserError, match="deploy its plan"):
        federation.task("b00", replace(board.facts, model_id=bytes(16)), clock.now)
    with pytest.raises(UserError, match="expected at most"):
        federation.task("b00", replace(board.facts, samples=2**32 - 1), clock.now)
    with pytest.raises(UserError, match="expected a name"):
        federation.enrol("a b\n", SECRET, "test")
    with pytest.raises(UserError, match="secret of 3 bytes"):
        federation.enrol("c", b"abc", "test")


def test_an_answer_to_a_lost_round_does_not_count_in_the_next(tmp_path: Path, plan: Path, clock: Clock) -> None:
    """Two rounds with one base: only the nonce tells them apart, and they have different seeds."""
    federation, boards = begun(tmp_path, plan, clock, replace(JOB, deadline_s=10.0))
    first = asked(federation, boards, clock.now)
    board = next(b for b in boards if b.name in first)
    body = board.answer(first[board.name])
    clock.now += 10
    federation.tick(clock.now)
    second = asked(federation, boards, clock.now)
    assert federation.head["round"] == 2 and board.name in second
    verdict = federation.submit(board.name, body, clock.now, first[board.name].nonce)
    assert not verdict.accepted and verdict.reason.startswith("late: round 1")
    assert federation.submit(board.name, board.answer(second[board.name]), clock.now, second[board.name].nonce).accepted
    assert federation.journal.value("SELECT late FROM rounds WHERE round = 1") == 1
