"""The numbers of the plan format, read from their one definition, ``ulab_kernels/ul_format.h``.

Device modules carry the few numbers they use as ``_NAME = const(number)`` lines, because MicroPython folds those away
and a table of names would cost three kilobytes of heap. This module checks and rewrites them::

    python -m ulearn_host.layout --write

On the host, ``ulearn_host.numbers`` holds all of them, generated likewise.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

_DEFINE = re.compile(r"^#define UL_(\w+) (-?(?:0x[0-9A-Fa-f]+|\d+))\b", re.M)
_CONST = re.compile(r"^_(\w+) = const\((-?(?:0x[0-9A-Fa-f]+|\d+))\)", re.M)
# Formats of their own, with a magic and a version of their own.
_OTHER_FORMATS = ("frames.py", "checkpoint.py", "update.py", "agent.py")
_ROOT = Path(__file__).resolve().parents[2]


def numbers(header: Path | None = None) -> dict[str, int]:
    """All numbers of the header by name, without their ``UL_`` prefix."""
    text = (header or _ROOT / "ulab_kernels" / "ul_format.h").read_text()
    return {name: int(value, 0) for name, value in _DEFINE.findall(text)}


def device_modules() -> list[Path]:
    """The device's Python files whose constants are the plan format's."""
    return sorted(p for p in (_ROOT / "firmware" / "ulearn").glob("*.py") if p.name not in _OTHER_FORMATS)


def synchronised(text: str, known: dict[str, int]) -> str:
    """``text`` with every constant that carries a name of the format set to the format's number."""

    def line(match: re.Match[str]) -> str:
        name, value = match.groups()
        number = known.get(name)
        return match.group(0) if number is None or int(value, 0) == number else f"_{name} = const({number})"

    return _CONST.sub(line, text)


def host_module(known: dict[str, int]) -> str:
    """The text of ``ulearn_host/numbers.py``."""
    lines = [f"{name} = {value}" for name, value in known.items()]
    title = '"""Generated from ulab_kernels/ul_format.h by python -m ulearn_host.layout --write; not edited."""'
    return title + "\n\n" + "\n".join(lines) + "\n"


def stale(write: bool = False) -> list[Path]:
    """Files that differ from what the header says; with ``write`` they are rewritten."""
    known = numbers()
    wanted = {path: synchronised(path.read_text(), known) for path in device_modules()}
    wanted[Path(__file__).with_name("numbers.py")] = host_module(known)
    changed = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if write:
        for path in changed:
            path.write_text(wanted[path])
    return changed


def main() -> int:
    """Command line: list stale files, or rewrite them."""
    return command("Keep Python's copies of the format's numbers equal to ul_format.h.", stale)


def command(description: str, stale: Callable[[bool], list[Path]]) -> int:
    """The command line of generated files: list those that stale(write) names, or have it rewrite them. Exit status."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--write", action="store_true", help="rewrite stale files")
    arguments = parser.parse_args()
    changed = stale(arguments.write)
    for path in changed:
        print(("wrote " if arguments.write else "stale: ") + str(path.relative_to(_ROOT)))
    return 1 if changed and not arguments.write else 0


if __name__ == "__main__":
    sys.exit(main())
