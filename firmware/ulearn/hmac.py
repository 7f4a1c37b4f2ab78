# HMAC-SHA256 (RFC 2104), of which MicroPython has the hash alone. One object serves one message after the other.
from hashlib import sha256

from .compat import const

_BLOCK_BYTES = const(64)
MAC_BYTES = const(32)


class Hmac:
    def __init__(self, key):
        if len(key) > _BLOCK_BYTES:
            raise ValueError("a key of %d bytes, expected at most 64" % len(key))
        self._inner = _pad(key, 0x36)
        self._outer = _pad(key, 0x5C)
        self._hash = None

    def begin(self):
        self._hash = sha256(self._inner)

    def update(self, data):
        self._hash.update(data)

    def end(self):
        # The 32 bytes for what was given since `begin`.
        digest = sha256(self._outer)
        digest.update(self._hash.digest())
        self._hash = None
        return digest.digest()


def equal(a, b):
    # In a time that does not tell where they differ.
    if len(a) != len(b):
        return False
    differ = 0
    for i in range(len(a)):
        differ |= a[i] ^ b[i]
    return not differ


def _pad(key, mask):
    pad = bytearray(b"\0" * _BLOCK_BYTES)
    pad[: len(key)] = key
    for i in range(_BLOCK_BYTES):
        pad[i] ^= mask
    return bytes(pad)
