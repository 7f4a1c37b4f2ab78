"""A host of a network fleet in a process of its own, which dies by SIGKILL where it is told to and is started again.

A supervisor forks one host after the other, so that a new one is there in milliseconds. What a host has told of its
transitions is in a file before it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import socket
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from network_fleet import HOST
from ulearn_host.federation import server
from ulearn_host.federation.door import Limits
from ulearn_host.federation.rounds import Federation

Doom = Callable[[str], bool]  # (a transition): whether to die there


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.create_server((HOST, 0)) as probe:
        return int(probe.getsockname()[1])


def at_every_transition(event: str) -> bool:
    """Before and after each kind of transition, once between two commits; at each stage of a model file's change."""
    return True


def never(event: str) -> bool:
    """A host that lives."""
    return False


class NetworkHost:
    """The supervisor, from the test's side. events: what all hosts have told of, one entry a transition."""

    def __init__(
        self, folder: Path, port: int, doom: Doom = never, limits: Limits | None = None, plain: bool = False
    ) -> None:
        """Serve the job in a folder at a port."""
        self.folder, self.port = folder, port
        self._log = folder / "events.log"
        self._facts = folder / "facts.json"
        self.process = multiprocessing.get_context("fork").Process(
            target=_supervise, args=(folder, port, doom, limits, plain, self._log, self._facts), daemon=False
        )
        self.process.start()

    @property
    def events(self) -> list[dict[str, Any]]:
        """In order; `event` is the transition's name."""
        if not self._log.exists():
            return []
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    @property
    def facts(self) -> dict[str, Any]:
        """Deaths so far, and of the host that lives: refused, rss_bytes, traced_bytes, written twice a second."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            found: dict[str, Any] = json.loads(self._facts.read_text())
            return found
        return {}

    def wait(self, seconds: float) -> None:
        """Until the job is done, and every board knows."""
        self.process.join(seconds)
        assert self.process.exitcode == 0, f"the host ended with {self.process.exitcode}: {self.events[-5:]}"

    def end(self) -> None:
        """Kill what is left."""
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


def _supervise(folder: Path, port: int, doom: Doom, limits: Limits | None, plain: bool, log: Path, facts: Path) -> None:
    died: set[str] = set()
    child = 0

    def end(*_: Any) -> None:
        if child:
            os.kill(child, signal.SIGKILL)
        os._exit(1)

    signal.signal(signal.SIGTERM, end)
    while True:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.close(reader)
            status = 1
            try:
                _live(folder, port, doom, died, limits, plain, log, facts, writer)
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        with os.fdopen(reader) as last:
            words = last.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != -signal.SIGKILL or not words:
            os._exit(0 if status == 0 else 2)
        died.add(words)


def _live(
    folder: Path,
    port: int,
    doom: Doom,
    died: set[str],
    limits: Limits | None,
    plain: bool,
    log: Path,
    facts: Path,
    last: int,
) -> None:
    """One life of a host."""
    commits = sum(json.loads(line)["event"] == "commit" for line in log.read_text().splitlines()) if log.exists() else 0
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def observe(event: str, details: dict[str, Any]) -> None:
        told = {
            "event": event,
            "at": time.time(),
            **{k: details[k] for k in ("round", "board", "base_id", "text") if k in details},
        }
        os.write(out, (json.dumps(told) + "\n").encode())
        nonlocal commits
        # By commits and not by rounds, whose number a round that is given up takes, too: the deaths come to an end.
        name = f"{event} after {commits} commits"
        commits += event == "commit"
        if name not in died and doom(name):
            os.write(last, name.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    if doom is never:
        tracemalloc.start()

    async def tell(host: server.Server) -> None:
        while True:
            rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            traced = tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else 0
            told = {"refused": host.audit.count, "rss_bytes": rss, "traced_bytes": traced, "connections": 0}
            told |= {"connections": host.connections, "at": time.time(), "deaths": len(died)}
            facts.with_suffix(".new").write_text(json.dumps(told))
            facts.with_suffix(".new").replace(facts)
            await asyncio.sleep(0.5)

    with Federation(folder, observe=observe) as federation:
        asyncio.run(
            server.serve(federation, HOST, port, plain=plain, limits=limits, beside=[tell], warn=lambda text: None)
        )
