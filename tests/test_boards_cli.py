"""`ulearn boards` and `ulearn emulate` as a user runs them: on real ptys, with boards, without, and with worse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import serial

import cases
from conftest import ON_DEBIAN, Device
from test_cli import run
from ulearn_host import boards, emulate, running
from ulearn_host.link import Link

COMMAND = [sys.executable, "-m", "ulearn_host.cli"]
EMULATED = ["UNIX", "QEMU_CORTEX_M0"] if ON_DEBIAN else ["UNIX"]


@contextmanager
def emulated(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[dict[str, Any]]]]:
    """`ulearn emulate --json` and the boards it has told of."""
    process = subprocess.Popen(
        [*COMMAND, "emulate", *arguments, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        first = process.stdout.readline()
        assert first, process.stderr and process.stderr.read()
        listed = [json.loads(first)]
        mine = [board for board in running.running() if board.pid == process.pid]
        listed += [json.loads(process.stdout.readline()) for _ in mine[1:]]
        yield process, listed
    finally:
        process.kill()
        process.communicate()


def asked(*arguments: object) -> dict[str, dict[str, Any]]:
    """What `ulearn boards --json` says, by port."""
    patience = () if "--timeout" in arguments else ("--timeout", 15)
    return {place["port"]: place for place in json.loads(run("boards", *arguments, *patience, "--json").stdout)}


@contextmanager
def line(behaviour: Callable[[int, threading.Event], None] | None = None) -> Iterator[str]:
    """A port whose other end does what `behaviour` does; nothing without one."""
    master, slave = os.openpty()
    tty.setraw(slave)
    os.set_blocking(master, False)
    ending = threading.Event()
    thread = threading.Thread(target=behaviour or (lambda master, ending: None), args=(master, ending))
    thread.start()
    try:
        yield os.ttyname(slave)
    finally:
        ending.set()
        thread.join()
        os.close(master)
        os.close(slave)


def test_emulated_boards_are_boards(tmp_path: Path) -> None:
    """They are listed, take a deployment, tell of it, and are gone with a SIGTERM."""
    plan = tmp_path / "first.ulm"
    plan.write_bytes(cases.random_case(0).plan.data)
    with emulated(*EMULATED) as (process, listed):
        assert [board["board"] for board in listed] == EMULATED
        found = asked()
        for board in listed:
            place = found[board["port"]]
            facts = emulate.board_facts(board["board"])
            assert place["state"] == "ready" and place["emulated"] == board["board"] == place["build"]
            assert place["architecture"] == facts["arch"] and place["mpy"].startswith("6.")
            assert place["firmware"].startswith("MicroPython 1.") and not place["interrupted"]
            assert 0.9 * facts["heap_bytes"] < place["free_bytes"] <= facts["heap_bytes"]
            assert 0.8 * place["free_bytes"] < place["largest_bytes"] <= place["free_bytes"]
            assert set(place["modules"].values()) == {""} and place["romfs_bytes"] >= 0
        port = listed[-1]["port"]
        run("deploy", plan, "--port", port)
        place = asked("--port", port)[port]
        for name in ("ulab_kernels", "ulearn"):
            assert name in place["modules"][name], place
        assert not place["modules"]["ulab"]
        told = run("boards", "-p", port, "--timeout", 15).stdout
        for word in (port, "(emulated)", "in one piece", "ulab_kernels, ulearn"):
            assert word in told, told
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0
        for board in listed:
            assert not Path(board["port"]).exists()
        assert not [board for board in running.running() if board.pid == process.pid]
        assert not list(running.folder().glob(f"{process.pid}.*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_count_of_boards_ends_by(number: signal.Signals) -> None:
    """Ctrl-C, or its terminal's end."""
    with emulated("unix", "--count", "2") as (process, listed):
        assert len({board["port"] for board in listed}) == 2 and listed[0]["board"] == "UNIX"
        process.send_signal(number)
        assert process.wait(timeout=10) == 0
        assert not any(Path(board["port"]).exists() for board in listed)


