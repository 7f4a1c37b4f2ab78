"""Which files of the device package a board gets: one list, for `ulearn deploy` and for MicroPython's `mip`.

mip installs what a JSON file lists. Those files lie in ``firmware/``, beside what they name: mip takes a relative
address as it stands, so `..` would reach the web server, and `deps` cannot be relative at all. Written by::

    python -m ulearn_host.mip_package --write

``<arch>.json`` is the package as bytecode with an architecture's native modules, ``package.json`` the whole package in
Python, for a firmware that has the kernels or ulab built in; ``<arch>-inference.json`` and ``inference.json`` hold no
trainer. The bytecode is in ``firmware/bytecode``, written likewise.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import ulearn
from ulearn_host import bytecode, layout
from ulearn_host.emulate import NATIVE_MODULES

ARCHITECTURES = ("armv6m", "armv7emsp", "armv7m", "rv32imc", "x64", "xtensawin")
_FIRMWARE = Path(__file__).resolve().parents[2] / "firmware"
_BYTECODE = "bytecode"

# What loading a plan and running it forward import.
_INFERENCE = ("__init__", "compat", "faults", "loader", "loading", "model", "plan", "reading",
              "safefile", "streaming", "verify", "which")  # fmt: skip
_ULAB = ("ulab_executor", "ulab_operators", "ulab_training")  # where there are no kernels


def package_files(kernels: bool, inference: bool = False) -> list[Path]:
    """The Python files for a board that has the kernels (ulab otherwise), all of them or those of inference alone."""
    files = sorted(Path(ulearn.__file__).parent.glob("*.py"))
    if inference:
        wanted = _INFERENCE if kernels else [*_INFERENCE, *_ULAB[:2], "cpython"]
        return [path for path in files if path.stem in wanted]
    return [path for path in files if not (kernels and path.stem in (*_ULAB, "cpython"))]


def native_names(inference: bool = False) -> tuple[str, ...]:
    """The native modules that go with those files."""
    return ("ulab_infer",) if inference else NATIVE_MODULES


def package(architecture: str | None, inference: bool) -> str:
    """The text of one of mip's JSON files; without an architecture, the Python files for every board."""
    python = package_files(architecture is not None, inference)
    if architecture is None:
        urls = [[f"ulearn/{path.name}"] * 2 for path in python]
    else:
        urls = [[f"ulearn/{path.stem}.mpy", f"{_BYTECODE}/{path.stem}.mpy"] for path in python]
        urls += [[f"{name}.mpy", f"native/{architecture}/{name}.mpy"] for name in native_names(inference)]
    lines = ",\n".join("    " + json.dumps(pair) for pair in urls)
    return f'{{\n  "version": "{ulearn.__version__}",\n  "deps": [],\n  "urls": [\n{lines}\n  ]\n}}\n'


def packages() -> dict[str, str]:
    """The JSON files by name."""
    files = {"package.json": package(None, False), "inference.json": package(None, True)}
    for name in ARCHITECTURES:
        files[f"{name}.json"] = package(name, False)
        files[f"{name}-inference.json"] = package(name, True)
    return files


def stale(write: bool = False) -> list[Path]:
    """Files that differ from what they should be, and those that should not be; with ``write`` they are put right."""
    wanted = {_FIRMWARE / name: text.encode() for name, text in packages().items()}
    with tempfile.TemporaryDirectory() as folder:
        for path in bytecode.build(Path(folder), package_files(True)):
            wanted[_FIRMWARE / _BYTECODE / path.name] = path.read_bytes()
    changed = [path for path, data in wanted.items() if not path.exists() or path.read_bytes() != data]
    there = [*_FIRMWARE.glob("*.json"), *(_FIRMWARE / _BYTECODE).glob("*")]
    extra = [path for path in there if path not in wanted]
    if write:
        (_FIRMWARE / _BYTECODE).mkdir(exist_ok=True)
        for path in changed:
            path.write_bytes(wanted[path])
        for path in extra:
            path.unlink()
    return changed + extra


def main() -> int:
    """Command line: list stale files, or rewrite them."""
    return layout.command("Keep mip's JSON files and the bytecode equal to the package.", stale)


if __name__ == "__main__":
    sys.exit(main())
