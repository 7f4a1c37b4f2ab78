"""An emulated Xtensa that runs calls of the native modules: no ESP32, but the same windowed instructions.

The modules are those that go onto a board. What MicroPython would do for them is done here (loading, relocation) and in
xtensa/runtime.c (the few functions they call); xtensa/start.s makes the bare core run C.
"""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elftools.elf.elffile import ELFFile

from conftest import HERE
from ulearn_host import emulate

RESET = 0xFE000000  # of the emulated core
START, CODE, MEMORY, HEAP = 0x2000, 0x3000, 0x100000, 0x101000  # as in start.s and runtime.c
XTENSAWIN = 10  # as in the header of a module
TABLE_WORDS = 87  # of mp_fun_table; struct memory_t goes on behind it
FLAGS = (
    "-std=c99 -O2 -fno-jump-tables -Wall -Wextra -Werror -Wno-unused-parameter -DNDEBUG -DNO_QSTR"
    " -DMICROPY_ENABLE_DYNRUNTIME -DMICROPY_FLOAT_IMPL=MICROPY_FLOAT_IMPL_FLOAT -DMP_CONFIGFILE=<config.h>"
)
QEMU = "qemu-system-xtensa -M sim -cpu dc233c -m 64M -nographic -monitor null -semihosting"


@dataclass(frozen=True)
class Call:
    """run(program, table, first, count) as it was before, and what it left: the code and the buffers."""

    program: bytes
    table: tuple[bytes | None, ...]
    first: int
    count: int
    code: int
    after: tuple[bytes | None, ...]


COMPILER = HERE.parent / "boards" / "xtensa" / "xtensa-esp32-elf-gcc"


class Loaded:
    """A module as MicroPython's py/persistentcode.c loads it, at an address."""

    def __init__(self, data: bytes, address: int) -> None:
        self._stream = io.BytesIO(data)
        self.address = address
        head = self._stream.read(4)
        assert head[:2] == b"M\x06" and head[2] >> 2 == XTENSAWIN, head
        names = self._uint()
        assert self._uint() == 0, "no objects are expected"
        for _ in range(names):
            length = self._uint()
            if not length & 1:  # else one of MicroPython's own strings
                self._stream.read((length >> 1) + 1)
        text = bytearray(self._stream.read(self._uint() >> 3))
        flags = self._uint()
        assert not flags & 0x40, "no variables are expected"
        rodata = bytearray(self._stream.read(self._uint())) if flags & 0x20 else bytearray()
        text.extend(bytes(-len(text) % 16))
        self._relocate(text, rodata)
        self.image = bytes(text + rodata)

    def _uint(self) -> int:
        value = 0
        while True:
            (byte,) = self._stream.read(1)
            value = value << 7 | byte & 127
            if byte < 128:
                return value

    def _relocate(self, text: bytearray, rodata: bytearray) -> None:
        places = {0: (text, self.address), 1: (rodata, self.address + len(text))}
        base, word = text, 0
        while (op := self._stream.read(1)[0]) != 0xFF:
            if op & 1:
                place = self._uint()
                base, word = places[place & 1][0], place >> 1
            op >>= 1
            count = 1
            if op <= 5:
                count = self._uint() if op & 1 else 1
                to = places[op >> 1][1]
            elif op == 6:
                to = HEAP - 16  # the names: two are asked for, and none looked at
            else:  # the table of functions, or what it holds, of which only the address matters
                to = MEMORY if op == 8 else MEMORY + 4 * (op - 9)
            for _ in range(count):
                (value,) = struct.unpack_from("<I", base, 4 * word)
                struct.pack_into("<I", base, 4 * word, value + to & 0xFFFFFFFF)
                word += 1


