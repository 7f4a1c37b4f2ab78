"""Heap that random networks with branches take on a 32-bit board, and how well `inspect` predicts it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import branches
import cases
from conftest import HERE, Device
from ulearn_host import report
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.tflite_import import load_tflite

SEEDS = range(20, 30)
LAYERWISE = (3, 7)
INFERENCE = (2, 4)
LOCKED = (20, 23, 26)
_KEYWORDS = "kws01_dscnn_int8.tflite"


def _plans() -> Iterator[tuple[str, bytes]]:
    for seed in SEEDS:
        yield f"case{seed}", branches.random_case(seed).plan.data
    for seed in LAYERWISE:
        plan = branches.random_case(seed).plan
        yield f"layers{seed}", compile_plan(plan.network, replace(plan.options, layerwise=True)).data
    for seed in INFERENCE:
        yield f"infer{seed}", compile_plan(branches.random_case(seed).plan.network, Options("none")).data


NAMES = [f"case{seed}" for seed in SEEDS] + [f"layers{s}" for s in LAYERWISE] + [f"infer{s}" for s in INFERENCE]


@pytest.fixture(scope="module")
def plans(own_cortex_m0: Device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plans on the board and in a folder."""
    folder = tmp_path_factory.mktemp("plans")
    for name, data in _plans():
        (folder / f"{name}.ulm").write_bytes(data)
    for seed in LOCKED:
        cases.write(branches.random_case(seed), folder)
    own_cortex_m0.put(*folder.iterdir(), HERE / "device" / "memory.py")
    return folder


def check(read: report.Report, line: str) -> None:
    """Within 1 % or 256 bytes; a step leaves nothing behind."""
    _, measured, grown = line.split()
    predicted = read.ram_bytes
    print(f"{read.path.rpartition('/')[2]}: measured {measured}, predicted {predicted}")
    assert abs(int(measured) - predicted) <= max(256, 0.01 * predicted), (int(measured), predicted)
    assert int(grown) == 0


@pytest.mark.parametrize("name", NAMES)
def test_predicted_ram(own_cortex_m0: Device, plans: Path, name: str) -> None:
    """`inspect` predicts what gc.mem_alloc shows: ten networks and schemes, programs by layer, inference alone."""
    read = report.read(plans / f"{name}.ulm")
    assert len(read.programs) > 2 or not name.startswith("layers")
    check(read, own_cortex_m0.run(f"import memory; memory.heap('{name}.ulm')")[0])


def test_predicted_ram_of_keyword_spotting(own_cortex_m0: Device, plans: Path, shared_data: Path) -> None:
    """A real network of which chosen layers train, on a board that has just been started.

    Operands in FROZEN are 0x20000000 and more, as addresses on a Cortex-M are: what lies where one points by chance is
    kept by the collector, and that is more the longer a board has run.
    """
    network = replace(load_tflite(shared_data / "models" / _KEYWORDS), loss="softmax_ce")
    last = len(network.layers) - 1
    chosen = [(len(d.weights) if last - i in (0, 1, 3) else 0, last - i < 5) for i, d in enumerate(network.layers)]
    path = plans / "keywords.ulm"
    path.write_bytes(compile_plan(network, Options("sparse", selection=tuple(chosen))).data)
    own_cortex_m0.put(path)
    check(report.read(path), own_cortex_m0.fresh("import memory; memory.heap('keywords.ulm')")[0])


@pytest.mark.parametrize("seed", LOCKED)
def test_steps_allocate_nothing(own_cortex_m0: Device, plans: Path, seed: int) -> None:
    """A hundred training steps of a network with branches under micropython.heap_lock()."""
    assert own_cortex_m0.run(f"import memory; memory.locked('case{seed}.ulm', 'case{seed}')") == ["locked 100 100"]
