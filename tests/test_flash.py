"""`ulearn flash`: files are checked before a board is touched, RP2's drive gets the file whole, esptool does the rest.

No real board is at hand: a folder stands in for an RP2's drive, and a simulated ESP32 for a chip in its bootloader, to
which the real esptool speaks over a pty.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
import tty
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from test_cli import run
from ulearn_host import cli, emulate, firmware_file, flash, flash_drive
from ulearn_host.errors import UserError

RP2040, RP2350, ABSOLUTE = 0xE48BFF56, 0xE48BFF59, 0xE48BFF57


def uf2_block(address: int, number: int, count: int, family: int, data: bytes, flags: int = 0x2000) -> bytes:
    head = struct.pack("<8I", 0x0A324655, 0x9E5D5157, flags, address, len(data), number, count, family)
    return head + data.ljust(476, b"\0") + struct.pack("<I", 0x0AB16F30)


def uf2(family: int = RP2040, blocks: int = 20, start: int = 0x10000000) -> bytes:
    """A firmware whose pages hold their number."""
    return b"".join(uf2_block(start + 256 * i, i, blocks, family, struct.pack("<I", i) * 64) for i in range(blocks))


def image(chip: int, size: int = 0x20, data: bytes = b"code" * 300) -> bytes:
    """An ESP32 image of two segments, with checksum and SHA-256; size: the flash size and frequency in its header."""
    body = struct.pack("<BBBBIBBHHBHHIB", 0xE9, 2, 2, size, 0x40080000, 0xEE, 0, 0, chip, 0, 0, 99, 0, 1)
    checksum = 0xEF
    for segment in (data, data[:40]):
        body += struct.pack("<II", 0x40080000, len(segment)) + segment
        for byte in segment:
            checksum ^= byte
    body += bytes(15 - len(body) % 16) + bytes([checksum])
    return body + hashlib.sha256(body).digest()


def esp(chip: int, start: int, size: int = 0x20, app_bytes: int = 20000, app_chip: int | None = None) -> bytes:
    """What MicroPython publishes: bootloader, partition table at 0x8000, application at 0x10000 of flash."""
    entries = struct.pack("<HBBII16sI", 0x50AA, 1, 2, 0x9000, 0x6000, b"nvs", 0)
    entries += struct.pack("<HBBII16sI", 0x50AA, 0, 0, 0x10000, 0x1F0000, b"factory", 0)
    table = entries + b"\xeb\xeb" + b"\xff" * 14 + hashlib.md5(entries).digest()
    app = image(chip if app_chip is None else app_chip, size, os.urandom(app_bytes // 4) * 4)
    whole = image(chip, size).ljust(0x8000 - start, b"\xff") + table
    return whole.ljust(0x10000 - start, b"\xff") + app


def change(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    """A folder with what an RP2040's bootloader shows."""
    return make_drive(tmp_path / "RPI-RP2", "Raspberry Pi RP2", "RPI-RP2")


