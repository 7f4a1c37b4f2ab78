"""Every emulated board starts, is what its board.json says, and behaves as a board does: files, Ctrl-C, clock, wire."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
import serial

from conftest import ON_DEBIAN
from ulearn_host import asking, emulate

BOARDS = emulate.emulated_boards()
IN_QEMU = [name for name in BOARDS if name.startswith("QEMU")]
PATIENCE_S = 10


class Repl:
    """A started board and its raw REPL, on one connection that is kept."""

    def __init__(self, name: str, folder: Path) -> None:
        if name in IN_QEMU and not ON_DEBIAN:
            pytest.skip("not a Debian system: the emulated board cannot be built")
        self.board = emulate.start(name, folder=folder)
        self.wire = serial.Serial(self.board.port, timeout=PATIENCE_S)
        self.send(b"\r\x03\x01")
        self.until(b"raw REPL; CTRL-B to exit\r\n>")

    def send(self, data: bytes) -> None:
        self.wire.write(data)

    def until(self, ending: bytes) -> bytes:
        heard = self.wire.read_until(ending)
        assert heard.endswith(ending), heard
        return heard[: -len(ending)]

    def begin(self, code: str) -> None:
        """Have the board run code, without waiting for its end."""
        self.send(code.encode() + b"\x04")
        self.until(b"OK")

    def end(self) -> tuple[str, str]:
        """Wait for the code's end; return what it printed and the error it ended with."""
        printed, error = self.until(b"\x04"), self.until(b"\x04")
        self.until(b">")
        return printed.decode().strip(), error.decode()

    def run(self, code: str) -> str:
        self.begin(code)
        printed, error = self.end()
        assert not error, error
        return printed

    def soft_reset(self) -> None:
        self.send(b"\x04")
        self.until(b"soft reboot\r\n")
        self.until(b"raw REPL; CTRL-B to exit\r\n>")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wire.close()
        self.board.close()


@pytest.fixture(params=BOARDS)
def any_board(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Repl]:
    with Repl(request.param, tmp_path) as repl:
        yield repl


@pytest.fixture(params=IN_QEMU)
def cortex_m(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Repl]:
    with Repl(request.param, tmp_path) as repl:
        yield repl


def test_the_boards_are_known() -> None:
    assert {"QEMU_CORTEX_M0", "QEMU_CORTEX_M3", "UNIX"} <= set(BOARDS)
    with pytest.raises(emulate.EmulatorError, match="no board 'QEMU_CORTEX_M1'.*QEMU_CORTEX_M0, QEMU_CORTEX_M3"):
        emulate.start("QEMU_CORTEX_M1")


def test_the_facts_hold(any_board: Repl) -> None:
    """board.json against the board: heap, architecture, flash, float."""
    facts = emulate.board_facts(any_board.board.name)
    # The Unix board is given heap_bytes, of which the collector's tables take a part; the others have them free.
    heap, within = ("gc.mem_free()", 0.01) if "qemu" in facts else ("gc.mem_free() + gc.mem_alloc()", 0.02)
    measured = int(any_board.run(f"import gc; gc.collect(); print({heap})"))
    assert measured == pytest.approx(facts["heap_bytes"], rel=within)
    index = int(any_board.run("import sys; print(sys.implementation._mpy >> 10 & 15)"))
    assert asking.ARCHITECTURES[index] == facts["arch"]
    block, _, blocks = any_board.run("import os; print(*os.statvfs('/')[:3])").split()
    assert facts["flash_bytes"] in (None, int(block) * int(blocks))
    assert any_board.run("print(16777216.0 + 1 == 16777216.0)") == str(facts["float"].startswith("single"))


def test_its_native_code_runs(any_board: Repl) -> None:
    """Of the emitter, and of the module that is built for the architecture."""
    any_board.run("@micropython.viper\ndef f(n: int) -> int:\n s = 0\n for i in range(n):\n  s += i ^ 77\n return s")
    assert int(any_board.run("print(f(1000))")) == sum(i ^ 77 for i in range(1000))
    arch = emulate.board_facts(any_board.board.name)["arch"]
    for assembler in (True, False) if arch == "armv6m" else (True,):
        module = emulate.find_native(arch, assembler)
        data = module.read_bytes()
        any_board.run(f"f = open('{module.name}', 'wb')")
        for start in range(0, len(data), 1024):
            any_board.run(f"f.write({data[start : start + 1024]!r})")
        assert any_board.run(f"f.close(); import {module.stem} as m; print(m.__name__)") == module.stem


