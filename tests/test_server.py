"""The server of a fleet: real boards over TLS, a line that fails, a host that is killed, uploads that go on."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

import ulearn
from letters import Connection, Writer, http
from network_fleet import Board, Faults, Line, enrolled
from network_host import NetworkHost, at_every_transition, free_port
from test_rounds import independent
from test_trainer import plan as small_plan
from ulearn import letter
from ulearn import task as wire
from ulearn_host.errors import UserError
from ulearn_host.federation import certificate, enrol, server
from ulearn_host.federation.door import Limits
from ulearn_host.federation.job import Job
from ulearn_host.federation.rounds import Federation
from ulearn_host.federation.security import NOTHING, Audit, Head, Hellos, Refused, Session

BOARDS = int(os.environ.get("ULEARN_FLEET_BOARDS", "3"))
ROUNDS = int(os.environ.get("ULEARN_FLEET_ROUNDS", "2"))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small perceptron that trains whole."""
    return Path(small_plan(tmp_path_factory.mktemp("plan"), "full"))


class Served:
    """A federation that is served by a thread of this process."""

    def __init__(self, federation: Federation, **more: Any) -> None:
        """Start it; `port` is there when this returns."""
        self.federation = federation
        self.server: server.Server | None = None
        self.fault: BaseException | None = None
        listening = threading.Event()

        def ready(here: server.Server) -> None:
            self.server, self.port = here, here.port
            listening.set()

        async def live() -> None:
            self.task = asyncio.current_task()
            await server.serve(federation, "127.0.0.1", 0, ready=ready, **{"limits": Limits(quiet_s=0.3), **more})

        def run() -> None:
            try:
                asyncio.run(live())
            except asyncio.CancelledError:
                pass
            except BaseException as fault:
                self.fault = fault
            finally:
                listening.set()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        listening.wait()

    def wait(self, seconds: float) -> None:
        """Until the job is done."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), self.federation.status()
        if self.fault:
            raise self.fault

    def end(self) -> None:
        """Stop serving."""
        if self._thread.is_alive() and self.server is not None and self.task is not None:
            self.server._loop.call_soon_threadsafe(self.task.cancel)
        self._thread.join()


@contextmanager
def running(folders: list[Path], **more: object) -> Iterator[list[Board]]:
    """Boards that end with the test."""
    boards = [Board(folder, **more) for folder in folders]
    try:
        yield boards
    finally:
        for board in boards:
            board.end()


def agree(federation: Federation, boards: list[Board]) -> None:
    """All boards ended by themselves, with the last base; the journal's replay and an independent one give it too."""
    for board in boards:
        assert board.process.wait(20) == 0, board.log
        assert board.said("base") == bytes(federation.model["base"]).hex()
        assert board.said("blob") == sha256(bytes(federation.model["blob"])).hexdigest()
    assert federation.replay() == bytes(federation.model["blob"]) == independent(federation)
    assert ulearn.load(str(federation.folder / "model.ulm")).train_blob == bytes(federation.model["blob"])


def test_boards_over_tls(tmp_path: Path, plan: Path) -> None:
    """Three boards, three rounds, evaluations between; all end with the same bits."""
    job = Job("tls", 3, 3, over=1.0, retry_s=0.5, epochs=2, evaluate_every=1, min_group=1)
    federation = Federation.create(tmp_path / "job", plan, job)
    served = Served(federation)
    folders = enrolled(federation, tmp_path, plan, 3, served.port)
    with running(folders) as boards:
        served.wait(60)
        agree(federation, boards)
    history = federation.status()["history"]
    assert [(turn["state"], turn["updates"]) for turn in history] == [("committed", 3)] * 3
    assert all(turn["accuracy"] is not None for turn in history)
    assert federation.status()["refused"] == []
    assert all(board["step_us"] > 0 and board["bytes_up"] > 0 for board in federation.status()["boards"])
    federation.close()


