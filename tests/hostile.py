"""What a server must expect from a network: messages that no board of the fleet would send, drawn by a seed.

Each attack sends one message from an address of its own, and returns who refused it and why: "server" for what the
server refuses by itself, "signed" for what the federation refuses of a board that is enrolled.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from letters import HOST, Reply, Writer, context, http
from ulearn import letter
from ulearn_host.federation.facts import BoardFacts, pack
from ulearn_host.federation.security import NOTHING, sign

Verdict = tuple[str, str]


@dataclass
class Attacker:
    """One attacker: an address, and a board of the fleet that has gone bad, whose secret it knows."""

    port: int
    der: bytes
    source: str
    traitor: Writer
    victim: str  # a board whose secret it does not know
    largest: int  # bytes of an answer
    update: bytes  # a sound one, of the job's model
    seed: int
    made: int = 0
    random: random.Random = field(default_factory=random.Random)
    recorded: list[bytes] = field(default_factory=list)  # letters that were good once

    async def attack(self, number: int) -> Verdict:
        """The message of a number: the same kind and content for the same seed."""
        self.random = random.Random(self.seed * 1_000_003 + number)
        return await self.random.choices(ATTACKS, WEIGHTS)[0](self)

    async def connect(self, tls: bool = True) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """From its own address."""
        made = {"ssl": context(self.der), "server_hostname": "ulearn"} if tls else {}
        return await asyncio.open_connection(HOST, self.port, local_addr=(self.source, 0), **made)  # type: ignore[arg-type]

    async def post(self, *requests: bytes, raw: bool = False) -> Reply:
        """Several requests in one connection; the last one's reply."""
        reader, writer = await self.connect()
        try:
            for request in requests:
                status, body = await talk(reader, writer, request if raw else http(request))
            return self.traitor.read(status, body) if status == 200 else Reply(status, body.decode(errors="replace"))
        finally:
            writer.transport.abort()

    async def session(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection in which the traitor has said hello."""
        reader, writer = await self.connect()
        hello = self.traitor.hello()
        self.recorded = [*self.recorded[-20:], hello]
        status, body = await talk(reader, writer, http(hello))
        self.traitor.welcomed(self.traitor.read(status, body))
        return reader, writer

    async def in_session(self, make: Callable[[Writer], bytes]) -> Reply:
        """One letter of the traitor's, and its reply."""
        reader, writer = await self.session()
        try:
            body = make(self.traitor)
            self.recorded = [*self.recorded[-20:], body]
            status, answer = await talk(reader, writer, http(body))
            return self.traitor.read(status, answer)
        finally:
            writer.transport.abort()


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, bytes]:
    """Send a request; status and body of the reply, (0, b"") where the connection ends instead."""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        writer.write(request)
        await writer.drain()
    with contextlib.suppress(ConnectionError, ssl.SSLError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)).decode().lower().split("\r\n")
        (size,) = (int(line[15:]) for line in head if line.startswith("content-length:"))
        return int(head[0].split(" ")[1]), await asyncio.wait_for(reader.readexactly(size), 30)
    return 0, b""


def by_server(reply: Reply) -> Verdict:
    """What is refused before anything is looked at more closely is not signed."""
    assert 400 <= reply.status < 500 and reply.text, reply
    return "server", reply.text


def signed(reply: Reply) -> Verdict:
    """What the federation refuses of one of its boards."""
    assert reply.what == letter.REFUSED and reply.content, reply
    return "signed", reply.content.decode()


def letter_of(attacker: Attacker, writer: Writer) -> bytes:
    """Some letter."""
    r = attacker.random
    kind = r.choice((letter.HELLO, letter.POLL, letter.DOWN, letter.UP, letter.WHERE, letter.CANNOT))
    writer.session, writer.counter = r.randbytes(16), r.randrange(1000)
    return writer.letter(kind, r.randbytes(r.choice((0, 4, 62, 300))), nonce=r.randbytes(16))


async def stranger(a: Attacker) -> Verdict:
    """A board that nobody knows."""
    name = "".join(a.random.choices("abcdefgh", k=a.random.randint(1, 64)))
    return by_server(await a.post(letter_of(a, Writer(name, a.random.randbytes(32)))))


