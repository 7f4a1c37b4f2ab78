"""Boards on serial lines as members of a fleet: the host asks for tasks in their names and has them carried out.

Every board has a thread, since lines block; the federation has one thread alone, which `Calls` or a network's server
runs what the boards' threads want of it on.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ulearn import task as tasks
from ulearn_host.errors import UserError
from ulearn_host.federation import facts
from ulearn_host.federation.rounds import Federation
from ulearn_host.fleet import Samples
from ulearn_host.link import BoardError, Link

if TYPE_CHECKING:
    from ulearn_host.federation.server import Server  # needs the extra [fleet]

FIRST_PAUSE_S = 0.5  # after a failure; it doubles
LONGEST_PAUSE_S = 30.0
PATIENCE_S = 60.0  # with boards that are slow to begin
_SLICE_S = 0.2  # between two looks at whether it is over

T = TypeVar("T")
Call = Callable[..., Any]


class Say(Protocol):
    """Is told what happens on a board's line: (board, text)."""

    def __call__(self, board: str, text: str, /) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class Line:
    """A board on a serial line. open: begins a session with it, its model loaded; raises LinkError.

    train, test: what it learns from and is tested on, sent at the begin of a session; None where it has its own.
    """

    board: str
    open: Callable[[], Link]
    train: Samples | None = None
    test: Samples | None = None


def name_of(port: str) -> str:
    """A board's name after its port: /dev/pts/3 is pts-3."""
    short = re.sub(r"^/dev/(serial/by-id/)?", "", port)
    return re.sub(r"[^A-Za-z0-9._:-]", "-", short).strip("-._:")[:64] or "board"


class Calls:
    """Runs on one thread what other threads want of a federation."""

    def __init__(self) -> None:
        """Nothing waits."""
        self._waiting: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()

    def call(self, do: Callable[..., T], *args: Any) -> T:
        """do(*args) on the thread that runs `serve`; its result or its exception. From any other thread."""
        future: Future[T] = Future()
        self._waiting.put((lambda: do(*args), future))
        return future.result()

    def serve(self, seconds: float) -> None:
        """Run what comes, until there was nothing for so long or one call was run."""
        with contextlib.suppress(queue.Empty):
            do, future = self._waiting.get(timeout=max(0.001, seconds))
            try:
                future.set_result(do())
            except BaseException as fault:
                future.set_exception(fault)
                if not isinstance(fault, Exception):
                    raise


class Gate:
    """Boards on lines begin together: who is ready first would be evaluated, and train, without the others."""

    def __init__(self, members: int) -> None:
        """Open once so many have come, or have failed to."""
        self._left, self._lock, self._open = members, threading.Lock(), threading.Event()

    def arrive(self) -> None:
        """One more."""
        with self._lock:
            self._left -= 1
            if self._left <= 0:
                self._open.set()

    def wait(self, over: threading.Event) -> None:
        """Until it opens, or it is over, at most PATIENCE_S."""
        until = time.monotonic() + PATIENCE_S
        while not self._open.wait(_SLICE_S) and not over.is_set() and time.monotonic() < until:
            pass


