# Files that survive power loss: written beside, read back, then renamed.
import os

_NEW = ".new"


def write(path, parts, check):
    # `parts` is an iterable of bytes-like pieces, `check(path)` raises ValueError when a file is not whole.
    # The old file stays until the new one was read back, and one of the two is always there to be found by newest().
    beside = path + _NEW
    with open(beside, "wb") as f:
        for part in parts:
            if f.write(part) != len(part):
                raise OSError("%s: the file system is full" % beside)
    check(beside)
    try:
        os.rename(beside, path)
    except OSError:
        # FAT does not rename over a file; if power fails in between, candidates() still finds the new one.
        os.remove(path)
        os.rename(beside, path)
    if hasattr(os, "sync"):
        os.sync()


def candidates(path):
    # Where a whole file may lie after a power loss, the committed place first.
    return (path, path + _NEW)


def exists(path):
    try:
        os.stat(path)
        return True
    except OSError:
        return False
