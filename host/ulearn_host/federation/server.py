"""The host's end of a fleet on a network: boards ask over HTTP/1.1 and TLS, and their federation answers.

    async with Server(federation, certificate.ensure(folder)) as server:
        await server.open("0.0.0.0", 8470)
        await server.run()  # until the job is done

or serve(federation, ...) for all of it. The federation is called on the event loop's thread alone; other threads, of
boards on serial lines, use `call`. Requests are letters (firmware/ulearn/letter.py), all posted to one path. Who sends
one is known from its head, before a byte of content is kept; an upload that breaks goes on where it ended.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

from aiohttp import web

from ulearn import letter
from ulearn import task as tasks
from ulearn.hmac import MAC_BYTES
from ulearn_host.errors import UserError
from ulearn_host.federation import certificate, facts
from ulearn_host.federation.certificate import Certificate
from ulearn_host.federation.door import Door, Limits, Protocol, closing
from ulearn_host.federation.rounds import Federation
from ulearn_host.federation.security import NOTHING, Audit, Head, Hellos, Refused, Session, check, sign

PORT = 8470
PLAIN = "no TLS: whoever listens on the network reads every update; the boards' signatures still keep others out"
_FRAME_BYTES = letter.HEAD_BYTES + 2 * MAC_BYTES
_PIECE_BYTES = 4096
_HEADERS = {"Server": "ulearn"}
_TEXT_BYTES = 160  # of a reason; a board keeps no more
_LINGER_S = 60.0
# After these a board that waits may have something to do.
_NEWS = ("configure", "commit", "abandon", "evaluate", "evaluated", "done")

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass
class Partial:
    """An upload as far as it has come. taker: the request that fills it now."""

    nonce: bytes
    total: int
    data: bytearray = field(default_factory=bytearray)
    taker: object = None


@dataclass(frozen=True)
class Judged:
    """The last answer of a board, and what came of it: a reply may be lost."""

    nonce: bytes
    accepted: bool
    reason: str


class Server:
    """Answers the boards of one federation."""

    def __init__(self, federation: Federation, identity: Certificate | None, limits: Limits | None = None) -> None:
        """identity: None for plain text, which is for tests and trusted wires alone."""
        self.federation, self.limits, self.clock = federation, limits or Limits(), federation.clock
        self.port = 0
        self.busy: list[Callable[[], bool]] = []  # whether others, beside, have yet to learn that the job is done
        self.audit = Audit(self._write_down, time.monotonic)
        self._door = Door(self._handle, identity.context() if identity else None, self.limits, self._refused_at_door)
        self._hellos = Hellos()
        self._partials: dict[str, Partial] = {}
        self._judged: dict[str, Judged] = {}
        self._heard: dict[str, float] = {}  # when a board last wrote that does not know that the job is done
        self._asked = float("-inf")  # when any did
        self._held = 0
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._observe, federation.observe = federation.observe, self._observed

    async def __aenter__(self) -> Self:
        """The server itself; `open` makes it listen."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close every connection; boards try again until there is a host."""
        await self._door.close()
        self.audit.flush(force=True)
        self.federation.observe = self._observe

    async def open(self, host: str = "0.0.0.0", port: int = PORT) -> int:
        """Listen; returns the port. Raises UserError where the address cannot be had."""
        self.port = await self._door.open(host, port)
        return self.port

    async def run(self) -> None:
        """Carry the rounds on until the job is done and the boards that are there know it."""
        self._heard |= self._seen_before()
        until = None
        while until is None or (time.monotonic() < until and not self._all_know()):
            news = self._news
            wait = min(self.federation.tick(self.clock()), Audit.MINUTE_S)
            self.audit.flush()
            if self.federation.head["state"] == "done" and until is None:
                until = time.monotonic() + _LINGER_S
            if until is not None:
                wait = min(wait, 0.2)
            await _either(news, max(wait, 0.005))

    @property
    def connections(self) -> int:
        """How many there are, strangers' included."""
        return self._door.connections

    def call(self, do: Callable[..., T], *args: Any) -> T:
        """Run do(*args), which may use the federation, on the event loop's thread, from any other thread."""

        async def run() -> T:
            return do(*args)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    def _seen_before(self) -> dict[str, float]:
        """The boards on the network that asked lately, by the journal: this host may have been started again."""
        now, lately = self.clock(), max(self.federation.job.present_s, _LINGER_S)
        rows = self.federation.journal.rows(
            "SELECT board, seen FROM boards WHERE link = 'network' AND seen IS NOT NULL"
        )
        return {row["board"]: time.monotonic() - (now - row["seen"]) for row in rows if now - row["seen"] < lately}

    def _all_know(self) -> bool:
        """Whether each board that asked here lately has the last base and knows that the job is done."""
        now = time.monotonic()
        lately = now - max(self.federation.job.present_s, _LINGER_S)
        quiet = now - self._asked >= self.limits.quiet_s
        return quiet and all(h < lately for h in self._heard.values()) and not any(busy() for busy in self.busy)

    def _observed(self, event: str, details: dict[str, Any]) -> None:
        """A transition of the federation, on its way to who observed before."""
        self._observe(event, details)
        if event in _NEWS:
            self._news.set()
            self._news = asyncio.Event()

    # What is refused.

    def _refused_at_door(self, address: str, reason: str) -> None:
        self.audit.note(address, None, reason)

    def _write_down(self, board: str | None, text: str) -> None:
        """A line of the federation's log."""
        if board is not None:
            self.federation.presence.move(board, refused=1)
        with self.federation.transition("refuse", self.clock(), text, board):
            pass

    # Requests.

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request; what is refused ends its connection."""
        protocol = request.protocol
        assert isinstance(protocol, Protocol)
        protocol.begun()
        try:
            return await self._answer(request, protocol)
        except Refused as refused:
            self.audit.note(protocol.peer.address, refused.board, refused.reason)
            return closing(refused.status, refused.reason)
        except (asyncio.CancelledError, ConnectionError):
            if protocol.peer.board is None:
                self.audit.note(protocol.peer.address, None, "the connection ended in the middle of a request")
            raise

    async def _answer(self, request: web.BaseRequest, protocol: Protocol) -> web.StreamResponse:
        size = self._size(request)
        raw = await self._read(request, letter.HEAD_BYTES + MAC_BYTES, self.limits.request_s)
        head = Head.parse(raw[: letter.HEAD_BYTES])
        secret = self.federation.secret(head.board)
        if secret is None:
            raise Refused(401, f"board {head.board!r} is not enrolled; enrol it over USB first")
        if not check(secret, raw[letter.HEAD_BYTES :], head.raw):
            raise Refused(401, f"not signed with the secret of board {head.board!r}; enrol it anew if it is yours")
        self._heard[head.board] = self._asked = time.monotonic()
        letters = Letter(self, request, head, secret, size - _FRAME_BYTES)
        if head.kind == letter.HELLO:
            return await letters.hello(self._hellos, protocol.peer.session)
        protocol.peer.session.enter(head)
        self._door.known(protocol.peer, head.board)
        if head.kind == letter.POLL:
            return await self._poll(letters)
        if head.kind == letter.DOWN:
            return await self._down(letters)
        if head.kind == letter.UP:
            return await self._up(letters)
        if head.kind == letter.WHERE:
            return await self._where(letters)
        return await self._cannot(letters)

    def _size(self, request: web.BaseRequest) -> int:
        """Bytes of the body, from what HTTP says. Raises Refused before any is read."""
        if request.method != "POST":
            raise Refused(405, f"method {request.method[:16]}, expected POST")
        if request.path != letter.PATH:
            raise Refused(404, f"nothing here; boards post to {letter.PATH}")
        try:
            size = request.content_length
        except ValueError:
            size = None
        if size is None or "Transfer-Encoding" in request.headers:
            raise Refused(411, "a body without Content-Length")
        largest = _FRAME_BYTES + max(self.federation.body_largest, facts.BYTES_LARGEST)
        if not _FRAME_BYTES <= size <= largest:
            raise Refused(413, f"a body of {size} bytes, expected {_FRAME_BYTES} to {largest}")
        return size

    async def _read(self, request: web.BaseRequest, size: int, limit_s: float) -> bytes:
        try:
            async with asyncio.timeout(limit_s):
                return await request.content.readexactly(size)
        except TimeoutError:
            raise Refused(408, f"{size} bytes did not come in {limit_s:g} s") from None
        except (asyncio.IncompleteReadError, web.RequestPayloadError):
            raise Refused(400, "the body broke off") from None

    async def _poll(self, question: Letter) -> web.StreamResponse:
        """A board asks what to do, and waits here for a while if that is nothing."""
        board, federation = question.head.board, self.federation
        try:
            told = facts.parse(await question.content())
        except UserError as fault:
            raise Refused(400, str(fault), board) from None
        until = time.monotonic() + (min(question.head.what, self.limits.hold_s) if self._held < self.limits.held else 0)
        self._held += 1
        try:
            while True:
                news = self._news
                try:
                    body = federation.task(board, told, self.clock())
                except UserError as fault:
                    return await question.refuse(str(fault))
                task = tasks.parse(body)
                left = until - time.monotonic()
                if task.kind != tasks.WAIT or left <= 0:
                    break
                while left > 0 and not await _either(news, min(left, task.retry_ms / 1000)):
                    federation.presence.asked(board, told, self.clock())  # it is still there
                    left = until - time.monotonic()
        finally:
            self._held -= 1
        response = await question.reply(letter.DONE, body)
        if task.kind == tasks.DONE and told.base_id == task.base_id:
            self._heard.pop(board, None)
        return response

    async def _down(self, question: Letter) -> web.StreamResponse:
        """A board wants the current base, or the rest of it."""
        have, begun, offset = struct.unpack(letter.WANTED, await question.content(letter.WANTED_BYTES))
        kind, data = self.federation.down(question.head.board, have)
        last = bytes(self.federation.model["base"])
        what = {"update": letter.UPDATE, "full": letter.FULL, "none": letter.DONE}[kind]
        return await question.reply(what, data, last, offset if begun == last and offset <= len(data) else 0)

    async def _where(self, question: Letter) -> web.StreamResponse:
        """How far an upload got, or what came of it."""
        head = question.head
        await question.closed(b"")
        judged = self._judged.get(head.board)
        if judged is not None and judged.nonce == head.nonce:
            return await self._judge(question, judged)
        if head.total > self.federation.body_largest:
            return await question.refuse(self._too_long(head.total))
        partial = self._partials.get(head.board)
        fits = partial is not None and (partial.nonce, partial.total) == (head.nonce, head.total)
        place = len(partial.data) if partial is not None and fits else 0
        return await question.reply(letter.PARTIAL, struct.pack(letter.PLACE, place))

    async def _up(self, question: Letter) -> web.StreamResponse:
        """An answer to a task, or the rest of it."""
        head = question.head
        if head.job != self.federation.job.number:
            return await question.refuse(f"an answer in job {head.job}, expected {self.federation.job.number}")
        if head.total > self.federation.body_largest:
            return await question.refuse(self._too_long(head.total))
        partial = self._partials.get(head.board)
        if partial is None or (partial.nonce, partial.total) != (head.nonce, head.total):
            partial = self._partials[head.board] = Partial(head.nonce, head.total)
        if question.size != head.total - head.offset:
            raise Refused(400, f"{question.size} bytes from {head.offset} of {head.total}", head.board)
        if head.offset != len(partial.data):
            return await question.reply(letter.PARTIAL, struct.pack(letter.PLACE, len(partial.data)), last=True)
        await question.fill(partial)
        try:
            await question.closed(partial.data)
        except Refused as refused:
            if refused.status == 401:
                del self._partials[head.board]
            raise
        del self._partials[head.board]
        try:
            verdict = self.federation.submit(head.board, bytes(partial.data), self.clock(), head.nonce)
        except UserError as fault:
            return await question.refuse(str(fault))
        judged = self._judged[head.board] = Judged(head.nonce, verdict.accepted, verdict.reason)
        return await self._judge(question, judged)

    async def _cannot(self, question: Letter) -> web.StreamResponse:
        """A board says why it has no answer."""
        text = await question.content()
        reason = f"cannot: {printable(text)}"
        digest = hashlib.sha256(reason.encode()).digest()
        self.federation.reject(question.head.board, digest, reason, self.clock())
        return await question.reply(letter.DONE, b"")

    async def _judge(self, question: Letter, judged: Judged) -> web.StreamResponse:
        if judged.accepted:
            return await question.reply(letter.DONE, judged.reason.encode()[:_TEXT_BYTES])
        return await question.refuse(judged.reason)

    def _too_long(self, total: int) -> str:
        return f"an answer of {total} bytes, expected at most {self.federation.body_largest}"


class Letter:
    """A request whose head is signed by a board, and the reply to it. size: bytes of content that follow."""

    def __init__(self, server: Server, request: web.BaseRequest, head: Head, secret: bytes, size: int) -> None:
        """What the server has read so far."""
        self.head, self.size = head, size
        self._server, self._request, self._secret = server, request, secret

    async def hello(self, hellos: Hellos, session: Session) -> web.StreamResponse:
        """A session begins."""
        await self.content(0)
        hellos.check(self.head)
        nonce, hold_s = session.begin(self.head.board), int(self._server.limits.hold_s)
        return await self.reply(letter.DONE, struct.pack(letter.SESSION, nonce, hold_s))

    async def content(self, expected: int | None = None) -> bytes:
        """All of it, checked. Raises Refused."""
        expected = self.head.total if expected is None else expected
        if not self.size == self.head.total == expected <= facts.BYTES_LARGEST or self.head.offset:
            raise Refused(400, f"a letter with {self.size} bytes, expected {expected}", self.head.board)
        data = await self._server._read(self._request, self.size, self._server.limits.silence_s)
        await self.closed(data)
        return data

    async def closed(self, data: bytes | bytearray) -> None:
        """Read the MAC behind the content, which has been read, and check it. Raises Refused."""
        mac = await self._server._read(self._request, MAC_BYTES, self._server.limits.silence_s)
        if not check(self._secret, mac, self.head.raw, data):
            raise Refused(401, "content that is not signed with the board's secret", self.head.board)

    async def fill(self, partial: Partial) -> None:
        """Take what comes of an upload. Raises Refused where it is too slow, or the board has come back elsewhere."""
        limits, board = self._server.limits, self.head.board
        partial.taker = self
        began = time.monotonic()
        left = partial.total - len(partial.data)
        while left:
            try:
                async with asyncio.timeout(limits.silence_s):
                    piece = await self._request.content.read(min(left, _PIECE_BYTES))
            except TimeoutError:
                raise Refused(408, f"nothing came for {limits.silence_s:g} s", board) from None
            except web.RequestPayloadError:
                piece = b""
            if not piece:
                raise Refused(400, "the body broke off", board)
            if partial.taker is not self:
                raise Refused(409, "the board goes on in another connection", board)
            partial.data += piece
            left -= len(piece)
            lasted = time.monotonic() - began
            if lasted > limits.silence_s and (self.size - left) / lasted < limits.slowest:
                raise Refused(408, f"less than {limits.slowest} bytes a second", board)

    async def refuse(self, reason: str) -> web.StreamResponse:
        """A signed refusal."""
        text = reason.encode()[:_TEXT_BYTES]
        return await self.reply(letter.REFUSED, text, last=not self._request.content.at_eof())

    async def reply(
        self, what: int, content: bytes, nonce: bytes = NOTHING, offset: int = 0, last: bool = False
    ) -> web.StreamResponse:
        """Send a reply, signed, its content from an offset on. last: of this connection."""
        head = self.head.reply(what, nonce, offset, len(content))
        mac = sign(self._secret, head, content)
        if len(content) - offset <= _PIECE_BYTES:
            # HTTP's head and all of it at once: one packet.
            small = web.Response(body=head + content[offset:] + mac, headers=_HEADERS)
            if last:
                small.force_close()
            return small
        response = web.StreamResponse(headers=_HEADERS)
        response.content_length = len(head) + len(content) - offset + len(mac)
        if last:
            response.force_close()
        await response.prepare(self._request)
        pieces = (content[at : at + _PIECE_BYTES] for at in range(offset, len(content), _PIECE_BYTES))
        for piece in (head, *pieces, mac):
            try:
                async with asyncio.timeout(self._server.limits.silence_s):
                    await response.write(piece)
            except TimeoutError:
                raise ConnectionResetError("the board takes no more") from None
        return response


def printable(text: bytes) -> str:
    """What others wrote, short and harmless."""
    return "".join(c if c.isprintable() else "?" for c in text[:_TEXT_BYTES].decode("ascii", "replace"))


async def _either(event: asyncio.Event, limit_s: float) -> bool:
    """Whether the event came within the time."""
    try:
        async with asyncio.timeout(limit_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


async def serve(
    federation: Federation,
    host: str = "0.0.0.0",
    port: int = PORT,
    *,
    plain: bool = False,
    identity: Certificate | None = None,
    limits: Limits | None = None,
    beside: Sequence[Callable[[Server], Awaitable[None]]] = (),
    ready: Callable[[Server], None] = lambda server: None,
    warn: Callable[[str], None] = print,
) -> None:
    """Serve a federation until its job is done.

    host, port: where to listen. plain: without TLS, of which warn is told; identity: the host's otherwise, default: one
    that lies in the job's folder. beside: coroutine functions that live as long as the server does and end with it:
    boards on serial lines, a page. ready(server): called when it listens.

    Raises UserError where the address cannot be had; what one of `beside` raises ends everything.
    """
    identity = None if plain else identity or certificate.ensure(federation.folder)
    if plain:
        warn(PLAIN)
    async with Server(federation, identity, limits) as server:
        await server.open(host, port)
        ready(server)
        others = [asyncio.ensure_future(_as_coroutine(other(server))) for other in beside]
        rounds = asyncio.ensure_future(server.run())
        try:
            waiting = {rounds, *others}
            while not rounds.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in (rounds, *others):
                task.cancel()
            await asyncio.gather(rounds, *others, return_exceptions=True)


async def _as_coroutine(awaitable: Awaitable[None]) -> None:
    await awaitable
