"""Letters as bytes, for tests that write to a server what no board would: requests, and replies taken apart."""

from __future__ import annotations

import os
import socket
import ssl
import struct
from dataclasses import dataclass, field

from ulearn import letter
from ulearn_host.federation.security import NOTHING, sign

HOST = "127.0.0.1"


@dataclass
class Reply:
    """status: HTTP's; text: of a refusal that is not signed; what, content, nonce, offset: of a letter."""

    status: int
    text: str = ""
    what: int = -1
    content: bytes = b""
    nonce: bytes = b""
    offset: int = 0


def http(body: bytes, length: int | None = None) -> bytes:
    """A request with a body, which says that it is `length` bytes long."""
    size = len(body) if length is None else length
    return f"POST {letter.PATH} HTTP/1.1\r\nHost: ulearn\r\nContent-Length: {size}\r\n\r\n".encode() + body


@dataclass
class Writer:
    """Writes a board's letters with its secret."""

    board: str
    secret: bytes
    session: bytes = NOTHING
    counter: int = 0
    job: int = 0
    last: bytes = field(default=b"", repr=False)  # the head of the last letter

    def letter(
        self,
        kind: int,
        content: bytes = b"",
        *,
        what: int = 0,
        nonce: bytes = NOTHING,
        turn: int = 0,
        offset: int = 0,
        total: int | None = None,
        secret: bytes | None = None,
    ) -> bytes:
        """The body of the next request; content is whole, of which what lies before `offset` is not sent again."""
        self.counter += 1
        head = bytearray(letter.HEAD_BYTES)
        size = len(content) if total is None else total
        numbers = (self.counter, nonce, self.job, turn, offset, size)
        letter.write(head, letter.REQUEST, kind, what, self.board.encode(), self.session, *numbers)
        self.last = bytes(head)
        key = secret or self.secret
        return bytes(head) + sign(key, head) + content[offset:] + sign(key, head, content)

    def hello(self) -> bytes:
        """The body of a request for a new session."""
        self.session, self.counter = os.urandom(letter.ID_BYTES), -1
        return self.letter(letter.HELLO)

    def welcomed(self, reply: Reply) -> None:
        """Take the session from the answer to `hello`."""
        assert reply.status == 200, reply
        self.session, _ = struct.unpack(letter.SESSION, reply.content)
        self.counter = 0

    def read(self, status: int, body: bytes) -> Reply:
        """An HTTP reply's body taken apart, its signature checked."""
        if status != 200:
            return Reply(status, body.decode())
        head, mac = body[: letter.HEAD_BYTES], body[-32:]
        magic, _, _, what, _, session, counter, nonce, _, _, offset, total = struct.unpack(letter.HEAD, head)
        content = body[letter.HEAD_BYTES : -32]
        assert magic == letter.REPLY and (session, counter) == (self.session, self.counter)
        assert len(content) == total - offset
        if not offset:
            assert mac == sign(self.secret, head, content), "a reply that is not signed"
        return Reply(200, "", what, content, nonce, offset)


class Connection:
    """One connection to a server, with TLS where a certificate is given."""

    def __init__(self, port: int, der: bytes | None, source: str = HOST, timeout_s: float = 20.0) -> None:
        """Connect from an address of loopback."""
        self.socket: socket.socket = socket.create_connection((HOST, port), timeout_s, (source, 0))
        if der is not None:
            self.socket = context(der).wrap_socket(self.socket, server_hostname="ulearn")

    def close(self) -> None:
        """At once."""
        self.socket.close()

    def ask(self, writer: Writer, body: bytes) -> Reply:
        """One letter and the reply to it."""
        self.socket.sendall(http(body))
        return writer.read(*self.reply())

    def reply(self) -> tuple[int, bytes]:
        """Status and body of the next reply; (0, b"") where the connection ends instead."""
        data = b""
        while b"\r\n\r\n" not in data:
            piece = self._receive()
            if not piece:
                return 0, b""
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        lines = head.decode().lower().split("\r\n")
        (size,) = (int(line[15:]) for line in lines if line.startswith("content-length:"))
        while len(body) < size:
            piece = self._receive()
            if not piece:
                return 0, b""
            body += piece
        return int(lines[0].split(" ")[1]), body

    def _receive(self) -> bytes:
        try:
            return self.socket.recv(65536)
        except (ConnectionError, ssl.SSLError):
            return b""


def context(der: bytes) -> ssl.SSLContext:
    """A client's that trusts one certificate alone."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.load_verify_locations(cadata=der)
    return made
