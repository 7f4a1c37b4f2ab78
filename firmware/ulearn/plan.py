# Reads a plan (.ulm) into place: one pass over the file, every section hashed as it comes, nothing believed before.
import os
import struct
from hashlib import sha256

from .compat import const

_MAGIC = const(1347243125)
_VERSION = const(1)
_HEADER_BYTES = const(96)
_H_MODEL_ID = const(16)
_H_HASH = const(32)
_H_TAG = const(64)
_ID_BYTES = const(16)
_SECTION_REQUIRED = const(1)
_SECTION_IO = const(1)
_SECTION_TENSORS = const(2)
_SECTION_PROGRAM = const(3)
_SECTION_CUTS = const(4)
_SECTION_FROZEN = const(5)
_SECTION_TRAIN = const(6)
_SECTION_STATE = const(7)
_SECTION_SCALES = const(8)
_SECTION_META = const(9)
_SKIPPED_CHUNK = const(256)


class Plan:
    # What a plan file holds. Sections are bytearrays (a file) or slices of the caller's buffer (read in place).
    def __init__(self, name):
        self.name = name
        self.programs = []
        self.sections = {}
        self.offsets = {}  # of every section's value, with its length: (offset, bytes)

    def section(self, kind):
        return self.sections.get(kind, b"")


class _Buffer:
    def __init__(self, data):
        self.view = memoryview(data)
        self.length = len(data)
        self.at = 0

    def take(self, count):
        part = self.view[self.at : self.at + count]
        self.at += len(part)
        return part

    def skip(self, count, digest):
        digest.update(self.take(count))

    def close(self):
        pass


class _File:
    def __init__(self, path):
        self.file = open(path, "rb")
        self.length = self.file.seek(0, 2)
        self.file.seek(0)
        self.at = 0

    def take(self, count):
        part = bytearray(count)
        got = self.file.readinto(part) or 0
        self.at += got
        return part if got == count else part[:got]

    def skip(self, count, digest):
        # Through one buffer: a trail of dead ones would leave what is loaded after them scattered over the heap.
        chunk = bytearray(_SKIPPED_CHUNK)
        end = self.at + count
        while end - self.at >= _SKIPPED_CHUNK and self.file.readinto(chunk) == _SKIPPED_CHUNK:
            digest.update(chunk)
            self.at += _SKIPPED_CHUNK
        digest.update(self.take(min(end - self.at, _SKIPPED_CHUNK)))

    def close(self):
        self.file.close()


def read(source, name=None, leave=()):
    # `source`: a path, or the plan itself in a buffer that is kept and read in place, as a file of a ROMFS is. `leave`:
    # sections that are checked and left in the file.
    if isinstance(source, str):
        source = _found(source)
    reader = _reader(source)
    plan = Plan(name or (source if isinstance(source, str) else "plan"))
    plan.leave = leave
    plan.in_place = isinstance(reader, _Buffer)
    try:
        _read(reader, plan)
    finally:
        reader.close()
    return plan


def _found(path):
    # What is no file here may be one of the ROMFS by the same name.
    for place in (path, "/rom/" + path):
        try:
            os.stat(place)
            return place
        except OSError:
            pass
    return path


def _reader(source):
    if not isinstance(source, str):
        return _Buffer(source)
    reader = _File(source)
    try:
        view = memoryview(reader.file)  # of a ROMFS: flash that can be read where it is
    except TypeError:
        return reader
    reader.close()
    return _Buffer(view)


def _refuse(plan, fault):
    raise ValueError("%s: %s" % (plan.name, fault))


def _take(reader, plan, count, what):
    part = reader.take(count)
    if len(part) != count:
        _refuse(plan, "cut short in the %s: %d bytes, expected %d" % (what, len(part), count))
    return part


def _read(reader, plan):
    header = _take(reader, plan, _HEADER_BYTES, "header")
    magic, version, flags, length, count, zero = struct.unpack_from("<IHHIHH", header, 0)
    if magic != _MAGIC:
        _refuse(plan, "not a ulearn plan (it does not begin with 'uLMP')")
    if version != _VERSION:
        _refuse(plan, "plan version %d, this ulearn reads version %d; update ulearn on the board" % (version, _VERSION))
    if flags or zero:
        _refuse(plan, "unknown flags 0x%x in the header" % (flags or zero))
    if length != reader.length:
        _refuse(plan, "%d bytes long, its header says %d" % (reader.length, length))
    digest = sha256(header[:_H_HASH])
    digest.update(bytes(_HEADER_BYTES - _H_HASH))  # hash and tag count as zeros
    if bytes(header[_H_TAG:]) != bytes(_HEADER_BYTES - _H_TAG):
        _refuse(plan, "carries an authentication tag, which version %d cannot check" % _VERSION)
    plan.hash = bytes(header[_H_HASH:_H_TAG])
    plan.model_id = bytes(header[_H_MODEL_ID : _H_MODEL_ID + _ID_BYTES])
    for _ in range(count):
        _section(reader, plan, digest)
    if reader.at != length:
        _refuse(plan, "%d bytes after the last section" % (length - reader.at))
    if digest.digest() != plan.hash:
        _refuse(plan, "damaged: its SHA-256 does not match")
    for kind in (_SECTION_IO, _SECTION_PROGRAM, _SECTION_STATE):
        if kind not in plan.offsets:
            _refuse(plan, "section %d is missing" % kind)


def _section(reader, plan, digest):
    head = _take(reader, plan, 8, "section header")
    digest.update(head)
    kind, flags, size = struct.unpack("<HHI", head)
    if size > reader.length - reader.at:
        _refuse(plan, "section %d claims %d bytes, %d are left" % (kind, size, reader.length - reader.at))
    if flags & ~_SECTION_REQUIRED:
        _refuse(plan, "section %d has unknown flags 0x%x" % (kind, flags))
    known = _SECTION_IO <= kind <= _SECTION_META
    if not known and flags & _SECTION_REQUIRED:
        _refuse(plan, "needs section type %d, which version %d does not know" % (kind, _VERSION))
    if kind in plan.offsets and kind != _SECTION_PROGRAM:
        _refuse(plan, "section %d occurs twice" % kind)
    plan.offsets[kind] = (reader.at, size)
    if not known or kind >= _SECTION_SCALES or (kind in plan.leave and not plan.in_place):
        end = reader.at + size
        reader.skip(size, digest)
        if reader.at != end:
            _refuse(plan, "cut short in section %d: %d bytes, expected %d" % (kind, size - end + reader.at, size))
    else:
        value = _take(reader, plan, size, "section %d" % kind)
        digest.update(value)
        if kind == _SECTION_PROGRAM:
            plan.programs.append(value)
        else:
            plan.sections[kind] = value
    padding = _take(reader, plan, -size & 7, "padding")
    if any(padding):
        _refuse(plan, "the padding behind section %d is not zero" % kind)
    digest.update(padding)
