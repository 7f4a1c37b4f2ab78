"""The host's half of the board protocol: a session with one board over its serial port.

    with Link.open("/dev/ttyACM0") as board:
        board.load("digits.ulm")
        board.data_reset(200)
        board.data_add(x, y)
        board.train(epochs=4, learning_rate=0.03, progress=print)
        update = board.update_get()

Requests are answered in order, several may be on their way, and a lost or broken frame costs a repetition: the board
carries every request out once (firmware/ulearn/agent.py). One Link belongs to one thread; several Links may work at
the same time.
"""

from __future__ import annotations

import binascii
import codecs
import contextlib
import hashlib
import os
import secrets
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any, Self

import numpy as np
import serial
from numpy.typing import NDArray

import ulearn.agent as board
from ulearn import frames
from ulearn_host.errors import UserError

Progress = Callable[[int, int], None]
Samples = NDArray[np.int8]

_BUFFER_BYTES = 1 << 16
_FIRST_PAYLOAD_BYTES = 1024  # the most a HELLO's reply may have
_RETRY_S = 0.2
_RETRY_MAX_S = 2.0
_NAK_S = 0.1
_GREET_S = 0.3
_STOP_S = 3.0
_BITS_PER_BYTE = 10  # on a UART
_RECENT_CHARS = 2000
_PATH_BYTES = 200
_REPL = b"raw REPL; CTRL-B to exit\r\n>"
_CTRL_A, _CTRL_B, _CTRL_C, _CTRL_D = b"\x01", b"\x02", b"\x03", b"\x04"
_SOFTMAX_CE = 1


class LinkError(UserError):
    """The board cannot be reached, or does not answer; one sentence says what was tried."""


class BoardError(LinkError):
    """The board refused a request, in its own words. It goes on serving, and nothing was half done."""


