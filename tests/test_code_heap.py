"""What package and native module take of a Cortex-M0's heap, to infer and to train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import code_heap
import speakers
from conftest import ON_DEBIAN
from ulearn_host import emulate, placement
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.tflite_import import load_tflite

LIMIT = 24 * 1024


@pytest.fixture(scope="module")
def found() -> dict[str, code_heap.Taken]:
    """Of each native module."""
    if not ON_DEBIAN:
        pytest.skip("not a Debian system: the emulated board cannot be built")
    for taken in code_heap.measured():
        print(taken)
    return {taken.module: taken for taken in code_heap.measured()}


def test_inference_and_training_take_24_kb(found: dict[str, code_heap.Taken]) -> None:
    """All networks' inference; training in every step of a fit: dense networks whole, others' dense layers behind a
    backbone of convolutions. Whoever trains convolutions has more code."""
    assert found["ulab_infer"].loaded <= LIMIT
    for module in ("ulab_dense", "ulab_convs", "ulab_last"):
        taken = found[module]
        assert taken.loaded < (taken.stepped or 0) < (taken.fitting or 0) <= LIMIT, taken
    assert (found["ulab_kernels"].fitting or 0) <= 36 * 1024


def test_keywords_too(shared_data: Path, tmp_path: Path) -> None:
    """MLPerf Tiny's keyword network, of which the last layer trains."""
    if not ON_DEBIAN:
        pytest.skip("not a Debian system: the emulated board cannot be built")
    network = replace(load_tflite(shared_data / speakers.MODEL_FILE), loss="softmax_ce")
    path = tmp_path / "kws.ulm"
    path.write_bytes(compile_plan(network, Options("last")).data)
    with emulate.start("QEMU_CORTEX_M0") as board:
        taken = code_heap.measure(board, path)
    print(taken)
    assert taken.module == "ulab_convs" and taken.fitting is not None
    assert taken.fitting <= LIMIT


def test_it_is_what_is_predicted(found: dict[str, code_heap.Taken]) -> None:
    """placement.code_bytes, by which a plan is held against a board's heap: not less than what is used, and near."""
    for module, taken in found.items():
        trains = taken.fitting is not None
        said = placement.code_bytes(module, trains, False)
        assert -200 <= said - (taken.fitting or taken.loaded) <= 900, (taken, said)