def test_files_survive(any_board: Repl, tmp_path: Path) -> None:
    """A soft reset, and a power cut with a start in the same folder."""
    any_board.run("kept = 1\nwith open('kept.txt', 'w') as f: f.write('written once')")
    read = "print(open('kept.txt').read(), 'kept' in globals())"
    any_board.soft_reset()
    assert any_board.run(read) == "written once False"
    any_board.board.kill()
    with Repl(any_board.board.name, tmp_path) as again:
        assert again.run(read) == "written once False"


@pytest.mark.parametrize("body", ["n += 1", "time.sleep(0.01)", "print(n)"])
def test_ctrl_c_interrupts(cortex_m: Repl, body: str) -> None:
    cortex_m.begin(f"import time\nn = 1\nwhile True:\n {body}\n")
    time.sleep(0.1)
    cortex_m.send(b"\x03")
    assert "KeyboardInterrupt" in cortex_m.end()[1]
    assert cortex_m.run("print(n > 0)") == "True"


def test_nothing_is_lost(cortex_m: Repl) -> None:
    """Far more than the board's receive buffer comes while it computes, then it reads, slowly; all comes back."""
    data = bytes(range(256)) * 80
    cortex_m.begin(
        "import sys, micropython\nmicropython.kbd_intr(-1)\nprint('go')\nfor i in range(200000): pass\n"
        f"got = bytearray()\nwhile len(got) < {len(data)}:\n got += sys.stdin.buffer.read(64)\n"
        "for i in range(0, len(got), 4000): sys.stdout.buffer.write(got[i:i + 4000])\n"
    )
    cortex_m.until(b"go\r\n")
    cortex_m.wire.write_timeout = PATIENCE_S
    cortex_m.send(data[: len(data) // 2])
    cortex_m.send(data[len(data) // 2 :])
    assert cortex_m.wire.read(len(data)) == data
    assert cortex_m.end() == ("", "")


def test_an_idle_board_sleeps(cortex_m: Repl) -> None:
    """Waiting for input, or for time to pass, takes next to nothing of the host's processor."""
    assert cortex_m.board._process
    stat = Path(f"/proc/{cortex_m.board._process.pid}/stat")

    def used_s() -> float:
        return sum(map(int, stat.read_text().rsplit(")", 1)[1].split()[11:13])) / 100

    time.sleep(0.2)  # until the last command's answer has gone
    before = used_s()
    time.sleep(0.5)
    cortex_m.run("import time; time.sleep(0.5)")
    assert used_s() - before < 0.3


@pytest.mark.parametrize("name", IN_QEMU)
def test_instruction_counts_repeat(name: str, tmp_path: Path) -> None:
    """Two starts take the same time for the same loop, but for the part of a microsecond in which it begins."""
    loop = (
        "import time\ndef f():\n s = 0\n for i in range(20000):\n  s ^= i\n"
        "t = time.ticks_us(); f(); print(time.ticks_diff(time.ticks_us(), t))"
    )
    took = []
    for start in ("first", "second"):
        with Repl(name, tmp_path / start) as repl:
            took.append(int(repl.run(loop)))
    assert took[0] > 1000
    assert abs(took[0] - took[1]) <= 1, took


def test_boards_run_at_once(tmp_path: Path) -> None:
    """Two of each in QEMU, every one in the middle of a program while the others work."""
    for name in IN_QEMU:
        with Repl(name, tmp_path / f"{name}-1") as one, Repl(name, tmp_path / f"{name}-2") as other:
            one.begin("import sys\nwith open('a', 'w') as f: f.write(sys.stdin.readline())")
            other.begin("import sys\nwith open('a', 'w') as f: f.write(sys.stdin.readline())")
            one.send(b"first\n")
            assert one.end()[1] == ""
            assert one.run("print(open('a').read())") == "first"
            other.send(b"second\n")
            assert other.end()[1] == ""
            assert other.run("print(open('a').read())") == "second"
            assert one.board.port != other.board.port