def runtime(folder: Path) -> dict[int, bytes]:
    """Compile start.s and runtime.c: the code of both, by its address."""
    source = emulate.cache_dir() / "micropython-src"
    command = [str(COMPILER), "-mcpu=esp32", "-c", str(HERE / "xtensa" / "start.s"), "-o", str(folder / "start.o")]
    subprocess.run(command, check=True, capture_output=True)
    with (folder / "start.o").open("rb") as f:
        start = ELFFile(f)
        parts = {at: start.get_section_by_name(name).data() for at, name in ((RESET, ".reset"), (START, ".start"))}
    link = [sys.executable, str(HERE.parent / "boards" / "xtensa" / "mpy_ld.py"), str(source / "tools")]
    link += ["--arch", "xtensawin", "-o", "runtime.mpy"]
    subprocess.run(
        [*link[:-1], "config.h", "--preprocess", str(HERE / "xtensa" / "runtime.c")],
        check=True,
        cwd=folder,
        capture_output=True,
    )
    flags = [f"-I{source}", "-I.", *FLAGS.split(), "-c", str(HERE / "xtensa" / "runtime.c"), "-o", "runtime.o"]
    subprocess.run([str(COMPILER), *flags], check=True, cwd=folder)
    subprocess.run([*link, "runtime.o"], check=True, cwd=folder, capture_output=True)
    assert len(parts[START]) <= CODE - START
    parts[CODE] = Loaded((folder / "runtime.mpy").read_bytes(), CODE).image
    return parts


class Heap:
    """Memory behind what is known to all: what is put there, and where."""

    def __init__(self) -> None:
        self.data = bytearray()

    def put(self, block: bytes) -> int:
        """Append a block, aligned; its address."""
        self.data.extend(bytes(-len(self.data) % 16))
        address = HEAP + len(self.data)
        self.data.extend(block)
        return address


_BUFFER = struct.Struct("<III")  # an object: type, data, bytes
_CALL_BYTES = 8 * _BUFFER.size + 12


def lay_out(module: bytes, calls: Sequence[Call]) -> tuple[bytes, int, list[list[int]]]:
    """The memory from MEMORY on, where in it the calls begin, and where in it their buffers are."""
    heap = Heap()
    entry = heap.put(b"")
    heap.data.extend(Loaded(module, entry).image)
    begin = heap.put(bytes(_CALL_BYTES * len(calls)))
    kept: dict[bytes, int] = {}  # what is only read is there once
    places = []
    for i, call in enumerate(calls):
        record = bytearray()
        places.append([])
        for buffer, block in enumerate((call.program, *call.table)):
            if block is None:
                place = 0
            elif buffer in (0, 7):
                place = kept.get(block) or kept.setdefault(block, heap.put(block))
            else:
                place = heap.put(block)
            record += _BUFFER.pack(0, place, len(block or b""))
            places[-1].append(place - begin)
        record += struct.pack("<iii", call.first, call.count, -99)
        at = begin - HEAP + i * _CALL_BYTES
        heap.data[at : at + _CALL_BYTES] = record
    heap.put(b"")
    # memory_t behind its table: init, run, the objects, the types, how many calls, where, the end.
    head = struct.pack("<10I", entry, *[0] * 6, len(calls), begin, HEAP + len(heap.data))
    known = bytes(4 * TABLE_WORDS) + head
    return known + bytes(HEAP - MEMORY - len(known)) + heap.data, begin, places


def elf(parts: dict[int, bytes], entry: int) -> bytes:
    """A program for the emulator: its parts by their addresses."""
    segments, blocks = b"", b""
    first = 52 + 32 * len(parts)
    for address, data in parts.items():
        offset = first + len(blocks)
        segments += struct.pack("<8I", 1, offset, address, address, len(data), len(data), 7, 1)
        blocks += data
    head = b"\x7fELF\x01\x01\x01" + bytes(9)
    head += struct.pack("<HHIIIIIHHHHHH", 2, 94, 1, entry, 52, 0, 0, 52, 32, len(parts), 40, 0, 0)
    return head + segments + blocks


def run(module: bytes, calls: Sequence[Call], folder: Path) -> list[tuple[int, tuple[bytes | None, ...]]]:
    """Have the emulator run calls, of a module's `run`; code and buffers of each."""
    memory, begin, places = lay_out(module, calls)
    program = folder / "program.elf"
    program.write_bytes(elf({**runtime(folder), MEMORY: memory}, RESET))
    done = subprocess.run(
        [*QEMU.split(), "-kernel", str(program)], stdin=subprocess.DEVNULL, capture_output=True, timeout=600
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    out = done.stdout
    assert len(out) == MEMORY + len(memory) - begin, len(out)
    results = []
    for i, (call, where) in enumerate(zip(calls, places, strict=True)):
        (answer,) = struct.unpack_from("<i", out, (i + 1) * _CALL_BYTES - 4)
        after = [None if b is None else out[p : p + len(b)] for b, p in zip(call.table, where[1:], strict=True)]
        results.append((answer, tuple(after)))
    return results