def test_a_killed_one_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its entry is stale and dropped by the next that reads; so is what is no entry at all."""
    with emulated("UNIX") as (process, listed):
        entry = running.folder() / f"{process.pid}.json"
        assert entry.exists() and listed[0]["port"] in {board.port for board in running.running()}
        process.kill()
        process.wait()
        assert entry.exists()
        assert listed[0]["port"] not in {board.port for board in running.running()} and not entry.exists()
    monkeypatch.setenv("ULEARN_RUNNING", str(tmp_path / "running"))
    assert running.running() == []
    (tmp_path / "running").mkdir()
    for name, text in (("1.json", "{}"), ("2.json", "no json"), ("3.json", "")):
        (tmp_path / "running" / name).write_text(text)
    assert running.running() == [] and not list((tmp_path / "running").iterdir())


def test_what_cannot_be_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence: which boards there are, or what builds them."""
    told = run("emulate", "QEMU_CORTEX_M9", fails=True).stderr
    assert "not known" in told and all(name in told for name in emulate.emulated_boards())
    told = run("emulate", "RPI_PICO", fails=True).stderr
    assert "a real board" in told and "QEMU_CORTEX_M0" in told
    monkeypatch.setenv("ULEARN_CACHE", str(tmp_path))
    if ON_DEBIAN:
        assert "make setup" in run("emulate", "QEMU_CORTEX_M0", fails=True).stderr
    monkeypatch.setenv("ULEARN_MICROPYTHON", sys.executable)  # a program that is no MicroPython ends at once
    told = run("emulate", "UNIX", fails=True).stderr
    assert "UNIX does not start" in told


def test_silent_ports_do_not_hold_it_up() -> None:
    """Asked side by side, given up after the timeout, listed; nothing is a traceback and the status is 0."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        ports = [stack.enter_context(line()) for _ in range(6)]
        begun = time.monotonic()
        found = asked(*(a for port in ports for a in ("-p", port)), "--timeout", 2)
        assert time.monotonic() - begun < 8
        assert [place["port"] for place in found.values()] == ports
        assert {place["state"] for place in found.values()} == {"no answer"}
        assert f"{ports[0]}  no answer within 1 s" in run("boards", "-p", ports[0], "--timeout", 1).stdout


def echoing(master: int, ending: threading.Event) -> None:
    while not ending.wait(0.01):
        try:
            os.write(master, os.read(master, 1000))
        except BlockingIOError:
            continue


def talking(master: int, ending: threading.Event) -> None:
    while not ending.wait(0.02):
        try:
            os.write(master, b"$GPGGA,,,,,,0,00,99.99,,,,,,*48\r\n")
        except BlockingIOError:
            continue


def pretending(master: int, ending: threading.Event) -> None:
    # A prompt that never runs anything.
    while not ending.wait(0.01):
        try:
            heard = os.read(master, 1000)
        except BlockingIOError:
            continue
        if b"\x01" in heard and b"A" not in heard:
            os.write(master, b"raw REPL; CTRL-B to exit\r\n>")


@pytest.mark.parametrize("behaviour", [echoing, talking, pretending])
def test_what_is_no_board(behaviour: Callable[[int, threading.Event], None]) -> None:
    """A plug that echoes, a receiver that talks all the time, a prompt that hangs."""
    with line(behaviour) as port:
        begun = time.monotonic()
        assert asked("-p", port, "--timeout", 1.5)[port]["state"] == "no answer"
        assert time.monotonic() - begun < 8


def test_ports_that_cannot_be_opened(tmp_path: Path) -> None:
    """One that another program has, one that is not there, one that is a file."""
    (tmp_path / "file").write_text("")
    with line() as port, serial.Serial(port, exclusive=True):
        found = asked("-p", port, "-p", "/dev/ttyNOWHERE", "-p", tmp_path / "file")
    assert found[port]["state"] == "busy" and "another program" in found[port]["detail"]
    assert found["/dev/ttyNOWHERE"]["state"] == "cannot be opened"
    assert found[str(tmp_path / "file")]["state"] == "cannot be opened"
    assert "busy" in boards.lines(boards.Found("p", "busy", "another program has it open"))[0]


def test_a_program_is_interrupted_and_this_is_told(cortex_m0: Device) -> None:
    """Nothing of it is destroyed silently: the list says so."""
    with serial.Serial(cortex_m0.port, timeout=5) as wire:
        wire.write(b"\r\x03\x01")
        wire.read_until(b"raw REPL; CTRL-B to exit\r\n>")
        wire.write(b"import time\nwhile True: time.sleep(0.01)\n\x04")
        wire.read_until(b"OK")
    done = run("boards", "-p", cortex_m0.port, "--timeout", 15)
    assert "a running program was interrupted" in done.stderr and "ulab_kernels, ulearn" in done.stdout
    assert not asked("-p", cortex_m0.port)[cortex_m0.port]["interrupted"]


def test_an_agent_goes_on_serving(cortex_m0: Device) -> None:
    """It is asked by a frame, and what it has loaded stays."""
    cortex_m0.fresh("pass")  # other tests have left models in its heap
    link = Link.open(cortex_m0.port)
    link.load("first.ulm")
    link.close()  # the agent serves on
    place = asked("-p", cortex_m0.port)[cortex_m0.port]
    assert place["state"] == "agent" and place["architecture"] == "armv6m" and place["free_bytes"] > 50_000
    with Link.open(cortex_m0.port, start=False) as again:
        assert again.about and again.about.model is not None
        again.stop()


def test_without_any_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence, and an empty list for scripts."""
    monkeypatch.setenv("ULEARN_RUNNING", str(tmp_path))
    monkeypatch.setattr(boards.list_ports, "comports", lambda: [])
    assert boards.find() == []
    if not [port for port in serial.tools.list_ports.comports() if port.vid]:
        assert json.loads(run("boards", "--json").stdout) == []
        assert "no board is plugged in" in run("boards").stderr