@dataclass(frozen=True)
class ModelFacts:
    """What the board says about the model it has loaded."""

    model_id: bytes
    base_id: bytes
    loss_kind: int
    classes: int
    input_bytes: int
    target_bytes: int
    train_bytes: int
    state_bytes: int
    trains: bool

    @property
    def labelled(self) -> bool:
        """Whether a target is a label; otherwise it is an int8 vector."""
        return self.loss_kind == _SOFTMAX_CE

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample with its target."""
        return self.target_bytes + self.input_bytes


@dataclass(frozen=True)
class Hello:
    """Who the board is and what it can take."""

    protocol: int
    fresh: bool
    window: int
    credit: int
    max_payload: int
    idle_s: int
    mpy: int
    mem_free: int
    mem_alloc: int
    implementation: str
    machine: str
    executor: str
    model: ModelFacts | None


@dataclass(frozen=True)
class Counters:
    """The start of the model's STATE: what training has done so far. `loss` is the last step's, in integer units."""

    steps: int
    loss: int
    saturated: int
    clipped: int
    skipped: int


@dataclass(frozen=True)
class Info:
    """Counters, memory and data of the board."""

    counters: Counters
    mem_free: int
    mem_alloc: int
    samples: int
    capacity: int
    model: ModelFacts | None


@dataclass(frozen=True)
class Score:
    """How a model does on samples: number, number right, for vectors the sum of squared differences."""

    samples: int
    right: int
    loss: int


@dataclass
class _Request:
    sequence: int
    kind: int
    frame: bytes
    reply: bytes | None = None

    @property
    def large(self) -> bool:
        return bool(self.kind & board._LARGE)


class Link:
    """A session with the agent on one board. Make it with `Link.open`."""

    def __init__(self, port: serial.Serial, timeout_s: float, on_text: Callable[[str], None] | None) -> None:
        """Take over an open port; `open` is the usual way."""
        self.port = str(port.port)
        self.timeout_s = timeout_s
        self.about: Hello | None = None
        self.repeats = 0  # frames that were sent again
        self._serial = port
        self._on_text = on_text
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._recent = ""
        self._quiet = False
        self._decoder = frames.Decoder(_BUFFER_BYTES, self._skipped)
        self._session = 0
        self._sequence = 0
        self._heard_s = 0.0
        self._started = False

    @classmethod
    def open(
        cls,
        port: str,
        baudrate: int = 115200,
        timeout_s: float = 15.0,
        *,
        start: bool = True,
        attach_s: float = 1.0,
        buffer_bytes: int = 2048,
        on_text: Callable[[str], None] | None = None,
    ) -> Self:
        """Open a board's port and a session with its agent.

        An agent that already serves is attached to; otherwise it is started through the REPL, which interrupts the
        program that runs there.

        Args:
            port: the serial port, best by /dev/serial/by-id.
            baudrate: of a real UART; USB ports and emulated boards ignore it.
            timeout_s: how long the board may be silent before it is given up.
            start: whether an agent may be started; without it only a serving one is attached to.
            attach_s: how long to wait for a serving agent; longer for a slow loop around `poll()`.
            buffer_bytes: of the agent that is started: twice the largest frame.
            on_text: gets what the board prints.

        Raises:
            LinkError: no such port, or nobody answers on it.
        """
        link = cls(open_port(port, baudrate), timeout_s, on_text)
        try:
            if not start:
                link.hello(max(attach_s, timeout_s))
            elif not link._greet(attach_s, echo_ends=True):
                asked = link._start(buffer_bytes)
                if not link._greet(timeout_s):
                    nobody = "neither an agent nor a REPL answers; is a program running on the board?"
                    raise LinkError(f"{port}: {link._silence() if asked else nobody}")
        except BaseException:
            link.close()
            raise
        return link

    # The session.

    def hello(self, timeout_s: float | None = None) -> Hello:
        """Open a new session. What was on its way in an older one is forgotten, the board's model and data are not.

        Raises:
            LinkError: the board does not answer.
        """
        if not self._greet(self.timeout_s if timeout_s is None else timeout_s):
            raise LinkError(f"{self.port}: {self._silence()}")
        assert self.about
        return self.about

    def stop(self) -> None:
        """Tell the agent to stop; a board whose agent was started through the REPL is at its prompt again."""
        patience_s, self.timeout_s = self.timeout_s, min(self.timeout_s, _STOP_S)
        try:
            self._call(board._STOP)
        except BoardError:
            raise
        except LinkError:
            if not self._serial.is_open:
                raise
            # The agent had stopped and its reply was lost: what was sent since went to the REPL.
            if self._started:
                self._write(_CTRL_C)
        finally:
            self.timeout_s = patience_s
        self._session = 0
        if self._started:
            self._started = False
            self._write(b"\r" + _CTRL_B)
            self._repl_text(b">>> ", 1.0)

    def close(self) -> None:
        """Close the port. An agent that serves goes on serving."""
        self._session = 0
        self._serial.close()

    def __enter__(self) -> Self:
        """Return the link itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the agent if this link started it, and close the port."""
        if self._started and self._serial.is_open:
            with contextlib.suppress(LinkError):
                if not self._session:
                    self.hello(_STOP_S)  # ends a training that nobody waits for
                self.stop()
        self.close()

    # What a board can be asked.

    def load(self, path: str) -> ModelFacts | None:
        """Load a plan from the board's files; its data is gone then. An empty path unloads."""
        facts = _model_facts(self._call(board._LOAD, _path(path)))
        self._know(facts)
        return facts

    def info(self) -> Info:
        """Counters, memory, number of samples, ids."""
        reply = self._call(board._INFO)
        _expect(reply, 32 + 54, self.port)
        *counters, free, used, samples, capacity = struct.unpack_from("<IiIIIIIHH", reply)
        model = _model_facts(reply[32:])
        self._know(model)
        return Info(Counters(*counters), free, used, samples, capacity, model)

    def data_reset(self, capacity: int, held_out: bool = False) -> None:
        """Drop the board's samples and make room for `capacity` new ones; 0 gives the memory back.

        held_out: those that it is tested on, which lie beside those that it learns from.
        """
        if not 0 <= capacity <= 0xFFFF:
            raise LinkError(f"room for {capacity} samples was asked for, expected 0 to 65535")
        self._call(board._DATA_RESET, struct.pack("<HB", capacity, 1) if held_out else struct.pack("<H", capacity))

    def data_add(self, x: Samples, y: NDArray[Any], progress: Progress | None = None) -> int:
        """Send samples to the board: x int8 [n, ...], y labels [n] or int8 vectors [n, outputs]. They go where the last
        data_reset made room.

        Returns:
            How many samples the board holds now; when its room is full, the oldest have made way.
        """
        held = 0
        for reply in self._in_pieces(board._DATA_ADD, self._packed(x, y), self.model.sample_bytes, progress):
            _expect(reply, 4, self.port)
            held = struct.unpack("<HH", reply)[0]
        return held

    def predict(self, x: Samples, progress: Progress | None = None) -> NDArray[np.uint16]:
        """Predict the labels of the inputs x, int8 [n, ...]."""
        packed = self._inputs(x).tobytes()
        replies = self._in_pieces(board._PREDICT, packed, self.model.input_bytes, progress, 2)
        return np.frombuffer(b"".join(replies), "<u2").astype(np.uint16)

    def output(self, x: Samples, progress: Progress | None = None) -> Samples:
        """Run the network on the inputs x and return its raw int8 outputs, [n, outputs]."""
        packed = self._inputs(x).tobytes()
        replies = self._in_pieces(board._OUTPUT, packed, self.model.input_bytes, progress, self.model.classes)
        return np.frombuffer(b"".join(replies), np.int8).reshape(-1, self.model.classes)

    def score(self, x: Samples, y: NDArray[Any], progress: Progress | None = None) -> Score:
        """Count how many of the samples the board gets right; they do not stay there."""
        samples = right = loss = 0
        for reply in self._in_pieces(board._SCORE, self._packed(x, y), self.model.sample_bytes, progress):
            _expect(reply, 8, self.port)
            n, r, s = struct.unpack("<HHI", reply)
            samples, right, loss = samples + n, right + r, loss + s
        return Score(samples, right, loss)

    def train(
        self,
        epochs: int = 4,
        learning_rate: float | tuple[int, int] = 0.03,
        seed: int = 1,
        skip: float = 1 / 16,
        progress: Progress | None = None,
    ) -> Counters:
        """Train on the samples the board holds.

        Args:
            epochs: how often each sample is used.
            learning_rate: a number, or (mantissa, exponent) of mantissa * 2^exponent as the board holds it.
            seed: of the order of samples and of stochastic rounding.
            skip: leave the backward pass out when no probability is off by more than this.
            progress: called with (steps done, steps in all) a few times a second; an exception it raises ends the
                wait, and the next session ends the training.
        """
        from ulearn.rates import rate

        mantissa, exponent = learning_rate if isinstance(learning_rate, tuple) else rate(learning_rate)
        request = struct.pack(
            "<HHhIH", epochs, mantissa, exponent, seed & 0xFFFFFFFF, max(0, min(int(skip * 65536), 65535))
        )
        reply = self._call(board._TRAIN, request, progress)
        _expect(reply, 20, self.port)
        return Counters(*struct.unpack("<IiIII", reply))

    def update_get(self, num_samples: int = 0) -> bytes:
        """Fetch the update since the base; it counts as `num_samples`, 0 for as many as the board holds."""
        return self._pieces(board._UPDATE_GET, "<IHI", lambda offset, size: (offset, size, num_samples))

    def facts(self, step_us: int = 0, link: int = 0) -> bytes:
        """What the board tells a fleet's host of itself (task.facts); step_us, link: what the host has measured."""
        self._call(board._FACTS, struct.pack("<II", step_us, link))
        return self._answer()

    def carry_out(self, task: bytes, progress: Progress | None = None) -> bytes:
        """Have a fleet's task (task.make) carried out; returns the answer, an update or a report."""
        self._call(board._TASK, task, progress)
        return self._answer()

    def _answer(self) -> bytes:
        return self._pieces(board._ANSWER_GET, "<IH", lambda offset, size: (offset, size))

    def replace(self, blob: bytes, base_id: bytes, progress: Progress | None = None) -> bytes:
        """Send a whole base, the trainable weights in canonical order, that must have this id; returns the id."""
        return self.update_put(blob, progress, base_id)

    def update_put(self, update: bytes, progress: Progress | None = None, base_id: bytes = b"") -> bytes:
        """Send an update and have it applied; returns the new base id. base_id: see `replace`."""
        room = self._limits().max_payload - 8
        pieces = (
            struct.pack("<II", offset, len(update)) + update[offset : offset + room]
            for offset in range(0, len(update), room)
        )
        for done, _ in enumerate(self._exchange((board._UPDATE_PUT, piece) for piece in pieces)):
            if progress:
                progress(min((done + 1) * room, len(update)), len(update))
        reply = self._call(board._UPDATE_COMMIT, struct.pack("<II", len(update), binascii.crc32(update)) + base_id)
        _expect(reply, 16, self.port)
        return reply

    def file_put(self, path: str, data: bytes, progress: Progress | None = None) -> None:
        """Write one of the board's files; folders on its way are made. It is there as sent, or as it was before."""
        room = self._limits().max_payload - 5
        pieces = (struct.pack("<BI", 2, offset) + data[offset : offset + room] for offset in range(0, len(data), room))
        self._call(board._FILE, struct.pack("<BI", 1, len(data)) + _path(path))
        for done, _ in enumerate(self._exchange((board._FILE, piece) for piece in pieces)):
            if progress:
                progress(min((done + 1) * room, len(data)), len(data))
        self._call(board._FILE_COMMIT, hashlib.sha256(data).digest())

    def checkpoint(self, path: str) -> None:
        """Save weights and state among the board's files, safe against power loss."""
        self._call(board._CHECKPOINT, _path(path))

    def restore(self, path: str) -> None:
        """Go back to a checkpoint."""
        self._call(board._RESTORE, _path(path))

    def reset(self) -> None:
        """Go back to the base and the plan's first STATE: training then depends on base, data and seed alone."""
        self._call(board._RESET)

    def weights(self) -> bytes:
        """Fetch the trainable weights, in canonical order."""
        return self._pieces(board._BLOB_GET, "<BIH", lambda offset, size: (0, offset, size))

    def state(self) -> bytes:
        """Fetch STATE: generator, counters, learning rate, gains."""
        return self._pieces(board._BLOB_GET, "<BIH", lambda offset, size: (1, offset, size))

    @property
    def model(self) -> ModelFacts:
        """The facts of the loaded model.

        Raises:
            LinkError: none is loaded.
        """
        if self.about is None or self.about.model is None:
            raise LinkError(f"{self.port}: no model is loaded on the board")
        return self.about.model

    # Samples to bytes.

    def _know(self, facts: ModelFacts | None) -> None:
        if self.about:
            self.about = Hello(**{**self.about.__dict__, "model": facts})

    def _inputs(self, x: Samples) -> Samples:
        x = np.ascontiguousarray(x)
        if x.dtype != np.int8:
            raise LinkError(f"inputs are {x.dtype}, expected int8 codes in the quantisation of the model's input")
        size = self.model.input_bytes
        if x.ndim < 2 or x.size != len(x) * size:
            raise LinkError(f"inputs have the shape {x.shape}, expected [n, {size}]")
        return x.reshape(len(x), size)

    def _packed(self, x: Samples, y: NDArray[Any]) -> bytes:
        inputs = self._inputs(x)
        facts = self.model
        targets = np.asarray(y)
        shape = (len(inputs),) if facts.labelled else (len(inputs), facts.target_bytes)
        if targets.shape != shape:
            raise LinkError(f"targets have the shape {targets.shape}, expected {list(shape)}")
        if not facts.labelled and targets.dtype != np.int8:
            raise LinkError(f"targets are {targets.dtype}, expected int8 codes in the quantisation of the output")
        if facts.labelled and targets.dtype.kind not in "iu":
            raise LinkError(f"labels are {targets.dtype}, expected integers")
        if facts.labelled and len(targets) and not 0 <= targets.min() <= targets.max() < facts.classes:
            raise LinkError(f"labels reach from {targets.min()} to {targets.max()}, expected 0 to {facts.classes - 1}")
        raw = targets.astype("<u2" if facts.labelled else np.int8).view(np.uint8)
        raw = raw.reshape(len(inputs), facts.target_bytes)
        return bytes(np.concatenate([raw, inputs.view(np.uint8)], axis=1).tobytes())

    def _in_pieces(
        self, kind: int, packed: bytes, unit: int, progress: Progress | None, reply_unit: int = 0
    ) -> Iterator[bytes]:
        # As many whole samples a frame as it and its reply can hold.
        room = self._limits().max_payload
        size = room // max(unit, reply_unit) * unit
        if not size:
            raise LinkError(
                f"{self.port}: one sample needs {unit} bytes, the board takes {room} at once; "
                f"serve with buffer_bytes={2 * (max(unit, reply_unit) + frames.FRAME_BYTES)} or more"
            )
        pieces = ((kind, packed[at : at + size]) for at in range(0, len(packed), size))
        for done, reply in enumerate(self._exchange(pieces)):
            if progress:
                progress(min((done + 1) * size, len(packed)) // unit, len(packed) // unit)
            yield reply

    def _pieces(self, kind: int, layout: str, fields: Callable[[int, int], tuple[int, ...]]) -> bytes:
        # Something large from the board: the first piece says how large.
        room = self._limits().max_payload - 4
        first = self._call(kind, struct.pack(layout, *fields(0, room)))
        _expect(first, 4, self.port, exact=False)
        total = struct.unpack_from("<I", first)[0]
        parts = [first[4:]]
        offsets = range(len(parts[0]), total, room)
        parts += [part[4:] for part in self._exchange((kind, struct.pack(layout, *fields(at, room))) for at in offsets)]
        data = b"".join(parts)
        if len(data) != total:
            raise LinkError(f"{self.port}: the board sent {len(data)} bytes, announced were {total}")
        return data

    # Requests and replies.

    def _call(self, kind: int, payload: bytes = b"", progress: Progress | None = None) -> bytes:
        return next(iter(list(self._exchange([(kind, payload)], progress))))

    def _limits(self) -> Hello:
        if not self._session or self.about is None:
            raise LinkError(f"{self.port}: there is no session; open one with hello()")
        return self.about

    def _exchange(self, requests: Iterable[tuple[int, bytes]], progress: Progress | None = None) -> Iterator[bytes]:
        # Sends requests, several at a time, and yields their replies in order.
        self._limits()
        self._wake()
        return _Exchange(self, requests, progress).replies()

    def _request(self, kind: int, payload: bytes) -> _Request:
        self._sequence = (self._sequence + 1) & 0xFFFF
        return _Request(self._sequence, kind, _frame(kind, self._session, self._sequence, payload))

    def _wake(self) -> None:
        # After a pause the board lets Ctrl-C through again; a HELLO is free of such bytes and ends that.
        if self.about and time.monotonic() - self._heard_s > self.about.idle_s / 4:
            session = self._session
            if not self._greet(self.timeout_s, session):
                raise LinkError(f"{self.port}: {self._silence()}")
            if self.about.fresh:
                self._session = 0
                raise LinkError(f"{self.port}: the board was reset; its model and data must be loaded again")

    def _greet(self, timeout_s: float, session: int = 0, echo_ends: bool = False) -> bool:
        # HELLO until it is answered. True: the session is open. A REPL may be there: its echo is nobody's text.
        session, frame = _hello_frame(session)
        echo = bytes(b for b in frame if 32 <= b < 127).decode()
        self._decoder.max_payload = _FIRST_PAYLOAD_BYTES
        self._quiet = echo_ends
        until = time.monotonic() + timeout_s
        try:
            while (now := time.monotonic()) < until:
                self._write(frame)
                again_s = min(until, now + _GREET_S)
                while (left := again_s - time.monotonic()) > 0:
                    if self._receive(left, session) and self._decoder.kind == board._HELLO | board._REPLY:
                        self._agree(session, self._hello_reply(bytes(self._decoder.payload)))
                        return True
                self._decoder.resync()
                if self._started:
                    self._check_started()
                if echo_ends and echo in self._recent:
                    break
        finally:
            self._quiet = False
        return False

    def _agree(self, session: int, about: Hello) -> None:
        self.about = about
        self._decoder.max_payload = max(about.max_payload, 256)
        self._heard_s = time.monotonic()
        if session != self._session:
            self._session, self._sequence = session, 0

    def _hello_reply(self, reply: bytes) -> Hello:
        _expect(reply, 20 + 54, self.port, exact=False)
        protocol, fresh, window, _, credit, room, idle_s, mpy, free, used = struct.unpack_from("<BBBBHHHHII", reply)
        if protocol != board._PROTOCOL:
            raise LinkError(
                f"{self.port}: the board speaks protocol {protocol}, expected {board._PROTOCOL}; "
                "deploy ulearn to it again"
            )
        model = _model_facts(reply[20:])
        implementation, rest = _first_text(reply[20 + 54 :])
        machine, rest = _first_text(rest)
        executor, _ = _first_text(rest)
        return Hello(
            protocol,
            bool(fresh),
            max(window, 1),
            credit,
            room,
            idle_s,
            mpy,
            free,
            used,
            implementation,
            machine,
            executor,
            model,
        )

    # Bytes.

    def _write(self, data: bytes) -> None:
        try:
            self._serial.write(data)
        except serial.SerialTimeoutException as error:
            self._session = 0
            raise LinkError(f"{self.port}: the board takes no bytes any more") from error
        except OSError as error:
            raise self._gone(error) from error

    def _receive(self, timeout_s: float, session: int | None = None) -> bool:
        # The next frame of this session is in the decoder. False: it did not come in time.
        wanted = self._session if session is None else session
        until = time.monotonic() + timeout_s
        decoder = self._decoder
        while True:
            while decoder.next():
                if decoder.session == wanted:
                    return True
            left = until - time.monotonic()
            if left <= 0:
                return False
            decoder.feed(self._read(left))

    def _read(self, timeout_s: float) -> bytes:
        # What is there; if nothing is, what comes first within the time.
        try:
            self._serial.timeout = max(timeout_s, 0)
            waiting = min(self._serial.in_waiting or 1, 4096)
            return bytes(self._serial.read(waiting))
        except (OSError, TypeError) as error:  # pyserial's TypeError: the port was closed under it
            raise self._gone(error) from error

    def _gone(self, error: Exception) -> LinkError:
        self.close()
        return LinkError(f"{self.port}: the port is gone: {getattr(error, 'strerror', None) or error}")

    def _skipped(self, view: memoryview) -> None:
        text = self._utf8.decode(bytes(view))
        self._recent = (self._recent + text)[-_RECENT_CHARS:]
        if self._on_text and text and not self._quiet:
            self._on_text(text)

    def _silence(self) -> str:
        lines = [line.strip() for line in self._recent.replace("\x04", "\n").splitlines()]
        last = next((line for line in reversed(lines) if line.strip(">")), "")
        words = f"; its last words: {last[-120:]}" if last else ""
        return f"the board did not answer for {self.timeout_s:g} s{words}"

    # The REPL.

    def _start(self, buffer_bytes: int) -> bool:
        # False: there is no REPL; perhaps an agent that is busy.
        # The raw REPL is spoken here, on the port that stays open: closing and opening it again, as a call of mpremote
        # would, resets some boards, and would lose what the agent has to say when it cannot start.
        for _ in range(3):
            self._write(b"\r" + _CTRL_C + _CTRL_C)
            self._repl_text(b"", 0.1)
            self._write(b"\r" + _CTRL_A)
            if _REPL in self._repl_text(_REPL, 1.0):
                break
        else:
            return False
        self._write(b"import ulearn.agent\nulearn.agent.serve(%d)\n" % buffer_bytes + _CTRL_D)
        _, taken, rest = self._repl_text(b"OK", 2.0).partition(b"OK")
        if not taken:
            raise LinkError(f"{self.port}: the REPL did not take the command that starts the agent")
        self._recent = ""
        self._decoder.feed(rest)
        self._started = True
        return True

    def _repl_text(self, ending: bytes, timeout_s: float) -> bytes:
        text = b""
        until = time.monotonic() + timeout_s
        while (left := until - time.monotonic()) > 0 and not (ending and ending in text):
            text += self._read(left)
        return text

    def _check_started(self) -> None:
        # Two Ctrl-D and a prompt end a program under the raw REPL, its error stands between the two. Without the prompt
        # they may be of a frame that was cut.
        parts = self._recent.split("\x04")
        if len(parts) < 3 or not parts[-1].startswith(">"):
            return
        lines = [line for line in parts[-2].splitlines() if line.strip()] or ["it ended"]
        self._started = False
        hint = "; put it there with `ulearn deploy`" if "no module named" in lines[-1] else ""
        raise LinkError(f"{self.port}: the agent did not start: {lines[-1].strip()}{hint}")


class _Exchange:
    # Requests on their way. An error ends the sending; what was sent is waited for, so that the session stays in step.
    # After a loss everything from the first unanswered request on is sent again, in order.

    def __init__(self, link: Link, requests: Iterable[tuple[int, bytes]], progress: Progress | None) -> None:
        self._link = link
        self._about = link._limits()
        self._source = iter(requests)
        self._progress = progress
        self._queue: deque[_Request] = deque()  # replies not yet handed out, by sequence
        self._sent = 0  # of the queue
        self._window = self._about.window
        self._refusal: str | None = None
        # A UART's bytes there, and as long again for slack.
        self._byte_s = 2 * _BITS_PER_BYTE / (link._serial.baudrate or 115200)
        self._retry_s = _RETRY_S
        self._nak_s = 0.0
        self._moved()

    def replies(self) -> Iterator[bytes]:
        try:
            while self._fill():
                if not self._overdue() and self._link._receive(self._patience_s()) and self._take():
                    yield from self._finished()
        finally:
            if self._queue:
                self._link._session = 0  # left in the middle: only a new session is in step again
        if self._refusal is not None:
            raise BoardError(f"{self._link.port}: {self._refusal}")

    def _moved(self) -> None:
        self._moved_s = time.monotonic()
        self._again_s = self._moved_s + self._retry_s

    def _patience_s(self) -> float:
        return min(self._again_s, self._moved_s + self._link.timeout_s) - time.monotonic()

    def _fill(self) -> bool:
        # Send what may be sent. False: all is done.
        while True:
            if self._sent == len(self._queue):
                following = None if self._refusal else next(self._source, None)
                if following is None:
                    break
                self._queue.append(self._link._request(*following))
            if not self._may_send():
                break
            request = self._queue[self._sent]
            if request.reply is None:
                if self._sent == 0:
                    self._again_s = time.monotonic() + self._retry_s
                self._link._write(request.frame)
                self._again_s += self._byte_s * len(request.frame)
            self._sent += 1
        return bool(self._queue)

    def _may_send(self) -> bool:
        # Bytes that the board can hold while it is busy, replies that it keeps. A single frame may be larger than the
        # credit: with nothing else to do, the board reads along.
        if self._sent == 0:
            return True
        following = self._queue[self._sent]
        open_now = [r for r in islice(self._queue, self._sent) if r.reply is None]
        if self._sent >= self._window or (following.large and any(r.large for r in open_now)):
            return False
        return sum(len(r.frame) for r in open_now) + len(following.frame) <= self._about.credit

    def _overdue(self) -> bool:
        now = time.monotonic()
        if now - self._moved_s > self._link.timeout_s:
            raise LinkError(f"{self._link.port}: {self._link._silence()}")
        if now < self._again_s:
            return False
        # Perhaps the board is only busy: one frame is enough to find out, and cannot drown it.
        self._link._decoder.resync()
        self._again(1)
        self._retry_s = min(2 * self._retry_s, _RETRY_MAX_S)
        return True

    def _again(self, window: int) -> None:
        self._link.repeats += 1
        self._sent, self._window = 0, window

    def _take(self) -> bool:
        # One frame from the board. True: it was a reply that was missing.
        frame = self._link._decoder
        self._link._heard_s = now = time.monotonic()
        if frame.kind == board._NAK:
            # The board lacks the oldest request. One loss causes several NAKs: the first is heeded.
            if frame.sequence == self._queue[0].sequence and self._sent and now - self._nak_s > _NAK_S:
                self._nak_s = now
                self._retry_s = _RETRY_S  # the board is not busy, the line is bad
                self._again(self._window)
            return False
        request = next((r for r in self._queue if r.sequence == frame.sequence and r.reply is None), None)
        if request is None:
            return False  # a reply that came twice
        if frame.kind == board._PROGRESS:
            self._moved()
            if self._progress and len(frame.payload) == 8:
                self._progress(*struct.unpack("<II", frame.payload))
            return False
        if frame.kind == board._ERROR:
            request.reply = b""
            self._refusal = self._refusal or bytes(frame.payload).decode(errors="replace")
        elif frame.kind == request.kind | board._REPLY:
            request.reply = bytes(frame.payload)
        else:
            return False
        self._window, self._retry_s = self._about.window, _RETRY_S
        self._moved()
        return True

    def _finished(self) -> Iterator[bytes]:
        while self._queue and self._queue[0].reply is not None:
            reply = self._queue.popleft().reply
            self._sent = max(0, self._sent - 1)
            if self._refusal is None and reply is not None:
                yield reply
                self._moved()  # the caller may have taken his time


def open_port(name: str, baudrate: int) -> serial.Serial:
    port = serial.Serial()
    port.port = name
    port.baudrate = baudrate
    port.timeout = 0
    port.write_timeout = 5
    if os.name == "posix":
        port.exclusive = True
    else:
        port.dtr = port.rts = False  # either of them resets ESP boards there
    try:
        port.open()
    except OSError as error:
        busy = "exclusively lock" in str(error)
        reason = "another program has it open" if busy else os.strerror(error.errno) if error.errno else str(error)
        raise LinkError(f"{name}: the port cannot be opened: {reason}") from error
    except ValueError as error:
        raise LinkError(f"{name}: the port cannot be opened: {error}") from error
    return port


def _frame(kind: int, session: int, sequence: int, payload: bytes = b"") -> bytes:
    buffer = bytearray(len(payload) + frames.FRAME_BYTES)
    buffer[frames.PAYLOAD_OFFSET : frames.PAYLOAD_OFFSET + len(payload)] = payload
    frames.encode(memoryview(buffer), kind, session, sequence, len(payload))
    return bytes(buffer)


def _hello_frame(session: int = 0) -> tuple[int, bytes]:
    # A session whose HELLO holds no control character but NUL: at a REPL they would do something.
    while True:
        number = session or secrets.randbelow(0xFFFF) + 1
        frame = _frame(board._HELLO, number, 0)
        if session or all(b == 0 or (b >= 32 and b != 127) for b in frame):
            return number, frame


def _model_facts(raw: bytes) -> ModelFacts | None:
    if len(raw) < 54:
        raise LinkError(f"the board's facts about its model have {len(raw)} bytes, expected 54")
    loaded, loss_kind, classes, input_bytes, target_bytes, train, state, model_id, base_id, trains = struct.unpack_from(
        "<BBHIIII16s16sH", raw
    )
    if not loaded:
        return None
    return ModelFacts(model_id, base_id, loss_kind, classes, input_bytes, target_bytes, train, state, bool(trains))


def _first_text(raw: bytes) -> tuple[str, bytes]:
    # A text behind the byte with its length, and what follows.
    size = raw[0] if raw else 0
    return raw[1 : 1 + size].decode(errors="replace"), raw[1 + size :]


def _path(path: str) -> bytes:
    raw = path.encode()
    if len(raw) > _PATH_BYTES:
        raise LinkError(f"the path has {len(raw)} bytes, expected at most {_PATH_BYTES}")
    return raw


def _expect(reply: bytes, size: int, port: str, exact: bool = True) -> None:
    if len(reply) < size or (exact and size <= 20 and len(reply) != size):
        raise LinkError(f"{port}: a reply has {len(reply)} bytes, expected {size}; deploy ulearn to the board again")