async def wrong_secret(a: Attacker) -> Verdict:
    """In the name of a board whose secret it does not know."""
    return by_server(await a.post(letter_of(a, Writer(a.victim, a.random.randbytes(32)))))


async def flipped(a: Attacker) -> Verdict:
    """A good letter with one bit that is another."""

    def make(writer: Writer) -> bytes:
        body = bytearray(writer.letter(letter.DOWN, struct.pack(letter.WANTED, NOTHING, NOTHING, 0)))
        body[a.random.randrange(len(body))] ^= 1 << a.random.randrange(8)
        return bytes(body)

    return by_server(await a.in_session(make))


async def replay(a: Attacker) -> Verdict:
    """A letter that was good before: hellos and others, from other connections."""
    if not a.recorded:
        reader, writer = await a.session()
        writer.transport.abort()
    return by_server(await a.post(a.random.choice(a.recorded)))


async def replay_at_once(a: Attacker) -> Verdict:
    """Twice in the connection that it is meant for."""
    reader, writer = await a.session()
    body = a.traitor.letter(letter.WHERE, total=10, offset=10)
    status, _ = await talk(reader, writer, http(body))
    assert status == 200
    status, text = await talk(reader, writer, http(body))
    writer.transport.abort()
    return by_server(Reply(status, text.decode()))


async def oversized(a: Attacker) -> Verdict:
    """More than any answer can have, by HTTP's word or the letter's own."""
    size = a.random.choice((2**20, 2**31, 2**40, 2**70, a.largest + 1000))
    if a.random.random() < 0.5:
        return by_server(await a.post(http(a.random.randbytes(2000), size), raw=True))
    total = min(size, 2**32 - 1)

    def make(writer: Writer) -> bytes:
        return writer.letter(letter.UP, a.random.randbytes(100), total=total, nonce=NOTHING)

    return signed(await a.in_session(make))


async def truncated(a: Attacker) -> Verdict:
    """A body that ends too early."""
    body = letter_of(a, Writer(a.victim, a.random.randbytes(32)))
    _, writer = await a.connect()
    writer.write(http(body[: a.random.randrange(150)], len(body)))
    await writer.drain()
    await asyncio.sleep(0.01)
    writer.transport.abort()
    return "server", "(the connection is gone)"


async def slow(a: Attacker) -> Verdict:
    """Byte by byte: the head of HTTP, or that of a letter."""
    reader, writer = await a.connect()
    request = http(letter_of(a, Writer(a.victim, a.random.randbytes(32))))
    at = a.random.choice((0, 5, request.index(b"\r\n\r\n") + 4, request.index(b"\r\n\r\n") + 100))
    writer.write(request[:at])
    reply = asyncio.ensure_future(talk(reader, writer, b""))
    for byte in request[at : at + 100]:
        if reply.done():
            break
        with contextlib.suppress(ConnectionError):
            writer.write(bytes([byte]))
            await writer.drain()
        await asyncio.sleep(0.1)
    status, text = await reply
    writer.transport.abort()
    return by_server(Reply(status, text.decode()))


async def silent(a: Attacker) -> Verdict:
    """A connection that brings nothing."""
    reader, writer = await a.connect()
    status, text = await talk(reader, writer, b"")
    writer.transport.abort()
    return by_server(Reply(status, text.decode()))


async def another_plan(a: Attacker) -> Verdict:
    """Of a board that was given another model."""
    r = a.random
    facts = pack(BoardFacts(r.randbytes(16), r.randbytes(16), 10))
    return signed(await a.in_session(lambda writer: writer.letter(letter.POLL, facts)))


async def answer(a: Attacker) -> Verdict:
    """An update that was not asked for: of another model, cut, or sound."""
    update = bytearray(a.update)
    fate = a.random.randrange(4)
    if fate == 0:
        update[12:28] = a.random.randbytes(16)
    elif fate == 1:
        update = update[: a.random.randrange(len(update))]
    elif fate == 2:
        update = bytearray(a.random.randbytes(a.random.randrange(1, len(update))))
    nonce = a.random.randbytes(16)
    return signed(await a.in_session(lambda writer: writer.letter(letter.UP, bytes(update), nonce=nonce)))


