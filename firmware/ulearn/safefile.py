# Files that survive power loss: written beside, read back, then renamed.
import os

_NEW = ".new"


def write(path, parts, check):
    # `parts` is an iterable of bytes-like pieces; `check(path)` raises ValueError unless the file is whole and of use.
    # At any moment one of the two places holds such a file, if there was one before.
    beside = path + _NEW
    recover(path, check)
    with open(beside, "wb") as f:
        for part in parts:
            if f.write(part) != len(part):
                raise OSError("%s: the file system is full" % beside)
        f.flush()
        if hasattr(os, "fsync"):
            os.fsync(f.fileno())  # POSIX: the data before the name
    check(beside)
    # Littlefs and POSIX replace in one step, MicroPython's FAT removes first: then the new file is found beside.
    os.rename(beside, path)
    if not hasattr(os, "fsync") and hasattr(os, "sync"):
        os.sync()


def recover(path, check):
    # Whether `path` holds a good file. One that a power loss in the middle of a renaming left beside is moved there.
    if not _holds(path, check) and _holds(path + _NEW, check):
        os.rename(path + _NEW, path)
    return _holds(path, check)


def _holds(path, check):
    try:
        check(path)
        return True
    except (OSError, ValueError):
        return False


def candidates(path):
    # Where a whole file may lie after a power loss, the committed place first.
    return (path, path + _NEW)


def exists(path):
    try:
        os.stat(path)
        return True
    except OSError:
        return False
