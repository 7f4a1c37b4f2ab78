"""Faults that a review of the federation found: each test fails on the code as it was before."""

from __future__ import annotations

import json
import os
import struct
import sys
import termios
import threading
import time
from binascii import crc32
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gateways
import test_trainer
from small_fleet import BEGIN, SmallFleet, made_up
from ulearn import features as wire_features
from ulearn import post
from ulearn import task as wire
from ulearn_host import cli
from ulearn_host.compiler import Options
from ulearn_host.errors import UserError
from ulearn_host.federation import advance, facts, hosting, lines
from ulearn_host.federation import job as job_file
from ulearn_host.federation.certificate import ensure
from ulearn_host.federation.gateway import Gateway
from ulearn_host.federation.hosting import Hosting, Network
from ulearn_host.federation.job import Job
from ulearn_host.federation.progress import Progress
from ulearn_host.federation.root import Root
from ulearn_host.federation.roster import Roster
from ulearn_host.federation.rounds import Federation
from ulearn_host.federation.upward import Answer, Ask
from ulearn_host.federation.virtual import VirtualBoard
from ulearn_host.fleet import PlanFacts, Samples
from ulearn_host.prepare import prepare
from ulearn_host.quantise import FloatDense

Rows = list[tuple[Any, ...]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small perceptron that trains whole."""
    return Path(test_trainer.plan(tmp_path_factory.mktemp("plan"), "full"))


def rows(federation: Federation, query: str) -> Rows:
    """Of its journal, as tuples."""
    return [tuple(row) for row in federation.journal.rows(query)]


def told(fleet: SmallFleet, name: str, **other: Any) -> facts.BoardFacts:
    """What a board tells of itself, or claims."""
    return replace(facts.parse(fleet.boards[name].facts()), **other)


# Split training.


def features(task: Any, model_id: bytes, count: int, size: int, samples: int, **other: int) -> bytes:
    """Activations as a board would send them that says what it likes of them."""
    rng = np.random.default_rng(1)
    known = {"cut": 0, "job": task.job, "round": task.round} | other
    head = struct.pack(
        wire_features.HEADER,
        *(wire_features.MAGIC, wire_features.VERSION, known["cut"], wire_features.CLUSTERS),
        *(known["job"], known["round"], model_id, task.base_id, samples, count, 2, size),
    )
    body = head + b"".join(struct.pack("<H", i % 4) + rng.bytes(size) for i in range(count))
    return body + struct.pack("<I", crc32(body))


def test_a_split_job_that_no_training_can_count() -> None:
    """A training counts its samples in 16 bits."""
    Job("split", 1, 2, up="features:32767")
    with pytest.raises(UserError, match="expected at most 65535 together"):
        Job("split", 1, 2, up="features:32768")


def test_a_commit_that_overflows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job begun before such jobs were refused gives its round up, and does not end its host at every start."""
    monkeypatch.setattr(job_file, "FIT_LARGEST", 1 << 20, raising=False)
    fleet = SmallFleet(tmp_path, 2, 1, up="features:33000", evaluate_every=0, quorum=1.0)
    host = fleet.federation
    for name in fleet.boards:
        host.task(name, told(fleet, name, samples=40_000), fleet.now)
    for name in fleet.boards:
        task = wire.parse(host.task(name, told(fleet, name, samples=40_000), fleet.now))
        assert host.submit(name, features(task, host.plan.model_id, 33_000, 8, 40_000), fleet.now, task.nonce).accepted
    assert rows(host, "SELECT round, state FROM rounds")[0] == (1, "abandoned")
    fleet.close()
    with Federation(host.folder, lambda: fleet.now) as again:
        again.tick(fleet.now)
        assert again.head["round"] == 2


LIES: dict[str, dict[str, int]] = {
    "cut": {"cut": 1},
    "size": {"size": 7},
    "round": {"round": 9},
    "job": {"job": 9},
    "count": {"count": 6},
}


@pytest.mark.parametrize("lie", LIES)
def test_features_that_were_not_asked_for(lie: str, tmp_path: Path) -> None:
    """One board sends them in every round: it is refused, and the rounds are the others'."""
    names = [f"board-{i}" for i in range(5)]
    how = {"up": "features:4", "evaluate_every": 0, "quorum": 0.8, "deadline_s": 40.0, "retry_s": 100.0}
    fleet = SmallFleet(tmp_path, names, 2, world=wide(tmp_path, names), **how)
    host, refused = fleet.federation, 0
    for _ in range(12):
        for name, board in fleet.boards.items():
            body = fleet.ask(name)
            task = wire.parse(body)
            if task.kind != wire.FEATURES:
                continue
            board.take(*host.down(name, board.base_id), task.base_id)
            if name == "board-0":
                lies = {"count": 4, "size": 8} | LIES[lie]
                sent = features(task, host.plan.model_id, samples=40, **lies)
                verdict = host.submit(name, sent, fleet.now, task.nonce)
                assert not verdict.accepted and "features: " in verdict.reason
                refused += 1
            else:
                assert host.submit(name, board.answer(body), fleet.now, task.nonce).accepted
        fleet.now += 30
    assert refused >= 2 and host.head["state"] == "done"
    assert rows(host, "SELECT round, state FROM rounds") == [(1, "committed"), (2, "committed"), (3, "done")]
    assert {board for (board,) in rows(host, "SELECT board FROM updates")} == set(names[1:])
    assert host.replay() == bytes(host.model["blob"])
    fleet.close()


def wide(folder: Path, names: list[str]) -> tuple[Path, list[tuple[Samples, Samples]]]:
    """A plan with a cut before its last that is wider, so that what is too much there may still be short enough."""
    rng, widths = np.random.default_rng(4), (9, 32, 8, 4)
    layers = [
        FloatDense(rng.normal(size=(n, k)) / k**0.5, rng.normal(size=n) / 4, i < 2)
        for i, (k, n) in enumerate(zip(widths, widths[1:], strict=False))
    ]
    path = folder / "wide.ulm"
    made = prepare(layers, rng.normal(size=(40, 9)), None, loss="softmax_ce", options=Options("last"))
    path.write_bytes(made.data)
    some = PlanFacts(path).samples(rng.normal(size=(40, 9)), rng.integers(0, 4, 40), "made up")
    return path, [(some, some)] * len(names)


# What boards tell of themselves.


def test_a_histogram_of_another_length(tmp_path: Path) -> None:
    """One with 4,096 labels made the draw of all boards slow, or failed in it."""
    fleet = SmallFleet(tmp_path, 3, selection="balanced", histogram=True)
    host = fleet.federation
    for labels in ((40,), (10,) * 3 + (5, 5), (40,) + (0,) * 4095):
        with pytest.raises(UserError, match=rf"a histogram of {len(labels)} labels, the plan has 4"):
            host.task("board-0", told(fleet, "board-0", histogram=labels), fleet.now)
    assert host.presence.seen("board-0") is None
    host.task("board-0", told(fleet, "board-0", histogram=(10,) * 4), fleet.now)
    fleet.close()


def test_held_out_samples_have_a_limit(tmp_path: Path) -> None:
    """As those to learn from: one board's claim must not be the pooled figure."""
    fleet = SmallFleet(tmp_path, 3)
    most = fleet.federation.job.samples_largest
    for many in (most + 1, 2**32 - 1):
        with pytest.raises(UserError, match=rf"{many} samples, expected at most {most}"):
            fleet.federation.task("board-0", told(fleet, "board-0", held_out=many), fleet.now)
    fleet.federation.task("board-0", told(fleet, "board-0", held_out=most), fleet.now)
    fleet.close()


def test_one_sample_more_at_every_poll(tmp_path: Path) -> None:
    """Does not write a line of the log each; but what a board told last is what its answer may count."""
    fleet = SmallFleet(tmp_path, 2, 1, evaluate_every=0)
    host, count = fleet.federation, "SELECT count(*) FROM audit"
    for name in ("board-0", "board-1"):
        fleet.ask(name)
    before = host.journal.value(count)
    for more in range(500):
        host.task("board-0", told(fleet, "board-0", samples=40 + more), fleet.now)
    assert host.journal.value(count) - before < 16
    host.task("board-1", told(fleet, "board-1", samples=42), fleet.now)
    body = host.task("board-1", told(fleet, "board-1", samples=43), fleet.now)
    task, board = wire.parse(body), fleet.boards["board-1"]
    honest = bytearray(board.answer(body))
    samples_at = honest.index(struct.pack("<I", 40))
    for many, accepted in ((44, False), (43, True)):
        struct.pack_into("<I", honest, samples_at, many)
        struct.pack_into("<I", honest, len(honest) - 4, crc32(bytes(honest[:-4])))
        verdict = host.submit("board-1", bytes(honest), fleet.now, task.nonce)
        assert verdict.accepted == accepted, verdict.reason
    fleet.close()


# Clocks.


def slow(monkeypatch: pytest.MonkeyPatch, fleet: SmallFleet, seconds: float) -> None:
    """The host's part of a commit takes long, as it does for a large model."""
    real = advance.advance

    def advanced(*what: Any) -> Any:
        fleet.now += seconds
        return real(*what)

    monkeypatch.setattr(advance, "advance", advanced)


def test_after_a_slow_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next round begins when the commit is made, and boards have all of its time."""
    fleet = SmallFleet(tmp_path, 3, 4, evaluate_every=0, deadline_s=5.0)
    slow(monkeypatch, fleet, 30.0)
    fleet.run()
    found = rows(fleet.federation, "SELECT state, opened, deadline, ended FROM rounds WHERE state != 'done'")
    assert [state for state, *_ in found] == ["committed"] * 4
    ends = BEGIN
    for _, opened, deadline, ended in found:
        assert opened >= ends and deadline == opened + 5.0
        ends = ended + 30.0
    assert not rows(fleet.federation, "SELECT * FROM audit WHERE event = 'resume'")
    fleet.close()


def test_an_answer_that_brings_a_slow_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes after the deadline and is counted late, in the next round: nobody thinks that a clock was set back."""
    fleet = SmallFleet(tmp_path, 3, 2, evaluate_every=0, deadline_s=50.0, quorum=0.6, stale=1, retry_s=100.0)
    host, bodies = fleet.federation, {}
    for _ in range(2):
        bodies = {name: fleet.ask(name) for name in fleet.boards}
    for name in ("board-0", "board-1"):
        task = wire.parse(bodies[name])
        assert host.submit(name, fleet.boards[name].answer(bodies[name]), fleet.now, task.nonce).accepted
    fleet.now += 60.0
    for name in fleet.boards:
        host.presence.touched(name, fleet.now)
    slow(monkeypatch, fleet, 30.0)
    task = wire.parse(bodies["board-2"])
    verdict = host.submit("board-2", fleet.boards["board-2"].answer(bodies["board-2"]), fleet.now, task.nonce)
    assert verdict == type(verdict)(True, "counted in round 2")
    assert host.head["state"] == "collect" and host.head["deadline"] == fleet.now + 50.0
    assert not rows(host, "SELECT * FROM audit WHERE event = 'resume'")
    fleet.close()


class OnLine:
    """A session with a board whose line is a call."""

    def __init__(self, board: VirtualBoard) -> None:
        self.board = board

    def __enter__(self) -> OnLine:
        return self

    def __exit__(self, *fault: object) -> None:
        """Nothing to close."""

    def facts(self, step_us: int, rate: int) -> bytes:
        return self.board.facts()

    def carry_out(self, task: bytes) -> bytes:
        return self.board.answer(task)

    def update_put(self, data: bytes) -> None:
        self.board.take("update", data, b"")

    def replace(self, data: bytes, base: bytes) -> None:
        self.board.take("full", data, base)


def test_a_line_that_waits_for_a_busy_thread(tmp_path: Path) -> None:
    """What a board's thread wants of the federation has the time at which it is done."""
    fleet = SmallFleet(tmp_path, 2, 1, evaluate_every=0, deadline_s=1000.0)
    host = fleet.federation

    def call(do: Callable[..., Any], *args: Any) -> Any:
        fleet.now += 5.0  # the federation's thread had something else to do
        host.tick(fleet.now)
        return do(*args)

    members = [lines.Member(lines.Line(name, lambda: None), host, call, print) for name in fleet.boards]  # type: ignore[arg-type, return-value]
    for _ in range(3):
        for member in members:
            member._over.set()  # it need not wait to ask again
            member._step(OnLine(fleet.boards[member.line.board]))  # type: ignore[arg-type]
    assert host.head["state"] == "done"
    assert not rows(host, "SELECT * FROM audit WHERE event = 'resume'")
    fleet.close()


def test_a_commit_while_a_line_takes_the_base(tmp_path: Path) -> None:
    """A blob and the name of its base are of one moment."""
    fleet = SmallFleet(tmp_path, 2, 3, evaluate_every=0, down="full", goal=1, quorum=1.0)
    fleet.run(1)
    calls: list[int] = []

    def call(do: Callable[..., Any], *args: Any) -> Any:
        result = do(*args)
        calls.append(1)
        if len(calls) == 1:
            fleet.run(2)
        return result

    member = lines.Member(lines.Line("board-1", lambda: None), fleet.federation, call, print)  # type: ignore[arg-type, return-value]
    first = bytes(fleet.federation.model["base"])
    member._take_base(OnLine(fleet.boards["board-1"]), bytes(16))  # type: ignore[arg-type]
    assert fleet.boards["board-1"].base_id == first != bytes(fleet.federation.model["base"])
    fleet.close()


# Serial lines.


def test_a_port_that_is_pulled_while_it_is_opened(tmp_path: Path) -> None:
    """termios.error is no OSError: the line is tried again all the same, and the job comes to its end."""
    fleet = SmallFleet(tmp_path, ["a"], 2, evaluate_every=0)
    fleet.federation.clock = time.time
    said: list[str] = []

    def opened() -> Any:
        if not said:
            raise termios.error(5, "Input/output error")
        return OnLine(fleet.boards["a"])

    lines.run(fleet.federation, [lines.Line("a", opened)], lambda board, text: said.append(text))
    assert fleet.federation.head["state"] == "done" and fleet.federation.commits() == 2
    assert len(said) == 1 and "Input/output error" in said[0]
    fleet.close()


def test_no_line_is_left(tmp_path: Path, small: Path) -> None:
    """The command does not end as if the job were done."""

    def opened() -> Any:
        raise OSError("no such port")

    def tick() -> None:
        for thread in threading.enumerate():
            if isinstance(thread, lines.Member) and thread.fault:
                thread.stop()

    with Federation.create(tmp_path / "job", small, Job("lines", 3, 1)) as federation:
        federation.enrol("a", bytes(16), "serial")
        with pytest.raises(UserError, match="no board is left before the job is done: a: no such port"):
            lines.run(federation, [lines.Line("a", opened)], tick=tick)


# A download of a board.


class Wire:
    """What a host sends, all zeros; breaks once."""

    open = True

    def __init__(self) -> None:
        self.left, self.turns = 1500, 0

    def idle(self) -> None:
        self.turns += 1
        assert self.turns < 1000, "it never ends"

    def read(self, view: memoryview) -> None:
        if len(view) > self.left:
            raise OSError("the connection broke")
        self.left -= len(view)
        view[:] = bytes(len(view))


@pytest.mark.parametrize("total", [4000, 2500, 1024, 500])
def test_a_download_that_changes_its_length(total: int) -> None:
    """Longer or shorter, for the base of which a board has a part: it is refused, and then begun anew."""
    line = Wire()
    made = post.Post(line, b"b", bytes(32), 10_000)
    made._mac.begin()
    with pytest.raises(OSError, match="the connection broke"):
        made._download(b"B" * 16, 0, 3000)
    assert made.have == 1024
    line.left = 1 << 20
    made._mac.begin()
    with pytest.raises(OSError, match="goes on with what this board has not"):
        made._download(b"B" * 16, made.have, total)
    assert made.have == 0 and made.room is None
    made._mac.begin()
    assert len(made._download(b"B" * 16, 0, total)) == total == made.have
    assert line.turns < 20


# Who may speak.


def test_a_card_that_is_taken_away(tmp_path: Path) -> None:
    """The board is dismissed at the next start, and taken in again with another card."""
    plan, _ = made_up(tmp_path, ["good"])
    roster = Roster(tmp_path / "fleet")
    for name in ("good", "stolen"):
        roster.add(name, "host", 1, ensure(tmp_path))
    seen: list[dict[str, bytes | None]] = []
    links: list[dict[str, str]] = []

    class Started(Hosting):
        def _carry_on(self, federation: Federation, progress: Progress) -> None:
            seen.append({name: federation.secret(name) for name in federation.boards()})
            links.append(dict(rows(federation, "SELECT board, link FROM boards")))

    def start() -> None:
        network = Network("127.0.0.1", 0, roster.secrets())
        Started(tmp_path / "job", tmp_path / "fleet", network=network, as_json=True).run(
            plan, Job("cards", 3, 1), lambda: os.urandom(32)
        )

    start()
    assert seen[0] == roster.secrets()
    (tmp_path / "fleet/cards/stolen.json").unlink()
    start()
    start()
    for later in seen[1:]:
        assert later["good"] == seen[0]["good"] and later["stolen"] != seen[0]["stolen"]
    assert seen[1]["stolen"] == seen[2]["stolen"] and links[2] == {"good": "network", "stolen": "dismissed"}
    roster.add("stolen", "host", 1, ensure(tmp_path))
    start()
    assert seen[3] == roster.secrets() and links[3]["stolen"] == "network"


def test_nobody_waits_for_who_was_dismissed(tmp_path: Path) -> None:
    """Neither a round nor an evaluation: it is over at once when the whole rest of the fleet has answered."""
    fleet = SmallFleet(tmp_path, 4, 2, goal=4, quorum=0.7, retry_s=1000.0, min_group=1)
    host = fleet.federation
    host.dismiss("board-3")
    del fleet.boards["board-3"]
    assert host.boards() != host.boards("virtual") == list(fleet.boards) and host.secret("board-3") != bytes(16)
    with pytest.raises(UserError, match="not enrolled"):
        host.dismiss("board-9")
    began = fleet.now
    fleet.run()
    assert fleet.now - began < 100 and host.commits() == 2
    host.enrol("board-3", bytes(16), "virtual")
    assert host.secret("board-3") == bytes(16) and host.boards("virtual") == host.boards()
    fleet.close()


# Between hosts.


def crafted(root: Root, **other: Any) -> bytes:
    """An answer as no gateway makes it."""
    head = {"job": root.job.number, "round": root.head["round"], "gateway": "g", "boards": ["x"], "samples": 1}
    head |= {"base": bytes(root.model["base"]).hex(), "sum": False, "reason": "", "parts": [["x", 1, 1.0, 0]]}
    body = json.dumps({**head, "bytes": [4], **other}).encode() + b"abcd"
    return struct.pack("<4sII", b"uLG!", len(body) - 4, crc32(body)) + body


HOSTILE: dict[str, dict[str, Any]] = {
    "a large quality": {"parts": [["x", 1, 10**400, 0]]},
    "an endless quality": {"parts": [["x", 1, float("inf"), 0]]},
    "no quality": {"parts": [["x", 1, float("nan"), 0]]},
    "a negative quality": {"parts": [["x", 1, -1.0, 0]]},
    "half a character in the reason": {"reason": "\ud800"},
    "half a character in the name": {"gateway": "\ud800", "round": 7},
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("rule", ["mean", "median"])
def test_what_a_hostile_gateway_says(rule: str, what: str, tmp_path: Path, small: Path) -> None:
    """Is refused, with a reason in the log; the host above goes on."""
    Root.create(tmp_path / "root", small, Job("hostile", 3, 2, rule=rule)).close()
    with Root(tmp_path / "root") as root:
        assert not root.collect([crafted(root, **HOSTILE[what])], root.clock())
        assert rows(root, "SELECT event FROM audit ORDER BY n")[-3:] == [("refuse",), ("collect",), ("abandon",)]
        (text,) = rows(root, "SELECT text FROM audit WHERE event = 'refuse'")[0]
        assert "quality" not in what or "is no factor of 0 to 1000000" in text or "too large" in text
        assert root.head["round"] == 2


def beside(folder: Path, plan: Path, job: Job) -> tuple[Root, list[bytes]]:
    """A root and the answers of two gateways to its first round."""
    clock = gateways.Time()
    Root.create(folder / "root", plan, job, clock).close()
    root = Root(folder / "root", clock)
    asked, answers = Ask.unpack(root.ask()), []
    for i in (0, 1):
        with Gateway.begin(folder / f"gateway-{i}", plan, job, gateways.SIZES[i], clock) as gateway:
            boards = gateways.enrol(gateway, folder / f"boards-{i}", plan, gateways.names(i))
            gateway.ask(asked, clock())
            answer = None
            while answer is None:
                gateways.visit(gateway, boards, clock)
                clock.now += 1
                answer = gateway.answer(asked)
            answers.append(answer.pack())
    return root, answers


def renamed(answer: Answer) -> Answer:
    return replace(answer, gateway="\ud800")


def board_renamed(answer: Answer) -> Answer:
    (part,) = answer.parts
    return replace(answer, boards=["\ud800"], samples=0, parts=[replace(part, board="\ud800", samples=0)])


def countless(answer: Answer) -> Answer:
    return replace(answer, samples=2**70)


def weighty(answer: Answer) -> Answer:
    (part,) = answer.parts
    return replace(answer, parts=[replace(part, quality=float("nan"))])


def elsewhere(answer: Answer) -> Answer:
    (part,) = answer.parts
    body = bytearray(part.body)
    body[5] = 1  # the cut
    struct.pack_into("<I", body, len(body) - 4, crc32(bytes(body[:-4])))
    return replace(answer, parts=[replace(part, body=bytes(body))])


SPOILT: dict[str, tuple[Callable[[Answer], Answer], dict[str, Any], int]] = {
    "a name that none can write": (renamed, {"rule": "median"}, 2),
    "a board's name that none can write": (board_renamed, {"rule": "median"}, 1),
    "a count that no journal holds": (countless, {"rule": "median"}, 1),
    "a quality that is no number": (weighty, {"quality": True}, 1),
    "features from elsewhere": (elsewhere, {"up": "features:3", "epochs": 2}, 1),
}


@pytest.mark.parametrize("way", SPOILT)
def test_a_gateway_that_spoils_what_others_pass_up(way: str, tmp_path: Path) -> None:
    """The others make the round all the same. A name is read as it can be written, and does no harm."""
    spoil, terms, kept = SPOILT[way]
    plan = Path(test_trainer.plan(tmp_path, "last+bias"))
    root, answers = beside(tmp_path, plan, Job("spoilt", 2, 3, over=1.0, quorum=0.5, **terms))
    assert root.collect([answers[0], spoil(Answer.unpack(answers[1])).pack()], 1e6)
    assert root.journal.value("SELECT count(*) FROM updates") == kept
    assert root.replay() == bytes(root.model["blob"])
    root.close()


def test_a_gateway_with_another_first_base(tmp_path: Path, small: Path) -> None:
    """Says so, and asked with the right one it begins."""
    job = Job("gateway", 3, 1)
    with Gateway.begin(tmp_path / "gateway", small, job, 1) as gateway:
        right = bytes(gateway.model["blob"])
        other = bytes([right[0] ^ 1]) + right[1:]
        with pytest.raises(UserError, match="round 1 has another base here; use the same plan"):
            gateway.ask(Ask(job.number, 1, gateway.plan.model_id, other, {}), gateway.clock())
        gateway.ask(Ask(job.number, 1, gateway.plan.model_id, right, {}), gateway.clock())
        assert bytes(gateway.model["blob"]) == right


# What reaches a terminal.


OWNED = "\x1b]0;owned\x07\x1b[2J\x1b[8m hidden\u202eevil"


def clean(text: str) -> bool:
    """Whether a terminal obeys nothing in it."""
    return all(c.isprintable() or c == "\n" for c in text)


def test_a_board_says_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    hosting._say("ttyACM0", OWNED)
    said = capsys.readouterr().err
    assert said.startswith("ttyACM0: ") and "hidden" in said and clean(said)


def test_an_error_holds_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ends a command may be a board's words; a file's name is as good."""
    path = tmp_path / f"{OWNED}.ulm"
    path.write_bytes(b"no plan")
    monkeypatch.setattr(sys, "argv", ["ulearn", "inspect", str(path)])
    assert cli.main() == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "hidden" in said and clean(said)
