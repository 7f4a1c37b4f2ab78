"""Puts the package, the native modules and a plan on a board, proves them there, and copies only what changed.

mpremote's command line asks the board, starts the agent's own few files on their way and runs the self-test; the rest
goes over the agent's frames, which are checked one by one and some ten times as fast.
"""

from __future__ import annotations

import base64
import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ulearn
from ulearn import selftest
from ulearn_host import bytecode, deploy_rom, placement, report, romfs
from ulearn_host.asking import Answer, Board, ask_for, digest, mpremote
from ulearn_host.emulate import NATIVE_MODULES, EmulatorError, find_native
from ulearn_host.errors import UserError
from ulearn_host.link import Link, Progress
from ulearn_host.mip_package import package_files

_BOOTSTRAP = ("__init__", "compat", "frames", "agent", "files")  # what frames need; mpremote brings them
_BUFFER_BYTES = 8192  # of the agent while it takes files
_LEAST_FREE_BYTES = 24_000  # of the heap, for the agent and that buffer
_SLACK_BYTES = 8192  # of the flash: directories, and the file system's blocks
# Heap that code takes less from a ROMFS, for inference and for training: tests/test_romfs.py.
_ROM_SAVES = (2_500, 4_500)
_PIECE_BYTES = 1536  # of a file in a command that mpremote sends

# mpremote and the agent meet the same paths; lib need not be there.
_PATHS = """
import os,sys
for d in ('lib','lib/ulearn'):
 try:os.mkdir(d)
 except OSError:pass
for p in ('/lib','lib'):
 if p not in sys.path:sys.path.append(p)
"""
# Of a ROMFS that is about to be emptied nothing may be imported.
_HIDE = "sys.path[:]=[p for p in sys.path if p[:4]!='/rom']\n"
_REMOVE = "for n in {strays!r}:os.remove(n)\n"
_BOOT = """
from binascii import a2b_base64
def boot(n,s):
 with open(n,'ab') as f:f.write(a2b_base64(s))
for n in {names!r}:open(n,'wb').close()
"""
_TEST = """
import os
import ulearn.selftest
r=ulearn.selftest.run('{path}')
print('selftest|%d|%d|%d'%r)
if r=={expected!r}:
 print('executor|'+ulearn.executor)
"""
# Bases that were counted from the old plan go with it; an unchanged plan is set back to its own weights.
_TAKE = """
 for n in ('{name}.base.new','{name}.base'):
  try:os.remove(n)
  except OSError:pass
 if '{place}'!='{name}':os.rename('{place}','{name}')
"""
# The same for a ROMFS, whose older copies in the file system go; the package's folder, too.
_ROM_FIRST = "import sys\nsys.path[:]=['/rom/lib']+[p for p in sys.path if p!='/rom/lib']\n"
_DROP = """
 for n in {old!r}+['{name}.base.new','{name}.base','{name}.new','{name}']:
  try:os.remove(n)
  except OSError:pass
 try:os.rmdir('lib/ulearn')
 except OSError:pass
"""


@dataclass(frozen=True)
class Deployed:
    """What was done. copied: names of files; executor: what runs the plan there; tested: numbers of the self-test;
    note: why the ROMFS was left alone, or ''."""

    board: Board
    copied: tuple[str, ...]
    copied_bytes: int
    executor: str
    tested: tuple[int, int, int]
    note: str = ""


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


def _modules(read: report.Report, answer: Answer) -> set[str]:
    """The first native module that will do for a plan, those that are there already, which other plans may need, and
    where it trains the one that knows everything, for plans to come."""
    rom = {} if answer.foreign else answer.rom
    there = {m for m in NATIVE_MODULES if answer.files[f"lib/{m}.mpy"][1] or f"lib/{m}.mpy" in rom}
    return there | {read.modules[0]} | ({NATIVE_MODULES[-1]} if read.trains else set())


def _wanted(folder: Path, board: Board, modules: set[str]) -> dict[str, Path]:
    """What a board should have beside the plan, by place. Raises UserError where nothing could run it there."""
    native: list[Path] = []
    if not board.kernels:
        try:
            native = _native(board.architecture)
        except EmulatorError as fault:
            if not board.ulab:
                raise UserError(f"{board.port}: {fault}; the firmware has no ulab either") from None
    if board.package and board.package != ulearn.__version__:
        raise UserError(
            f"{board.port}: the firmware has ulearn {board.package} frozen in, this is {ulearn.__version__}; "
            "flash a firmware with this version, or install the other one here"
        )
    files = {f"lib/{path.name}": path for path in native if path.stem in modules}
    if not board.package:
        built = bytecode.build(folder, package_files(bool(native or board.kernels)))
        files |= {f"lib/ulearn/{path.name}": path for path in built}
    return files


