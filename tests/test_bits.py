"""Every executor trains random plans to the bits of the independent reference (tests/reference.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import cases
import steps
import ulearn
from conftest import HERE, Device
from ulearn import ulab_executor
from ulearn_host import emulate

PLANS = 200
ON_THE_CHIP = 20


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of all cases."""
    path = tmp_path_factory.mktemp("cases")
    for seed in range(PLANS):
        cases.write(cases.random_case(seed), path)
    return path


@pytest.fixture(scope="session")
def wanted() -> dict[str, list[str]]:
    """The reference's lines by case."""
    return {f"case{seed}": cases.expected(cases.random_case(seed)) for seed in range(PLANS)}


def test_cases_cover_the_format(wanted: dict[str, list[str]]) -> None:
    """The random plans use every scheme, loss, kind of weights and mask, and training changes their weights."""
    made = [cases.random_case(seed) for seed in range(PLANS)]
    assert {c.plan.options.scheme for c in made} == {"last", "bias", "last+bias", "full"}
    assert {c.plan.options.weights for c in made} == {"int16", "int8"}
    assert {c.plan.network.loss for c in made} == {"softmax_ce", "mse"}
    assert {c.plan.options.fraction for c in made} == set(range(8))
    assert {len(c.plan.network.layers) for c in made} == {1, 2, 3, 4}
    moving = [len({line.split()[0] for line in lines}) for lines in wanted.values()]
    assert sum(n > cases.STEPS // 2 for n in moving) > 0.9 * PLANS


def test_native_cpython(folder: Path, wanted: dict[str, list[str]]) -> None:
    """CPython with the C core."""
    assert ulearn.executor == "native"
    for stem, lines in wanted.items():
        assert steps.run(str(folder), stem) == lines, stem


def test_ulab_executor_with_numpy(folder: Path, wanted: dict[str, list[str]]) -> None:
    """CPython with numpy in ulab's place."""
    for stem, lines in wanted.items():
        assert steps.run(str(folder), stem, ulab_executor.run) == lines, stem


def micropython(interpreter: Path, folder: Path, path: list[Path], code: str) -> list[str]:
    """Run code on a Unix-port interpreter with nothing but `path` to import from."""
    environment = {**os.environ, "MICROPYPATH": ":".join(str(p) for p in path)}
    done = subprocess.run(
        [str(interpreter), "-X", "heapsize=64m", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr + done.stdout[-500:]
    return done.stdout.splitlines()


def listing(wanted: dict[str, list[str]]) -> list[str]:
    """What tests/device/steps.py prints for all cases."""
    return [line for stem, lines in wanted.items() for line in (f"case {stem}", *lines)]


FIRMWARE = HERE.parent / "firmware"


def test_unix_user_module(folder: Path, wanted: dict[str, list[str]]) -> None:
    """The Unix port with the kernels built in."""
    if shutil.which("dpkg") is None:
        pytest.skip("not a Debian system: the interpreter cannot be built")
    interpreter = emulate.find_micropython(user_module=True)
    code = f"import steps; steps.main('.', {list(wanted)})"
    lines = micropython(interpreter, folder, [FIRMWARE, HERE / "device"], code)
    assert lines == ["executor native", *listing(wanted)]


def test_unix_native_module(folder: Path, wanted: dict[str, list[str]], tmp_path: Path) -> None:
    """The stock Unix port with the native .mpy."""
    for module in emulate.NATIVE_MODULES:
        shutil.copy(emulate.find_native("x64", module=module), tmp_path)
    code = f"import steps; steps.main('.', {list(wanted)})"
    lines = micropython(emulate.find_micropython(), folder, [tmp_path, FIRMWARE, HERE / "device"], code)
    assert lines == ["executor native", *listing(wanted)]


def test_real_ulab(folder: Path, wanted: dict[str, list[str]]) -> None:
    """Interpreters with ulab, given by ULEARN_MICROPYTHON_ULAB (several with : between them)."""
    named = os.environ.get("ULEARN_MICROPYTHON_ULAB")
    if not named:
        pytest.skip("ULEARN_MICROPYTHON_ULAB names no interpreter with ulab")
    for interpreter in named.split(":"):
        code = f"import steps; steps.main('.', {list(wanted)})"
        lines = micropython(Path(interpreter), folder, [FIRMWARE, HERE / "device"], code)
        assert lines == ["executor ulab", *listing(wanted)], interpreter
        for stem in ("case0", "case5"):  # a regression and a classifier
            code = f"import ulab_arrays; ulab_arrays.main('{stem}.ulm')"
            assert micropython(Path(interpreter), folder, [FIRMWARE, HERE / "device"], code) == ["ulab arrays 8"]


def test_cortex_m0(cortex_m0: Device, folder: Path, wanted: dict[str, list[str]]) -> None:
    """The emulated Cortex-M0: 32 bits, no long multiply, the armv6m module."""
    chosen = {f"case{seed}": wanted[f"case{seed}"] for seed in range(ON_THE_CHIP)}
    files = [folder / f"{stem}{end}" for stem in chosen for end in (".ulm", ".bin")]
    cortex_m0.put(*files, HERE / "device" / "steps.py")
    lines = cortex_m0.run(f"import steps; steps.main('.', {list(chosen)})")
    assert lines == ["executor native", *listing(chosen)]
