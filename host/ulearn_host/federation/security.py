"""Whom the server listens to: letters' heads, signatures, sessions, and an account of what was refused.

A letter (firmware/ulearn/letter.py) is signed with the secret of the board that it names, by HMAC-SHA256 (RFC 2104).
A session is a connection's; its nonce is the host's, so that nothing recorded elsewhere passes, and counters only rise.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from ulearn import letter
from ulearn_host.errors import UserError

NOTHING = bytes(letter.ID_BYTES)
KINDS = (letter.HELLO, letter.POLL, letter.DOWN, letter.UP, letter.WHERE, letter.CANNOT)
_HELLOS = 256  # of a board, which are known again


class Refused(Exception):
    """A request that is not carried out: its HTTP status, and why, in one sentence."""

    def __init__(self, status: int, reason: str, board: str | None = None) -> None:
        """board: who proved to be the sender."""
        super().__init__(reason)
        self.status, self.reason, self.board = status, reason, board


@dataclass(frozen=True)
class Head:
    """A request's head, as letter.HEAD lays it out. raw: its bytes."""

    kind: int
    what: int
    board: str
    session: bytes
    counter: int
    nonce: bytes
    job: int
    round: int
    offset: int
    total: int
    raw: bytes

    @classmethod
    def parse(cls, raw: bytes) -> Head:
        """Raises Refused for what no board writes."""
        magic, version, kind, what, board, session, counter, nonce, job, turn, offset, total = struct.unpack(
            letter.HEAD, raw
        )
        if magic != letter.REQUEST:
            raise Refused(400, f"no letter of a board: it does not begin with {letter.REQUEST.decode()}")
        if version != letter.VERSION:
            raise Refused(400, f"a letter of version {version}, expected {letter.VERSION}; deploy ulearn on the board")
        if kind not in KINDS:
            raise Refused(400, f"a letter of kind {kind}, expected 1 to {max(KINDS)}")
        name = board.rstrip(b"\0")
        if not name.isascii() or not name.decode().isprintable():
            raise Refused(400, "a board's name that is no text")
        if offset > total:
            raise Refused(400, f"a letter that goes on at byte {offset} of {total}")
        return cls(kind, what, name.decode(), session, counter, nonce, job, turn, offset, total, raw)

    def reply(self, what: int, nonce: bytes, offset: int, total: int) -> bytes:
        """The head of a reply to this."""
        out = bytearray(letter.HEAD_BYTES)
        letter.write(
            *(out, letter.REPLY, self.kind, what, self.board.encode(), self.session, self.counter, nonce),
            *(self.job, self.round, offset, total),
        )
        return bytes(out)


def sign(secret: bytes, *parts: bytes | bytearray) -> bytes:
    """The MAC of parts that follow each other."""
    mac = hmac.new(secret, digestmod=hashlib.sha256)
    for part in parts:
        mac.update(part)
    return mac.digest()


def check(secret: bytes, given: bytes, *parts: bytes | bytearray) -> bool:
    """Whether it is, in a time that tells nothing."""
    return hmac.compare_digest(sign(secret, *parts), given)


class Session:
    """What one connection has proved. A recording of another one is worth nothing here: the nonce is another."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._nonce: bytes | None = None
        self._board, self._counter = "", 0

    def begin(self, board: str) -> bytes:
        """The nonce that a board is to use from now on."""
        self._nonce, self._board, self._counter = os.urandom(letter.ID_BYTES), board, 0
        return self._nonce

    def enter(self, head: Head) -> None:
        """One request. Raises Refused for another session's, or a counter that has been."""
        if self._nonce is None or not hmac.compare_digest(head.session, self._nonce) or head.board != self._board:
            raise Refused(401, "a letter of another session than this connection's; say hello", head.board)
        if head.counter <= self._counter:
            raise Refused(401, f"a replay: request {head.counter} after {self._counter}", head.board)
        self._counter = head.counter


class Hellos:
    """The last hellos of each board, which are good for once. Of bounded size: only enrolled boards get here."""

    def __init__(self) -> None:
        """None yet. A hello from before a restart begins a session that nobody can use."""
        self._known: dict[str, deque[bytes]] = {}

    def check(self, head: Head) -> None:
        """Raises Refused for a hello that came before."""
        known = self._known.setdefault(head.board, deque(maxlen=_HELLOS))
        if head.session in known:
            raise Refused(401, "a replay: a hello that came before", head.board)
        known.append(head.session)


class Audit:
    """What was refused, written down by `write(board, text)`: the first ones of a minute at once, the others as numbers
    when it is over, so that nobody fills memory or disk."""

    LINES = 12  # of a minute, at once
    SORTS = 64  # told apart in a minute
    MINUTE_S = 60.0

    def __init__(self, write: Callable[[str | None, str], None], clock: Callable[[], float]) -> None:
        """clock: seconds."""
        self._write, self._clock = write, clock
        self.count = 0  # in all
        self._waiting: Counter[tuple[str | None, str]] = Counter()
        self._written, self._began = 0, clock()

    def note(self, address: str, board: str | None, reason: str) -> None:
        """One refusal. board: only one that has proved to be it."""
        self.flush()
        self.count += 1
        if self._written < self.LINES:
            self._written += 1
            self._put(board, f"{address}: {reason}")
            return
        sort = (board, f"{address}: {reason}")
        if sort not in self._waiting and len(self._waiting) >= self.SORTS:
            sort = (None, "other requests were refused")
        self._waiting[sort] += 1

    def flush(self, force: bool = False) -> None:
        """Write the numbers of a minute that is over; of the one that is not with `force`."""
        now = self._clock()
        if not force and now - self._began < self.MINUTE_S:
            return
        common = self._waiting.most_common(self.LINES)
        for (board, text), count in common:
            self._put(board, f"{text} ({count} times more)")
        rest = sum(self._waiting.values()) - sum(count for _, count in common)
        if rest:
            self._put(None, f"{rest} other requests were refused")
        self._waiting.clear()
        self._written, self._began = 0, now

    def _put(self, board: str | None, text: str) -> None:
        """A disk that is full keeps nobody from being refused."""
        with suppress(UserError):
            self._write(board, text)
