"""The package where it is installed, without the repository beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cases
from conftest import HERE
from ulearn_host import emulate

ROOT = HERE.parent
LOOK = """
import json, ulearn_host
from ulearn_host import costs, emulate, flash
natives = [str(emulate.find_native(arch, module=m)) for arch in {archs} for m in emulate.NATIVE_MODULES]
print(json.dumps([ulearn_host.__file__, sorted(b["board"] for b in costs.boards()), natives]))
"""


def test_boards_and_native_modules_come_along(tmp_path: Path) -> None:
    """As `pip install .` leaves it: facts of all boards, modules of all architectures, and a command that uses them."""
    source, target = tmp_path / "source", tmp_path / "installed"
    for name in ("firmware", "host", "boards", "ulab_kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__", "*.so"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, cwd=tmp_path)
    shutil.rmtree(source)
    archs = ("armv6m", "armv7m", "armv7emsp", "xtensawin", "rv32imc")
    env = os.environ | {"PYTHONPATH": str(target), "ULEARN_CACHE": str(tmp_path / "no-cache")}
    run = [sys.executable, "-c", LOOK.format(archs=archs)]
    said = subprocess.run(run, check=True, env=env, cwd=tmp_path, capture_output=True, text=True)
    where, boards, natives = json.loads(said.stdout)
    assert where.startswith(str(target)) and boards == sorted(
        p.parent.name for p in emulate.BOARDS.glob("*/board.json")
    )
    assert len(natives) == 5 * len(archs) and all(path.startswith(str(target)) for path in natives)
    (tmp_path / "a.ulm").write_bytes(cases.random_case(0).plan.data)
    command = [sys.executable, "-m", "ulearn_host.cli", "inspect", "a.ulm", "--json"]
    said = subprocess.run(command, check=True, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert {"RPI_PICO", "ESP32_GENERIC"} <= {board["board"] for board in json.loads(said.stdout)["boards"]}