SAID = """ulearn|4870|micropython|1.25.0|Raspberry Pi Pico with RP2040|RPI_PICO|rp2|180000|16\r
stack: 500 out of 7936\r
GC: total: 233024, used: 12000, free: 221024, max new split: 110592\r
 No. of 1-blocks: 15, 2-blocks: 5, max blk sz: 64, max free sz: 4000\r
found|firmware||/lib/ulab_dense.mpy|||/lib/ulab_kernels.mpy|/rom/lib/ulearn|131072\r
"""


def test_what_a_real_board_says_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Board and chip, the larger of a free block and the block a heap can grow by, ROMFS, a drive of a bootloader."""
    place = boards.Found("/dev/ttyACM0", usb="2e8a:0005 E660")
    boards._understand(place, SAID)
    assert (place.state, place.board, place.chip) == ("ready", "Raspberry Pi Pico", "RP2040")
    assert (place.largest_bytes, place.free_bytes, place.architecture) == (110592, 180000, "armv6m")
    assert boards.lines(place) == [
        "Raspberry Pi Pico, RP2040, MicroPython 1.25.0",
        "heap: 180,000 bytes free, 110,592 in one piece; native code: armv6m (mpy 6.3)",
        "has: ulab (in the firmware), ulab_dense, ulab_kernels, ulearn (ROMFS), a ROMFS of 131,072 bytes",
    ]
    drive = tmp_path / "me" / "RPI-RP2"
    drive.mkdir(parents=True)
    (drive / "INFO_UF2.TXT").write_text("UF2 Bootloader v3.0\nModel: Raspberry Pi RP2\nBoard-ID: RPI-RP2\n")
    monkeypatch.setattr(boards.flash_drive, "ROOTS", (tmp_path,))
    found = [place for place in boards.find() if place.state == "bootloader"]
    assert [place.port for place in found] == [str(drive)]
    boards.probe(found, 0.5)
    assert "RP2040 in its bootloader" in boards.lines(found[0])[0]
