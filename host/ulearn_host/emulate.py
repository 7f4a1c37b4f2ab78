"""Start the emulated boards: MicroPython's Unix port, and a Cortex-M0, a Cortex-M3 and a RISC-V in QEMU.

All appear as a serial port that mpremote and pyserial open like a real board's. A board ends with
its launcher: by `close`, at exit, and through a hang-up of its terminal even when the launcher is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import tty
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ulearn import loading

_HERE = Path(__file__).resolve().parent
# In the repository, or beside this file where it is installed (pyproject.toml).
_INSTALLED = (_HERE / "board_facts").is_dir()
BOARDS = _HERE / "board_facts" if _INSTALLED else _HERE.parents[1] / "boards"
NATIVE = _HERE / "native" if _INSTALLED else _HERE.parents[1] / "firmware" / "native"
NATIVE_MODULES: tuple[str, ...] = loading.MODULES

# The first terminal that a session leader opens becomes its own: it hangs up when the launcher is gone.
_LEASH = 'exec 3<>"$0"; '
_RUN = _LEASH + 'exec "$@"'
# A soft reset is a fresh process: repl.py ends with 0. `trap` keeps the shell when Ctrl-C is sent.
_RUN_UNIX = "trap : INT; " + _LEASH + '"$@"; while [ $? -eq 0 ]; do "$@" raw; done'
# QEMU's own `-serial pty` looks for a partner once a second only.
_QEMU_WIRE = ["-chardev", "stdio,id=wire,signal=off", "-serial", "chardev:wire"]


class EmulatorError(RuntimeError):
    """A board cannot be started; the message says in one sentence why, and what to do."""


def cache_dir() -> Path:
    """Return the folder that holds the built interpreters and firmware: ULEARN_CACHE, or one in the home folder."""
    return Path(os.environ.get("ULEARN_CACHE") or Path.home() / ".cache" / "ulearn").absolute()


def find_micropython(user_module: bool = False) -> Path:
    """Return the MicroPython to run: ULEARN_MICROPYTHON, the cache's, or the one on PATH.

    With `user_module`, the one that has the kernels compiled in, which only the cache can hold.

    Raises:
        EmulatorError: there is none.
    """
    if user_module:
        return _built("bin/micropython-ulab_kernels")
    chosen = os.environ.get("ULEARN_MICROPYTHON")
    if chosen:
        if not os.access(chosen, os.X_OK):
            raise EmulatorError(f"ULEARN_MICROPYTHON names {chosen}, which is not a program")
        return Path(chosen).absolute()
    built = cache_dir() / "bin" / "micropython"
    if built.exists():
        return built
    on_path = shutil.which("micropython")
    if on_path:
        return Path(on_path).absolute()
    raise EmulatorError("no MicroPython: run `make setup`, or name one in ULEARN_MICROPYTHON")


def find_native(arch: str, assembler: bool = True, module: str = "ulab_kernels") -> Path:
    """Return a native module, one of NATIVE_MODULES, for `arch` ("x64", "armv6m", "rv32imc", ...).

    Without `assembler`, the one of the same kernels all in C, with _c in its name, which is built for armv6m only.

    The cache's comes first, which `make setup` has built of its checkout's sources, then the repository's.

    Raises:
        EmulatorError: there is none.
    """
    committed = NATIVE / arch / f"{module}.mpy"
    if assembler and not (cache_dir() / "native" / arch / committed.name).exists() and committed.exists():
        return committed
    return _built(f"native/{arch}/{module}.mpy" if assembler else f"native/{arch}-c/{module}_c.mpy")


def emulated_boards() -> list[str]:
    """Return the names of the boards that `start` can start."""
    names = sorted(path.parent.name for path in BOARDS.glob("*/board.json"))
    return [name for name in names if name == "UNIX" or "qemu" in board_facts(name)]


def board_facts(board: str) -> dict[str, Any]:
    """Return what boards/<board>/board.json says.

    Raises:
        EmulatorError: there is no such board.
    """
    path = BOARDS / board / "board.json"
    if not path.is_file():
        raise EmulatorError(f"no board {board!r} in {BOARDS}; the emulated ones are {', '.join(emulated_boards())}")
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts


class EmulatedBoard:
    """A running board. Use it as a context manager, or call `close`.

    Attributes:
        name: one of `emulated_boards()`.
        port: path of the serial port.
        folder: the Unix board's file system; for a board in QEMU the place of its flash.bin. It outlives
            `kill`, so a board started in it again is the same board after a power cut.
        log: the file with what the process itself had to say.
    """

    def __init__(self, name: str, folder: Path | None, log: Path | None) -> None:
        """Make the board's folders; `_start` gives it a process."""
        self._scratch = Path(tempfile.mkdtemp(prefix="ulearn-board-"))
        self.name = name
        self.port = ""
        self.folder = (folder or self._scratch / "files").absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = (log or self._scratch / "log").absolute()
        self._process: subprocess.Popen[bytes] | None = None
        self._fds: list[int] = []
        atexit.register(self.close)

    def _terminal(self) -> tuple[int, int]:
        master, slave = os.openpty()
        self._fds += [master, slave]
        tty.setraw(slave)
        return master, slave

    def _start(self, script: str, command: list[str]) -> None:
        # The process holds the wire's master, so that the slave is a port like any other. The slave stays
        # open here too: with nobody at the other end the master could not even be read.
        wire, port = self._terminal()
        self.port = os.ttyname(port)
        leash = os.ttyname(self._terminal()[1])
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", script, leash, *command],
                stdin=wire,
                stdout=wire,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether the board's process is alive."""
        return self._process is not None and self._process.poll() is None

    def interrupt(self) -> None:
        """Interrupt a running program of the Unix board, which cannot see a Ctrl-C on its wire; those in QEMU can.

        A program that has called micropython.kbd_intr(-1) ends with its board.
        """
        if self.name == "UNIX":
            self._signal(signal.SIGINT)

    def kill(self) -> None:
        """Cut the power: the process ends at once, and its files stay as they are."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def close(self) -> None:
        """End the board and remove what was made for it. May be called twice."""
        atexit.unregister(self.close)
        self.kill()
        while self._fds:
            with contextlib.suppress(OSError):
                os.close(self._fds.pop())
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _signal(self, number: int) -> None:
        # The session was made for this board, so its group holds only the board's own processes.
        if self._process is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def __enter__(self) -> Self:
        """Return the board itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the board."""
        self.close()


def start(
    board: str,
    *,
    folder: Path | None = None,
    micropython: Path | None = None,
    log: Path | None = None,
    count_instructions: bool = True,
) -> EmulatedBoard:
    """Start a board and return it; its port can be opened at once.

    Args:
        board: one of `emulated_boards()`.
        folder: where the board keeps its files between starts; a temporary one when None.
        micropython: the Unix board's interpreter; `find_micropython()` when None.
        log: file to append the process's own messages to; a temporary one when None.
        count_instructions: let one instruction of a board in QEMU take one virtual nanosecond, so that times on
            the board repeat: time.ticks_us() counts 1,000 instructions; time.ticks_cpu() 62.5 on the Cortex-M0,
            40 on the Cortex-M3 and 100 on the RISC-V.

    Raises:
        EmulatorError: the board is unknown, or something it needs is missing.
    """
    facts = board_facts(board)
    running = EmulatedBoard(board, folder, log)
    try:
        if board == "UNIX":
            interpreter = str((micropython or find_micropython()).absolute())
            heap = f"heapsize={facts['heap_bytes']}"
            running._start(_RUN_UNIX, [interpreter, "-X", heap, str(BOARDS / "UNIX" / "repl.py")])
        elif "qemu" in facts:
            emulator = "qemu-system-riscv32" if facts["arch"] == "rv32imc" else "qemu-system-arm"
            qemu = shutil.which(emulator)
            if qemu is None:
                raise EmulatorError(f"no {emulator}: run `make setup`")
            count = ["-icount", "shift=0"] if count_instructions else []
            firmware = str(_built(f"bin/{board}.elf"))
            running._start(_RUN, [qemu, *facts["qemu"], *count, *_QEMU_WIRE, "-kernel", firmware])
        else:
            raise EmulatorError(f"{board} is a real board, which cannot be emulated")
    except BaseException:
        running.close()
        raise
    return running


def _built(name: str) -> Path:
    path = cache_dir() / name
    if not path.exists():
        raise EmulatorError(f"{path} is not built: run `make setup`")
    return path