def _check_fit(board: Board, read: report.Report, loading: Mapping[str, int], in_rom: bool) -> None:
    """Compare a plan with a board's free heap, and new files with its flash. Raises UserError."""
    name = Path(read.path).name
    code = 0 if board.package else placement.package_bytes(read.trains, True)
    if not board.kernels:
        code += placement.module_bytes(read.modules[0], board.architecture)
    if in_rom and not board.package:
        code -= _ROM_SAVES[read.trains]
    held = read.frozen.ram_in_place if in_rom else read.frozen.ram_streamed
    if code + held > board.free_bytes:
        raise UserError(
            f"{board.port}: {name} takes {held:,} bytes of heap at the least and its code {code:,}, the board has "
            f"{board.free_bytes:,} free; prepare it with --ram {board.free_bytes // 1024}k or another scheme"
        )
    largest = max(read.buffers["arena"], 0 if in_rom else read.frozen.window_bytes)
    if largest > board.block_bytes:
        raise UserError(
            f"{board.port}: {name} needs {largest:,} bytes of heap in one piece, the board has "
            f"{board.block_bytes:,}; prepare it with --gradients int8, --recompute or another scheme"
        )
    needed = sum(loading.values()) + _SLACK_BYTES if loading else 0
    if needed > board.flash_bytes > 0:
        raise UserError(
            f"{board.port}: the files that are to be copied take {needed:,} bytes of flash, the board has "
            f"{board.flash_bytes:,} free; remove some with `mpremote connect {board.port} rm`"
        )


def deploy(port: str, plan: Path, progress: Progress = lambda done, total: None, *, use_rom: bool = True) -> Deployed:
    """Put package, native modules (unless the firmware has them) and plan on a board; the plan lies in its root.

    Only files that differ are copied. Before a byte is written the plan's memory and the files are compared with what
    the board has free. The new plan takes the old one's place after a self-test: an inference and ten training steps,
    whose results are compared with this computer's to the bit. Interrupted anywhere and called again, it completes.

    A ROMFS that is empty, no file system yet, or an earlier deploy's work, takes them instead where they fit, with the
    plans that it holds already; copies in the file system go. It is written as a whole: a board on which that was
    interrupted has no plan until this is called again.

    Args:
        port: the serial port.
        plan: the .ulm file.
        progress: called with (percent, 100).
        use_rom: whether a ROMFS is used; without, what an earlier deploy put there moves to the file system.

    Raises:
        UserError: the board does not answer, has nothing that could run the plan, is too small, or computes
            otherwise; or its ROMFS holds another ulearn among files that no deploy put there.
    """
    read = report.read(plan)
    progress(0, 100)
    names = [f"lib/ulearn/{path.stem}.mpy" for path in package_files(False)]
    names += [f"lib/{module}.mpy" for module in (*NATIVE_MODULES, *deploy_rom.FORMER)] + [plan.name, f"{plan.name}.new"]
    answer = ask_for(port, names, "soft-reset")  # with all of its heap
    progress(10, 100)
    with tempfile.TemporaryDirectory() as temporary:
        wanted = _wanted(Path(temporary), answer.board, _modules(read, answer))
        data = {place: path.read_bytes() for place, path in wanted.items()}
    if answer.foreign:
        data = deploy_rom.beside(answer, data)
    note = ""
    if use_rom and answer.board.romfs_bytes:
        note = deploy_rom.objection(answer, deploy_rom.image_files(data, deploy_rom.others_of(answer, plan), plan))
        if not note:
            _check_fit(answer.board, read, {}, True)
            progress(15, 100)
            copied, size, place = deploy_rom.write(answer, data, plan)
            progress(80, 100)
            tested, executor = _prove(
                port, plan, place, _DROP.format(name=plan.name, old=deploy_rom.replaced(answer, data))
            )
            progress(100, 100)
            return Deployed(answer.board, copied, size, executor, tested)
    copied, size, place = _into_files(answer, read, data, plan, progress)
    tested, executor = _prove(port, plan, place, _TAKE.format(name=plan.name, place=place))
    progress(100, 100)
    return Deployed(answer.board, copied, size, executor, tested, note)


