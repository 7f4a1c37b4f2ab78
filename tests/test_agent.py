"""The board protocol: framing, the agent in real interpreters on real terminals, and a line that spoils bytes."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import tty
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import cases
import ulearn
import ulearn.agent as board
from ulearn import frames
from ulearn_host import emulate, link
from ulearn_host.link import BoardError, Link, LinkError

# Scenarios on a bad line, and kills; by hand: ULEARN_FAULT_SEEDS=750 pytest tests/test_agent.py -k "faults or random"
FAULT_SEEDS = int(os.environ.get("ULEARN_FAULT_SEEDS", "12"))
KILL_SEEDS = FAULT_SEEDS // 3
RATE = (1311, -15)
SERVE = "import ulearn.agent; ulearn.agent.serve()"


# ---- Frames ----------------------------------------------------------------------------------------------------------


def frame(kind: int, session: int, sequence: int, payload: bytes = b"") -> bytes:
    buffer = bytearray(len(payload) + frames.FRAME_BYTES)
    buffer[frames.PAYLOAD_OFFSET : frames.PAYLOAD_OFFSET + len(payload)] = payload
    assert frames.encode(memoryview(buffer), kind, session, sequence, len(payload)) == len(buffer)
    return bytes(buffer)


def decoded(
    decoder: frames.Decoder, data: bytes, rng: random.Random | None = None
) -> list[tuple[int, int, int, bytes]]:
    """Everything found in data, fed in random portions."""
    found = []
    while True:
        portion = rng.randint(1, 40) if rng else len(data)
        taken = decoder.feed(data[:portion])
        data = data[taken:]
        while decoder.next():
            found.append((decoder.kind, decoder.session, decoder.sequence, bytes(decoder.payload)))
        if not data:
            return found


def random_frames(rng: random.Random, count: int, most: int) -> list[bytes]:
    return [frame(0x22, 7, i, rng.randbytes(rng.choice((0, 1, rng.randint(0, most), most)))) for i in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_frames_come_through_whatever_surrounds_them(seed: int) -> None:
    rng = random.Random(seed)
    sent = random_frames(rng, 30, 240)
    prints = (
        b"",
        b"t=21.5 C\r\n",
        b"\x00" * 30,
        b"\xf5",
        b"\xf5\xf5u",
        b"\xf5u magic\n",
        sent[0][:9],
        sent[0][:-1],
        b">>> ",
    )
    stream, strays = b"", 0
    for one in sent:
        # What begins like a frame may hold back what follows, never swallow it.
        stray = rng.choice((*prints, rng.randbytes(rng.randint(0, 50))))
        stream += stray + one
        strays += len(stray)
    stray_text = bytearray()
    decoder = frames.Decoder(256, lambda view: stray_text.extend(view))
    # Two whole frames' worth of other bytes end every wait for a frame that was none.
    found = decoded(decoder, stream + bytes(512), rng)
    assert [f[2:] for f in found] == [(i, one[12:-4]) for i, one in enumerate(sent)]
    assert decoder.skipped == len(stray_text) >= strays
    assert len(decoder.space()) <= 256


def test_every_broken_byte_costs_one_frame() -> None:
    good = [frame(0x22, 7, i, bytes(range(40))) for i in range(3)]
    for at in range(len(good[1])):
        for bit in (1, 0x80):
            broken = bytearray(good[1])
            broken[at] ^= bit
            found = decoded(frames.Decoder(256), good[0] + broken + good[2] + bytes(300))
            assert [f[2] for f in found] == [0, 2], f"byte {at}"


def test_every_lost_or_doubled_byte_costs_one_frame() -> None:
    good = [frame(0x22, 7, i, bytes(range(100, 140))) for i in range(3)]
    for at in range(len(good[1])):
        for broken in (good[1][:at] + good[1][at + 1 :], good[1][: at + 1] + good[1][at:]):
            found = decoded(frames.Decoder(256), good[0] + broken + good[2] + bytes(300))
            # A doubled first byte is a stray byte before a good frame.
            assert [f[2] for f in found] in ([0, 2], [0, 1, 2]), f"byte {at}"
            assert len(found) == 2 or broken[1:] == good[1] or broken[:-1] == good[1]


def test_noise_is_no_frame() -> None:
    rng = random.Random(5)
    noise = rng.randbytes(400_000).replace(b"\xf5", b"\xf5u")
    decoder = frames.Decoder(512)
    assert decoded(decoder, noise, rng) == []
    assert decoder.skipped >= len(noise) - 512


def test_a_frame_larger_than_the_buffer_is_skipped() -> None:
    decoder = frames.Decoder(128)
    found = decoded(decoder, frame(0x22, 7, 0, bytes(200)) + frame(0x22, 7, 1, bytes(112)))
    assert [f[2] for f in found] == [1]


def test_resync_gives_up_a_frame_whose_rest_is_lost() -> None:
    decoder = frames.Decoder(1024)
    assert decoded(decoder, frame(0x22, 7, 0, bytes(900))[:50] + frame(0x30, 9, 0)) == []
    assert decoder.partial()
    decoder.resync()
    assert decoder.next()
    assert (decoder.kind, decoder.session) == (0x30, 9)


def test_the_hello_holds_no_control_character() -> None:
    for _ in range(50):
        session, raw = link._hello_frame()
        assert session and all(b == 0 or (b >= 32 and b != 127) for b in raw)


# ---- Boards ----------------------------------------------------------------------------------------------------------


class CPythonBoard:
    """The board's own code in a CPython process, on the master's end of a terminal."""

    def __init__(self, folder: Path, program: str = SERVE) -> None:
        self.folder = folder
        self._fds = list(os.openpty())
        tty.setraw(self._fds[1])
        self.port = os.ttyname(self._fds[1])
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=self._fds[0], stdout=self._fds[0], cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )  # fmt: skip
        os.close(self._fds.pop(0))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> CPythonBoard:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass
class Place:
    """A board with ulearn and the plans on it."""

    port: str
    start: bool  # the agent must be started through the REPL

    def open(self, **more: object) -> Link:
        return Link.open(self.port, start=self.start, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def labelled() -> cases.Case:
    return next(c for c in map(cases.random_case, range(1, 50)) if c.targets.ndim == 1 and c.inputs.shape[1] > 30)


@pytest.fixture(scope="module")
def vector() -> cases.Case:
    return next(c for c in map(cases.random_case, range(50)) if c.targets.ndim == 2 and c.inputs.shape[1] > 30)


@pytest.fixture(scope="module", params=["CPYTHON", "UNIX", "QEMU_CORTEX_M0"])
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, labelled: cases.Case, vector: cases.Case
) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("board")
    plans = {"a.ulm": labelled.plan.data, "b.ulm": vector.plan.data}
    for name, data in plans.items():
        (folder / name).write_bytes(data)
    if request.param == "CPYTHON":
        with CPythonBoard(folder) as running:
            yield Place(running.port, False)
        return
    with running_board(request.param) as emulated:
        put(emulated.port, *(folder / name for name in plans))
        yield Place(emulated.port, True)


def running_board(name: str) -> emulate.EmulatedBoard:
    try:
        return emulate.start(name)
    except emulate.EmulatorError as error:
        pytest.skip(f"{name}: {error}")


def put(port: str, *plans: Path) -> None:
    from ulearn_host.deploy import deploy

    for plan in plans:
        deploy(port, plan)


def simulated(case: cases.Case, epochs: int, seed: int = 1, skip: float = 1 / 16) -> ulearn.Model:
    """What the board must come to, by the same code in this process."""
    model = ulearn.load(case.plan.data)
    samples = ulearn.Samples(model, len(case.inputs))
    for x, y in zip(case.inputs, case.targets, strict=True):
        samples.add(x.tobytes(), int(y) if case.targets.ndim == 1 else y.tobytes())
    trainer = ulearn.Trainer(model, 0, seed, skip)
    trainer.set_rate(*RATE)
    trainer.fit(samples, epochs)
    return model


def go_through(one: Link, plan: str, case: cases.Case, epochs: int = 3) -> tuple[bytes, bytes, bytes]:
    """Load, send, train, and fetch weights, state and the update."""
    one.load(plan)
    one.data_reset(len(case.inputs))
    assert one.data_add(case.inputs, case.targets) == len(case.inputs)
    one.train(epochs, RATE)
    return one.weights(), one.state(), one.update_get()


@pytest.mark.parametrize("name", ["labelled", "vector"])
def test_a_board_comes_to_the_same_bits(place: Place, name: str, request: pytest.FixtureRequest) -> None:
    case = request.getfixturevalue(name)
    plan = {"labelled": "a.ulm", "vector": "b.ulm"}[name]
    expected = simulated(case, 3)
    with place.open() as one:
        weights, state, update = go_through(one, plan, case)
        assert (weights, state) == (bytes(expected.train_blob), bytes(expected.state))
        assert update == bytes(expected.update(len(case.inputs)))
        outputs = np.array([np.frombuffer(bytes(expected.output(x.tobytes())), np.int8) for x in case.inputs])
        assert (one.output(case.inputs) == outputs).all()
        score = one.score(case.inputs, case.targets)
        assert score.samples == len(case.inputs)
        if name == "labelled":
            labels = [expected.predict(x.tobytes()) for x in case.inputs]
            assert one.predict(case.inputs).tolist() == labels
            assert score.right == int((np.array(labels) == case.targets).sum())
        else:
            assert score.loss == int(((outputs.astype(int) - case.targets) ** 2).sum())
            with pytest.raises(BoardError, match="no classes"):
                one.predict(case.inputs)
        steps = 3 * len(case.inputs)
        assert one.info().counters.steps == steps
        # A checkpoint holds weights and state; another training is undone by it.
        one.checkpoint("agent.ck")
        one.train(1, RATE, seed=9)
        assert one.weights() != weights or one.state() != state
        one.restore("agent.ck")
        assert (one.weights(), one.state()) == (weights, state)
        # The update becomes the base.
        before = one.info().model
        expected.apply(update)
        base = one.update_put(update)
        after = one.info().model
        assert before and after and base == after.base_id == expected.base_id != before.base_id
        assert one.weights() == bytes(expected.train_blob)
        assert one.repeats < 5  # a machine that is busy for a moment costs one


def test_what_is_refused_leaves_the_board_serving(place: Place, labelled: cases.Case) -> None:
    x, y = labelled.inputs, labelled.targets
    with place.open() as one:
        one.load("")
        with pytest.raises(LinkError, match="no model"):
            one.predict(x)
        with pytest.raises(BoardError, match="no model"):
            one.train()
        with pytest.raises(BoardError, match="none.ulm"):
            one.load("none.ulm")
        facts = one.load("a.ulm")
        assert facts and facts.input_bytes == x.shape[1]
        before = one.weights(), one.state()
        with pytest.raises(BoardError, match="no training"):
            one.train()
        with pytest.raises(BoardError, match="room"):
            one.data_add(x, y)
        if one.about and one.about.implementation.startswith("micropython"):
            with pytest.raises(BoardError, match="Memory"):
                one.data_reset(65535)
        one.data_reset(4)
        for payload in (
            b"",
            bytes(facts.sample_bytes - 1),
            struct.pack("<H", facts.classes) + bytes(facts.input_bytes),
        ):
            with pytest.raises(BoardError, match="expected"):
                one._call(board._DATA_ADD, payload)
        good = one._packed(x[:1], y[:1])
        with pytest.raises(BoardError, match="label"):  # the first sample is good, and is not taken either
            one._call(board._DATA_ADD, good + struct.pack("<H", facts.classes) + bytes(facts.input_bytes))
        assert one.info().samples == 0
        with pytest.raises(BoardError, match="learning rate"):
            one.data_add(x[:2], y[:2])
            one.train(1, (77, -10))
        with pytest.raises(BoardError, match="unknown"):
            one._call(0x2F)
        update = bytearray(one.update_get())
        with pytest.raises(BoardError, match="update"):
            one.update_put(bytes(update[:-1]))
        update[-20] ^= 1
        with pytest.raises(BoardError, match="update"):
            one.update_put(bytes(update))
        with pytest.raises(BoardError, match="expected at most"):
            one.update_put(bytes(10 * len(before[0]) + 5000))
        with pytest.raises(BoardError, match="none.ck"):
            one.restore("none.ck")
        assert (one.weights(), one.state()) == before
        assert one.repeats < 5  # a machine that is busy for a moment costs one


def test_the_host_says_what_is_wrong_with_samples(place: Place, labelled: cases.Case) -> None:
    x, y = labelled.inputs, labelled.targets
    with place.open() as one:
        one.load("a.ulm")
        one.data_reset(5)
        with pytest.raises(LinkError, match="expected int8"):
            one.predict(x.astype(np.float32))
        with pytest.raises(LinkError, match="shape"):
            one.predict(x[:, :-1])
        with pytest.raises(LinkError, match="labels reach"):
            one.data_add(x, y + 1000)
        with pytest.raises(LinkError, match="shape"):
            one.data_add(x, y[:-1])
        assert one.data_add(x[:0], y[:0]) == 0 and len(one.predict(x[:0])) == 0


# ---- One line, byte by byte ------------------------------------------------------------------------------------------


class Wire:
    """A bare end of the line: frames out, frames in."""

    def __init__(self, port: str) -> None:
        self.fd = os.open(port, os.O_RDWR | os.O_NOCTTY)
        self.decoder = frames.Decoder(8192)

    def send(self, data: bytes) -> None:
        os.write(self.fd, data)

    def replies(self, seconds: float = 0.5, count: int = 99) -> list[tuple[int, int, bytes]]:
        found = []
        until = time.monotonic() + seconds
        while len(found) < count and (left := until - time.monotonic()) > 0:
            if select.select([self.fd], [], [], left)[0]:
                self.decoder.feed(os.read(self.fd, 4096))
            while self.decoder.next():
                found.append((self.decoder.kind, self.decoder.sequence, bytes(self.decoder.payload)))
        return found

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def wire(tmp_path: Path, labelled: cases.Case) -> Iterator[Wire]:
    (tmp_path / "a.ulm").write_bytes(labelled.plan.data)
    with CPythonBoard(tmp_path) as running, contextlib.closing(Wire(running.port)) as one:
        yield one


def steps(wire: Wire, session: int, sequence: int) -> int:
    wire.send(frame(board._INFO, session, sequence))
    ((kind, answered, payload),) = wire.replies(count=1)
    assert (kind, answered) == (board._INFO | board._REPLY, sequence)
    return struct.unpack_from("<I", payload)[0]


def test_a_request_that_comes_twice_is_carried_out_once(wire: Wire, labelled: cases.Case) -> None:
    hello = frame(board._HELLO, 9, 0)
    wire.send(hello)
    assert [r[0] for r in wire.replies(5, 1)] == [board._HELLO | board._REPLY]
    packed = labelled.targets[0].tobytes() + labelled.inputs[0].tobytes()
    train = frame(board._TRAIN, 9, 4, struct.pack("<HHhIH", 5, *RATE, 1, 0))
    wire.send(frame(board._LOAD, 9, 1, b"a.ulm") + frame(board._DATA_RESET, 9, 2, b"\x05\0"))
    wire.send(frame(board._DATA_ADD, 9, 3, packed) + train)
    first = wire.replies(2, 4)
    assert [r[1] for r in first] == [1, 2, 3, 4] and not any(r[0] == board._ERROR for r in first)
    # Again, all of them, in any order: the same replies, byte for byte.
    wire.send(train + train + frame(board._DATA_ADD, 9, 3, packed) + hello + train)
    assert [r for r in wire.replies() if r[1]] == [first[3], first[3], first[2], first[3]]
    assert steps(wire, 9, 5) == 5
    # Older than what is kept, of another session, none at all: no answer, no effect.
    wire.send(frame(board._DATA_RESET, 9, 65000, b"\x01\0") + frame(board._DATA_RESET, 8, 6, b"\x01\0"))
    wire.send(frame(board._DATA_RESET, 0, 6, b"\x01\0") + frame(board._HELLO, 0, 0) + frame(board._ERROR, 9, 6))
    assert wire.replies() == []
    # Ahead of its turn: a NAK with the number that is due.
    wire.send(train[:2] + frame(board._TRAIN, 9, 8, struct.pack("<HHhIH", 5, *RATE, 1, 0)))
    assert wire.replies() == [(board._NAK, 6, b"")]
    # A broken frame: the same.
    broken = bytearray(frame(board._INFO, 9, 6, b""))
    broken[-1] ^= 4
    wire.send(broken)
    assert wire.replies() == [(board._NAK, 6, b"")]
    assert steps(wire, 9, 6) == 5


def test_a_request_repeated_in_its_own_work_keeps_no_new_host_out(wire: Wire, labelled: cases.Case) -> None:
    """A host that hears nothing for a moment sends its TRAIN again, and may be gone before the training ends."""
    packed = labelled.targets[0].tobytes() + labelled.inputs[0].tobytes()
    train = frame(board._TRAIN, 9, 4, struct.pack("<HHhIH", 60000, *RATE, 1, 0))
    wire.send(frame(board._HELLO, 9, 0))
    assert [r[0] for r in wire.replies(5, 1)] == [board._HELLO | board._REPLY]
    wire.send(frame(board._LOAD, 9, 1, b"a.ulm") + frame(board._DATA_RESET, 9, 2, b"\x05\0"))
    wire.send(frame(board._DATA_ADD, 9, 3, packed * 5))
    assert [r[1] for r in wire.replies(2, 3)] == [1, 2, 3]
    wire.send(train + train)
    time.sleep(0.5)
    wire.send(train + frame(board._HELLO, 10, 0))
    assert board._HELLO | board._REPLY in [r[0] for r in wire.replies(1)]


def test_half_a_frame_delays_a_new_host_for_a_moment_only(wire: Wire) -> None:
    wire.send(frame(board._DATA_ADD, 9, 1, bytes(900))[:200])
    time.sleep(0.3)
    wire.send(frame(board._HELLO, 10, 0))
    assert [r[0] for r in wire.replies(1, 1)] == [board._HELLO | board._REPLY]


def test_the_sequence_goes_round() -> None:
    (inward, send), (receive, outward) = os.pipe(), os.pipe()
    with os.fdopen(inward, "rb") as stream_in, os.fdopen(outward, "wb") as stream_out:
        agent = ulearn.Agent(None, stream_in, stream_out)
        decoder = frames.Decoder(2048)

        def answers(data: bytes) -> list[int]:
            os.write(send, data)
            while agent.poll():
                pass
            return [f[2] for f in decoded(decoder, os.read(receive, 2048))]

        answers(frame(board._HELLO, 9, 0))
        agent._due = 65533
        for some in ([65533, 65534], [65535, 0, 1], [1, 2, 3]):
            assert answers(b"".join(frame(board._DATA_RESET, 9, i, b"\0\0") for i in some)) == some
        assert agent._due == 4
    os.close(send)
    os.close(receive)


# ---- Loops, threads, ends --------------------------------------------------------------------------------------------

LOOP = """
import os, time, ulearn
agent = ulearn.Agent()
n = 0
while True:
    n += 1
    print("reading", n, "\\udcf5u", flush=True) if n % 3 else os.write(1, b"\\xf5u1\\x22")
    time.sleep(0.002)
    agent.poll()
