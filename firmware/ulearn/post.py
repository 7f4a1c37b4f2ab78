# Letters on their way: a board writes signed requests to its host and checks the replies. See letter.py.
import os
import struct

import ulearn.letter as letter

from .compat import collect, const
from .hmac import MAC_BYTES, Hmac, equal

_PIECE_BYTES = const(1024)
_SMALL_BYTES = const(256)  # any reply's content but that of DOWN
_NONE = bytes(16)


class Post:
    # `board`: its name, bytes. `secret`: what it signs with. `largest`: bytes of a download, at the most.
    def __init__(self, wire, board, secret, largest):
        self.wire, self.board, self.largest = wire, board, largest
        self.session = None
        self.hold_s = 0  # the host keeps a poll no longer
        self._mac = Hmac(secret)
        self._head = memoryview(bytearray(letter.HEAD_BYTES))
        self._small = memoryview(bytearray(_SMALL_BYTES))
        self._digest = memoryview(bytearray(MAC_BYTES))
        self._counter = 0
        self.forget()

    @property
    def open(self):
        return self.wire.open and self.session is not None

    def hello(self):
        # Connects, and begins a session, which ends with the connection.
        self.session, self._counter = None, -1
        self.wire.connect()
        self.session = os.urandom(letter.ID_BYTES)
        self.send(letter.HELLO, 0, b"")
        _, content = self.reply(letter.HELLO)
        self.session, self.hold_s = struct.unpack(letter.SESSION, content)
        self._counter = 0

    def send(self, kind, what, content, nonce=_NONE, job=0, turn=0, offset=0, total=None):
        # `content` from `offset` on; its MAC is that of all of it. `total`: of what is only asked about.
        wire, mac, head, size = self.wire, self._mac, self._head, len(content)
        self._counter += 1
        ids = (self.board, self.session, self._counter, nonce, job, turn, offset, size if total is None else total)
        letter.write(head, letter.REQUEST, kind, what, *ids)
        wire.post(letter.PATH, letter.HEAD_BYTES + MAC_BYTES + max(0, size - offset) + MAC_BYTES)
        mac.begin()
        mac.update(head)
        wire.put(head)
        wire.put(mac.end())
        mac.begin()
        mac.update(head)
        content = memoryview(content)
        if offset:
            mac.update(content[: min(offset, size)])
        for at in range(offset, size, _PIECE_BYTES):
            piece = content[at : at + _PIECE_BYTES]
            mac.update(piece)
            wire.put(piece)
            wire.idle()
        wire.put(mac.end())
        wire.flush()

    def reply(self, kind, wait_ms=0):
        # The reply to the request that was sent: what it says, its content as a view that the next one overwrites; for
        # a download the room that holds it.
        wire, mac, head = self.wire, self._mac, self._head
        size = wire.reply(wait_ms) - letter.HEAD_BYTES - MAC_BYTES
        wire.read(head)
        magic, version, replied, what, _, session, counter, nonce, _, _, offset, total = struct.unpack(
            letter.HEAD, head
        )
        if magic != letter.REPLY or version != letter.VERSION or size != total - offset:
            raise OSError("what the host answers is no letter")
        if replied != kind or session != self.session or counter != self._counter:
            raise OSError("the host answers another question")
        mac.begin()
        mac.update(head)
        if kind == letter.DOWN:
            content = self._download(nonce, offset, total)
        else:
            if size > _SMALL_BYTES:
                raise OSError("the host's reply is too long")
            content = self._small[:size]
            wire.read(content)
            mac.update(content)
        wire.read(self._digest)
        if not equal(self._digest, mac.end()):
            self.forget()
            raise OSError("the host's answer is not signed with this board's secret")
        wire.end()
        return what, content

    def forget(self):
        # What was downloaded.
        self.room, self.base, self.have = None, _NONE, 0

    def _download(self, base, offset, total):
        # Into room that stays when the connection breaks.
        if total > self.largest:
            raise OSError("the host sends more than this model has")
        if base != self.base or offset != self.have or (self.room is not None and len(self.room) != total):
            self.forget()
            if offset:
                raise OSError("the host goes on with what this board has not")
        if self.room is None:
            collect()
            self.room, self.base = bytearray(total), base
        view = memoryview(self.room)
        if offset:
            self._mac.update(view[:offset])
        while self.have < total:
            piece = view[self.have : self.have + _PIECE_BYTES]
            self.wire.read(piece)
            self._mac.update(piece)
            self.have += len(piece)
            self.wire.idle()
        return view
