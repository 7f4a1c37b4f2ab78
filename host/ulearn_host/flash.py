"""Puts MicroPython on a board: by esptool on ESP32 chips, as a copy to the bootloader's drive on RP2 chips.

The file is checked first (firmware_file.py), then the chip that answers; only then is anything erased or written.
esptool runs as a process of its own: it may hang, and is ended when it does.

Not run on real hardware: no board was at hand. Run were esptool 5.6 itself, against a line where nothing answers and
against a simulated ESP32 (tests/test_flash.py), and the copy, against a folder in a drive's place. So these are not
proved: the reset into the bootloader by DTR and RTS, machine.bootloader(), the time an RP2's drive takes to appear, and
how each system reports that the drive is gone after the last block.
"""

from __future__ import annotations

import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ulearn_host import flash_drive
from ulearn_host.errors import UserError
from ulearn_host.firmware_file import Chip, EspChip, Firmware, Rp2Chip
from ulearn_host.link import LinkError

Tick = Callable[[int, int], None]

_RP2040 = Rp2Chip("RP2040", (0xE48BFF56,), "RPI-RP2")
_RP2350 = Rp2Chip("RP2350", (0xE48BFF59, 0xE48BFF5A), "RP2350")
_ESP32 = EspChip("ESP32", 0, "esp32", 0x1000)
_ESP32_S3 = EspChip("ESP32-S3", 9, "esp32s3", 0)
_ESP32_C3 = EspChip("ESP32-C3", 5, "esp32c3", 0)
_ESP32_C6 = EspChip("ESP32-C6", 13, "esp32c6", 0)
_MIB = 1 << 20


@dataclass(frozen=True)
class Board:
    """A board that can be flashed. flash_bytes: of the whole chip, as its MicroPython is built for (boards/*/)."""

    chip: Chip
    flash_bytes: int


BOARDS = {
    "ESP32_GENERIC": Board(_ESP32, 4 * _MIB),
    "ESP32_GENERIC_C3": Board(_ESP32_C3, 4 * _MIB),
    "ESP32_GENERIC_C6": Board(_ESP32_C6, 4 * _MIB),
    "ESP32_GENERIC_S3": Board(_ESP32_S3, 8 * _MIB),
    "RPI_PICO": Board(_RP2040, 2 * _MIB),
    "RPI_PICO_W": Board(_RP2040, 2 * _MIB),
    "RPI_PICO2": Board(_RP2350, 4 * _MIB),
    "RPI_PICO2_W": Board(_RP2350, 4 * _MIB),
}

ESPTOOL = [sys.executable, "-m", "esptool"]
_CONNECT_TRIES = 5
_SILENT_S = 60.0  # esptool says nothing for so long only when it hangs,
_ERASING_S = 150.0  # or while all of a large flash is erased
_DRIVE_S = 20.0
_SIZES = {"KB": 1 << 10, "MB": _MIB}


def board_named(name: str) -> Board:
    """A board's facts. Raises UserError when it cannot be flashed."""
    spelled = name.upper().replace("-", "_")
    if spelled not in BOARDS:
        raise UserError(f"no board {name} to flash; expected one of {', '.join(BOARDS)}")
    return BOARDS[spelled]


# RP2.


def find_drive(chip: Rp2Chip, path: Path | None) -> flash_drive.Drive | None:
    """The drive of a board in its bootloader, at `path` or wherever one is mounted. None: there is none.

    Raises:
        UserError: it is another chip's, or there are several.
    """
    if path is not None:
        drive = flash_drive.at(path)
        if drive.board_id != chip.board_id:
            found = drive.chip or drive.board_id or "another board"
            raise UserError(f"{path}: the drive of {found}, expected {chip.name} (Board-ID {chip.board_id})")
        return drive
    found_drives = flash_drive.drives()
    fitting = [drive for drive in found_drives if drive.board_id == chip.board_id]
    if len(fitting) > 1:
        raise UserError(f"{len(fitting)} drives of {chip.name} are mounted; name one by --drive {fitting[0].path}")
    if not fitting and found_drives:
        other = found_drives[0]
        raise UserError(f"{other.path}: the drive of {other.chip}, expected {chip.name}; name the board that it is")
    return fitting[0] if fitting else None


