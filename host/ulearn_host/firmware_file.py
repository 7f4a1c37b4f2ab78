"""Firmware files, checked before anything on a board is erased: UF2 for RP2 chips, images for ESP32 chips.

UF2: blocks of 512 bytes with magics, an address, a number and a family (github.com/microsoft/uf2). An ESP32 file as
MicroPython publishes it is what flash holds from the bootloader on: the bootloader's image, the partition table at
0x8000 of flash, the application's image where the table says; an image has a header, segments, a checksum and mostly
a SHA-256. Every fault is a UserError naming file and fault.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

from ulearn_host.errors import UserError

UF2_BLOCK_BYTES = 512
UF2_MAGICS = (0x0A324655, 0x9E5D5157, 0x0AB16F30)
UF2_NOT_FOR_FLASH, UF2_HAS_FAMILY = 0x1, 0x2000
UF2_PAGE_BYTES = 256  # of data in a block; an RP2's bootloader takes nothing else
FAMILIES = {
    0xE48BFF56: "RP2040",
    0xE48BFF57: "any chip (absolute)",
    0xE48BFF58: "RP2xxx data",
    0xE48BFF59: "RP2350, ARM secure",
    0xE48BFF5A: "RP2350, RISC-V",
    0xE48BFF5B: "RP2350, ARM non-secure",
}
ABSOLUTE = 0xE48BFF57
RP2_FLASH_START = 0x10000000

ESP_MAGIC = 0xE9
ESP_CHIPS = {0: "ESP32", 2: "ESP32-S2", 5: "ESP32-C3", 9: "ESP32-S3", 12: "ESP32-C2", 13: "ESP32-C6", 16: "ESP32-H2",
             18: "ESP32-P4"}  # fmt: skip
ESP_TABLE_AT = 0x8000
_ESP_HEADER = struct.Struct("<BBBBIBBHHBHHIB")
_ESP_SEGMENTS_MAX = 16
_ESP_CHECKSUM = 0xEF
_TABLE_BYTES = 0xC00
_ENTRY = struct.Struct("<HBBII16sI")
_ENTRY_MAGIC, _MD5_MAGIC = 0x50AA, 0xEBEB


@dataclass(frozen=True)
class Rp2Chip:
    """What a UF2 file must say for a chip. families: of the file; board_id: in the drive's INFO_UF2.TXT."""

    name: str
    families: tuple[int, ...]
    board_id: str


@dataclass(frozen=True)
class EspChip:
    """What an image must say for a chip. option: esptool's name for it; start: where in flash the bootloader lies."""

    name: str
    chip_id: int
    option: str
    start: int


Chip = Rp2Chip | EspChip


@dataclass(frozen=True)
class Firmware:
    """A file that was found right. last: the highest address in flash it takes, plus one, from the flash's start."""

    path: Path
    data: bytes
    last: int


def read(path: Path, chip: Chip, flash_bytes: int) -> Firmware:
    """Read and check a firmware file for a chip with so much flash. Raises UserError."""
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise UserError(f"{path}: {fault.strerror}; expected a firmware file") from None
    check = _check_uf2 if isinstance(chip, Rp2Chip) else _check_esp
    try:
        last = check(data, chip)  # type: ignore[arg-type]
    except UserError as fault:
        raise UserError(f"{path}: {fault}") from None
    if last > flash_bytes:
        raise UserError(f"{path}: takes flash up to byte {last:,}, and the board has {flash_bytes:,}")
    return Firmware(path, data, last)


# UF2.


