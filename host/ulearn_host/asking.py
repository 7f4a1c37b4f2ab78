"""A board's answers: what it is, what it has free and which files are there, by mpremote's command line."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from ulearn_host.errors import UserError

ARCHITECTURES = ("", "x86", "x64", "armv6", "armv6m", "armv7m", "armv7em", "armv7emsp", "armv7emdp", "xtensa",
                  "xtensawin", "rv32imc")  # fmt: skip
TIMEOUT_S = 120
LIST = "ulearn.txt"

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


def mpremote(port: str, *commands: str) -> str:
    """Run mpremote commands on a board and return what it printed. Raises UserError with mpremote's last line."""
    line = [sys.executable, "-m", "mpremote", "connect", port, "resume", *commands]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{port}: the board did not answer mpremote within {TIMEOUT_S} s; reset it and try again"
        ) from None
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise UserError(f"{port}: mpremote failed: {last[-1]}")
    return done.stdout


def ask(port: str) -> Board:
    """Ask a board what it is. Its heap is as the program that ran there has left it."""
    return ask_for(port, ()).board


@dataclass(frozen=True)
class Answer:
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


def ask_for(port: str, files: Iterable[str], *reset: str) -> Answer:
    """Ask for files, too; reset: mpremote commands to run before. Raises UserError."""
    printed = mpremote(port, *reset, "exec", f"FILES={list(files)!r}\nLIST={LIST!r}\n" + _ASK)
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
    return Answer(board, found, said["here"], rom, said["rom"][1].splitlines())


def digest(data: bytes) -> str:
    """SHA-256 as a board tells it."""
    return hashlib.sha256(data).hexdigest()
