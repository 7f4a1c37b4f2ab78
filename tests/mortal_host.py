"""A host of rounds in a process of its own that dies by SIGKILL where it is told to, and is started again.

The boards live on in the test's process and ask again, as boards do. What the host has said of its transitions has
reached the test before it dies.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ulearn_host.federation.facts import BoardFacts
from ulearn_host.federation.job import Job
from ulearn_host.federation.rounds import Federation, Verdict

Lives = Callable[[], int]  # how many SQL statements a life lasts


class Dead(Exception):
    """The host died before it answered."""


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _serve(
    line: Connection, folder: Path, plan: Path, job: Job, now: float, killed: set[str], life: int | None
) -> None:
    """The child: begin or open the job, carry out calls until the line ends. killed: events that were lived to already;
    life: statements to live for, None: until an event that is new."""
    clock, statements = [now], [0]

    def observe(event: str, details: dict[str, Any]) -> None:
        line.send(("event", event, details))
        if life is None and key(event, details) not in killed:
            _die()

    def trace(statement: str) -> None:
        statements[0] += 1
        if life is not None and statements[0] > life:
            _die()

    federation = Federation.create(folder, plan, job, lambda: clock[0], observe)
    federation.journal.trace(trace)
    line.send(("ready",))
    while True:
        try:
            name, clock[0], arguments = line.recv()
        except EOFError:
            os._exit(0)
        result: Any = bytes(federation.model["base"]) if name == "base" else getattr(federation, name)(*arguments)
        line.send(("result", result))


def key(event: str, details: dict[str, Any]) -> str:
    """What is one event, however often it happens."""
    return f"{event}, round {details.get('round')}, board {details.get('board')}"


class MortalHost:
    """The parent's side, with the calls of a Federation that boards need. A call of a dead host raises Dead once; the
    next one finds a new host. events: all that any life has told of, in order; killed: those that ended one."""

    def __init__(self, folder: Path, plan: Path, job: Job, lives: Lives | None = None) -> None:
        """No process before the first call. Without lives every event is the death of one host."""
        self._begin, self._lives = (folder, plan, job), lives
        self._process: Any = None
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.killed: set[str] = set()
        self.deaths = 0
        self.now = 0.0
        self.model = _Base(self)
        self.autopsy: Callable[[], None] = lambda: None  # of what a death leaves behind

    def _start(self) -> None:
        self._line, theirs = multiprocessing.Pipe()
        life = self._lives() if self._lives else None
        arguments = (theirs, *self._begin, self.now, self.killed, life)
        self._process = multiprocessing.get_context("fork").Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._wait("ready")

    def _wait(self, wanted: str) -> Any:
        try:
            while True:
                kind, *rest = self._line.recv()
                if kind == wanted:
                    return rest[0] if rest else None
                self.events.append((rest[0], rest[1]))
        except (EOFError, ConnectionResetError):
            self._process.join()
            assert self._process.exitcode == -signal.SIGKILL, "the host failed by itself"
            self._process = None
            self._line.close()
            self.deaths += 1
            if not self._lives:
                self.killed.add(key(*self.events[-1]))
            self.autopsy()
            raise Dead from None

    def _call(self, name: str, *arguments: Any) -> Any:
        if self._process is None:
            self._start()
        with suppress(BrokenPipeError, ConnectionResetError):  # what it said before it died is still to be read
            self._line.send((name, self.now, arguments))
        return self._wait("result")

    def enrol(self, board: str, secret: bytes, link: str) -> None:
        self._call("enrol", board, secret, link)

    def task(self, board: str, facts: BoardFacts, now: float) -> bytes:
        return bytes(self._call("task", board, facts, now))

    def down(self, board: str, have: bytes) -> tuple[str, bytes]:
        kind, data = self._call("down", board, have)
        return kind, data

    def submit(self, board: str, body: bytes, now: float, nonce: bytes | None = None) -> Verdict:
        verdict: Verdict = self._call("submit", board, body, now, nonce)
        return verdict

    def tick(self, now: float) -> float:
        return float(self._call("tick", now))

    def base(self) -> bytes:
        return bytes(self._call("base"))

    def end(self) -> None:
        """Kill it for good."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._line.close()
            self._process = None


class _Base:
    """`federation.model["base"]` of a host in another process."""

    def __init__(self, host: MortalHost) -> None:
        self._host = host

    def __getitem__(self, key: str) -> bytes:
        assert key == "base"
        return self._host.base()
