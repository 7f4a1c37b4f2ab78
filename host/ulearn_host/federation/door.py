"""Who may connect, and for how long: connections are counted before TLS begins, and strangers make room for each other.

A stranger is whoever has not yet sent a letter that is signed with the secret of a board. Strangers share a fixed
number of places, in all and for each address; where these are taken, one of them, drawn by lot, gives way to the next
(as OpenSSH does), so that whoever holds all places cannot keep them. A board has one connection: its newest.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from ulearn_host.errors import UserError
from ulearn_host.federation.security import Session

_BACKLOG = 128
_READ_BYTES = 4096  # that aiohttp holds of a request's body, twice at most
_LINE_BYTES = 1024
_HEADERS = 32
_SHUTDOWN_S = 2.0


@dataclass(frozen=True)
class Limits:
    """What a client may take. handshake_s: for TLS; request_s: for the first request of a connection, and for the head
    of a letter; idle_s: between requests; silence_s: between two pieces of a body, either way; slowest: bytes a second,
    beyond the first silence_s; strangers, strangers_of_address: connections; held: polls that are kept; hold_s: for how
    long; quiet_s: after a job's end, how long nobody must ask: who has not got the last reply asks again."""

    handshake_s: float = 15.0
    request_s: float = 10.0
    idle_s: float = 60.0
    silence_s: float = 10.0
    slowest: int = 256
    strangers: int = 64
    strangers_of_address: int = 16
    held: int = 512
    hold_s: float = 25.0
    quiet_s: float = 4.0


class Peer:
    """One connection. board: whose it has proved to be. session: what it has proved."""

    def __init__(self, address: str) -> None:
        """A stranger from an address."""
        self.address = address
        self.board: str | None = None
        self.session = Session()
        self.transport: asyncio.Transport | None = None
        self.task: asyncio.Task[None] | None = None
        self.gone = asyncio.Event()

    def close(self) -> None:
        """At once; what is under way there ends."""
        if self.transport is not None:
            self.transport.abort()
        elif self.task is not None:
            self.task.cancel()


class Protocol(web.RequestHandler):
    """aiohttp's connection, with a limit on the first request and an account of what is no HTTP."""

    def __init__(self, server: web.Server, door: Door, peer: Peer) -> None:
        """A connection of a peer."""
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=door.limits.idle_s,
            access_log=None,  # type: ignore[arg-type]
            max_line_size=_LINE_BYTES,
            max_field_size=_LINE_BYTES,
            max_headers=_HEADERS,
            lingering_time=1.0,
            read_bufsize=_READ_BYTES,
            auto_decompress=False,
        )
        self.peer, self._door = peer, door
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """TLS is there."""
        super().connection_made(transport)
        assert isinstance(transport, asyncio.Transport)
        self.peer.transport = transport
        self._patience = asyncio.get_running_loop().call_later(self._door.limits.request_s, self._late)

    def begun(self) -> None:
        """A request's HTTP head is here."""
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def connection_lost(self, exc: BaseException | None) -> None:
        """Whatever the reason."""
        if self._patience is not None:
            self.begun()
            self._door.refused(self.peer.address, "the connection ended before it brought a request")
        self.peer.gone.set()
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is no HTTP, and what went wrong here."""
        self.begun()
        if status == 500:
            self.log_exception("an error of the host's own", exc_info=exc)
            reason = "an error of the host's own"
        else:
            reason = "no HTTP request that can be read"
            self._door.refused(self.peer.address, reason)
        return closing(status, reason)

    def _late(self) -> None:
        """A client that says nothing, or byte by byte."""
        self._patience = None
        reason = f"no request in {self._door.limits.request_s:g} s"
        self._door.refused(self.peer.address, reason)
        if self.peer.transport is not None:
            head = f"HTTP/1.1 408 Request Timeout\r\nContent-Length: {len(reason)}\r\nConnection: close\r\n\r\n"
            self.peer.transport.write((head + reason).encode())
        self.force_close()


def closing(status: int, reason: str) -> web.Response:
    """A refusal, the last reply of a connection."""
    response = web.Response(status=status, text=reason, headers={"Server": "ulearn"})
    response.force_close()
    return response


class Door:
    """Listens, and counts who came in."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Any],
        context: ssl.SSLContext | None,
        limits: Limits,
        refused: Callable[[str, str], None],
    ) -> None:
        """context: of TLS, None for plain text. refused(address, reason): told of those who get no further."""
        self.limits, self.refused = limits, refused
        self._handler, self._context = handler, context
        self._peers: set[Peer] = set()
        self._accepting: asyncio.Task[None] | None = None

    async def open(self, host: str, port: int) -> int:
        """Listen; returns the port, which the system chooses for 0. Raises UserError."""
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
            self._listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as fault:
            raise UserError(
                f"{host} port {port}: cannot be listened at ({fault.strerror}); name another address or port"
            ) from None
        self._listener.setblocking(False)
        self._server = web.Server(self._handler, handler_cancellation=True)
        self._accepting = asyncio.create_task(self._accept())
        return int(self._listener.getsockname()[1])

    async def close(self) -> None:
        """End every connection."""
        if self._accepting is not None:
            self._accepting.cancel()
            self._listener.close()
        tasks = [peer.task for peer in self._peers if peer.task is not None]
        for peer in list(self._peers):
            peer.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    def known(self, peer: Peer, board: str) -> None:
        """A connection is a board's, whose earlier one ends."""
        if peer.board == board:
            return
        peer.board = board
        for other in list(self._peers):
            if other is not peer and other.board == board:
                other.close()

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._peers)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(self._listener)
            except OSError:  # too many open files: those that are there will end
                await asyncio.sleep(0.1)
                continue
            peer = Peer(str(address[0]))
            self._make_room(peer.address)
            self._peers.add(peer)
            peer.task = asyncio.create_task(self._serve(peer, connection))

    def _make_room(self, address: str) -> None:
        """For one more stranger."""
        strangers = [peer for peer in self._peers if peer.board is None]
        same = [peer for peer in strangers if peer.address == address]
        crowd = same if len(same) >= self.limits.strangers_of_address else strangers
        if crowd is same or len(strangers) >= self.limits.strangers:
            out = random.choice(crowd)
            self._peers.discard(out)
            self.refused(out.address, "too many connections that are no board's")
            out.close()

    async def _serve(self, peer: Peer, connection: socket.socket) -> None:
        """One connection from TLS to its end."""
        loop = asyncio.get_running_loop()
        limits: dict[str, Any] = {}
        if self._context:
            limits = {"ssl_handshake_timeout": self.limits.handshake_s, "ssl_shutdown_timeout": _SHUTDOWN_S}
        try:
            await loop.connect_accepted_socket(
                lambda: Protocol(self._server, self, peer), connection, ssl=self._context, **limits
            )
            await peer.gone.wait()
        except OSError:  # ssl's errors and time limits, too
            self.refused(peer.address, "TLS did not come about")
            connection.close()
        finally:
            if peer.transport is not None:
                peer.transport.abort()
            self._peers.discard(peer)
