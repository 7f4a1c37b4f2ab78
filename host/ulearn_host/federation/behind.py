"""A gateway as a command runs it: the boards of one host, on serial lines or a network, and the desk it is asked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ulearn_host.federation.core import Observe
from ulearn_host.federation.desk import Desk
from ulearn_host.federation.gateway import Gateway
from ulearn_host.federation.hosting import Hosting
from ulearn_host.federation.job import Job
from ulearn_host.federation.lines import Calls
from ulearn_host.federation.progress import Progress
from ulearn_host.federation.rounds import Federation


@dataclass(frozen=True)
class Behind(Hosting):
    """As Hosting. socket: where the gateway is asked; goal: updates of a round that are enough, None: of all boards."""

    socket: Path = Path("gateway.sock")
    goal: int | None = None

    def opened(self, plan: Path, job: Job, observe: Observe) -> Federation:
        """The gateway."""
        boards = len(self.lines) + len(self.network.secrets if self.network else ())
        return Gateway.begin(self.folder, plan, job, self.goal or boards, observe=observe)

    def _carry_on(self, federation: Federation, progress: Progress) -> None:
        """As a federation, and asked at the desk meanwhile."""
        calls = Calls()
        with Desk(cast(Gateway, federation), self.socket, calls.call):
            super()._carry_on(federation, _Between(progress, calls))


class _Between(Progress):
    """Runs what the desk wants wherever the federation's thread has time for progress to be shown."""

    def __init__(self, progress: Progress, calls: Calls) -> None:
        self._inner, self._calls = progress, calls

    def tick(self, at_once: bool = False) -> None:
        """As Progress."""
        self._calls.serve(0)
        self._inner.tick(at_once)
