"""The native modules of every architecture: those committed are the sources', and the RISC-V ones compute the bits."""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import branches
import cases
import code_heap
import conftest
import reference
import tflite_models
from conftest import HERE, ON_DEBIAN, Device
from test_bits import FIRMWARE, listing, micropython
from ulearn import loader, loading
from ulearn import plan as plan_file
from ulearn_host import emulate
from ulearn_host import numbers as n
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


# A module that is loaded already is taken before smaller ones; which were, the last line says.
ALONE = """import sys, {module}, steps
steps.main('.', {stems})
print(sorted(m for m in sys.modules if m[:5] == 'ulab_'))"""


def known_to(module: str, seeds: int) -> tuple[dict[str, cases.Case], set[int]]:
    """Random cases all of whose records a module knows, by stems of their own, and the operations in them."""
    chosen, ops = {}, set()
    for kind in (cases, branches):
        for seed in range(seeds):
            case = kind.random_case(seed)
            programs = plan_file.read(case.plan.data).programs
            if module in loader.modules(programs):
                case = replace(case, seed=len(chosen))
                chosen[f"case{case.seed}"] = case
                ops |= {p[at] for p in programs for at in range(n.PROGRAM_BYTES, len(p), n.RECORD_BYTES)}
    return chosen, ops


def operations(module: str) -> set[int]:
    """What a module knows, by the loader's table."""
    parts = loader._HAVE[loading.MODULES.index(module)]
    known = {op for i, ops in enumerate(loader._PARTS) if parts >> i & 1 for op in ops} | set(loader._ALWAYS)
    rest = {value for name, value in vars(n).items() if name.startswith("OP_")} - set(loader._ALWAYS)
    return known | (rest - {op for ops in loader._PARTS for op in ops} if parts & loader._TRAINING else set())


