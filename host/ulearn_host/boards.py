"""What is plugged in: asks the boards on all ports at once what they are, and waits for none of them for long.

A board that serves ulearn's agent is asked by a frame and goes on serving; any other is asked through the raw REPL,
which interrupts its program. Nothing is written to a board and none is reset. (Opening a port sets DTR and RTS; an
ESP32 board whose automatic reset circuit is not the usual one may take that for a reset.)
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from serial.tools import list_ports

from ulearn_host import flash_drive, running
from ulearn_host.asking import ARCHITECTURES
from ulearn_host.emulate import NATIVE_MODULES
from ulearn_host.link import Link, LinkError, open_port
from ulearn_host.repl import RawRepl

TIMEOUT_S = 3.0
_AGENT_S = 0.5
_SLACK_S = 0.5  # for opening and closing a port
_MODULES = ("ulab", *NATIVE_MODULES, "ulearn")

# Found without an import where it is a file: a package takes heap. What a firmware holds is imported and dropped again.
_ASK = """
import sys, gc
gc.collect()
I = sys.implementation
def seen(n):
 import os
 for p in sys.path:
  for s in ('', '.mpy', '.py'):
   f = (p + '/' if p else '') + n + s
   try:
    os.stat(f)
    return f
   except OSError:
    pass
 old = set(sys.modules)
 try:
  __import__(n)
  return 'firmware'
 except Exception:
  return ''
 finally:
  for m in list(sys.modules):
   if m not in old:
    del sys.modules[m]
def rom():
 try:
  import vfs
  return len(memoryview(vfs.rom_ioctl(2, 0)))
 except Exception:
  return 0
w = getattr(I, '_machine', sys.platform)
try:
 import os
 w = os.uname().machine
except AttributeError:
 pass
print('ulearn', getattr(I, '_mpy', 0), I.name, '.'.join(str(v) for v in I.version[:3]), w, getattr(I, '_build', ''),
 sys.platform, gc.mem_free(), 16 if sys.maxsize < 1 << 32 else 32, sep='|')
try:
 import micropython
 micropython.mem_info()
except Exception:
 pass
print('found', *[seen(n) for n in %r], rom(), sep='|')
del I, seen, rom, w
gc.collect()
"""

State = Literal["ready", "agent", "bootloader", "busy", "no answer", "not MicroPython", "cannot be opened"]


@dataclass
class Found:
    """A port and what is there.

    state: 'ready' (at its prompt), 'agent' (it serves ulearn's agent, which was left alone), 'bootloader' (an RP2
    waiting for firmware as a drive), or why nothing is known. free_bytes, largest_bytes: of the heap, without ulearn
    loaded. modules: where each of ulab, the native modules and ulearn is: 'firmware', a path, or '' (nowhere); empty
    where the board was not asked. romfs_bytes: of the ROMFS, 0 where there is none. interrupted: whether a program was
    running. emulated: the name of a board that `ulearn emulate` keeps.
    """

    port: str
    state: State = "no answer"
    detail: str = ""
    board: str = ""
    chip: str = ""
    build: str = ""
    firmware: str = ""
    architecture: str = ""
    mpy: str = ""
    free_bytes: int | None = None
    largest_bytes: int | None = None
    modules: dict[str, str] = field(default_factory=dict)
    romfs_bytes: int = 0
    interrupted: bool = False
    emulated: str = ""
    usb: str = ""

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def find() -> list[Found]:
    """All ports where a board may be: USB serial ports, emulated boards, drives of an RP2's bootloader."""
    places = [Found(port.device, usb=_usb(port)) for port in sorted(list_ports.comports()) if port.vid is not None]
    places += [Found(board.port, emulated=board.board) for board in running.running()]
    for drive in flash_drive.drives():
        places.append(Found(str(drive.path), "bootloader", board=drive.model, chip=drive.chip))
    return places


def named(ports: Sequence[str]) -> list[Found]:
    """The same for ports that are given, each once."""
    known = {place.port: place for place in find()}
    return [known.get(port, Found(port)) for port in dict.fromkeys(ports)]


def _usb(port: Any) -> str:
    number = f" {port.serial_number}" if port.serial_number else ""
    return f"{port.vid:04x}:{port.pid:04x}{number}"


def probe(places: Sequence[Found], timeout_s: float = TIMEOUT_S, tick: Callable[[], None] = lambda: None) -> None:
    """Ask all of them at once and note what they say; returns after timeout_s and a moment, whatever they do."""
    threads = []
    results: dict[int, Found] = {}

    def ask(index: int, place: Found) -> None:
        # Into a copy: a thread that is given up must not write any more where others read.
        result = Found(place.port, usb=place.usb, emulated=place.emulated)
        _ask(result, timeout_s)
        results[index] = result
        tick()

    for index, place in enumerate(places):
        if place.state != "bootloader":
            threads.append(threading.Thread(target=ask, args=(index, place), daemon=True))
            threads[-1].start()
    until = time.monotonic() + timeout_s + _SLACK_S
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    for index, result in list(results.items()):
        places[index].__dict__.update(result.__dict__)
    for index, place in enumerate(places):
        if index not in results and place.state != "bootloader":
            place.detail = f"within {timeout_s:g} s"