def _into_files(
    answer: Answer, read: report.Report, data: dict[str, bytes], plan: Path, progress: Progress
) -> tuple[tuple[str, ...], int, str]:
    """Copy what differs. Returns the names of what was copied, their bytes, and the plan's place until it is proved."""
    port = answer.board.port
    wanted = set(data)
    ours = bool(answer.rom) and not answer.foreign
    if ours:
        data = data | deploy_rom.fetch(
            port, [name for name in deploy_rom.others_of(answer, plan) if not answer.files[name][1]]
        )
    place = plan.name
    if answer.files[place][1] != digest(plan.read_bytes()):
        place += ".new"
        data = data | {place: plan.read_bytes()}
    changed = {name: new for name, new in data.items() if answer.files[name][1] != digest(new)}
    loading = {name: len(new) - answer.files[name][0] for name, new in changed.items()}
    _check_fit(answer.board, read, loading, False)
    progress(15, 100)
    strays = [f"lib/ulearn/{name}" for name in answer.here if f"lib/ulearn/{name}" not in wanted] if wanted else []
    # Kernels that the firmware has, or that no ulearn loads any more.
    former = (*NATIVE_MODULES, *deploy_rom.FORMER) if answer.board.kernels else deploy_rom.FORMER
    strays += [name for name in (f"lib/{module}.mpy" for module in former) if answer.files[name][1]]
    if changed or strays:
        tick: Progress = lambda done, total: progress(15 + done * 65 // total, 100)  # noqa: E731
        _copy(port, changed, _HIDE if ours else "", strays, answer.board, tick)
    if ours:
        deploy_rom.write_image(port, romfs.EMPTY)
    progress(80, 100)
    return tuple(changed), sum(map(len, changed.values())), place


def _copy(
    port: str, files: Mapping[str, bytes], code: str, strays: Sequence[str], board: Board, progress: Progress
) -> None:
    """Bring files over, the agent's own first. code: to run before; strays: files to be removed."""
    first = {n: d for n, d in files.items() if n.startswith("lib/ulearn/") and Path(n).stem in _BOOTSTRAP}
    # As literals in base64, which takes half the bytes and a fraction of the calls of `fs cp`.
    commands = ["exec", _PATHS + code + _REMOVE.format(strays=list(strays)) + _BOOT.format(names=list(first))]
    for name, data in first.items():
        for at in range(0, len(data), _PIECE_BYTES):
            piece = base64.b64encode(data[at : at + _PIECE_BYTES]).decode()
            commands += ["+", "exec", f"boot('{name}','{piece}')"]
    mpremote(port, *commands)
    total = sum(map(len, files.values())) or 1
    done = sum(map(len, first.values()))
    progress(done, total)
    rest = {name: data for name, data in files.items() if name not in first}
    if not rest:
        return
    roomy = board.free_bytes > _LEAST_FREE_BYTES + _BUFFER_BYTES
    with Link.open(port, buffer_bytes=_BUFFER_BYTES if roomy else _BUFFER_BYTES // 4) as link:
        for name, data in rest.items():
            link.file_put(name, data, lambda part, whole, done=done: progress(done + part, total))  # type: ignore[misc]
            done += len(data)


def _prove(port: str, plan: Path, place: str, then: str) -> tuple[tuple[int, int, int], str]:
    """Run the self-test on the board; code to run after one that passes lets the new plan take its place.

    Raises UserError.
    """
    expected = selftest.run(str(plan))
    paths = _ROM_FIRST if place.startswith("/") else _PATHS
    code = paths + _TEST.format(path=place, expected=expected) + then
    kept = "; the board keeps the plan it had" if place.endswith(".new") else ""
    try:
        # From a fresh heap: what copying left behind would stand in the way of a large arena.
        lines = mpremote(port, "soft-reset", "exec", code, "soft-reset").splitlines()  # and leave it fresh
    except UserError as fault:
        raise UserError(f"{fault}{kept}") from None
    said = {key: rest for key, _, rest in (line.partition("|") for line in lines)}
    tested = tuple(int(v) for v in said.get("selftest", "").split("|") if v)
    if len(tested) != 3:
        raise UserError(f"{port}: the board did not say how its self-test went; reset it and try again{kept}")
    if tested != expected or "executor" not in said:
        what = "an inference" if tested[0] != expected[0] else f"{selftest.STEPS} training steps"
        raise UserError(f"{port}: {what} on the board gave other bits than here; please report this board{kept}")
    return tested, said["executor"].strip()


# ---- ROMFS -----------------------------------------------------------------------------------------------------------