def make_drive(path: Path, model: str, board_id: str) -> Path:
    path.mkdir(parents=True)
    (path / "INFO_UF2.TXT").write_text(f"UF2 Bootloader v3.0\r\nModel: {model}\r\nBoard-ID: {board_id}\r\n")
    (path / "INDEX.HTM").write_text("<html></html>")
    return path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Gives the one sentence with which a command ends, run in this process."""

    def told(*command: object) -> str:
        monkeypatch.setattr(sys, "argv", ["ulearn", "flash", *map(str, command)])
        assert cli.main() == 1
        return one_sentence(capsys.readouterr().err)

    return told


def one_sentence(said: str) -> str:
    lines = said.strip().splitlines()
    assert lines[-1].startswith("error: ") and sum(line.startswith("error: ") for line in lines) == 1, lines
    return lines[-1]


def test_the_boards_are_those_of_the_repository() -> None:
    """One entry for each real board, with the chip that its facts name."""
    real = {path.parent.name for path in emulate.BOARDS.glob("*/board.json")} - set(emulate.emulated_boards())
    assert set(flash.BOARDS) == {name for name in real if name.startswith(("ESP32", "RPI"))}
    for name, board in flash.BOARDS.items():
        facts = emulate.board_facts(name)
        assert facts["mcu"].partition(",")[0] == board.chip.name
        assert facts["flash_bytes"] < board.flash_bytes


# RP2.


@pytest.mark.parametrize(
    ("board", "family", "info"),
    [("RPI_PICO", RP2040, ("Raspberry Pi RP2", "RPI-RP2")), ("rpi-pico2-w", RP2350, ("Raspberry Pi RP2350", "RP2350"))],
)
def test_a_good_file_is_copied(tmp_path: Path, board: str, family: int, info: tuple[str, str]) -> None:
    """Byte for byte, and nothing else of the drive changes."""
    place = make_drive(tmp_path / "drive", *info)
    data = uf2(family)
    if family == RP2350:  # RP2350-E10's block stands before it
        data = uf2_block(0x10FFFF00, 0, 2, ABSOLUTE, b"\xef" * 256) + data
    (tmp_path / "firmware.uf2").write_bytes(data)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    done = run("flash", "--board", board, "--drive", place, tmp_path / "firmware.uf2", "--json")
    assert json.loads(done.stdout) == {
        "board": board,
        "chip": flash.board_named(board).chip.name,
        "where": str(place),
        "bytes": len(data),
    }
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {**before, "firmware.uf2": data}


WRONG_UF2: dict[str, tuple[bytes, str]] = {
    "family": (uf2(RP2350), "made for RP2350, ARM secure, expected RP2040"),
    "no family": (uf2_block(0x10000000, 0, 1, 0, bytes(256), 0), "made for no family"),
    "unknown family": (uf2(0xADA52840), "family 0xada52840"),
    "mixed families": (
        uf2_block(0x10000000, 0, 2, RP2040, bytes(256)) + uf2_block(0x10000100, 1, 2, RP2350, bytes(256)),
        "made for RP2350",
    ),
    "truncated": (uf2()[:-100], "cut off"),
    "a block is missing at the end": (uf2()[:-512], "19 blocks, of 20"),
    "a block is missing": (uf2()[:1024] + uf2()[1536:], "19 blocks, of 20"),
    "renumbered": (change(uf2(), 5 * 512 + 20, struct.pack("<I", 7)), "block 5 has the number 7"),
    "out of order": (uf2()[512:1024] + uf2()[:512] + uf2()[1024:], "block 0 has the number 1"),
    "first magic": (change(uf2(), 3 * 512, b"\0"), "block 3 lacks"),
    "last magic": (change(uf2(), 4 * 512 - 1, b"\0"), "block 3 lacks"),
    "address twice": (change(uf2(), 5 * 512 + 12, struct.pack("<I", 0x10000000)), "twice"),
    "in RAM": (uf2(start=0x20000000), "not for flash"),
    "not at the start": (uf2(start=0x10001000), "begins at 0x10001000"),
    "odd page": (uf2(start=0x10000010), "whole pages"),
    "too large": (uf2(blocks=8193), "the board has 2,097,152"),
    "not for main flash": (change(uf2(), 512 + 8, struct.pack("<I", 0x2001)), "not for flash"),
    "absolute block": (uf2_block(0x10FFFF00, 0, 2, ABSOLUTE, b"\xef" * 256) + uf2(), "any chip"),
    "ESP32": (esp(0, 0x1000), "an ESP32 image"),
    "text": (b"<html>not found</html>" * 100, "not a UF2 file"),
    "empty": (b"", "not a UF2 file"),
}


@pytest.mark.parametrize("name", WRONG_UF2)
def test_a_wrong_uf2_is_refused(tmp_path: Path, name: str) -> None:
    """With a sentence that names the fault, before the drive is looked for."""
    data, word = WRONG_UF2[name]
    path = tmp_path / "firmware.uf2"
    path.write_bytes(data)
    board = flash.BOARDS["RPI_PICO"]
    with pytest.raises(UserError, match=r"firmware\.uf2: ") as fault:
        firmware_file.read(path, board.chip, board.flash_bytes)
    assert word in str(fault.value)


def test_the_drive_stays_untouched(tmp_path: Path, drive: Path, refused: Callable[..., str]) -> None:
    """When the file is wrong, the drive is another chip's, or the board or options do not fit."""
    good, wrong = tmp_path / "good.uf2", tmp_path / "wrong.uf2"
    good.write_bytes(uf2())
    wrong.write_bytes(uf2(RP2350))
    other = make_drive(tmp_path / "other", "Raspberry Pi RP2350", "RP2350")
    third = make_drive(tmp_path / "third", "Feather", "SAMD51-Feather")
    before = {path: path.read_bytes() for place in (drive, other, third) for path in place.iterdir()}
    pico = ("--board", "RPI_PICO", "--drive")
    assert "made for RP2350" in refused(*pico, drive, wrong)
    assert "the drive of RP2350, expected RP2040" in refused(*pico, other, good)
    assert "SAMD51-Feather, expected RP2040" in refused(*pico, third, good)
    assert "BOOTSEL" in refused(*pico, tmp_path, good)
    assert "BOOTSEL" in refused(*pico, tmp_path / "nowhere", good)
    assert "RPI_PICO2_W" in refused("--board", "RPI_PICO3", "--drive", drive, good)
    assert "--erase" in refused(*pico, drive, good, "--erase")
    assert "--drive" in refused("--board", "ESP32_GENERIC", "--drive", drive, write(tmp_path, esp(0, 0x1000)))
    assert "No such file" in refused(*pico, drive, tmp_path / "missing.uf2")
    assert {path: path.read_bytes() for place in (drive, other, third) for path in place.iterdir()} == before


