"""What only a 32-bit board can show: memory, a locked heap, symbols."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import cases
from conftest import HERE, ON_DEBIAN, Device
from ulearn_host import emulate, report

SEEDS = (1, 2, 3, 4, 7)


@pytest.fixture(scope="module")
def plans(cortex_m0: Device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random plans on the board and in a folder."""
    folder = tmp_path_factory.mktemp("plans")
    for seed in (0, *SEEDS):
        cases.write(cases.random_case(seed), folder)
    cortex_m0.put(*folder.iterdir(), HERE / "device" / "memory.py")
    cortex_m0.fresh("pass")  # whatever other tests have left in the heap
    return folder


@pytest.mark.parametrize("seed", SEEDS)
def test_predicted_ram(cortex_m0: Device, plans: Path, seed: int) -> None:
    """`inspect` predicts what gc.mem_alloc shows, within 1 % or 256 bytes; a step leaves nothing behind."""
    lines = cortex_m0.run(f"import memory; memory.heap('case{seed}.ulm')")
    _, measured, grown = lines[0].split()
    predicted = report.read(plans / f"case{seed}.ulm").ram_bytes
    assert abs(int(measured) - predicted) <= max(256, 0.01 * predicted), (int(measured), predicted)
    assert int(grown) == 0


@pytest.mark.parametrize("seed", (0, *SEEDS))
def test_steps_allocate_nothing(cortex_m0: Device, plans: Path, seed: int) -> None:
    """A hundred training steps under micropython.heap_lock()."""
    lines = cortex_m0.run(f"import memory; memory.locked('case{seed}.ulm', 'case{seed}')")
    assert lines == ["locked 100 100"]


def test_no_float_in_the_core() -> None:
    """nm on the armv6m objects: no float routine, and nothing from outside but MicroPython's own tables."""
    if not ON_DEBIAN:
        pytest.skip("not a Debian system: the module cannot be built")
    objects = sorted(emulate.find_native("armv6m").parent.rglob("*.o"))
    assert len(objects) >= 3
    out = subprocess.run(["arm-none-eabi-nm", *map(str, objects)], capture_output=True, text=True, check=True).stdout
    symbols = {line.split()[-1] for line in out.splitlines() if line and not line.endswith(":")}
    assert "ul_dense_back" in symbols
    assert not [s for s in symbols if s.startswith(("__aeabi_f", "__aeabi_d"))]
    assert not [s for s in symbols if s.startswith("__aeabi")]
