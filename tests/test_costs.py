"""What kernels cost on the emulated Cortex-M0, and how well that is predicted from a plan alone."""

from __future__ import annotations

from pathlib import Path

import pytest

import bench_board
import bench_cycles
import bench_tables
import tflite_models
from bench_board import Cost
from conftest import ON_DEBIAN
from ulearn_host import costs
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.tflite_import import load_tflite

# Instructions per multiply-accumulate on ARMv6-M, requantisation included, MicroPython's share not.
_LIMITS = {
    "dense 256→64": 3.8,
    "pointwise 64→64, 25×5": 3.8,
    "conv 3×3 8→16, 16×16": 4.5,
    "depthwise 3×3 8, 16×16": 7.0,
    "depthwise 3×3 64, 25×5": 7.0,
}
_WHOLE_LIMIT = 6.0  # of kws01, everything included
_TOLERANCE = 0.15
_FACTS = ("arch", "heap_bytes", "largest_block_bytes", "flash_bytes", "clock_hz", "cycles_per_instruction", "romfs")
_REAL = ("RPI_PICO", "RPI_PICO_W", "RPI_PICO2", "RPI_PICO2_W", "ESP32_GENERIC", "ESP32_GENERIC_S3", "ESP32_GENERIC_C3",
         "ESP32_GENERIC_C6")  # fmt: skip


@pytest.fixture(scope="module")
def on_m0() -> dict[str, Cost | None]:
    """Kernels, and models where the shared data is, on the Cortex-M0."""
    if not ON_DEBIAN:
        pytest.skip("not a Debian system: the emulated Cortex-M0 cannot be built")
    return bench_tables.measured("armv6m")


@pytest.mark.parametrize("kernel", _LIMITS)
def test_kernels_keep_their_limits(on_m0: dict[str, Cost | None], kernel: str) -> None:
    """Instructions per multiply-accumulate with requantisation."""
    cost = on_m0[kernel]
    assert cost is not None
    each = cost.records / bench_tables.work(bench_tables.kernels()[kernel])
    assert each <= _LIMITS[kernel], f"{kernel}: {each:.2f} instructions per multiply-accumulate"


def test_keyword_spotting_keeps_its_limit(shared_data: Path, on_m0: dict[str, Cost | None]) -> None:
    """The whole of kws01 with MicroPython's share."""
    name = "kws01_dscnn_int8"
    cost = on_m0[name]
    assert cost is not None
    assert cost.instructions <= _WHOLE_LIMIT * bench_tables.work(bench_tables.models()[name])


def _off(data: bytes, cost: Cost) -> float:
    """By which share of what was measured the prediction is off."""
    predicted = costs.predict(bench_tables.forward(data)[0], "armv6m")
    assert predicted is not None
    return predicted / cost.instructions - 1


@pytest.mark.parametrize("name", ["kws01_dscnn_int8", "ic01_resnet8_int8"])
def test_models_are_predicted(shared_data: Path, on_m0: dict[str, Cost | None], name: str) -> None:
    """From the plan alone, within 15 %."""
    cost = on_m0[name]
    assert cost is not None
    assert abs(_off(bench_tables.models()[name], cost)) <= _TOLERANCE


def test_random_networks_are_predicted(tmp_path: Path) -> None:
    """Ten networks of many operators and shapes, within 15 %."""
    if not ON_DEBIAN:
        pytest.skip("not a Debian system: the emulated Cortex-M0 cannot be built")
    plans = {}
    for seed in range(10):
        path = tmp_path / f"{seed}.tflite"
        path.write_bytes(tflite_models.random_model(seed))
        plans[str(seed)] = compile_plan(load_tflite(path), Options("none")).data
    found = bench_board.on_board("armv6m", plans)
    off = {name: _off(data, cost) for name, data in plans.items() if (cost := found[name])}
    assert len(off) == 10
    assert {name: share for name, share in off.items() if abs(share) > _TOLERANCE} == {}


def test_cycles_an_instruction_are_modelled(shared_data: Path, tmp_path: Path) -> None:
    """What the boards with an RP2040 say is what tests/bench_cycles.py counts, within 2 %."""
    if not ON_DEBIAN:
        pytest.skip("not a Debian system: the emulated Cortex-M0 cannot be built")
    instructions, cycles = bench_cycles.trace(bench_cycles.build(tmp_path), tmp_path / "log")
    for facts in costs.boards():
        if facts["mcu"].startswith("RP2040"):
            assert facts["cycles_per_instruction"] == pytest.approx(cycles / instructions, rel=0.02)


def test_a_board_is_described_by_facts_with_sources() -> None:
    """Each fact of a real board says what it is known by, and an unknown one that it is not known."""
    boards = {facts["board"]: facts for facts in costs.boards()}
    for name in _REAL:
        facts = boards[name]
        assert set(facts["known_by"]) == set(_FACTS)
        for fact in _FACTS:
            assert (facts[fact] is None) == facts["known_by"][fact].startswith("not known"), (name, fact)


def test_the_unmeasured_is_not_predicted() -> None:
    """No coefficients, no instructions; no clock or no cycles, no seconds; a stand-in says so."""
    plan = bench_tables.kernels()["dense 256→64"]
    records, _ = bench_tables.forward(plan)
    assert costs.predict(records, "xtensawin") is None
    unknown = [costs.Record(99, 0, (1, 1, 1), (1, 1, 1), (0, 0), (0, 0), (0, 0), 0, 0)]
    assert costs.predict(unknown, "armv6m") is None
    found = {name: rest for name, *rest in costs.predictions(bench_board.forward_program(plan))}
    assert set(_REAL) <= set(found)
    assert found["ESP32_GENERIC"] == [None, None, "unmeasured"]
    assert found["ESP32_GENERIC_C3"] == [None, None, "unmeasured"]
    count, seconds, note = found["RPI_PICO2"]
    assert count == costs.predict(records, "armv7m") and seconds is None and "armv7m" in note
    count, seconds, note = found["RPI_PICO"]
    facts = next(f for f in costs.boards() if f["board"] == "RPI_PICO")
    assert count is not None and seconds == count * facts["cycles_per_instruction"] / facts["clock_hz"]


def test_work_is_counted_as_is_usual() -> None:
    """Multiply-accumulates with those that meet the padding."""
    works = {name: bench_tables.work(data) for name, data in bench_tables.kernels().items()}
    assert works["dense 256→64"] == 256 * 64
    assert works["conv 3×3 8→16, 16×16"] == 256 * 72 * 16
    assert works["depthwise 3×3 64, 25×5, stride 2"] == 13 * 3 * 64 * 9
    assert works["add 16×16×16 (per output)"] == 4096
