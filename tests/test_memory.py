"""Heap that random networks with branches take on a 32-bit board, and how well `inspect` predicts it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import branches
import cases
from conftest import HERE, Device
from ulearn_host import report
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.network import Depthwise
from ulearn_host.prepare import from_network
from ulearn_host.schemes import TRAINING_SCHEMES
from ulearn_host.tflite_import import load_tflite

SEEDS = range(20, 30)
LAYERWISE = (3, 7)
INFERENCE = (2, 4)
LOCKED = 23  # of the network that is trained with a locked heap
_KEYWORDS = "kws01_dscnn_int8.tflite"


def _plans() -> Iterator[tuple[str, bytes]]:
    for seed in SEEDS:
        yield f"case{seed}", branches.random_case(seed).plan.data
    for seed in LAYERWISE:
        plan = branches.random_case(seed).plan
        yield f"layers{seed}", compile_plan(plan.network, replace(plan.options, layerwise=True)).data
    for seed in INFERENCE:
        yield f"infer{seed}", compile_plan(branches.random_case(seed).plan.network, Options("none")).data


def _locked(scheme: str) -> cases.Case:
    """A network with branches and its samples, compiled anew for a scheme."""
    case = branches.random_case(LOCKED)
    network = case.plan.network
    half = tuple(
        (len(d.weights) if isinstance(d, Depthwise) else -(-len(d.weights) // 2), True) for d in network.layers
    )
    options = Options(scheme, selection=half if scheme == "sparse" else None)  # type: ignore[arg-type]
    return replace(case, seed=100 + TRAINING_SCHEMES.index(scheme), plan=compile_plan(network, options))  # type: ignore[arg-type]


NAMES = [f"case{seed}" for seed in SEEDS] + [f"layers{s}" for s in LAYERWISE] + [f"infer{s}" for s in INFERENCE]


@pytest.fixture(scope="module")
def plans(own_cortex_m0: Device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plans on the board and in a folder."""
    folder = tmp_path_factory.mktemp("plans")
    for name, data in _plans():
        (folder / f"{name}.ulm").write_bytes(data)
    for scheme in TRAINING_SCHEMES:
        cases.write(_locked(scheme), folder)
    own_cortex_m0.put(*folder.iterdir(), HERE / "device" / "memory.py")
    return folder


def check(read: report.Report, line: str, streamed: bool = False) -> None:
    """Within 1 % or 256 bytes; a step leaves nothing behind."""
    _, measured, grown = line.split()
    predicted = read.frozen.ram_streamed if streamed else read.ram_bytes
    print(f"{read.path.rpartition('/')[2]}: measured {measured}, predicted {predicted}")
    assert abs(int(measured) - predicted) <= max(256, 0.01 * predicted), (int(measured), predicted)
    assert int(grown) == 0


@pytest.mark.parametrize("name", NAMES)
def test_predicted_ram(own_cortex_m0: Device, plans: Path, name: str) -> None:
    """`inspect` predicts what gc.mem_alloc shows: ten networks and schemes, programs by layer, inference alone."""
    read = report.read(plans / f"{name}.ulm")
    assert len(read.programs) > 2 or not name.startswith("layers")
    check(read, own_cortex_m0.run(f"import memory; memory.heap('{name}.ulm')")[0])


@pytest.mark.parametrize("name", ["case22", "layers7", "infer2"])
def test_predicted_ram_streamed(own_cortex_m0: Device, plans: Path, name: str) -> None:
    """The same where the frozen weights stay in the file."""
    line = own_cortex_m0.run(f"import memory; memory.heap('{name}.ulm', 'stream')")[0]
    check(report.read(plans / f"{name}.ulm"), line, streamed=True)


def test_predicted_ram_of_keyword_spotting(own_cortex_m0: Device, plans: Path, shared_data: Path) -> None:
    """A real network of which chosen layers train, on a board that has just been started.

    A board that has run for long has more in its heap than is used: what a number points to by chance is kept.
    """
    network = replace(load_tflite(shared_data / "models" / _KEYWORDS), loss="softmax_ce")
    last = len(network.layers) - 1
    chosen = [(len(d.weights) if last - i in (0, 1, 3) else 0, last - i < 5) for i, d in enumerate(network.layers)]
    path = plans / "keywords.ulm"
    path.write_bytes(compile_plan(network, Options("sparse", selection=tuple(chosen))).data)
    own_cortex_m0.put(path)
    check(report.read(path), own_cortex_m0.fresh("import memory; memory.heap('keywords.ulm')")[0])


@pytest.mark.parametrize("frozen", ["ram", "stream"])
@pytest.mark.parametrize("scheme", TRAINING_SCHEMES)
def test_steps_allocate_nothing(own_cortex_m0: Device, plans: Path, scheme: str, frozen: str) -> None:
    """A hundred training steps by every scheme under micropython.heap_lock(), of a network with branches.

    Where the weights are streamed, in batches of three.
    """
    stem = f"case{_locked(scheme).seed}"
    code = f"import memory; memory.locked('{stem}.ulm', '{stem}', '{frozen}')"
    assert own_cortex_m0.run(code) == ["locked 100 100"]


@pytest.mark.parametrize("heap", [192_512, 112_640], ids=["RP2040", "ESP32"])
def test_keyword_spotting_trains_in_96_kilobytes(
    own_cortex_m0: Device, shared_data: Path, tmp_path: Path, heap: int
) -> None:
    """Package, kernels, plan, samples and all: a fourth of the last convolution, two layers' biases, the last layer.

    The frozen weights are streamed from the plan's file. heap: as large as the chip's.
    """
    network = replace(load_tflite(shared_data / "models" / _KEYWORDS), loss="softmax_ce")
    *_, convolution, last = network.layers
    chosen = [(0, False) for _ in network.layers]
    chosen[-2:] = [(len(convolution.weights) // 4, True), (len(last.weights), True)]
    with np.load(shared_data / "kws" / "kws_test_4890_mfcc_int8.npz") as archive:
        x, y = archive["X"].reshape(len(archive["X"]), -1), archive["y"]
    plan = from_network(network, x[:100], y[:100], options=Options("sparse", selection=tuple(chosen), gradients="int8"))
    (tmp_path / "keywords.ulm").write_bytes(plan.data)
    clips = b"".join(bytes([label]) + clip.tobytes() for clip, label in zip(x[:22], y[:22].tolist(), strict=True))
    (tmp_path / "clips.bin").write_bytes(clips)
    own_cortex_m0.put(tmp_path / "keywords.ulm", tmp_path / "clips.bin", HERE / "device" / "whole.py")
    line = own_cortex_m0.fresh(f"import whole; whole.main('keywords.ulm', {heap}, 'stream', 22, 2)")[-1]
    print(heap, line)
    name, used, _, steps, changed = line.split()
    assert (name, steps, changed) == ("whole", "44", "True")
    assert int(used) <= 84 * 1024