def write(folder: Path, data: bytes) -> Path:
    path = folder / "firmware.bin"
    path.write_bytes(data)
    return path


def test_the_drive_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where systems mount it; of several none is guessed."""
    chip = flash.BOARDS["RPI_PICO"].chip
    assert isinstance(chip, firmware_file.Rp2Chip)
    monkeypatch.setattr(flash_drive, "ROOTS", (tmp_path / "media", tmp_path / "run", tmp_path / "none"))
    assert flash.find_drive(chip, None) is None
    make_drive(tmp_path / "media" / "me" / "RP2350", "Raspberry Pi RP2350", "RP2350")
    with pytest.raises(UserError, match="drive of RP2350, expected RP2040"):
        flash.find_drive(chip, None)
    place = make_drive(tmp_path / "run" / "RPI-RP2", "Raspberry Pi RP2", "RPI-RP2")
    found = flash.find_drive(chip, None)
    assert found and found.path == place and found.chip == "RP2040" and found.model == "Raspberry Pi RP2"
    make_drive(tmp_path / "media" / "RPI-RP21", "Raspberry Pi RP2", "RPI-RP2")
    with pytest.raises(UserError, match="2 drives of RP2040"):
        flash.find_drive(chip, None)


def test_a_drive_appears_late_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for, and its absence is told."""
    chip = flash.BOARDS["RPI_PICO"].chip
    assert isinstance(chip, firmware_file.Rp2Chip)
    monkeypatch.setattr(flash_drive, "ROOTS", (tmp_path,))
    with pytest.raises(UserError, match="BOOTSEL"):
        flash.wait_for_drive(chip, None, 0.3)
    timer = threading.Timer(0.5, make_drive, (tmp_path / "RPI-RP2", "Raspberry Pi RP2", "RPI-RP2"))
    timer.start()
    assert flash.wait_for_drive(chip, None, 5).path == tmp_path / "RPI-RP2"
    timer.join()