async def another_job(a: Attacker) -> Verdict:
    """An answer in a job that is not this one."""

    def make(writer: Writer) -> bytes:
        job, writer.job = writer.job, a.random.randrange(2**32)
        body = writer.letter(letter.UP, a.update, nonce=a.random.randbytes(16))
        writer.job = job
        return body

    return signed(await a.in_session(make))


async def unsigned_content(a: Attacker) -> Verdict:
    """A head that is signed, content that is not."""

    def make(writer: Writer) -> bytes:
        body = bytearray(writer.letter(letter.UP, a.update, nonce=a.random.randbytes(16)))
        body[letter.HEAD_BYTES + 32 + a.random.randrange(len(a.update))] ^= 1
        return bytes(body)

    return by_server(await a.in_session(make))


async def senseless(a: Attacker) -> Verdict:
    """Signed, and yet no letter: kinds, versions, lengths, facts that do not exist."""
    fate = a.random.randrange(4)

    def make(writer: Writer) -> bytes:
        if fate == 0:
            return writer.letter(letter.POLL, a.random.randbytes(a.random.randrange(200)))
        if fate == 1:
            return writer.letter(a.random.choice((0, 7, 100, 255)), b"")
        if fate == 2:
            return writer.letter(letter.DOWN, bytes(a.random.randrange(30)))
        body = bytearray(writer.letter(letter.WHERE))
        body[4] = a.random.choice((0, 2, 255))
        body[letter.HEAD_BYTES : letter.HEAD_BYTES + 32] = sign(writer.secret, bytes(body[: letter.HEAD_BYTES]))
        return bytes(body)

    return by_server(await a.in_session(make))


async def facts_of_a_liar(a: Attacker) -> Verdict:
    """More samples than any board may claim."""
    facts = pack(BoardFacts(a.update[12:28], a.update[28:44], 2**31))
    return signed(await a.in_session(lambda writer: writer.letter(letter.POLL, facts)))


async def garbage(a: Attacker) -> Verdict:
    """No HTTP at all, or HTTP that nobody wants here."""
    r = a.random
    path = letter.PATH.encode()
    fates = (
        r.randbytes(r.randrange(1, 4000)).replace(b"\n", b".") + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: u\r\n\r\n",
        b"GET " + path + b" HTTP/1.1\r\nHost: u\r\n\r\n",
        b"POST /"
        + bytes(r.choices(b"abc/%.", k=900))
        + b" HTTP/1.1\r\nHost: u\r\nContent-Length: 400\r\n\r\n"
        + bytes(400),
        b"POST " + path + b" HTTP/1.1\r\nHost: u\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"POST " + path + b" HTTP/1.1\r\nHost: u\r\n\r\n",
        b"POST " + path + b" HTTP/1.1\r\nHost: u\r\nContent-Length: -1\r\n\r\n",
        b"POST " + path + b" HTTP/1.1\r\nHost: u\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"POST " + path + b" HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(200)) + b"\r\n",
        b"POST " + path + b" HTTP/1.1\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET " + path + b" HTTP/1.1\r\nHost: u\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    )
    return by_server(await a.post(r.choice(fates), raw=True))


async def no_tls(a: Attacker) -> Verdict:
    """Bytes where TLS should begin."""
    reader, writer = await a.connect(tls=False)
    cut = b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00"  # the beginning of a ClientHello
    with contextlib.suppress(ConnectionError):
        writer.write(a.random.choice((a.random.randbytes(300), b"GET / HTTP/1.1\r\n\r\n", cut)))
        await asyncio.wait_for(reader.read(1000), 30)
    writer.transport.abort()
    return "server", "(no TLS)"


Attack = Callable[[Attacker], Awaitable[Verdict]]
_ALL: dict[Attack, float] = {
    stranger: 1,
    wrong_secret: 1,
    flipped: 1,
    replay: 1,
    replay_at_once: 1,
    oversized: 1,
    truncated: 1,
    slow: 0.2,
    silent: 0.1,
    another_plan: 1,
    answer: 1,
    another_job: 0.5,
    unsigned_content: 1,
    senseless: 1,
    facts_of_a_liar: 0.3,
    garbage: 2,
    no_tls: 0.5,
}
ATTACKS, WEIGHTS = list(_ALL), list(_ALL.values())
