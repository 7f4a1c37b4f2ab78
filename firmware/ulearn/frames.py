# Frames: how bytes become messages on a serial line that also carries prints, noise and other people's data.
#
#   offset  bytes  field
#        0      2  magic F5 75; F5 never occurs in UTF-8, so no print holds it by chance
#        2      1  version of the framing, "1"
#        3      1  type
#        4      2  session
#        6      2  sequence
#        8      2  length of the payload
#       10      2  header check: lower half of the CRC-32 of the ten bytes before
#       12      n  payload, any bytes
#   12 + n      4  CRC-32 of everything before
#
# Numbers are little-endian. The header check makes a wrong length known at once: no wait for bytes that never come.
import binascii
import struct

from .compat import const

_MAGIC_0 = const(0xF5)
_MAGIC_1 = const(0x75)
_MAGIC = const(0x75F5)
_VERSION = const(0x31)
_HEADER_BYTES = const(12)
_CHECK_OFFSET = const(10)
_FRAME_BYTES = const(16)  # of a frame without payload

FRAME_BYTES = _FRAME_BYTES
PAYLOAD_OFFSET = _HEADER_BYTES


def encode(buffer, kind, session, sequence, length):
    """Make a frame of the `length` payload bytes that already lie in `buffer` (a memoryview) at PAYLOAD_OFFSET.

    Returns the frame's size in bytes.
    """
    struct.pack_into("<HBBHHH", buffer, 0, _MAGIC, _VERSION, kind, session, sequence, length)
    struct.pack_into("<H", buffer, _CHECK_OFFSET, binascii.crc32(buffer[:_CHECK_OFFSET]) & 0xFFFF)
    end = _HEADER_BYTES + length
    struct.pack_into("<I", buffer, end, binascii.crc32(buffer[:end]))
    return end + 4


class Decoder:
    """Finds frames in a stream of bytes, inside one buffer of `size` bytes that never grows.

    Fill `space()` and say how much with `filled(n)` (or `feed(data)`), then call `next()` until it says False. After a
    True, `kind`, `session`, `sequence` and `payload` are the frame's; `payload` is a view, valid until the next call.
    Bytes that belong to no frame are counted in `skipped` and handed to `log`, if there is one; `broken` counts frames
    with a good header and a bad end.
    """

    def __init__(self, size, log=None):
        self._view = memoryview(bytearray(size))
        self._start = 0  # of what has not been looked at
        self._end = 0  # of what has arrived
        self._size = size
        self._missing = _HEADER_BYTES
        self.max_payload = min(size - _FRAME_BYTES, 0xFFFF)
        self.log = log
        self.skipped = 0
        self.broken = 0
        self.kind = self.session = self.sequence = 0
        self.payload = self._view[:0]

    def space(self):
        """Where the next bytes go. Never empty after `next()` said False."""
        return self._view[self._end :]

    def filled(self, n):
        """Take notice of `n` bytes that were written to the start of `space()`."""
        self._end += n

    def feed(self, data):
        """Copy as much of `data` as there is room for; returns how much that was."""
        n = min(len(data), self._size - self._end)
        self._view[self._end : self._end + n] = memoryview(data)[:n]
        self._end += n
        return n

    def missing(self):
        """How many bytes must come before `next()` can find a frame, at the least. To be asked after a False."""
        return self._missing

    def partial(self):
        """Whether the beginning of what may be a frame is waiting for the rest."""
        return self._start != self._end

    def resync(self):
        """Give up the frame that is waiting for its rest: the line has been silent for too long."""
        if self._start != self._end:
            self._skip(self._start + 1)

    def next(self):
        """Find the next frame among the bytes that are here. False: more bytes are needed."""
        view = self._view
        while True:
            start = self._seek()
            have = self._end - start
            if have < _HEADER_BYTES:
                return self._wait(_HEADER_BYTES)
            length = self._length(start)
            if length < 0:
                self._skip(start + 1)
                continue
            total = length + _FRAME_BYTES
            if have < total:
                return self._wait(total)
            end = start + _HEADER_BYTES + length
            if binascii.crc32(view[start:end]) != struct.unpack_from("<I", view, end)[0]:
                self.broken += 1
                self._skip(start + 1)  # a good frame may begin inside the broken one
                continue
            self.payload = view[start + _HEADER_BYTES : end]
            self._start = start + total
            return True

    def _length(self, start):
        # The payload's length, with the header's other fields noted; -1: no header of a frame we could take.
        view = self._view
        _, version, self.kind, self.session, self.sequence, length, check = struct.unpack_from("<HBBHHHH", view, start)
        if version != _VERSION or length > self.max_payload:
            return -1
        return length if binascii.crc32(view[start : start + _CHECK_OFFSET]) & 0xFFFF == check else -1

    def _seek(self):
        # To the first place where a frame may begin; the end, if there is none.
        view = self._view
        at = self._start
        end = self._end
        while at < end and (view[at] != _MAGIC_0 or (at + 1 < end and view[at + 1] != _MAGIC_1)):
            at += 1
        if at != self._start:
            self._skip(at)
        return at

    def _skip(self, to):
        self.skipped += to - self._start
        if self.log:
            self.log(self._view[self._start : to])
        self._start = to

    def _wait(self, total):
        # Keep what is here of a frame of `total` bytes, at the front if its end would not fit behind.
        start = self._start
        have = self._end - start
        if have == 0 or start + total > self._size:
            self._view[:have] = self._view[start : self._end]
            self._start = 0
            self._end = have
        self._missing = total - have
        return False
