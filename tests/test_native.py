"""The native modules of every architecture: those committed are the sources', and the RISC-V ones compute the bits."""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import branches
import cases
import conftest
import reference
import tflite_models
from conftest import HERE, ON_DEBIAN, Device
from test_bits import listing
from ulearn_host import emulate
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.tflite_import import load_tflite

ROOT = HERE.parent
COMMITTED = ROOT / "firmware" / "native"
ARCHITECTURES = ("x64", "armv6m", "armv7m", "armv7emsp", "rv32imc", "xtensawin")
AGAIN = "firmware/native is not of these sources: run `make native-commit` and commit it"
ON_THE_CHIP = 6


def sources() -> str:
    """The hash of what the modules are made of, as boards/build.mk writes it."""
    kernels = [p for end in ("c", "h", "S", "inc") for p in (ROOT / "ulab_kernels").glob(f"*.{end}")]
    kernels = [p for p in kernels if p.name != "bind_cpython.c"]
    tools = [ROOT / "boards" / "xtensa" / name for name in ("mpy_ld.py", "xtensa-esp32-elf-gcc")]
    files = sorted([*kernels, *tools, ROOT / "ulab_kernels" / "Makefile"], key=str)
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_committed_modules_are_the_sources(arch: str) -> None:
    """By the sources' hash, and to the byte where the same compiler has built them here, too."""
    compiler, made_of = (COMMITTED / arch / "built.txt").read_text().splitlines()
    assert made_of == sources(), AGAIN
    built = emulate.cache_dir() / "native" / arch
    if not (built / "built.txt").exists() or (built / "built.txt").read_text().splitlines()[0] != compiler:
        return  # another compiler makes other bytes of the same sources
    assert (built / "built.txt").read_text().splitlines()[1] == made_of, "the cache is stale: run `make native`"
    for module in emulate.NATIVE_MODULES:
        data = (COMMITTED / arch / f"{module}.mpy").read_bytes()
        assert data[:2] == b"M\x06", module
        assert data == (built / f"{module}.mpy").read_bytes(), f"{module}: {AGAIN}"


def test_the_same_bytes_from_any_folder(tmp_path: Path) -> None:
    """Built in two places, from copies of the sources at two more."""
    if not ON_DEBIAN:
        pytest.skip("not a Debian system: the module cannot be built")
    made = []
    for place in ("a", "elsewhere/b"):
        shutil.copytree(ROOT / "ulab_kernels", tmp_path / place / "kernels")
        folder = tmp_path / place / "build"
        command = ["make", "-C", str(tmp_path / place / "kernels"), "ARCH=rv32imc", f"BUILD={folder}"]
        command += [f"OUT={folder}/module.mpy", f"MPY_DIR={emulate.cache_dir() / 'micropython-src'}"]
        subprocess.run([*command, f"PYTHON={sys.executable}"], check=True, capture_output=True)
        made.append((folder / "module.mpy").read_bytes())
    assert made[0] == made[1]


def operator_plans(folder: Path) -> list[tuple[bytes, bytes]]:
    """A plan for each operator of TensorFlow Lite and each of its variants, with an input."""
    random = np.random.default_rng(5)
    made = []
    for name, data in dict(tflite_models.operator_models()).items():
        (folder / f"{name}.tflite").write_bytes(data)
        network = load_tflite(folder / f"{name}.tflite")
        x = random.integers(-128, 128, network.input.size).astype(np.int8).tobytes()
        made.append((compile_plan(network, Options("none")).data, x))
    return made


@pytest.fixture(scope="module")
def rv32(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """An emulated RISC-V with an ESP32-C3's heap, the package and the native modules on it."""
    yield from conftest._device("QEMU_RV32", tmp_path_factory)


@pytest.mark.parametrize("kind", [cases, branches])
def test_rv32_trains(rv32: Device, kind: Any, tmp_path: Path) -> None:
    """Random plans, a step and a prediction in turns, to the bits of the reference."""
    made = [kind.random_case(seed) for seed in range(ON_THE_CHIP)]
    wanted = {cases.write(case, tmp_path): cases.expected(case) for case in made}
    rv32.put(*tmp_path.iterdir(), HERE / "device" / "steps.py")
    assert rv32.run(f"import steps; steps.main('.', {list(wanted)})") == ["executor native", *listing(wanted)]


def test_rv32_infers(rv32: Device, tmp_path: Path) -> None:
    """Models of one operator, of all kinds that get in."""
    packed, wanted = bytearray(), []
    for plan, x in operator_plans(tmp_path)[::4]:
        packed += struct.pack("<III", len(plan), 1, len(x)) + plan + x
        wanted.append(cases.digest([reference.Machine(reference.parse(plan)).predict(x)]))
    (tmp_path / "packed.bin").write_bytes(packed)
    rv32.put(tmp_path / "packed.bin", HERE / "device" / "forward.py")
    assert rv32.fresh("import forward; forward.packed('packed.bin', None)")[-len(wanted) :] == wanted