def test_a_drive_that_is_full_or_gone(drive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is told of; a drive that is gone after the last block is the board that restarts."""
    real = os.fsync
    calls: list[int] = []

    def failing(descriptor: int, at: int) -> None:
        calls.append(descriptor)
        if len(calls) > at:
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", lambda descriptor: failing(descriptor, 1))
    data = uf2(blocks=100)
    with pytest.raises(UserError, match="Input/output error after"):
        flash_drive.copy(data, flash_drive.at(drive), "f.uf2")
    pieces = -(-len(data) // 16384)
    calls.clear()

    def restarting(descriptor: int) -> None:
        if len(calls) == pieces - 1:
            (drive / "INFO_UF2.TXT").unlink()
        failing(descriptor, pieces - 1)

    place = flash_drive.at(drive)
    monkeypatch.setattr(os, "fsync", restarting)
    flash_drive.copy(data, place, "f.uf2")
    assert (drive / "f.uf2").read_bytes() == data


def test_a_board_that_is_another_stays_as_it_is(tmp_path: Path, refused: Callable[..., str]) -> None:
    """By --port: the emulated board runs MicroPython, and says that it is no RP2040."""
    (tmp_path / "good.uf2").write_bytes(uf2())
    with emulate.start("UNIX") as board:
        told = refused("--board", "RPI_PICO", "--port", board.port, tmp_path / "good.uf2")
        assert "expected RP2040; nothing was changed" in told
        assert board.running
        place = make_drive(tmp_path / "drive", "Raspberry Pi RP2", "RPI-RP2")
        two = ("--board", "RPI_PICO", "--port", board.port, "--drive", place, tmp_path / "good.uf2")
        assert "leave --port away" in refused(*two) and len(list(place.iterdir())) == 2


# ESP32.


ESPS = {
    "ESP32_GENERIC": (0, 0x1000),
    "ESP32_GENERIC_S3": (9, 0),
    "ESP32_GENERIC_C3": (5, 0),
    "ESP32_GENERIC_C6": (13, 0),
}


@pytest.mark.parametrize("name", ESPS)
def test_a_good_image_is_taken(tmp_path: Path, name: str) -> None:
    chip, start = ESPS[name]
    board = flash.BOARDS[name]
    data = esp(chip, start)
    found = firmware_file.read(write(tmp_path, data), board.chip, board.flash_bytes)
    assert found.data == data and found.last == start + len(data)


GOOD = esp(0, 0x1000)
APP = 0x10000 - 0x1000
WRONG_ESP: dict[str, tuple[bytes, str]] = {
    "chip": (esp(9, 0), "made for ESP32-S3, expected ESP32;"),
    "unknown chip": (esp(77, 0x1000), "made for chip 77"),
    "application's chip": (esp(0, 0x1000, app_chip=13), "made for ESP32-C6"),
    "magic": (change(GOOD, 0, b"\x7f"), "begins with 0x7f"),
    "application's magic": (change(GOOD, APP, b"\xff"), "begins with 0xff"),
    "truncated": (GOOD[:-10], "cut off in the application"),
    "truncated before the application": (GOOD[: APP - 5], "holds no application"),
    "truncated in the bootloader": (GOOD[:500], "cut off in the bootloader"),
    "of a few bytes": (GOOD[:10], "cut off in the bootloader"),
    "a bit in the bootloader": (change(GOOD, 100, bytes([GOOD[100] ^ 1])), "checksum"),
    "a bit in the application": (change(GOOD, APP + 9000, bytes([GOOD[APP + 9000] ^ 1])), "checksum"),
    "two bits that cancel out": (
        change(GOOD, APP + 90, bytes([GOOD[APP + 90] ^ 1, GOOD[APP + 91] ^ 1])),
        "checksum",
    ),
    "the partition table": (change(GOOD, 0x7004, b"\x12"), "partition table does not have its checksum"),
    "application alone": (image(0, data=b"app!" * 20000), "no partition table"),
    "segments": (change(GOOD, 1, b"\xff"), "255 segments"),
    "segment's length": (change(GOOD, 28, b"\xff\xff\xff\xff"), "cut off"),
    "more than its header says": (esp(0, 0x1000, size=0, app_bytes=1_200_000), "says of itself"),
    "larger than flash": (esp(0, 0x1000, size=0x40).ljust(4 << 20, b"\xff"), "the board has 4,194,304"),
    "UF2": (uf2(), "a UF2 file"),
    "empty": (b"", "cut off in the bootloader"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_ESP)
def test_a_wrong_image_is_refused(tmp_path: Path, name: str) -> None:
    data, word = WRONG_ESP[name]
    board = flash.BOARDS["ESP32_GENERIC"]
    with pytest.raises(UserError, match=r"firmware\.bin: ") as fault:
        firmware_file.read(write(tmp_path, data), board.chip, board.flash_bytes)
    assert word in str(fault.value)


def test_esptool_is_there() -> None:
    """With the commands and options that are used."""
    version = subprocess.run([*flash.ESPTOOL, "version"], capture_output=True, text=True, timeout=60)
    assert version.returncode == 0 and version.stdout.split()[-1].split(".")[0] == "5", version.stdout
    wide = {**os.environ, "COLUMNS": "200"}
    for command, words in (
        (["--help"], ("--chip", "--port", "--baud", "--connect-attempts", "write-flash", "flash-id")),
        (["write-flash", "--help"], ("--erase-all",)),
    ):
        told = subprocess.run([*flash.ESPTOOL, *command], capture_output=True, text=True, timeout=60, env=wide)
        assert told.returncode == 0 and all(word in told.stdout for word in words), told.stdout
    for board in flash.BOARDS.values():
        if isinstance(board.chip, firmware_file.EspChip):
            told = subprocess.run(
                [*flash.ESPTOOL, "--chip", board.chip.option, "version"], capture_output=True, timeout=60
            )
            assert told.returncode == 0


def test_nothing_answers(tmp_path: Path, refused: Callable[..., str]) -> None:
    """A clear sentence within the timeout, from esptool or because it was ended."""
    master, slave = os.openpty()
    path = write(tmp_path, esp(9, 0))
    command = ("--board", "ESP32_GENERIC_S3", "--port", os.ttyname(slave), path)
    begun = time.monotonic()
    told = refused(*command, "--timeout", 30)
    assert "Failed to connect to ESP32-S3" in told and "hold BOOT" in told and time.monotonic() - begun < 25
    begun = time.monotonic()
    assert "no answer for 2 s" in one_sentence(run("flash", *command, "--timeout", 2, fails=True).stderr)
    assert time.monotonic() - begun < 10
    os.close(master)
    os.close(slave)
    assert "/dev/ttyNOWHERE" in refused("--board", "ESP32_GENERIC_S3", "--port", "/dev/ttyNOWHERE", path)
    assert "--port" in refused("--board", "ESP32_GENERIC_S3", path)


class SimulatedEsp32:
    """An ESP32 in its bootloader on a pty: frames, registers, the flasher stub's commands, flash that must be written.

    It is not a model of the chip: code that is loaded is not run, but taken for esptool's stub.
    """

    def __init__(self, magic: int = 0x00F01D83, flash_bytes: int = 4 << 20) -> None:
        self.flash = bytearray(b"\xa5" * flash_bytes)  # what was there before
        self.writes = self.erasures = 0
        self._registers = {0x40001000: magic}
        self._flash_id = 0x0040EF | (flash_bytes.bit_length() - 1) << 16
        self._stub = False
        self._unpacked = b""
        self._at = 0
        self._inflate = zlib.decompressobj()
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        self.port = os.ttyname(self._slave)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ending.set()
        self._thread.join()
        os.close(self._master)
        os.close(self._slave)

    def _serve(self) -> None:
        heard = b""
        while not self._ending.is_set():
            if not select.select([self._master], [], [], 0.1)[0]:
                continue
            heard += os.read(self._master, 65536)
            while heard.count(b"\xc0") >= 2:
                start = heard.index(b"\xc0")
                end = heard.index(b"\xc0", start + 1)
                frame, heard = heard[start + 1 : end], heard[end + 1 :]
                frame = frame.replace(b"\xdb\xdc", b"\xc0").replace(b"\xdb\xdd", b"\xdb")
                if len(frame) >= 8:
                    self._handle(frame[1], frame[8:])

    def _send(self, data: bytes) -> None:
        data = b"\xc0" + data.replace(b"\xdb", b"\xdb\xdd").replace(b"\xc0", b"\xdb\xdc") + b"\xc0"
        while data:
            data = data[os.write(self._master, data) :]

    def _reply(self, command: int, value: int = 0, data: bytes = b"", status: int = 0) -> None:
        data += bytes([status, 5 if status else 0]) + (b"" if self._stub else b"\0\0")
        self._send(struct.pack("<BBHI", 1, command, len(data), value) + data)

    def _handle(self, command: int, data: bytes) -> None:
        numbers = struct.unpack_from(f"<{len(data) // 4}I", data)
        if command == 0x08:  # SYNC
            for _ in range(8):
                self._reply(command, 0x20120707)
        elif command == 0x0A:  # READ_REG
            self._reply(command, self._read_register(numbers[0]))
        elif command == 0x09:  # WRITE_REG
            self._registers[numbers[0]] = numbers[1]
            self._reply(command)
        elif command == 0x14 and not self._stub:  # GET_SECURITY_INFO: an ESP32 does not know it
            self._reply(command, status=1)
        elif command == 0x06:  # MEM_END: the stub takes over
            self._reply(command)
            self._stub = True
            self._send(b"OHAI")
        elif command in (0x10, 0x02):  # FLASH_(DEFL_)BEGIN
            self._at, self._inflate = numbers[3], zlib.decompressobj()
            self._reply(command)
        elif command in (0x11, 0x03):  # FLASH_(DEFL_)DATA
            piece = data[16 : 16 + numbers[0]]
            piece = self._inflate.decompress(piece) if command == 0x11 else piece
            self.flash[self._at : self._at + len(piece)] = piece
            self._at += len(piece)
            self.writes += 1
            self._reply(command)
        elif command == 0x13:  # SPI_FLASH_MD5
            digest = hashlib.md5(self.flash[numbers[0] : numbers[0] + numbers[1]])
            self._reply(command, data=digest.digest() if self._stub else digest.hexdigest().encode())
        elif command == 0xD0:  # ERASE_FLASH
            self.flash[:] = b"\xff" * len(self.flash)
            self.erasures += 1
            self._reply(command)
        else:
            self._reply(command)

    def _read_register(self, address: int) -> int:
        if address == 0x3FF42000:  # SPI_CMD: done
            return 0
        if address == 0x3FF42080:  # SPI_W0 after a command
            return self._flash_id
        return self._registers.get(address, 0)


@pytest.fixture
def simulated() -> Iterator[Callable[..., SimulatedEsp32]]:
    started: list[SimulatedEsp32] = []

    def start(**how: int) -> SimulatedEsp32:
        started.append(SimulatedEsp32(**how))
        return started[-1]

    yield start
    for chip in started:
        chip.close()


@pytest.mark.parametrize("erase", [False, True])
def test_esptool_writes_the_image(tmp_path: Path, simulated: Callable[..., SimulatedEsp32], erase: bool) -> None:
    """At the bootloader's place in flash, verified; what lies behind it stays, unless --erase asks for it."""
    chip = simulated()
    data = esp(0, 0x1000)
    command = ["--board", "ESP32_GENERIC", "--port", chip.port, write(tmp_path, data), "--json"]
    done = json.loads(run("flash", *command, *(["--erase"] if erase else [])).stdout)
    assert done == {"board": "ESP32_GENERIC", "chip": "ESP32", "where": chip.port, "bytes": len(data)}
    assert chip.flash[0x1000 : 0x1000 + len(data)] == data
    assert set(chip.flash[-4096:]) == {0xFF if erase else 0xA5} and chip.erasures == erase


def test_esptool_finds_another_chip_or_less_flash(
    tmp_path: Path, simulated: Callable[..., SimulatedEsp32], refused: Callable[..., str]
) -> None:
    """Then nothing is written."""
    other = simulated(magic=0x000007C6)
    path = write(tmp_path, esp(0, 0x1000))
    assert "This chip is ESP32-S2, not ESP32" in refused("--board", "ESP32_GENERIC", "--port", other.port, path)
    small = simulated(flash_bytes=1 << 20)
    path = write(tmp_path, esp(0, 0x1000, app_bytes=1_200_000))
    assert "the board has 1,048,576" in refused("--board", "ESP32_GENERIC", "--port", small.port, path)
    for chip in (other, small):
        assert not chip.writes and not chip.erasures and set(chip.flash) == {0xA5}


def test_esptool_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence says how to get it; silence and other ends are told, too."""
    chip = flash.BOARDS["ESP32_GENERIC"].chip
    assert isinstance(chip, firmware_file.EspChip)
    firmware = firmware_file.read(write(tmp_path, esp(0, 0x1000)), chip, 4 << 20)

    def ends(code: str, word: str) -> None:
        monkeypatch.setattr(flash, "ESPTOOL", [sys.executable, "-c", code])
        with pytest.raises(UserError, match=word):
            flash.flash_esp(
                firmware, chip, "p", erase=False, baud=115200, timeout_s=1, bar=lambda title: lambda done, total: None
            )

    ends("import sys; sys.exit('/usr/bin/python: No module named esptool')", "pip install esptool")
    ends("import time; time.sleep(30)", "no answer for 1 s")
    ends("raise SystemExit(3)", "no message")
