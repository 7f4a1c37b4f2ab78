"""`ulearn deploy` where the firmware has a ROMFS: package, native modules and plans as one image, used where it lies.

The image's first file lists the others: by that it is known to be a deploy's own, a part of one, too.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from ulearn import plan as plan_file
from ulearn_host import romfs
from ulearn_host.asking import LIST, Answer, digest, mpremote
from ulearn_host.emulate import NATIVE_MODULES
from ulearn_host.errors import UserError

FORMER = ("ulab_head", "ulab_training")  # native modules of earlier versions
_CHUNK_BYTES = 4096  # in which mpremote writes an image
_READ_BACK = """
import vfs,hashlib
h=hashlib.sha256(memoryview(vfs.rom_ioctl(2,0))[:{size}])
print('image|'+''.join('%02x'%c for c in h.digest()))
"""


def others_of(answer: Answer, plan: Path) -> dict[str, int]:
    """Sizes of other plans in a ROMFS that is ours, by name."""
    rom = {} if answer.foreign else answer.rom
    return {name: size for name, (size, _) in rom.items() if name.endswith(".ulm") and name != plan.name}


def image_files(data: Mapping[str, bytes], others: Mapping[str, int | bytes], plan: Path) -> dict[str, bytes]:
    """What the image is made of, in order; sizes stand for plans that need not be known yet."""
    plans = {name: bytes(other) for name, other in others.items()} | {plan.name: plan.read_bytes()}
    files = {**data, **dict(sorted(plans.items()))}
    listed = "".join(f"{name}\n" for name in (LIST, *files))
    return {LIST: listed.encode(), **files}


def beside(answer: Answer, data: dict[str, bytes]) -> dict[str, bytes]:
    """Which of these files a board with somebody else's ROMFS needs: what is imported from there comes first.

    Raises UserError where that is not the same.
    """
    modules = {name.split("/")[1].removesuffix(".mpy") for name in data}
    found = {module + suffix for module in modules for suffix in ("", ".py", ".mpy")}
    rom = {n: digest for n, (_, digest) in answer.rom.items() if n.removeprefix("lib/").split("/")[0] in found}
    if not rom:
        return data
    if rom != {name: digest(new) for name, new in data.items()}:
        raise UserError(
            f"{answer.board.port}: the ROMFS holds {min(rom)}, which is imported first and is not of this version, "
            f"beside {answer.foreign[0]}, which is not of ulearn deploy; build that image without one of the two"
        )
    return {}


def objection(answer: Answer, files: Mapping[str, bytes]) -> str:
    """Why the ROMFS cannot be used, or ''."""
    if answer.foreign:
        return f"the ROMFS is left alone, {answer.foreign[0]} in it is not of ulearn deploy"
    size = -(-len(romfs.image(files)) // _CHUNK_BYTES) * _CHUNK_BYTES
    if size > answer.board.romfs_bytes:
        return f"the ROMFS has {answer.board.romfs_bytes:,} bytes, package and plan take {size:,} there"
    return ""


def write(answer: Answer, data: Mapping[str, bytes], plan: Path) -> tuple[tuple[str, ...], int, str]:
    """Write an image unless the board has it. Returns names and bytes of what was copied, and the plan's place."""
    port = answer.board.port
    others = others_of(answer, plan)
    files = image_files(data, others, plan)
    wanted = {name: answer.rom[name][1] if name in others else digest(new) for name, new in files.items()}
    copied: tuple[str, ...] = ()
    size = 0
    if wanted != {name: digest for name, (_, digest) in answer.rom.items()}:
        files = image_files(data, fetch(port, others), plan)
        image = romfs.image(files)
        write_image(port, image)
        copied, size = tuple(f"/rom/{name}" for name in files), len(image)
    return copied, size, f"/rom/{plan.name}"


def fetch(port: str, names: Iterable[str]) -> dict[str, bytes]:
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


def write_image(port: str, image: bytes) -> None:
    """Write an image and compare it. Raises UserError."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "image.romfs"
        path.write_bytes(image)
        # Reset, so that nothing there is in use.
        mpremote(port, "soft-reset", "romfs", "--partition", "0", "deploy", str(path))
    if f"image|{digest(image)}" not in mpremote(port, "exec", _READ_BACK.format(size=len(image))):
        raise UserError(f"{port}: the ROMFS does not read back as it was written; is the flash worn out?")


def replaced(answer: Answer, data: Mapping[str, bytes]) -> list[str]:
    """Files of an earlier deploy in the file system that are in the ROMFS now."""
    folder = [f"lib/ulearn/{name}" for name in answer.here] if data else []
    folder += [f"lib/{module}.mpy" for module in FORMER]
    return folder + [f"lib/{module}.mpy" for module in NATIVE_MODULES if f"lib/{module}.mpy" in data]