def _ask(place: Found, timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    try:
        port = open_port(place.port, 115200)
    except LinkError as fault:
        place.state = "busy" if "another program" in str(fault) or "busy" in str(fault) else "cannot be opened"
        place.detail = str(fault).rpartition(": ")[2]
        return
    try:
        if not _ask_agent(place, Link(port, timeout_s, None), min(_AGENT_S, timeout_s / 2)):
            repl = RawRepl(port, max(0.1, until - time.monotonic()))
            repl.enter()
            place.interrupted = repl.interrupted
            place.state, place.detail = "not MicroPython", "a prompt answers, but does not say what it is"
            said = repl.run(_ASK % (_MODULES,), max(0.1, until - time.monotonic()))
            _understand(place, said)
            repl.close()
    except LinkError as fault:
        place.state = "no answer"
        place.detail = f"within {timeout_s:g} s" if "answer" in str(fault) else str(fault).partition(": ")[2]
    finally:
        port.close()


def _ask_agent(place: Found, link: Link, timeout_s: float) -> bool:
    # Whether an agent serves there. At a prompt a HELLO does nothing.
    try:
        about = link.hello(timeout_s)
    except LinkError:
        if not link._serial.is_open:
            raise
        return False
    place.state = "agent"
    place.detail = f"runs plans with {about.executor}"
    name, _, version = about.implementation.partition(" ")
    place.firmware = f"{'MicroPython' if name == 'micropython' else name} {version}"
    _machine(place, about.machine, "")
    _abi(place, about.mpy)
    place.free_bytes = about.mem_free
    return True


def _understand(place: Found, said: str) -> None:
    lines = {line.partition("|")[0]: line.split("|")[1:] for line in said.splitlines() if "|" in line}
    if "ulearn" not in lines or "found" not in lines:
        return
    mpy, name, version, machine, build, platform, free, block = lines["ulearn"]
    place.state, place.detail = "ready", ""
    place.firmware = f"{'MicroPython' if name == 'micropython' else name} {version}"
    place.build = build
    _machine(place, machine, platform)
    _abi(place, int(mpy))
    place.free_bytes = int(free)
    blocks = re.search(r"max free sz: (\d+)", said)
    growth = re.search(r"max new split: (\d+)", said)  # by which an ESP32's heap grows at once
    sizes = [int(blocks[1]) * int(block)] if blocks else []
    sizes += [int(growth[1])] if growth else []
    place.largest_bytes = max(sizes, default=None)
    *found, rom = lines["found"]
    place.modules = dict(zip(_MODULES, found, strict=True))
    place.romfs_bytes = int(rom)


def _machine(place: Found, machine: str, platform: str) -> None:
    # "Raspberry Pi Pico with RP2040" is a board with a chip.
    board, found, chip = machine.rpartition(" with ")
    place.board = board if found else place.build or machine
    place.chip = chip if found else platform


def _abi(place: Found, mpy: int) -> None:
    # The file format's version, its sub-version, the architecture of native code.
    if not mpy:
        return
    place.mpy = f"{mpy & 0xFF}.{mpy >> 8 & 3}"
    arch = mpy >> 10 & 15
    place.architecture = ARCHITECTURES[arch] if arch < len(ARCHITECTURES) else f"architecture {arch}"


def lines(place: Found) -> list[str]:
    """What is known of a port, for people."""
    emulated = f"{place.emulated} (emulated)" if place.emulated else ""
    if place.state == "bootloader":
        return [f"{place.chip} in its bootloader ({place.board}); ulearn flash puts MicroPython on it"]
    if place.state not in ("ready", "agent"):
        detail = f" {place.detail}" if place.state == "no answer" else f": {place.detail}" if place.detail else ""
        return [", ".join(word for word in (emulated, place.usb and f"USB {place.usb}", place.state + detail) if word)]
    words = [emulated or place.board, place.chip, place.firmware]
    heap = f"heap: {place.free_bytes or 0:,} bytes free"
    if place.largest_bytes is not None:
        heap += f", {place.largest_bytes:,} in one piece"
    native = f"native code: {place.architecture} (mpy {place.mpy})" if place.architecture else "no native code"
    has = f"serves ulearn's agent ({place.detail})" if place.state == "agent" else f"has: {_holds(place)}"
    return [", ".join(word for word in words if word), f"{heap}; {native}", has]


def _holds(place: Found) -> str:
    words = [name for name, where in place.modules.items() if where]
    words = [f"{name} (in the firmware)" if place.modules[name] == "firmware" else name for name in words]
    words = [f"{name} (ROMFS)" if place.modules.get(name, "").startswith("/rom") else name for name in words]
    if place.romfs_bytes:
        words.append(f"a ROMFS of {place.romfs_bytes:,} bytes")
    return ", ".join(words) or "neither ulab nor ulearn"
