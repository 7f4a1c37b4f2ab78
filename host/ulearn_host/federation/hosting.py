"""A job as a command runs it: boards on serial lines, on a network, or both, a page to look at, and progress."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulearn.hmac import MAC_BYTES
from ulearn_host import display
from ulearn_host.errors import UserError
from ulearn_host.federation import lines
from ulearn_host.federation.core import MODEL, Observe
from ulearn_host.federation.job import Job
from ulearn_host.federation.progress import Progress
from ulearn_host.federation.published import publish
from ulearn_host.federation.rounds import Federation

PAGE_S = 0.5  # between two looks at a federation for its page

if TYPE_CHECKING:
    from ulearn_host.federation.server import Server


def _new_secret() -> bytes:
    return secrets.token_bytes(MAC_BYTES)


@dataclass(frozen=True)
class Network:
    """Where boards on a network find the host. secrets: of the boards enrolled. plain: without TLS."""

    host: str
    port: int
    secrets: dict[str, bytes]
    plain: bool = False


@dataclass(frozen=True)
class Hosting:
    """What a job needs beside itself. folder: of the job; fleet: of the host's identity; out: where the fleet's plan is
    written after every commit; page: port of the page, on this computer alone."""

    folder: Path
    fleet: Path
    lines: Sequence[lines.Line] = ()
    network: Network | None = None
    out: Path | None = None
    page: int | None = None
    as_json: bool = False

    def run(self, plan: Path, job: Job, secret: Callable[[], bytes] = _new_secret) -> dict[str, Any]:
        """Begin the job, or go on with it, until it is done; returns the federation's last status.

        secret: makes one for a board on a line. Raises UserError for a folder that holds another job.
        """
        progress = Progress(self.as_json)

        def observe(event: str, details: dict[str, Any]) -> None:
            progress.observe(event, details)
            if event == "publish":
                self._write_out()

        with self.opened(plan, job, observe) as federation:
            for line in self.lines:
                federation.enrol(line.board, federation.secret(line.board) or secret(), "serial")
            for board, known in (self.network.secrets if self.network else {}).items():
                federation.enrol(board, known, "network")
            if self.network:
                for board in federation.boards("network"):
                    if board not in self.network.secrets:  # its card was taken out of the fleet's folder
                        federation.dismiss(board)
            progress.watch(federation.status)
            with progress:
                self._carry_on(federation, progress)
                self._write_out()
            return federation.status()

    def opened(self, plan: Path, job: Job, observe: Observe) -> Federation:
        """The job, begun or gone on with."""
        return Federation.create(self.folder, plan, job, observe=observe)

    def _write_out(self) -> None:
        if self.out:
            publish(self.out, (self.folder / MODEL).read_bytes())

    def _carry_on(self, federation: Federation, progress: Progress) -> None:
        """Until it is done."""
        if self.network is None and self.page is None:
            lines.run(federation, self.lines, _say, progress.tick)
        elif self.network is None:
            with self._page_beside(federation) as put:

                def tick() -> None:
                    progress.tick()
                    put()

                lines.run(federation, self.lines, _say, tick)
        else:
            asyncio.run(self._serve(federation, self.network, progress))

    @contextlib.contextmanager
    def _page_beside(self, federation: Federation) -> Any:
        """The page in a thread of its own; the value brings it up to date."""
        web = _web()
        latest = web.Latest(federation.status())
        with web.in_thread(latest.get, port=self.page) as url:
            _tell(f"the fleet's page: {url}")
            put_s = time.monotonic()

            def put() -> None:
                nonlocal put_s
                if time.monotonic() - put_s >= PAGE_S:
                    put_s = time.monotonic()
                    latest.put(federation.status())

            yield put
            latest.put(federation.status())

    async def _serve(self, federation: Federation, network: Network, progress: Progress) -> None:
        """Boards on the network, and what lives beside them."""
        from ulearn_host.federation import certificate, server

        async def show(_: Server) -> None:
            while True:
                progress.tick()
                await asyncio.sleep(0.25)

        def ready(here: Server) -> None:
            many = len(network.secrets)
            _tell(f"listening on {network.host} port {here.port} for {many} board{'s' * (many != 1)}")

        async with contextlib.AsyncExitStack() as stack:
            if self.page is not None:
                url = await stack.enter_async_context(_web().listen(federation.status, port=self.page))
                _tell(f"the fleet's page: {url}")
            await server.serve(
                federation,
                network.host,
                network.port,
                plain=network.plain,
                identity=None if network.plain else certificate.ensure(self.fleet),
                beside=[show, lines.beside(federation, self.lines, _say)],
                ready=ready,
                warn=lambda text: _tell(f"warning: {text}"),
            )


def _web() -> Any:
    """The page needs what a network does."""
    try:
        from ulearn_host.federation import web
    except ImportError as missing:
        raise UserError(f"the page needs {missing.name}: pip install 'ulearn[fleet]'") from None
    return web


def _say(board: str, text: str) -> None:
    """What a board's line has to say."""
    _tell(f"{board}: {display.visible(text)}")


def _tell(text: str) -> None:
    display.errors.print(text, markup=False, soft_wrap=True)
