"""Emulated boards that `ulearn emulate` keeps running, and the list of them for other commands.

Every such command has a file of its own in the cache's folder `running`, and holds a lock on it for as long as it
lives: a file without a lock is left over from a process that was killed, and is removed by whoever reads the list.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ulearn_host import emulate
from ulearn_host.errors import UserError
from ulearn_host.link import LinkError
from ulearn_host.repl import RawRepl

_START_S = 20.0
_TRY_S = 3.0
_LOOK_S = 0.5
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Running:
    """An emulated board: its name, its port, the process that keeps it."""

    board: str
    port: str
    pid: int


def folder() -> Path:
    """Where the list is kept. ULEARN_RUNNING names another place: two test runs do not ask each other's boards."""
    named = os.environ.get("ULEARN_RUNNING")
    return Path(named) if named else emulate.cache_dir() / "running"


def running() -> list[Running]:
    """The boards that are kept running now; what dead processes have left is removed."""
    boards: list[Running] = []
    for path in sorted(folder().glob("*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError), path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two readers take nobody for alive
            except BlockingIOError:
                boards += [Running(**entry) for entry in json.load(file)["boards"]]
            else:
                path.unlink(missing_ok=True)
    return boards


@contextmanager
def _registered(boards: Sequence[Running]) -> Iterator[None]:
    # Locked before it has the name that is looked for.
    path = folder() / f"{os.getpid()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    with fresh.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        json.dump({"boards": [asdict(board) for board in boards]}, file)
        file.flush()
        fresh.replace(path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def check(names: Sequence[str]) -> list[str]:
    """The names of boards as they are spelled. Raises UserError for one that cannot be emulated."""
    known = emulate.emulated_boards()
    spelled = [name.upper().replace("-", "_") for name in names]
    for name, given in zip(spelled, names, strict=True):
        if not known:
            raise UserError(
                "no emulated boards are here; they come with ulearn's repository, where `make setup` builds"
            )
        if name not in known:
            what = "a real board" if (emulate.BOARDS / name).is_dir() else "not known"
            raise UserError(f"{given} is {what}; the boards that can be emulated are {', '.join(known)}")
    return spelled


def keep(
    names: Sequence[str], ready: Callable[[Sequence[Running]], None], tick: Callable[[], None] = lambda: None
) -> None:
    """Start boards, call ready(boards) when all of them answer, keep them until Ctrl-C, SIGTERM or a hang-up.

    Raises:
        UserError: one did not come up, or all have ended by themselves.
        EmulatorError: something that a board needs is missing.
    """
    ending = threading.Event()
    before = {number: signal.signal(number, lambda *_: ending.set()) for number in _ENDING}
    try:
        with ExitStack() as stack:
            started = []
            for name in names:
                if ending.is_set():
                    return
                started.append(stack.enter_context(emulate.start(name)))
                _answers(started[-1])
                tick()
            boards = [Running(board.name, board.port, os.getpid()) for board in started]
            stack.enter_context(_registered(boards))
            ready(boards)
            while not ending.wait(_LOOK_S):
                if not any(board.running for board in started):
                    raise UserError("every board has ended by itself; start them again with ulearn emulate")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _answers(board: emulate.EmulatedBoard) -> None:
    # A board that cannot run ends at once, and its own words say why.
    until = time.monotonic() + _START_S
    while True:
        try:
            RawRepl.open(board.port, _TRY_S).close()
            return
        except LinkError as fault:
            if board.running and time.monotonic() < until:
                continue
            words = board.log.read_text(errors="replace").strip().splitlines() if board.log.exists() else []
            last = f": {words[-1]}" if words else ""
            raise UserError(f"{board.name} does not start ({fault}){last}; `make setup` builds it anew") from None
