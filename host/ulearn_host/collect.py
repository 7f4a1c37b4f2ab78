"""Labelled samples from a board's own sensor code over the line into an npz, and back as a recording that plays.

The board has a module with SHAPE, DTYPE and read(x), which fills x, an array that is made once, with one sample. The
host starts a program on the board by the raw REPL; it then asks for every sample by number, in pieces that fit one
frame (ulearn/frames.py: header check and CRC-32 at the end). What is lost or damaged is asked for again: the board
reads the sensor only for the number that follows, and sends again what it has for the number it is at.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulearn import frames
from ulearn_host import importers
from ulearn_host.errors import UserError
from ulearn_host.link import BoardError, LinkError
from ulearn_host.repl import RawRepl

Tick = Callable[[int, int], None]

TYPES = {"int8": "b", "uint8": "B", "int16": "h", "int32": "i", "float32": "f"}
_PIECE_BYTES = 1024
_SAMPLE_BYTES_MAX = 1 << 20
_SAMPLE, _FAULT = 0x41, 0x42
_AGAIN_S = 0.5
_AGAIN_MAX_S = 2.0
_MARK = "# A recording that plays, put here by `ulearn collect --playback`"
_OWN = ("x", "y", "labels", "dtype", "scale", "zero_point", "rate")
_TEXT_BYTES = 2000
_CHUNK_BYTES = 1536  # of a file, at once to the board

_ASK = """
import {module} as m
s = m.SHAPE
s = (s,) if isinstance(s, int) else tuple(s)
m.read
print('sensor', ','.join(str(int(v)) for v in s), m.DTYPE, getattr(m, 'SCALE', 1), getattr(m, 'ZERO_POINT', 0),
 hasattr(m, 'SCALE'), sep='|')
