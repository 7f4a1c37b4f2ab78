"""Writes an image of MicroPython's ROMFS in which every file begins at a multiple of 4, to be used where it lies.

The format is told at the top of MicroPython's extmod/vfs_rom.c: records of a kind, a length and that many bytes, in
one another. Numbers in it may be written longer than need be, and that is what aligns what follows them: here every
record begins at a multiple of 4 and is a multiple of 4 long, wherever it lies.
"""

from __future__ import annotations

from collections.abc import Mapping

EMPTY = b"\xd2\xcd\x31\x00"  # a ROMFS without files
_FILESYSTEM = EMPTY[:3]
_PADDING, _DATA, _DIRECTORY, _FILE = b"\x01", b"\x02", b"\x04", b"\x05"
_ALIGNMENT = 4

_Tree = dict[str, "bytes | _Tree"]


def image(files: Mapping[str, bytes]) -> bytes:
    """Build the image of a file system that holds files, in the order given.

    Args:
        files: contents by path; folders are made: ``{"lib/a.mpy": ..., "kws.ulm": ...}``.

    Raises:
        ValueError: a path is absolute or has an empty part, or a file's path is a folder, too.
    """
    tree: _Tree = {}
    for path, data in files.items():
        *folders, name = path.split("/")
        here = tree
        for folder in folders:
            inner = here.setdefault(folder, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{path}: {folder} is a file, expected a folder")
            here = inner
        if not all((name, *folders)):
            raise ValueError(f"{path!r} is no path in a ROMFS; expected names with one slash between them")
        if name in here:
            raise ValueError(f"{path}: {name} is a folder, expected a file")
        here[name] = bytes(data)
    return _record(_FILESYSTEM, b"", _records(tree))


def _records(tree: _Tree) -> bytes:
    parts = []
    for name, inner in tree.items():
        label = name.encode()
        label = _number(len(label)) + label
        if isinstance(inner, dict):
            parts.append(_record(_DIRECTORY, label, _records(inner)))
        else:
            parts.append(_record(_FILE, label, _padded(_record(_DATA, b"", inner))))
    return b"".join(parts)


def _record(kind: bytes, head: bytes, body: bytes) -> bytes:
    # The length is written so long that the body begins at a multiple of 4.
    length = _number(len(head) + len(body))
    missing = -len(kind + length + head) % _ALIGNMENT
    return kind + b"\x80" * missing + length + head + body


def _padded(data: bytes) -> bytes:
    # With a record behind it that nobody reads, which has 2 bytes at the least.
    missing = -len(data) % _ALIGNMENT
    if missing == 1:
        missing += _ALIGNMENT
    return data + (_PADDING + bytes([missing - 2]) + bytes(missing - 2) if missing else b"")


def _number(value: int) -> bytes:
    # The upper seven bits first; all bytes but the last have their top bit set.
    encoded = bytes([value & 0x7F])
    while value := value >> 7:
        encoded = bytes([value & 0x7F | 0x80]) + encoded
    return encoded