def _check_uf2(data: bytes, chip: Rp2Chip) -> int:
    if len(data) < UF2_BLOCK_BYTES or struct.unpack_from("<II", data) != UF2_MAGICS[:2]:
        what = "an ESP32 image" if data[:1] == bytes([ESP_MAGIC]) else "not a UF2 file"
        raise UserError(f"{what}; {chip.name} takes a .uf2")
    if len(data) % UF2_BLOCK_BYTES:
        raise UserError(f"cut off: {len(data):,} bytes, expected a multiple of {UF2_BLOCK_BYTES}")
    blocks = [_block(data, i) for i in range(len(data) // UF2_BLOCK_BYTES)]
    # One block may stand before an RP2350's: of the family "absolute", as RP2350-E10 wants it, past all else in flash.
    if blocks[0].family == ABSOLUTE and chip.name == "RP2350" and len(blocks) > 1:
        del blocks[0]
    pages: set[int] = set()
    for i, block in enumerate(blocks):
        if block.family not in chip.families:
            found = "no family" if block.family is None else FAMILIES.get(block.family, f"family 0x{block.family:08x}")
            wanted = FAMILIES[chip.families[0]]
            raise UserError(f"made for {found}, expected {wanted}; fetch the firmware of the board that is named")
        if block.count != len(blocks):
            raise UserError(f"has {len(blocks)} blocks, of {block.count} that belong together; fetch it again")
        if block.number != i:
            raise UserError(f"block {i} has the number {block.number}: some are lost or out of order; fetch it again")
        if block.size != UF2_PAGE_BYTES or block.address % UF2_PAGE_BYTES:
            raise UserError(
                f"block {i} has {block.size} bytes for 0x{block.address:08x}; the bootloader takes whole pages of 256"
            )
        if not RP2_FLASH_START <= block.address < RP2_FLASH_START + (1 << 24) or block.address in pages:
            what = "twice for" if block.address in pages else "not for flash but for"
            raise UserError(f"block {i} is {what} 0x{block.address:08x}; expected a firmware for flash")
        pages.add(block.address)
    if min(pages) != RP2_FLASH_START:
        raise UserError(f"begins at 0x{min(pages):08x}, expected a firmware that begins with flash at 0x10000000")
    return max(pages) + UF2_PAGE_BYTES - RP2_FLASH_START


@dataclass(frozen=True)
class _Block:
    address: int
    size: int
    number: int
    count: int
    family: int | None


def _block(data: bytes, index: int) -> _Block:
    at = index * UF2_BLOCK_BYTES
    *magics, flags, address, size, number, count, family = struct.unpack_from("<8I", data, at)
    (end,) = struct.unpack_from("<I", data, at + UF2_BLOCK_BYTES - 4)
    if (*magics, end) != UF2_MAGICS:
        raise UserError(f"damaged: block {index} lacks UF2's magic numbers; fetch it again")
    if flags & UF2_NOT_FOR_FLASH:
        raise UserError(f"block {index} is marked as not for flash; expected a firmware")
    return _Block(address, size, number, count, family if flags & UF2_HAS_FAMILY else None)


# ESP32.


def _check_esp(data: bytes, chip: EspChip) -> int:
    if struct.unpack_from("<II", data.ljust(8, b"\0")) == UF2_MAGICS[:2]:
        raise UserError(f"a UF2 file; {chip.name} takes a .bin")
    stated = _image(data, 0, len(data), chip, "the bootloader")
    table = ESP_TABLE_AT - chip.start
    apps = _apps(data[table : table + _TABLE_BYTES])
    for name, offset, size in apps:
        at = offset - chip.start
        if 0 < at < len(data):
            _image(data, at, at + size, chip, f"the application in '{name}'")
            break
    else:
        raise UserError("holds no application where its partition table says; expected MicroPython's whole .bin")
    last = chip.start + len(data)
    if last > stated:
        raise UserError(f"takes flash up to byte {last:,}, and says of itself that it is for {stated:,}")
    return last


def _image(data: bytes, start: int, limit: int, chip: EspChip, what: str) -> int:
    # Check the image at `start`, which must end at `limit` at the latest; how much flash its header says there is.
    if start + _ESP_HEADER.size > len(data):
        raise UserError(f"cut off in {what}; fetch it again")
    magic, count, _, size, _, _, _, _, chip_id, *_, hashed = _ESP_HEADER.unpack_from(data, start)
    if magic != ESP_MAGIC:
        raise UserError(f"{what} begins with 0x{magic:02x}, expected 0xe9, an ESP32 image's")
    if chip_id != chip.chip_id:
        found = ESP_CHIPS.get(chip_id, f"chip {chip_id}")
        raise UserError(f"made for {found}, expected {chip.name}; fetch the firmware of the board that is named")
    if not 1 <= count <= _ESP_SEGMENTS_MAX:
        raise UserError(f"damaged: {what} has {count} segments, expected 1 to {_ESP_SEGMENTS_MAX}")
    at, checksum = start + _ESP_HEADER.size, _ESP_CHECKSUM
    for _ in range(count):
        length = struct.unpack_from("<I", data, at + 4)[0] if at + 8 <= len(data) else len(data)
        at += 8
        if at + length > min(limit, len(data)):
            raise UserError(f"cut off in {what}; fetch it again")
        for byte in _folded(data[at : at + length]):
            checksum ^= byte
        at += length
    at += 16 - (at - start) % 16  # the checksum is the last byte of sixteen
    end = at + (32 if hashed else 0)
    if end > min(limit, len(data)):
        raise UserError(f"cut off in {what}; fetch it again")
    if data[at - 1] != checksum or (hashed and hashlib.sha256(data[start:at]).digest() != data[at:end]):
        raise UserError(f"damaged: {what} does not have its checksum; fetch it again")
    return 1 << 20 + (int(size) >> 4)


def _folded(data: bytes) -> bytes:
    # 64 bytes whose sum by exclusive or is that of all.
    folded = 0
    for at in range(0, len(data), 64):
        folded ^= int.from_bytes(data[at : at + 64], "little")
    return folded.to_bytes(64, "little")


def _apps(table: bytes) -> list[tuple[str, int, int]]:
    # Name, offset and size of the applications' partitions.
    apps = []
    for at in range(0, len(table) - _ENTRY.size + 1, _ENTRY.size):
        magic, kind, _, offset, size, name, _ = _ENTRY.unpack_from(table, at)
        if magic == _MD5_MAGIC:
            if hashlib.md5(table[:at], usedforsecurity=False).digest() != table[at + 16 : at + 32]:
                raise UserError("damaged: the partition table does not have its checksum; fetch it again")
            break
        if magic != _ENTRY_MAGIC:
            break
        if kind == 0:
            apps.append((name.rstrip(b"\0").decode(errors="replace"), offset, size))
    if not apps:
        raise UserError(
            "has no partition table: it is one image alone; expected MicroPython's whole .bin, with the bootloader"
        )
    return apps