@pytest.mark.parametrize("module", [m for m in emulate.NATIVE_MODULES if m != "ulab_infer"])
def test_each_module_trains_alone(module: str, cortex_m0: Device, tmp_path: Path) -> None:
    """On the Unix port and on the Cortex-M0, what the loader says that it knows, to the bits of the reference."""
    chosen, ops = known_to(module, 60)
    trains = {
        n.OP_SOFTMAX_CE,
        n.OP_UPDATE_WEIGHT,
        n.OP_UPDATE_BIAS,
        n.OP_DENSE_BACK,
        n.OP_CONV_BACK,
        n.OP_MSE,
        n.OP_SUM,
    }
    assert len(chosen) >= 8 and trains & ops == trains & operations(module)
    wanted = {cases.write(case, tmp_path): cases.expected(case) for case in chosen.values()}
    shutil.copy(emulate.find_native("x64", module=module), tmp_path)
    code = ALONE.format(module=module, stems=list(wanted))
    lines = micropython(emulate.find_micropython(), tmp_path, [tmp_path, FIRMWARE, HERE / "device"], code)
    assert lines == ["executor native", *listing(wanted), f"['{module}']"]
    few = dict(list(wanted.items())[:: max(1, len(wanted) // 4)])
    cortex_m0.put(
        *(tmp_path / f"{stem}{end}" for stem in few for end in (".ulm", ".bin")), HERE / "device" / "steps.py"
    )
    lines = cortex_m0.fresh(ALONE.format(module=module, stems=list(few)))
    assert lines == ["executor native", *listing(few), f"['{module}']"]


def test_a_module_knows_what_the_loader_says(tmp_path: Path) -> None:
    """Every operation: one that is known is refused for its buffers or runs, any other for itself."""
    probe = """if True:
    import struct, {module}
    for op in range(64):
        program = bytearray(128)
        struct.pack_into('<H', program, 52, 1)
        program[64] = op
        program[64 + 4] = 0
        code = None
        if op in {others}:
            code = {module}.run(program, [None] * 2 + [None] + [bytearray(8), bytearray(64), None, None], 0, 1)
        print(op, code)
    """
    everything = {value for name, value in vars(n).items() if name.startswith("OP_")}
    for module in emulate.NATIVE_MODULES:
        shutil.copy(emulate.find_native("x64", module=module), tmp_path)
        others = sorted(everything - operations(module))
        code = probe.format(module=module, others=others or "()")
        lines = micropython(emulate.find_micropython(), tmp_path, [tmp_path], code)
        refused = {int(line.split()[0]) for line in lines if line.endswith(str(n.E_RECORD))}
        assert refused == set(others), module


LOADED = """import sys, ulearn
for path in {paths}:
    try:
        model = ulearn.load(path)
        print(path, model.predict(bytes(model.input_bytes)) >= 0)
    except (ValueError, ImportError) as fault:
        print(type(fault).__name__, fault)
    print(sorted(m for m in sys.modules if m[:5] == 'ulab_'), ulearn.executor)"""


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A folder with plans that need ulab_infer, ulab_dense and ulab_kernels."""
    for module, data in code_heap.plans().items():
        if module in ("ulab_infer", "ulab_dense"):
            (tmp_path / f"{module}.ulm").write_bytes(data)
    case = next(c for c in map(branches.random_case, range(50)) if c.plan.network.loss == "softmax_ce" and needs_all(c))
    (tmp_path / "ulab_kernels.ulm").write_bytes(case.plan.data)
    return tmp_path


def needs_all(case: cases.Case) -> bool:
    """Whether only ulab_kernels knows all of a plan, and its inference too."""
    programs = plan_file.read(case.plan.data).programs
    return loader.modules(programs) == loader.modules(programs[:1]) == ["ulab_kernels"]


def loaded(interpreter: Path, folder: Path, *modules: str) -> list[str]:
    """What LOADED prints with these modules beside the plans."""
    for module in modules:
        shutil.copy(emulate.find_native("x64", module=module), folder)
    code = LOADED.format(paths=[f"{name}.ulm" for name in ("ulab_infer", "ulab_dense", "ulab_kernels")])
    return micropython(interpreter, folder, [folder, FIRMWARE], code)


def test_a_session_loads_two_native_modules_at_most(three: Path) -> None:
    """MicroPython never gives their memory back: the second one knows everything."""
    lines = loaded(emulate.find_micropython(), three, *emulate.NATIVE_MODULES)
    assert lines[::2] == [f"{name}.ulm True" for name in ("ulab_infer", "ulab_dense", "ulab_kernels")]
    assert lines[1] == "['ulab_infer'] native"
    assert lines[3] == lines[5] == "['ulab_infer', 'ulab_kernels'] native"


def test_without_a_module_that_knows_the_plan(three: Path) -> None:
    """Inference of a plan whose training is not known goes on; what cannot run at all is refused in a sentence."""
    lines = loaded(emulate.find_micropython(), three, "ulab_infer")
    assert lines[2] == "ulab_dense.ulm True"
    assert lines[4].startswith("ValueError ulab_kernels.ulm: ") and "deploy the plan" in lines[4]
    assert lines[5] == "['ulab_infer'] native"


def test_the_firmware_s_kernels_come_before_files(three: Path) -> None:
    """Whatever a former deployment has left in the file system, damaged files included."""
    if shutil.which("dpkg") is None:
        pytest.skip("not a Debian system: the interpreter cannot be built")
    (three / "ulab_infer.mpy").write_bytes(b"M\x05 of another version")
    lines = loaded(emulate.find_micropython(user_module=True), three, "ulab_dense")
    assert lines[::2] == [f"{name}.ulm True" for name in ("ulab_infer", "ulab_dense", "ulab_kernels")]
    assert not any("ulab_infer" in line or "ulab_dense" in line for line in lines[1::2])


def test_built_again_after_a_change(tmp_path: Path) -> None:
    """In the same folder, and for another module there."""
    if not ON_DEBIAN:
        pytest.skip("not a Debian system: the module cannot be built")
    shutil.copytree(ROOT / "ulab_kernels", tmp_path / "kernels")
    command = ["make", "-C", str(tmp_path / "kernels"), "ARCH=armv6m", f"PYTHON={sys.executable}"]
    command += [f"BUILD={tmp_path / 'build'}", f"MPY_DIR={emulate.cache_dir() / 'micropython-src'}"]

    def built(module: str) -> bytes:
        out = tmp_path / f"{module}.mpy"
        subprocess.run([*command, f"MOD={module}", f"OUT={out}"], check=True, capture_output=True)
        return out.read_bytes()

    first = built("ulab_dense")
    assert built("ulab_dense") == first != built("ulab_infer")
    source = tmp_path / "kernels" / "ul_softmax_ce.c"
    source.write_text(source.read_text().replace("* 710", "* 711"))
    assert first != built("ulab_dense")


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