"""


def test_a_loop_that_prints_all_the_time(tmp_path: Path, labelled: cases.Case) -> None:
    (tmp_path / "a.ulm").write_bytes(labelled.plan.data)
    heard: list[str] = []
    expected = simulated(labelled, 2)
    loop = "import sys; sys.stdout.reconfigure(errors='surrogateescape')\n" + LOOP
    with CPythonBoard(tmp_path, loop) as running, Link.open(running.port, start=False, on_text=heard.append) as one:
        weights, state, _ = go_through(one, "a.ulm", labelled, 2)
        assert (weights, state) == (bytes(expected.train_blob), bytes(expected.state))
    assert "reading" in "".join(heard)


MICROPYTHON_LOOP = """
import ulearn
a = ulearn.Agent()
n = 0
while not a.stopped:
    n += 1
    print("tick", n, "\\x03")
    for i in range(3):
        a.poll()
print("loop over")
"""


@pytest.mark.parametrize("name", ["UNIX", "QEMU_CORTEX_M0"])
def test_poll_in_a_loop_on_a_board(name: str, tmp_path: Path, labelled: cases.Case) -> None:
    (tmp_path / "a.ulm").write_bytes(labelled.plan.data)
    (tmp_path / "loop.py").write_text(MICROPYTHON_LOOP)
    expected = simulated(labelled, 2)
    heard: list[str] = []
    with running_board(name) as emulated:
        put(emulated.port, tmp_path / "a.ulm")
        mpremote = [sys.executable, "-m", "mpremote", "connect", emulated.port, "resume"]
        subprocess.run([*mpremote, "cp", str(tmp_path / "loop.py"), ":loop.py"], check=True, capture_output=True)
        subprocess.run([*mpremote, "exec", "--no-follow", "import loop"], check=True, capture_output=True)
        with Link.open(emulated.port, start=False, on_text=heard.append) as one:
            for _ in range(5):
                weights, state, _ = go_through(one, "a.ulm", labelled, 2)
                assert (weights, state) == (bytes(expected.train_blob), bytes(expected.state))
            one.stop()
    assert "tick" in "".join(heard)


def test_two_boards_at_once(tmp_path: Path, labelled: cases.Case) -> None:
    (tmp_path / "a.ulm").write_bytes(labelled.plan.data)
    expected = [simulated(labelled, epochs).train_blob for epochs in (2, 3)]
    weights: dict[int, bytes] = {}

    def work(index: int, port: str) -> None:
        with Link.open(port, start=False) as one:
            for _ in range(5):
                weights[index] = go_through(one, "a.ulm", labelled, index + 2)[0]

    with CPythonBoard(tmp_path) as first, CPythonBoard(tmp_path) as second:
        threads = [threading.Thread(target=work, args=(i, b.port)) for i, b in enumerate((first, second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert weights == {0: bytes(expected[0]), 1: bytes(expected[1])}


class Enough(Exception):
    pass


def test_a_training_that_nobody_waits_for_ends(place: Place, labelled: cases.Case) -> None:
    def interrupt(done: int, total: int) -> None:
        raise Enough

    with place.open() as one:
        one.load("a.ulm")
        one.data_reset(12)
        one.data_add(labelled.inputs, labelled.targets)
        with pytest.raises(Enough):
            one.train(60000, RATE, progress=interrupt)
        with pytest.raises(LinkError, match="no session"):
            one.info()
        began = time.monotonic()
        assert one.hello().fresh
        assert 0 < one.info().counters.steps < 12 * 60000
        assert time.monotonic() - began < 10


def test_a_killed_board_is_noticed(tmp_path: Path, labelled: cases.Case) -> None:
    (tmp_path / "a.ulm").write_bytes(labelled.plan.data)
    with CPythonBoard(tmp_path) as running:
        one = Link.open(running.port, start=False, timeout_s=1.5)
        one.load("a.ulm")
        running.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(LinkError, match="did not answer for 1.5 s"):
            one.info()
        assert time.monotonic() - began < 2.5
        running.process.send_signal(signal.SIGCONT)
        assert one.hello().fresh and one.info().model
        running.kill()  # the terminal's other end is gone with it
        with pytest.raises(LinkError, match="the port is gone|did not answer"):
            one.info()
        one.close()


@pytest.mark.parametrize("name", ["UNIX", "QEMU_CORTEX_M0"])
def test_a_board_that_loses_power_in_a_training(name: str, tmp_path: Path, labelled: cases.Case) -> None:
    (tmp_path / "a.ulm").write_bytes(labelled.plan.data)
    with running_board(name) as emulated:
        put(emulated.port, tmp_path / "a.ulm")
        one = Link.open(emulated.port, timeout_s=2)
        weights, state, _ = go_through(one, "a.ulm", labelled)
        one.checkpoint("agent.ck")
        began = 0.0

        def cut(done: int, total: int) -> None:
            nonlocal began
            began = began or time.monotonic()
            emulated.kill()

        with pytest.raises(LinkError, match="did not answer for 2 s|port is gone"):
            one.train(60000, RATE, progress=cut)
        assert began and time.monotonic() - began < 3
        one.close()
        with emulate.start(name, folder=emulated.folder) as again, Link.open(again.port) as one:
            assert one.about and one.about.model is None
            one.load("a.ulm")
            one.restore("agent.ck")
            assert (one.weights(), one.state()) == (weights, state)


def test_a_board_killed_at_a_random_moment(tmp_path: Path, labelled: cases.Case) -> None:
    """It is noticed within the timeout, and what the board holds afterwards is from before or after, never between."""
    (tmp_path / "a.ulm").write_bytes(labelled.plan.data)
    expected = simulated(labelled, 2)
    trained, state = bytes(expected.train_blob), bytes(expected.state)
    update = bytes(expected.update(len(labelled.inputs)))
    expected.apply(update)
    wanted = {bytes(ulearn.load(labelled.plan.data).train_blob), bytes(expected.train_blob)}
    killed = 0
    for seed in range(KILL_SEEDS):
        for left in [*tmp_path.glob("a.ulm.base*"), *tmp_path.glob("k.ck*")]:
            left.unlink()
        with CPythonBoard(tmp_path) as running:
            link_open = Link.open(running.port, start=False, timeout_s=3)
            timer = threading.Timer(random.Random(seed).uniform(0, 0.15), running.kill)
            timer.start()
            began = time.monotonic()
            try:
                with link_open as one:
                    assert go_through(one, "a.ulm", labelled, 2) == (trained, state, update)
                    one.checkpoint("k.ck")
                    one.update_put(update)
            except LinkError:
                killed += 1
            assert time.monotonic() - began < 5
            timer.join()
        with CPythonBoard(tmp_path) as running, Link.open(running.port, start=False) as one:
            one.load("a.ulm")
            assert one.weights() in wanted
            if (tmp_path / "k.ck").exists():
                with contextlib.suppress(BoardError):  # of the base before an update that was applied since
                    one.restore("k.ck")
                    assert (one.weights(), one.state()) == (trained, state)
    assert killed


def test_no_more_bytes_are_on_their_way_than_the_board_can_hold(
    tmp_path: Path, labelled: cases.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on an ESP32: its console holds 260 bytes while Python is busy.
    (tmp_path / "a.ulm").write_bytes(labelled.plan.data)
    together: list[int] = []
    fill = link._Exchange._fill

    def spied(self: link._Exchange) -> bool:
        more = fill(self)
        sent = [len(r.frame) for r in list(self._queue)[: self._sent] if r.reply is None]
        assert len(sent) < 2 or sum(sent) <= 256
        together.append(len(sent))
        return more

    monkeypatch.setattr(link._Exchange, "_fill", spied)
    expected = simulated(labelled, 3)
    with CPythonBoard(tmp_path, "import ulearn; ulearn.Agent(credit=256).serve()") as running:
        one = Link.open(running.port, start=False)
        assert one.about and one.about.credit == 256
        assert go_through(one, "a.ulm", labelled)[0] == bytes(expected.train_blob)
        list(one._exchange((board._DATA_RESET, b"\4\0") for _ in range(50)))
        list(one._exchange((board._SCORE, one._packed(labelled.inputs[:2], labelled.targets[:2])) for _ in range(50)))
        one.close()
    assert max(together) == 4


def test_a_reset_between_two_requests_is_noticed(tmp_path: Path) -> None:
    # A board whose main.py serves again after a reset: the old session must not go on with an empty board.
    with CPythonBoard(tmp_path, "import ulearn\nfor i in range(2): ulearn.Agent().serve()") as running:
        one = Link.open(running.port, start=False)
        other = Wire(running.port)
        other.send(frame(board._STOP, one._session, 1))
        other.replies(1, 1)
        other.close()
        one._heard_s -= 100
        with pytest.raises(LinkError, match="was reset"):
            one.info()
        one.close()


def test_ports_that_cannot_be_opened() -> None:
    with pytest.raises(LinkError, match="/dev/nowhere.*No such file"):
        Link.open("/dev/nowhere")
    with pytest.raises(LinkError, match="cannot be opened"):
        Link.open("/dev/null")


def test_a_board_without_ulearn_is_told_apart() -> None:
    with running_board("UNIX") as emulated, pytest.raises(LinkError, match="no module named 'ulearn'.*ulearn deploy"):
        Link.open(emulated.port)


def test_a_silent_port() -> None:
    master, slave = os.openpty()
    tty.setraw(slave)
    began = time.monotonic()
    with pytest.raises(LinkError, match="neither an agent nor a REPL"):
        Link.open(os.ttyname(slave), timeout_s=1)
    assert time.monotonic() - began < 8
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize("name", ["UNIX", "QEMU_CORTEX_M0"])
def test_the_board_is_at_its_prompt_afterwards(name: str, tmp_path: Path, labelled: cases.Case) -> None:
    from ulearn_host.deploy import mpremote

    (tmp_path / "a.ulm").write_bytes(labelled.plan.data)
    with running_board(name) as emulated:
        put(emulated.port, tmp_path / "a.ulm")
        with Link.open(emulated.port) as one:
            one.load("a.ulm")
        assert mpremote(emulated.port, "exec", "print(6 * 7)").strip() == "42"
        with Link.open(emulated.port) as one:  # nothing was lost between the two sessions
            assert one.about and one.about.model


# ---- A line that spoils bytes ----------------------------------------------------------------------------------------


class BadLine:
    """A terminal between a host and a board that drops, doubles, changes and delays bytes, by seed, once told to."""

    def __init__(self, port: str, seed: int, every: int, kinds: tuple[str, ...]) -> None:
        self._board = os.open(port, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(self._board)
        self._host, self._slave = os.openpty()
        tty.setraw(self._slave)
        self.port = os.ttyname(self._slave)
        self.bad = False
        self.faults = 0
        self._kinds = kinds
        self._every = every
        self._over = False
        self._threads = [
            threading.Thread(target=self._carry, args=(self._host, self._board, random.Random(2 * seed))),
            threading.Thread(target=self._carry, args=(self._board, self._host, random.Random(2 * seed + 1))),
        ]
        for thread in self._threads:
            thread.start()

    def _carry(self, source: int, target: int, rng: random.Random) -> None:
        left = rng.expovariate(1 / self._every)
        while not self._over:
            if not select.select([source], [], [], 0.05)[0]:
                continue
            try:
                data = os.read(source, 4096)
            except OSError:
                return
            while self.bad and left < len(data):
                at = int(left)
                data, left = self._spoil(data, at, rng, target), rng.expovariate(1 / self._every)
                self.faults += 1
            if self.bad:
                left -= len(data)
            write_all(target, data)

    def _spoil(self, data: bytes, at: int, rng: random.Random, target: int) -> bytes:
        # Sends what comes before the fault; returns what is left to send.
        kind = rng.choice(self._kinds)
        head, tail = data[:at], data[at:]
        if kind == "drop":
            tail = tail[rng.choice((1, 1, 3, 40)) :]
        elif kind == "double":
            n = rng.choice((1, 1, 3, 40))
            head += tail[:n]
        elif kind == "change":
            head, tail = head + bytes([tail[0] ^ 1 << rng.randrange(8)]), tail[1:]
        elif kind == "insert":
            head += rng.choice((b"tick 17\r\n", b"\x03\x03", b"\xf5u1\x22", rng.randbytes(20)))
        write_all(target, head)
        if kind == "delay":
            time.sleep(rng.choice((0.02, 0.2, 0.5)))
        return tail

    def close(self) -> None:
        self._over = True
        for thread in self._threads:
            thread.join()
        for fd in (self._board, self._host, self._slave):
            os.close(fd)


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


KINDS = ("drop", "double", "change", "insert", "delay")


def through_a_bad_line(port: str, seed: int, case: cases.Case, start: bool, every: int) -> tuple[int, int]:
    """One scenario on a bad line, with its end compared to the simulation; returns faults and repetitions."""
    expected = simulated(case, 2)
    noise = random.Random(seed).randbytes(3000)
    line = BadLine(port, seed, every, KINDS)
    try:
        with Link.open(line.port, 3_000_000, 30, start=start) as one:
            line.bad = True
            weights, state, update = go_through(one, "a.ulm", case, 2)
            one.file_put("noise/a.bin", noise)
            labels = one.predict(case.inputs)
            score = one.score(case.inputs, case.targets)
            info = one.info()
            base = one.update_put(update)
            line.bad = False
            assert (weights, state) == (bytes(expected.train_blob), bytes(expected.state))
            assert update == bytes(expected.update(len(case.inputs)))
            assert labels.tolist() == [expected.predict(x.tobytes()) for x in case.inputs]
            assert score.right == int((labels == case.targets).sum())
            assert (info.samples, info.counters.steps) == (len(case.inputs), 2 * len(case.inputs))
            expected.apply(update)
            assert base == expected.base_id
            assert one.weights() == bytes(expected.train_blob)
            return line.faults, one.repeats
    finally:
        line.close()


def test_faults_cost_repetitions_never_results(tmp_path: Path, labelled: cases.Case) -> None:
    (tmp_path / "a.ulm").write_bytes(labelled.plan.data)
    faults = repeats = 0
    with CPythonBoard(tmp_path) as running:
        for seed in range(FAULT_SEEDS):
            for left in tmp_path.glob("*.base*"):
                left.unlink()
            more = through_a_bad_line(running.port, seed, labelled, False, 600 if seed % 2 else 2000)
            faults, repeats = faults + more[0], repeats + more[1]
    assert faults > FAULT_SEEDS and repeats


@pytest.mark.parametrize("name", ["UNIX", "QEMU_CORTEX_M0"])
def test_faults_on_a_board(name: str, tmp_path: Path, labelled: cases.Case) -> None:
    (tmp_path / "a.ulm").write_bytes(labelled.plan.data)
    faults = 0
    with running_board(name) as emulated:
        put(emulated.port, tmp_path / "a.ulm")
        for seed in range(2):
            if seed:
                from ulearn_host.deploy import mpremote

                mpremote(emulated.port, "exec", "import os; os.remove('a.ulm.base')")
            faults += through_a_bad_line(emulated.port, 1000 + seed, labelled, True, 700)[0]
    assert faults > 2