"""

# Sleeping by milliseconds, a board rests; by microseconds it spins, which is worth it at high rates only.
# Asked in lines: number of the sample, number of the piece, checksum. A line 'q' ends it, Ctrl-C and Ctrl-D too.
_SERVE = """
def serve(read, code, items, size, piece, period):
 import sys, struct, time, gc
 from array import array
 from binascii import crc32
 take = sys.stdin.buffer.read
 put = sys.stdout.buffer.write
 x = array(code, bytes(items * size))
 view = memoryview(x)
 head = bytearray(12)
 tail = bytearray(4)
 line = bytearray(24)
 def send(kind, part, number, data, n):
  struct.pack_into('<HBBHHH', head, 0, 0x75f5, 0x31, kind, part, number, n)
  struct.pack_into('<H', head, 10, crc32(memoryview(head)[:10]) & 0xffff)
  struct.pack_into('<I', tail, 0, crc32(data, crc32(head)))
  for b in (head, data, tail):
   b = memoryview(b)
   while len(b):
    k = put(b)
    if not k:
     return
    b = b[k // (size if b is data else 1):]
 gc.collect()
 due = time.ticks_us()
 now = n = 0
 while True:
  c = take(1)
  if not c or c[0] in b'\\x03\\x04':
   return
  if c[0] != 10:
   if n < len(line):
    line[n] = c[0]
    n += 1
   continue
  word = bytes(line[:n])
  n = 0
  if word == b'q':
   return
  try:
   number, part, check = [int(str(w, 'ascii')) for w in word.split(b',')]
  except ValueError:
   continue
  if check != (number * 31 + part * 7 + 5) & 0xffff:
   continue
  if number == (now + 1) & 0xffff:
   if period:
    early = time.ticks_diff(due, time.ticks_us())
    if -period < early < 2 * period:
     if early >= 1000:
      time.sleep_ms((early + 500) // 1000)
     elif early > 0 and period < 5000:
      time.sleep_us(early)
    else:
     due = time.ticks_us()
    due = time.ticks_add(due, period)
   try:
    read(x)
   except Exception as e:
    text = (type(e).__name__ + ': ' + str(e)).encode()[:200]
    send({fault}, part, number, text, len(text))
    continue
   now = number
  if number == now and part * piece < items:
   data = view[part * piece:(part + 1) * piece]
   send({sample}, part, number, data, len(data) * size)
serve(m.read, {code!r}, {items}, {size}, {piece}, {period})
"""


@dataclass(frozen=True)
class Sensor:
    """What the board's module says of its samples. dtype: of what read() fills in; where a scale is given, the real
    value is (code - zero_point) * scale, and that is what is kept."""

    shape: tuple[int, ...]
    dtype: str
    scale: float | None = None
    zero_point: int = 0

    @property
    def items(self) -> int:
        """Numbers in a sample."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of a sample."""
        return self.items * np.dtype(self.dtype).itemsize

    def real(self, raw: NDArray[Any]) -> NDArray[Any]:
        """Samples in real units."""
        if self.scale is None:
            return raw
        return ((raw.astype(np.float64) - self.zero_point) * self.scale).astype(np.float32)


class Recorder:
    """A board whose sensor is read. Use it as a context manager."""

    def __init__(self, port: str, module: str, rate: float | None, timeout_s: float) -> None:
        """Interrupt and reset the board's program (softly: an empty heap), and import the module.

        Raises:
            UserError: nobody answers, there is no such module, or it is not as it should be.
        """
        if not module.replace(".", "_").isidentifier():
            raise UserError(
                f"--module {module} is no name of a module; expected e.g. sensor, for sensor.py on the board"
            )
        self._timeout_s = timeout_s
        self._period_s = 1 / rate if rate else 0.0
        self._module = module
        self._number = 0
        self.repeats = 0  # requests that were sent again
        self._repl = RawRepl.open(port, timeout_s)
        try:
            self._repl.soft_reset()
            self.sensor = self._asked()
        except BaseException:
            self._repl.close()
            raise
        self._decoder = frames.Decoder(4 * _PIECE_BYTES, self._skipped)
        self._pending = b""  # read, and not yet with the decoder
        self._text = b""

    def _asked(self) -> Sensor:
        name, port = self._module, self._repl.port
        wanted = f"expected {name}.py with SHAPE, DTYPE and read(x); see ulearn collect --help"
        try:
            said = self._repl.run(_ASK.format(module=name))
        except BoardError as fault:
            raise UserError(f"{fault}; {wanted}") from None
        lines = [line.split("|")[1:] for line in said.splitlines() if line.startswith("sensor|")]
        try:
            sizes, dtype, scale, zero, scaled = lines[-1]
            shape = tuple(int(size) for size in sizes.split(","))
            dtype = "float32" if dtype == "float" else dtype
            sensor = Sensor(shape, dtype, float(scale) if scaled == "True" else None, int(zero))
        except (IndexError, ValueError):
            raise UserError(f"{port}: {name} does not say what its samples are; {wanted}") from None
        if dtype not in TYPES:
            raise UserError(f"{port}: {name}.DTYPE is {dtype}, expected one of {', '.join(TYPES)}")
        if not shape or min(shape) < 1 or sensor.bytes > _SAMPLE_BYTES_MAX:
            raise UserError(f"{port}: {name}.SHAPE is {shape}, expected sizes of at least 1 and at most 1 MiB in all")
        if sensor.scale is not None and not (math.isfinite(sensor.scale) and sensor.scale > 0):
            raise UserError(f"{port}: {name}.SCALE is {sensor.scale:g}, expected a positive number")
        return sensor

    def begin(self) -> None:
        """Start the board's part; `sample` may be called after this."""
        size = np.dtype(self.sensor.dtype).itemsize
        self._piece = _PIECE_BYTES // size  # items
        self._parts = math.ceil(self.sensor.items / self._piece)
        numbers = {"items": self.sensor.items, "size": size, "piece": self._piece, "fault": _FAULT, "sample": _SAMPLE}
        code = _SERVE.format(code=TYPES[self.sensor.dtype], period=round(1e6 * self._period_s), **numbers)
        self._repl.begin(f"import {self._module} as m\n{code}")

    def sample(self) -> NDArray[Any]:
        """Ask for the next sample, of the sensor's shape and dtype. Raises UserError with what the board says."""
        number = (self._number + 1) & 0xFFFF
        data = b"".join(self._part(number, part) for part in range(self._parts))
        self._number = number
        dtype = np.dtype(self.sensor.dtype).newbyteorder("<")
        if len(data) != self.sensor.bytes:
            raise LinkError(f"{self._repl.port}: a sample of {len(data)} bytes came, expected {self.sensor.bytes}")
        return np.frombuffer(data, dtype).astype(self.sensor.dtype).reshape(self.sensor.shape)

    def _part(self, number: int, part: int) -> bytes:
        # Begun with a line's end: that of the request before may have been lost.
        request = b"\n%d,%d,%d\n" % (number, part, (number * 31 + part * 7 + 5) & 0xFFFF)
        again_s = _AGAIN_S + self._period_s
        until = time.monotonic() + self._timeout_s + self._period_s
        while time.monotonic() < until:
            self._repl.write(request)
            again = time.monotonic() + again_s
            while (left := again - time.monotonic()) > 0:
                found = self._decoder
                while found.next():
                    if (found.sequence, found.session) != (number, part):
                        continue  # came twice
                    if found.kind == _FAULT:
                        text = bytes(found.payload).decode(errors="replace")
                        raise UserError(f"{self._repl.port}: {self._module}.read(x) failed: {text}")
                    return bytes(found.payload)
                self._check_running()
                if not self._pending:
                    self._pending = self._repl.read(left)
                self._pending = self._pending[found.feed(self._pending) :]
            self._decoder.resync()
            self.repeats += 1
            again_s = min(2 * again_s, _AGAIN_MAX_S + self._period_s)
        raise LinkError(
            f"{self._repl.port}: no sample came for {self._timeout_s:g} s; is {self._module}.read(x) waiting?"
        )

    def _skipped(self, view: memoryview) -> None:
        # Bytes of no frame: what read() prints, and how the board's part ends.
        self._text = (self._text + bytes(view))[-_TEXT_BYTES:]

    def _check_running(self) -> None:
        # Two Ctrl-D end a program under the raw REPL, its error stands between them.
        if not self._text.endswith(b"\x04>"):
            return
        parts = self._text[:-2].decode(errors="replace").split("\x04")
        lines = [line.strip() for line in parts[-1].splitlines() if line.strip()]
        raise UserError(f"{self._repl.port}: the board stopped sending samples: {lines[-1] if lines else 'it ended'}")

    def close(self) -> None:
        """End the board's part and leave it at its prompt."""
        with contextlib.suppress(LinkError):
            self._repl.write(b"\nq\n")
            self._repl.write(b"\x03")
        self._repl.close()

    def __enter__(self) -> Recorder:
        """Return the recorder itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the board's part."""
        self.close()


# Files.


@dataclass(frozen=True)
class Recording:
    """Labelled samples: x in real units [n, ...], y indices of labels [n]."""

    x: NDArray[Any]
    y: NDArray[np.int64]
    labels: tuple[str, ...]
    sensor: Sensor
    rate: float = 0.0

    def counts(self) -> dict[str, int]:
        """Samples of each label."""
        return {label: int((self.y == i).sum()) for i, label in enumerate(self.labels)}


def read(path: Path) -> Recording:
    """A file that `collect` has written. Raises UserError when it is none."""
    arrays = importers.load_arrays(path)
    missing = [name for name in _OWN if name not in arrays]
    others = [name for name in arrays if name not in _OWN]
    if missing or others:
        what = f"lacks {', '.join(missing)}" if missing else f"also holds {', '.join(others)}"
        raise UserError(f"{path}: {what}, expected a file that ulearn collect has written; name another with --out")
    scale, rate = float(arrays["scale"]), float(arrays["rate"])
    x, y = arrays["x"], arrays["y"].astype(np.int64)
    sensor = Sensor(x.shape[1:], str(arrays["dtype"]), scale or None, int(arrays["zero_point"]))
    return Recording(x, y, tuple(str(label) for label in arrays["labels"]), sensor, rate)


def write(path: Path, recording: Recording) -> None:
    """Write beside, then rename: what was there stays until all of it is there."""
    sensor = recording.sensor
    fresh = path.with_name(path.name + ".new")
    try:
        with fresh.open("wb") as file:
            np.savez(
                file,
                x=recording.x,
                y=recording.y,
                labels=np.array(recording.labels),
                dtype=np.array(sensor.dtype),
                scale=np.array(sensor.scale or 0.0),
                zero_point=np.array(sensor.zero_point),
                rate=np.array(recording.rate),
            )
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def joined(old: Recording | None, path: Path, labels: Sequence[str], new: Recording) -> Recording:
    """The old samples and the new ones behind them; labels keep their numbers. Raises UserError when they differ."""
    if old is None:
        return new
    check_same(old, path, new.sensor)
    names = list(old.labels) + [label for label in labels if label not in old.labels]
    y = np.array([names.index(labels[i]) for i in new.y], np.int64)
    return Recording(
        np.concatenate([old.x, new.x]), np.concatenate([old.y, y]), tuple(names), old.sensor, new.rate or old.rate
    )


def check_same(old: Recording, path: Path, sensor: Sensor) -> None:
    """Raise UserError where a sensor's samples do not belong into a file."""
    for what in ("shape", "dtype", "scale", "zero_point"):
        a, b = getattr(old.sensor, what), getattr(sensor, what)
        if a != b and not (what == "scale" and a and b and math.isclose(a, b, rel_tol=1e-6)):
            raise UserError(f"{path}: its samples have {what} {a}, the board's {b}; name another file with --out")


# Playback.


@dataclass(frozen=True)
class Tape:
    """What is put on a board to be played: raw samples as its sensor gave them, label numbers (65535: none)."""

    raw: NDArray[Any]
    y: NDArray[np.uint16]
    labels: tuple[str, ...]
    sensor: Sensor


_NO_LABEL = 0xFFFF


def tape(path: Path, shuffle: int | None = None) -> Tape:
    """An npz as a recording that plays: one that collect has written, or any with x and perhaps y.

    shuffle: the seed of another order than the file's. Raises UserError.
    """
    arrays = importers.load_arrays(path)
    x, y = importers.load_samples(path)
    labels: tuple[str, ...] = ()
    if "dtype" in arrays:
        sensor = read(path).sensor
        codes = x if sensor.scale is None else np.rint(x / sensor.scale) + sensor.zero_point
        raw = codes.astype(sensor.dtype)
    else:
        raw = _narrow(arrays["x"])
        sensor = Sensor(raw.shape[1:], raw.dtype.name)
    if y is not None and y.ndim == 1 and y.dtype.kind == "U":
        names, y = np.unique(y, return_inverse=True)
        labels = tuple(str(name) for name in names)
    if "labels" in arrays and arrays["labels"].ndim == 1:
        labels = tuple(str(name) for name in arrays["labels"])
    numbers = np.full(len(raw), _NO_LABEL, np.uint16)
    if y is not None and y.ndim == 1 and np.array_equal(y, np.rint(y)) and y.min() >= 0 and y.max() < _NO_LABEL:
        numbers = y.astype(np.uint16)
    order = np.arange(len(raw)) if shuffle is None else np.random.default_rng(shuffle).permutation(len(raw))
    return Tape(raw[order], numbers[order], labels, sensor)


def _narrow(x: NDArray[Any]) -> NDArray[Any]:
    # In the smallest type a board's array can have.
    if x.dtype.kind in "iub":
        for name in ("int8", "uint8", "int16", "int32"):
            limits = np.iinfo(name)
            if x.min() >= limits.min and x.max() <= limits.max:
                return x.astype(name)
    return x.astype(np.float32)


def playing_module(played: Tape, name: str) -> str:
    """The module that plays a tape. read(x) fills x and returns the label; read() returns both, x being its own."""
    sensor = played.sensor
    scale = "" if sensor.scale is None else f"SCALE = {sensor.scale!r}\nZERO_POINT = {sensor.zero_point}\n"
    return f"""{_MARK}; delete it to have a real sensor again.
from array import array

SHAPE = {sensor.shape!r}
DTYPE = {sensor.dtype!r}
{scale}LABELS = {played.labels!r}
COUNT = {len(played.raw)}
_ITEMS = {sensor.items}
_BYTES = {sensor.bytes}
_file = None
_left = 0
_number = bytearray(2)
_own = None


def read(x=None):
    global _file, _left, _own
    own = x is None
    if own:
        if _own is None:
            _own = array({TYPES[sensor.dtype]!r}, bytes(_BYTES))
        x = _own
    elif len(x) != _ITEMS and len(x) != _BYTES:
        raise ValueError("x has %d numbers, expected %d" % (len(x), _ITEMS))
    if _file is None:
        _file = open("{name}.bin", "rb")
    if not _left:
        _file.seek(0)
        _left = COUNT
    if _file.readinto(x) != _BYTES or _file.readinto(_number) != 2:
        _left = 0
        raise ValueError("x does not have %d bytes, or {name}.bin is cut off" % _BYTES)
    _left -= 1
    label = _number[0] | _number[1] << 8
    if label == 65535:
        label = None
    return (x, label) if own else label
"""


def play_back(port: str, module: str, played: Tape, timeout_s: float, tick: Tick) -> int:
    """Put a tape and the module that plays it on a board; returns its bytes.

    Raises:
        UserError: nobody answers, the board is full, or it has a module of that name that is the user's own.
    """
    if not module.isidentifier():
        raise UserError(f"--module {module} is no name for a file on the board; expected e.g. sensor")
    label = played.y.astype("<u2").view(np.uint8).reshape(len(played.y), 2)
    samples = np.ascontiguousarray(played.raw.astype(played.raw.dtype.newbyteorder("<"))).view(np.uint8)
    data = np.concatenate([samples.reshape(len(label), -1), label], axis=1).tobytes()
    code = playing_module(played, module).encode()
    with RawRepl.open(port, timeout_s) as repl:
        repl.soft_reset()
        first = repl.run(
            f"try:\n print('first', repr(open('{module}.py').readline()))\nexcept OSError:\n print('first', None)"
        )
        if "None" not in first and _MARK not in first:
            raise UserError(
                f"{port}: {module}.py on the board is your own; name another module for the recording with --module"
            )
        try:
            total = len(data) + len(code)
            _put(repl, f"{module}.bin", data, lambda done: tick(done, total))
            _put(repl, f"{module}.py", code, lambda done: tick(len(data) + done, total))
        except BoardError as fault:
            repl.run(
                f"import os\nfor n in ('{module}.bin.new', '{module}.py.new'):\n"
                " try: os.remove(n)\n except OSError: pass"
            )
            full = "OSError: 28" in str(fault) or "full" in str(fault)
            room = f"; the board has no room for {total:,} bytes, record or keep fewer samples" if full else ""
            raise UserError(f"{fault}{room}; what the board had is unchanged") from None
        repl.run(f"import os\nfor n in ('{module}.bin', '{module}.py'): os.rename(n + '.new', n)")
    return total


def _put(repl: RawRepl, name: str, data: bytes, tick: Callable[[int], None]) -> None:
    # Written beside: what plays is whole or the one before.
    repl.run(f"from binascii import a2b_base64 as a, crc32\nf = open('{name}.new', 'wb')\nc = 0")
    for at in range(0, len(data), _CHUNK_BYTES):
        piece = base64.b64encode(data[at : at + _CHUNK_BYTES]).decode()
        repl.run(f"d = a('{piece}')\nc = crc32(d, c)\nif f.write(d) != len(d): raise OSError('full')")
        tick(min(at + _CHUNK_BYTES, len(data)))
    if int(repl.run("f.close()\nprint(c & 0xffffffff)")) != binascii.crc32(data):
        raise LinkError(f"{repl.port}: {name} was damaged on its way; try again")