def to_bootloader(port: str, chip: Rp2Chip, drive: Path | None, timeout_s: float) -> None:
    """Bring a board that runs MicroPython into its bootloader; its drive will be at `drive`, or found.

    Raises:
        UserError: it is another chip, or a drive is there already and would be taken for this board's.
    """
    from ulearn_host.repl import RawRepl

    there = find_drive(chip, None) if drive is None else flash_drive.at(drive) if _is_drive(drive) else None
    if there is not None:
        raise UserError(
            f"{there.path}: a board is in its bootloader already; leave --port away to flash that one, or unplug it"
        )
    try:
        with RawRepl.open(port, timeout_s) as repl:
            machine = repl.run("import sys;print(sys.implementation._machine)").strip()
            if machine.rpartition(" with ")[2] != chip.name:
                raise UserError(f"{port}: the board says it is a {machine}, expected {chip.name}; nothing was changed")
            repl.begin("import machine;machine.bootloader()")
    except LinkError as fault:
        raise UserError(f"{fault}; hold BOOTSEL while plugging the board in, and leave --port away") from None


def wait_for_drive(chip: Rp2Chip, path: Path | None, wait_s: float = _DRIVE_S) -> flash_drive.Drive:
    """The drive, once it is mounted. Raises UserError when none is in time."""
    until = time.monotonic() + wait_s
    while True:
        drive = None
        if path is None or _is_drive(path):
            drive = find_drive(chip, path)
        if drive is not None:
            return drive
        if time.monotonic() >= until:
            where = f"at {path}" if path else "in /media, /run/media or /Volumes"
            raise UserError(
                f"no drive of {chip.name} is mounted {where}; plug the board in with BOOTSEL held, and if your system "
                "does not mount it by itself, mount it and name it by --drive"
            )
        time.sleep(0.2)


def _is_drive(path: Path) -> bool:
    return (path / "INFO_UF2.TXT").exists()


# ESP32.


def flash_esp(
    firmware: Firmware,
    chip: EspChip,
    port: str,
    *,
    erase: bool,
    baud: int,
    timeout_s: float,
    bar: Callable[[str], Tick],
) -> None:
    """Write firmware by esptool, after it has found the right chip and enough flash.

    Args:
        firmware: the checked file.
        chip: what must answer.
        port: where.
        erase: everything first, files included; otherwise files stay.
        baud: bits a second while writing.
        timeout_s: within which the chip must answer.
        bar: makes a progress bar from its title.

    Raises:
        UserError: nothing answers, another chip does, its flash is too small, or writing fails.
    """
    tick = bar(f"asking the chip on {port}")
    common = ["--chip", chip.option, "--port", port, "--connect-attempts", str(_CONNECT_TRIES)]
    said = _esptool([*common, "flash-id"], port, timeout_s, timeout_s, lambda done, total: None)
    tick(1, 1)
    found = re.search(r"flash size:\s*(\d+)\s*(KB|MB)", said)
    if found and int(found[1]) * _SIZES[found[2]] < firmware.last:
        size = int(found[1]) * _SIZES[found[2]]
        raise UserError(f"{firmware.path}: takes flash up to byte {firmware.last:,}, and the board has {size:,}")
    command = [*common, "--baud", str(baud), "write-flash", *(["--erase-all"] if erase else [])]
    command += [hex(chip.start), str(firmware.path)]
    _esptool(command, port, None, _ERASING_S if erase else _SILENT_S, bar(f"writing {firmware.path.name} to {port}"))


def _esptool(arguments: list[str], port: str, within_s: float | None, silent_s: float, tick: Tick) -> str:
    # Run it, pass its percentages on, end it after within_s in all or when it has been silent for too long.
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    begun = heard = time.monotonic()
    said = b""
    with subprocess.Popen(
        [*ESPTOOL, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    ) as process:
        try:
            assert process.stdout
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                while True:
                    now = time.monotonic()
                    if (within_s is not None and now - begun > within_s) or now - heard > silent_s:
                        process.kill()
                        limit = within_s if within_s is not None and now - begun > within_s else silent_s
                        raise UserError(
                            f"{port}: esptool got no answer for {limit:g} s; hold BOOT, press RESET, and try again"
                        )
                    if not selector.select(0.2):
                        continue
                    piece = os.read(process.stdout.fileno(), 65536)
                    if not piece:
                        break
                    heard = time.monotonic()
                    said += piece
                    if shares := re.findall(rb"(\d+(?:\.\d+)?)\s?%", said[-400:]):
                        tick(round(float(shares[-1])), 100)
        except BaseException:
            process.kill()
            raise
    text = said.decode(errors="replace")
    if process.returncode:
        raise UserError(f"{port}: {_reason(text)}")
    return text


def _reason(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any("No module named esptool" in line for line in lines):
        return "esptool is missing; install it with pip install esptool"
    fatal = next((line for line in lines if "fatal error" in line.lower()), lines[-1] if lines else "no message")
    words = re.sub(r"^(ERROR:\s*)?(A fatal error occurred:\s*)?", "", fatal).rstrip(".")
    hint = "; hold BOOT, press RESET, and try again" if "connect" in words.lower() else ""
    return f"esptool: {words}{hint}"
