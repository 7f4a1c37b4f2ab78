"""The drive that an RP2 shows in its bootloader: found, told apart, written to."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ulearn_host.errors import UserError

# Where systems mount drives: by label, or by user and label.
ROOTS = (Path("/media"), Path("/run/media"), Path("/Volumes"))
_INFO = "INFO_UF2.TXT"
_INFO_BYTES = 4096
_PIECE_BYTES = 16384
_CHIPS = {"RPI-RP2": "RP2040", "RP2350": "RP2350"}  # by Board-ID


@dataclass(frozen=True)
class Drive:
    """A drive with an INFO_UF2.TXT. chip: empty for what is no RP2."""

    path: Path
    model: str
    board_id: str

    @property
    def chip(self) -> str:
        """RP2040, RP2350 or ''."""
        return _CHIPS.get(self.board_id, "")


def at(path: Path) -> Drive:
    """The drive that is mounted at a path. Raises UserError when it is none of a UF2 bootloader."""
    try:
        with (path / _INFO).open("rb") as file:
            text = file.read(_INFO_BYTES).decode("ascii", "replace")
    except OSError as fault:
        raise UserError(
            f"{path}: no drive of a board in its bootloader ({_INFO}: {fault.strerror}); hold BOOTSEL while plugging in"
        ) from None
    lines = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    return Drive(path, lines.get("Model", "").strip(), lines.get("Board-ID", "").strip())


def drives(roots: Sequence[Path] | None = None) -> list[Drive]:
    """All drives of RP2 bootloaders that are mounted."""
    found = []
    for root in ROOTS if roots is None else roots:
        for pattern in (f"*/{_INFO}", f"*/*/{_INFO}"):
            try:
                found += [at(path.parent) for path in sorted(root.glob(pattern))]
            except (OSError, UserError):
                continue  # a drive that goes away meanwhile, a folder of another user
    return [drive for drive in found if drive.chip]


def copy(data: bytes, drive: Drive, name: str, tick: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Write a checked firmware to the drive, down to the board. Raises UserError when the drive takes only a part.

    The board restarts with the last block, and its drive is gone: a fault after that is none.
    """
    target = drive.path / name
    done = 0
    try:
        with target.open("wb", buffering=0) as file:
            while done < len(data):
                done += file.write(data[done : done + _PIECE_BYTES])
                if done < len(data):
                    os.fsync(file.fileno())  # so that the bar tells the truth
                tick(done, len(data))
            os.fsync(file.fileno())
    except OSError as fault:
        if done == len(data) and not (drive.path / _INFO).exists():
            return
        raise UserError(
            f"{target}: {fault.strerror} after {done:,} of {len(data):,} bytes; plug the board in with BOOTSEL held "
            "and flash again"
        ) from None