def test_a_host_that_dies_at_every_transition(tmp_path: Path, plan: Path) -> None:
    """20 boards and 30 rounds with ULEARN_FLEET_BOARDS=20 ULEARN_FLEET_ROUNDS=30: 30 % of answers are lost or late, the
    host is killed before and after each transition on the way to each commit, and no bit is lost or counted twice."""
    goal = max(2, BOARDS * 2 // 5)
    long = ROUNDS > 10  # with some answers that are too late
    terms = {
        "retry_s": 2.0 if long else 1.0,
        "deadline_s": 8.0 if long else 4.0,
        "epochs": 2,
        "evaluate_every": ROUNDS,
        "min_group": 1,
    }
    job = Job("mortal", ROUNDS, goal, **terms)
    folder, port = tmp_path / "job", free_port()
    share = 1.0 if long else 0.5
    faults = Faults(seed=1, lost=0.1 * share, cut=0.05 * share, late=0.15 * share, late_s=12.0 if long else 1.0)
    line = Line(lambda: port, faults)
    with Federation.create(folder, plan, job) as federation:
        folders = enrolled(federation, tmp_path, plan, BOARDS, line.port)
    limits = Limits(strangers=128, strangers_of_address=128)  # they all come from one address
    host = NetworkHost(folder, port, at_every_transition, limits)
    began = time.monotonic()
    try:
        with running(folders) as boards:
            host.wait(60 + ROUNDS * 60)
            lasted = time.monotonic() - began
            with Federation(folder) as federation:
                agree(federation, boards)
                check_journal(federation, host, boards)
                bytes_up = [b["bytes_up"] for b in federation.status()["boards"]]
    finally:
        host.end()
        line.close()
    failed = sum(line.counts[what] for what in ("lost", "cut", "late"))
    print(f"{BOARDS} boards, {ROUNDS} rounds, {host.facts['deaths']} deaths, {lasted:.0f} s, {line.counts}, {bytes_up}")
    assert host.facts["deaths"] >= 12 * ROUNDS and failed > (0.25 * line.counts["answers"] if long else 0)


def check_journal(federation: Federation, host: NetworkHost, boards: list[Board]) -> None:
    """What any host has ever told of is in the journal, once."""
    models = {row["round"]: row["base"].hex() for row in federation.journal.rows("SELECT round, base FROM models")}
    commits = [(event["round"], event["base_id"]) for event in host.events if event["event"] == "commit"]
    assert len(commits) == len(models) - 1 == ROUNDS and all(models[turn] == base for turn, base in commits)
    counted = [(event["round"], event["board"]) for event in host.events if event["event"] == "update"]
    assert max(Counter(counted).values()) == 1
    kept = federation.journal.rows("SELECT round, entered, board, body FROM updates")
    assert sorted(counted) == sorted((row["entered"], row["board"]) for row in kept)
    # Each is what its own task asked for, whatever was lost and sent again on the way.
    for row in kept:
        assert bytes(row["body"]) == recomputed(federation, host.folder.parent / row["board"], row["round"])
    # What a board was told is counted is counted in that round.
    for board in boards:
        told = {int(turn) for turn in re.findall(r"round \d+: counted in round (\d+)", board.log)}
        assert told <= {row["entered"] for row in kept if row["board"] == board.folder.name}


def recomputed(federation: Federation, folder: Path, turn: int) -> bytes:
    """What a board's own code answers, here, to the training task that it was given in a round."""
    model = ulearn.load((folder / "m.ulm").read_bytes())
    query = "SELECT body FROM tasks WHERE kind = 1 AND round = ? AND board = ?"
    task = wire.parse(bytes(federation.journal.value(query, turn, folder.name)))
    if model.base_id != task.base_id:
        blob = federation.journal.value("SELECT blob FROM models WHERE base = ?", task.base_id)
        wire.replace(model, bytes(blob), task.base_id)
    return bytes(wire.carry_out(model, _samples(model, folder / "train.bin"), task))


# ---- What one board can do, letter by letter -------------------------------------------------------------------------


class Visitor:
    """A board's letters by hand, over TLS."""

    def __init__(self, served: Served, folder: Path) -> None:
        """A board that was enrolled, with its model."""
        name = folder.name
        self.served = served
        self.model = ulearn.load(str(folder / "m.ulm"))
        self.samples = _samples(self.model, folder / "train.bin")
        secret = served.federation.secret(name)
        assert secret is not None
        self.writer = Writer(name, secret, job=served.federation.job.number)
        self.connect()

    def connect(self) -> None:
        """A connection, and its session."""
        self.connection = Connection(self.served.port, certificate.ensure(self.served.federation.folder).der)
        self.writer.welcomed(self.connection.ask(self.writer, self.writer.hello()))

    def task(self) -> Any:
        """The next one."""
        facts = wire.facts(self.model, self.samples)
        return wire.parse(self.connection.ask(self.writer, self.writer.letter(letter.POLL, facts)).content)

    def answer(self, task: Any) -> bytes:
        """Train."""
        return bytes(wire.carry_out(self.model, self.samples, task))


def _samples(model: Any, path: Path) -> Any:
    size = model.target_bytes + model.input_bytes
    data = path.read_bytes()
    samples = ulearn.Samples(model, len(data) // size)
    for at in range(0, len(data), size):
        samples.add(data[at + 2 : at + size], struct.unpack_from("<H", data, at)[0])
    return samples


@pytest.fixture
def visitor(tmp_path: Path, plan: Path) -> Iterator[Visitor]:
    """The only board of a job."""
    federation = Federation.create(tmp_path / "job", plan, Job("one", 2, 1, over=1.0, retry_s=0.2))
    served = Served(federation, limits=Limits(silence_s=2.0, request_s=2.0))
    (folder,) = enrolled(federation, tmp_path, plan, 1, served.port)
    visiting = Visitor(served, folder)
    yield visiting
    visiting.connection.close()
    served.end()
    federation.close()


def test_an_upload_goes_on_where_it_broke_off(visitor: Visitor) -> None:
    """Half of an answer, the host says how much it has, the rest in another connection; a lost reply comes again."""
    task = visitor.task()
    answer = visitor.answer(task)
    ask = {"nonce": task.nonce, "turn": task.round}
    writer = visitor.writer
    body = writer.letter(letter.UP, answer, **ask)
    at = len(body) - 32 - len(answer) // 2
    visitor.connection.socket.sendall(http(body[:at], len(body)))
    time.sleep(0.3)
    visitor.connection.close()
    visitor.connect()
    place = visitor.connection.ask(writer, writer.letter(letter.WHERE, total=len(answer), offset=len(answer), **ask))
    assert place.what == letter.PARTIAL
    offset = struct.unpack(letter.PLACE, place.content)[0]
    assert offset == len(answer) - len(answer) // 2
    # From another place than that the host takes nothing, and says where.
    wrong = visitor.connection.ask(writer, writer.letter(letter.UP, answer, offset=offset - 1, **ask))
    assert wrong.what == letter.PARTIAL and struct.unpack(letter.PLACE, wrong.content)[0] == offset
    visitor.connect()
    done = visitor.connection.ask(writer, writer.letter(letter.UP, answer, offset=offset, **ask))
    assert (done.what, done.content) == (letter.DONE, b"counted in round 1")
    again = visitor.connection.ask(writer, writer.letter(letter.WHERE, total=len(answer), offset=len(answer), **ask))
    assert (again.what, again.content) == (letter.DONE, b"counted in round 1")
    assert visitor.served.federation.commits() == 1


def test_a_part_that_was_tampered_with_is_dropped(visitor: Visitor) -> None:
    """The signature is of the whole: a wrong beginning is found at the end, and nothing of it stays."""
    task = visitor.task()
    answer, ask = visitor.answer(task), {"nonce": task.nonce, "turn": task.round}
    writer = visitor.writer
    body = bytearray(writer.letter(letter.UP, answer, **ask))
    body[-40] ^= 1
    refused = visitor.connection.ask(writer, bytes(body))
    assert refused.status == 401 and "not signed" in refused.text
    visitor.connect()
    place = visitor.connection.ask(writer, writer.letter(letter.WHERE, total=len(answer), offset=len(answer), **ask))
    assert place.content == bytes(4)
    assert visitor.served.federation.commits() == 0


def test_a_download_goes_on_where_it_broke_off(visitor: Visitor) -> None:
    """Only from the same base, and signed as a whole."""
    task = visitor.task()
    writer, connection = visitor.writer, visitor.connection
    body = writer.letter(letter.UP, visitor.answer(task), nonce=task.nonce, turn=task.round)
    assert connection.ask(writer, body).what == letter.DONE
    have = bytes(visitor.model.base_id)
    whole = connection.ask(writer, writer.letter(letter.DOWN, struct.pack(letter.WANTED, have, NOTHING, 0)))
    assert whole.what in (letter.UPDATE, letter.FULL) and whole.offset == 0
    wanted = struct.pack(letter.WANTED, have, whole.nonce, 100)
    rest = connection.ask(writer, writer.letter(letter.DOWN, wanted))
    assert (rest.offset, rest.content, rest.nonce) == (100, whole.content[100:], whole.nonce)
    other = connection.ask(writer, writer.letter(letter.DOWN, struct.pack(letter.WANTED, have, bytes(15) + b"x", 100)))
    assert (other.offset, other.content) == (0, whole.content)


def test_a_board_resumes_by_itself(tmp_path: Path, plan: Path) -> None:
    """Connections end in the middle of the longest uploads: what goes up is not sent twice."""
    big = Path(_big_plan(tmp_path))
    federation = Federation.create(tmp_path / "job", big, Job("big", 2, 1, over=1.0, retry_s=0.2, epochs=1))
    served = Served(federation, plain=True, warn=lambda text: None)
    line = Line(lambda: served.port, Faults())
    (folder,) = enrolled(federation, tmp_path, big, 1, line.port, plain=True)
    size = 64 + len(ulearn.load(str(folder / "m.ulm")).train_blob)
    line.cut_up = size // 2
    with running([folder]) as boards:
        served.wait(60)
        agree(federation, boards)
    line.close()
    assert 2 * size < line.counts["up"] < 2.3 * size  # and not 2.5
    federation.close()


def _big_plan(folder: Path) -> str:
    """A perceptron with 30 KB of weights."""
    import cases
    from ulearn_host.compiler import Options, compile_plan

    rng = __import__("numpy").random.default_rng(3)
    network = cases.random_network(rng, 120)
    while network.loss != "softmax_ce" or sum(layer.weights.size for layer in network.layers) < 12000:
        network = cases.random_network(rng, 120)
    path = folder / "big.ulm"
    path.write_bytes(compile_plan(network, Options("full", fraction=7)).data)
    return str(path)


def test_a_poll_is_kept_until_there_is_something_to_do(tmp_path: Path, plan: Path) -> None:
    """One board waits for another, without asking twice."""
    federation = Federation.create(tmp_path / "job", plan, Job("two", 1, 2, over=1.0, retry_s=30.0, quorum=1.0))
    served = Served(federation)
    first, second = (Visitor(served, folder) for folder in enrolled(federation, tmp_path, plan, 2, served.port))
    found: list[Any] = []
    facts = wire.facts(first.model, first.samples)
    poll = first.writer.letter(letter.POLL, facts, what=20)
    thread = threading.Thread(target=lambda: found.append(first.connection.ask(first.writer, poll)))
    began = time.monotonic()
    thread.start()
    time.sleep(0.5)
    assert not found
    assert second.task().kind == wire.TRAIN
    thread.join(10)
    assert wire.parse(found[0].content).kind == wire.TRAIN and 0.5 <= time.monotonic() - began < 3
    served.end()
    federation.close()


def test_the_newest_connection_of_a_board_counts(visitor: Visitor) -> None:
    """One that hangs somewhere gives way."""
    assert visitor.task().kind == wire.TRAIN
    old = visitor.connection
    visitor.connect()
    assert visitor.task().kind == wire.TRAIN
    assert old.reply() == (0, b"")


def test_beside_the_server(tmp_path: Path, plan: Path) -> None:
    """What lives in the same process ends with it; other threads call the federation through it; faults come out."""
    federation = Federation.create(tmp_path / "job", plan, Job("beside", 1, 1))
    lived: list[str] = []

    async def other(here: server.Server) -> None:
        lived.append("began")
        try:
            await asyncio.sleep(60)
        finally:
            lived.append("ended")

    served = Served(federation, beside=[other])
    assert served.server is not None
    assert served.server.call(federation.boards) == []
    assert served.server.call(threading.get_ident) != threading.get_ident()
    served.end()
    assert lived == ["began", "ended"]

    async def broken(here: server.Server) -> None:
        raise UserError("a port is gone; plug it in again")

    failing = Served(federation, beside=[broken])
    with pytest.raises(UserError, match="plug it in"):
        failing.wait(10)
    federation.close()


def test_an_address_that_is_taken(tmp_path: Path, plan: Path) -> None:
    """One sentence."""
    federation = Federation.create(tmp_path / "job", plan, Job("taken", 1, 1))
    served = Served(federation)

    async def second() -> None:
        await server.serve(federation, "127.0.0.1", served.port)

    with pytest.raises(UserError, match="name another address or port"):
        asyncio.run(second())
    served.end()
    federation.close()


# ---- Parts -----------------------------------------------------------------------------------------------------------


def test_certificates(tmp_path: Path) -> None:
    """Made once, for the owner alone; a file that holds none is named."""
    first, second = certificate.ensure(tmp_path), certificate.ensure(tmp_path)
    assert first == second and first.path.stat().st_mode & 0o777 == 0o600
    assert certificate.ensure(_made(tmp_path / "other")).der != first.der
    first.path.write_text("nothing")
    with pytest.raises(UserError, match="put the file back"):
        certificate.ensure(tmp_path)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_cards(tmp_path: Path, plan: Path) -> None:
    """What is no card is not written; a board that is enrolled again keeps its secret."""
    with pytest.raises(UserError, match="expected 32"):
        enrol.card("b", b"short", "host", 1, None)
    with pytest.raises(UserError, match="1 to 64 bytes"):
        enrol.card("b" * 65, bytes(32), "host", 1, None)
    with pytest.raises(UserError, match="port below 65536"):
        enrol.card("b", bytes(32), "host", 70000, None)
    with Federation.create(tmp_path / "job", plan, Job("cards", 1, 1)) as federation:
        identity = certificate.ensure(federation.folder)
        first = enrol.enrol(federation, "b", "192.0.2.7", 8470, identity)
        assert enrol.enrol(federation, "b", "192.0.2.7", 8470, identity) == first
        assert enrol.enrol(federation, "c", "192.0.2.7", 8470, identity) != first
        assert federation.boards() == ["b", "c"]


def test_sessions_and_counters() -> None:
    """A connection's own nonce, counters that rise, hellos that are good for once."""
    writer, session, hellos = Writer("b", bytes(32)), Session(), Hellos()

    def head(kind: int = letter.POLL) -> Head:
        return Head.parse(writer.letter(kind)[: letter.HEAD_BYTES])

    with pytest.raises(Refused, match="say hello"):
        session.enter(head())
    writer.session = session.begin("b")
    session.enter(head())
    writer.counter = 0
    with pytest.raises(Refused, match="a replay: request 1 after 2"):
        session.enter(head())
    writer.counter = 7
    session.enter(head())
    for other in (Writer("c", bytes(32), writer.session), Writer("b", bytes(32), NOTHING)):
        other.counter = 20
        with pytest.raises(Refused, match="another session"):
            session.enter(Head.parse(other.letter(letter.POLL)[: letter.HEAD_BYTES]))
    hellos.check(head(letter.HELLO))
    with pytest.raises(Refused, match="came before"):
        hellos.check(head(letter.HELLO))
    with pytest.raises(Refused, match="goes on at byte 2 of 1"):
        Head.parse(writer.letter(letter.POLL, total=1, offset=2)[: letter.HEAD_BYTES])


def test_an_account_of_bounded_size() -> None:
    """The first refusals of a minute are lines, the others are numbers; none is lost."""
    now, lines = [0.0], []
    audit = Audit(lambda board, text: lines.append((board, text)), lambda: now[0])
    for i in range(1000):
        audit.note(f"192.0.2.{i % 200}", None, f"reason {i}")
    assert len(lines) == Audit.LINES and audit.count == 1000
    now[0] = 61.0
    audit.note("192.0.2.1", "b", "another")
    assert len(lines) <= 2 * Audit.LINES + 2 and lines[-1] == ("b", "192.0.2.1: another")
    found = [re.search(r"\((\d+) times more\)|^(\d+) other", text) for _, text in lines]
    assert sum(int(match[1] or match[2]) for match in found if match) + Audit.LINES == 1000


def test_limits_are_what_they_say() -> None:
    """Every one is a number above 0."""
    assert all(getattr(Limits(), field.name) > 0 for field in dataclasses.fields(Limits))
