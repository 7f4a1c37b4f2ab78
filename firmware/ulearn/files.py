# Files that a host sends to the agent: written beside, read back, compared with their SHA-256, then renamed.
import hashlib
import os
import struct

_PART = ".part"


class Incoming:
    def __init__(self, path, total):
        _folders(path)
        self.path, self.total, self.received = path, total, 0
        self.file = open(path + _PART, "wb")

    def put(self, offset, piece):
        # Pieces come in order; one that comes again has got its reply before it gets here.
        if offset != self.received or offset + len(piece) > self.total:
            raise ValueError("a piece of %s at %d, expected it at %d" % (self.path, offset, self.received))
        if self.file.write(piece) != len(piece):
            raise OSError("the file system is full")
        self.received += len(piece)

    def commit(self, digest, buffer):
        # `buffer`: room to read the file back through. Until the renaming the old file stays as it was.
        self.file.close()
        if self.received != self.total:
            raise ValueError("%d bytes of %s are here, expected %d" % (self.received, self.path, self.total))
        if sha256(self.path + _PART, buffer) != bytes(digest):
            raise ValueError("%s does not read back as it was sent; is the flash worn out?" % self.path)
        os.rename(self.path + _PART, self.path)

    def close(self):
        self.file.close()


def take(incoming, payload):
    # A request of the agent's: 1, then bytes in all and the path; or 2, then an offset and the piece that goes there.
    if len(payload) < 5:
        raise ValueError("a request about a file has %d bytes, expected 5 at least" % len(payload))
    what, number = payload[0], struct.unpack_from("<I", payload, 1)[0]
    if what == 1:
        if incoming:
            incoming.close()
        return Incoming(str(bytes(payload[5:]), "utf-8"), number)
    if incoming is None:
        raise ValueError("no file was begun; tell its name and size first")
    incoming.put(number, payload[5:])
    return incoming


def sha256(path, buffer):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while True:
            n = f.readinto(buffer)
            if not n:
                return digest.digest()
            digest.update(buffer[:n])


def _folders(path):
    at = path.find("/", 1)
    while at > 0:
        try:
            os.mkdir(path[:at])
        except OSError:
            pass  # it is there, or opening the file will say why not
        at = path.find("/", at + 1)
