"""The README tells the truth: its table is what `make bench` prints, its code runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import bench
import bench_tables
import code_heap
from conftest import ON_DEBIAN, Device
from ulearn_host.compiler import Options, compile_plan


def differences(old: str, new: str) -> list[tuple[str, str, float]]:
    """Words and numbers of two tables in order, with by how much the numbers differ; other words must be the same."""
    pairs = list(zip(re.findall(r"[\w+.,-]+", old), re.findall(r"[\w+.,-]+", new), strict=True))
    result = []
    for a, b in pairs:
        try:
            x, y = (float(v.replace(",", "").rstrip(".")) for v in (a, b))
        except ValueError:
            assert a == b
            continue
        result.append((a, b, abs(x - y)))
    return result


@pytest.fixture(scope="module", autouse=True)
def measured() -> None:
    """All tables at once, where that can be."""
    if ON_DEBIAN:
        bench.measure_all()


def assert_close(old: str, new: str) -> None:
    """Every number within 2 % (compilers differ a little), all else the same."""
    for before, after, difference in differences(old, new):
        number = after.replace(",", "").rstrip(".")
        decimals = len(number.partition(".")[2])
        allowed = max(0.02 * float(number), 1.1 * 10.0**-decimals if decimals else 0)
        assert difference <= allowed, (before, after)


@pytest.mark.parametrize("name", ["bench", "kernels"])
def test_a_table_of_costs_is_measured(name: str) -> None:
    """Regenerated, it says the same."""
    if not ON_DEBIAN:
        pytest.skip("not a Debian system: the emulated Cortex-M0 cannot be built")
    assert_close(bench.in_readme(name), bench.text() if name == "bench" else bench_tables.kernel_text())


def test_the_table_of_models_is_measured(shared_data: Path) -> None:
    """Regenerated, it says the same."""
    if not ON_DEBIAN:
        pytest.skip("not a Debian system: the emulated Cortex-M0 cannot be built")
    assert_close(bench.in_readme("models"), bench_tables.model_text())


def test_the_ten_lines_run(cortex_m0: Device, tmp_path: Path) -> None:
    """The README's MicroPython, unchanged, on the Cortex-M0; only the sensor is a recorded signal here."""
    text = bench.README.read_text()
    code = re.search(r"```python\n(import ulearn\n.*?)```", text, re.S)
    assert code and len(code.group(1).strip().splitlines()) <= 12
    (tmp_path / "digits.ulm").write_bytes(compile_plan(code_heap.perceptron(), Options("last+bias")).data)
    rng = np.random.default_rng(3)
    signal = rng.integers(-128, 128, (40, 64)).astype(np.int8)
    (tmp_path / "signal.bin").write_bytes(signal.tobytes())
    sensor = (
        "_data = open('signal.bin','rb').read()\n"
        "def read(n=[0]):\n"
        "    n[0] += 1\n"
        "    i = n[0] % 40\n"
        "    return _data[i * 64:i * 64 + 64], i % 10\n"
    )
    (tmp_path / "sensor.py").write_text(sensor)
    (tmp_path / "lines.py").write_text(code.group(1))
    cortex_m0.put(tmp_path / "digits.ulm", tmp_path / "signal.bin", tmp_path / "sensor.py", tmp_path / "lines.py")
    lines = cortex_m0.fresh("import lines")
    assert lines and lines[-1].isdigit()
    again = "import ulearn;m=ulearn.load('digits.ulm');b=bytes(m.train_blob);"
    again += "m.restore('digits.ckpt');print(b!=m.train_blob)"
    assert cortex_m0.fresh(again) == ["True"]