class Member(threading.Thread):
    """A board's thread: asks for tasks, brings the board to their base, has them carried out, submits the answers.

    A line that fails is opened again, later each time; a round goes on without the board meanwhile.
    """

    def __init__(self, line: Line, federation: Federation, call: Call, say: Say, gate: Gate | None = None) -> None:
        """call: of Calls or of a server. gate: to begin with others. The board must be enrolled."""
        super().__init__(name=f"ulearn {line.board}", daemon=True)
        self.line, self.fault = line, ""
        self._federation, self._call, self._say = federation, call, say
        self._over, self._gate = threading.Event(), gate
        self._step_us = self._rate = 0
        self._random = random.Random(line.board)

    def stop(self) -> None:
        """End as soon as the line lets it."""
        self._over.set()

    def run(self) -> None:
        """Until the job is done or `stop`."""
        pause = FIRST_PAUSE_S
        while not self._over.is_set():
            try:
                with self.line.open() as link:
                    self._send(link)
                    self._gather()
                    while not self._over.is_set():
                        self._step(link)
                        pause, self.fault = FIRST_PAUSE_S, ""
            except Exception as fault:  # a line can fail in ways that its driver does not name, as termios.error
                if self._over.is_set():
                    return  # the federation's thread may have ended
                self.fault = str(fault) or type(fault).__name__
                self._say(self.line.board, self.fault)
                self._gather(wait=False)
                if self._call(self._lost):
                    return  # nobody waits for it
                self._over.wait(pause * self._random.uniform(0.75, 1.25))
                pause = min(2 * pause, LONGEST_PAUSE_S)

    def _gather(self, wait: bool = True) -> None:
        """Once, at the begin or at the first failure."""
        gate, self._gate = self._gate, None
        if gate:
            gate.arrive()
            if wait:
                gate.wait(self._over)

    def _lost(self) -> bool:
        """On the federation's thread: the board is not there. Whether the job is done."""
        self._federation.lost(self.line.board, self._federation.clock())
        return bool(self._federation.head["state"] == "done")

    def _send(self, link: Link) -> None:
        """The board's samples: a session begins with them, since nobody knows what it held before."""
        began, sent = time.monotonic(), 0
        for samples, held_out in ((self.line.train, False), (self.line.test, True)):
            if samples is not None and len(samples):
                link.data_reset(len(samples), held_out)
                link.data_add(samples.x, samples.y)
                sent += samples.x.nbytes
        if sent > 1024:
            self._rate = round(sent / max(1e-3, time.monotonic() - began))

    def _step(self, link: Link) -> None:
        """One task."""
        federation, board = self._federation, self.line.board
        told = facts.parse(link.facts(self._step_us, self._rate))
        data = self._call(lambda: federation.task(board, told, federation.clock()))
        task = tasks.parse(data)
        if task.kind == tasks.WAIT:
            self._over.wait(task.retry_ms / 1000)
        elif task.kind == tasks.DONE:
            self._take_base(link, told.base_id)
            self._over.set()
        elif task.base_id != told.base_id:
            self._take_base(link, told.base_id)
        else:
            self._carry_out(link, data, task, told)

    def _take_base(self, link: Link, have: bytes) -> None:
        """Bring the board to the last base."""
        federation = self._federation
        # In one call: a commit in between would be another base.
        (kind, data), base = self._call(lambda: (federation.down(self.line.board, have), federation.model["base"]))
        if kind == "update":
            link.update_put(data)
        elif kind == "full":
            link.replace(data, bytes(base))

    def _carry_out(self, link: Link, data: bytes, task: Any, told: facts.BoardFacts) -> None:
        """Have it done, and submit the answer; a board that cannot says why, and asks again later."""
        board, began = self.line.board, time.monotonic()
        try:
            answer = link.carry_out(data)
        except BoardError as fault:
            reason = str(fault)
            digest = sha256(reason.encode()).digest()
            self._call(lambda: self._federation.reject(board, digest, reason, self._federation.clock()))
            self._say(board, str(fault))
            self._over.wait(self._federation.job.retry_s)
            return
        if task.kind == tasks.TRAIN:
            self._step_us = round(1e6 * (time.monotonic() - began) / max(1, told.samples * task.epochs))
        federation = self._federation
        verdict = self._call(lambda: federation.submit(board, answer, federation.clock(), task.nonce))
        if not verdict.accepted:
            self._say(board, verdict.reason)


def _begin(lines: Sequence[Line], federation: Federation, call: Call, say: Say) -> list[Member]:
    """The boards' threads, at work."""
    gate = Gate(len(lines))
    members = [Member(line, federation, call, say, gate) for line in lines]
    for member in members:
        member.start()
    return members


def beside(
    federation: Federation, lines: Sequence[Line], say: Say = lambda board, text: None
) -> Callable[[Server], Awaitable[None]]:
    """For `server.serve`: boards on serial lines beside those on the network."""

    async def live(server: Server) -> None:
        members = _begin(lines, federation, server.call, say)
        server.busy.append(lambda: any(member.is_alive() for member in members))
        try:
            while any(member.is_alive() for member in members):
                await asyncio.sleep(_SLICE_S)
        finally:
            for member in members:
                member.stop()

    return live


def run(
    federation: Federation,
    lines: Sequence[Line],
    say: Say = lambda board, text: None,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Carry a job on with boards on serial lines alone, until it is done and all of them have its last base.

    tick: called on the federation's thread a few times a second. Raises UserError where no thread is left before that.
    """
    calls = Calls()
    members = _begin(lines, federation, calls.call, say)
    try:
        while any(member.is_alive() for member in members):
            wait = federation.tick(federation.clock())
            calls.serve(min(wait, _SLICE_S))
            tick()
    finally:
        for member in members:
            member.stop()
        until = time.monotonic() + 2
        while any(member.is_alive() for member in members) and time.monotonic() < until:
            calls.serve(0.05)  # who waits for an answer gets one, and sees that it is over
    if federation.head["state"] != "done":
        faults = "; ".join(f"{member.line.board}: {member.fault}" for member in members if member.fault)
        raise UserError(f"no board is left before the job is done: {faults or 'their lines have ended'}")
