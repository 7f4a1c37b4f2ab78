"""Instructions of a training step on the emulated Cortex-M0: kws01, whatever of it trains (tests/bench_training.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

import bench_training
from conftest import ON_DEBIAN

LIMIT = 8.0  # instructions a multiply-accumulate, everything behind the forward pass counted


@pytest.mark.parametrize("place", range(1, 4))
def test_backward_keeps_its_limit(shared_data: Path, place: int) -> None:
    """Biases, biases and the last layer, a sparse choice."""
    if not ON_DEBIAN:
        pytest.skip("not a Debian system: the emulated Cortex-M0 cannot be built")
    cost = bench_training.measured()[place]
    print(f"{cost.name}: {cost.each:.2f} instructions a MAC, a step is {cost.step / cost.inference:.2f} inferences")
    assert cost.each <= LIMIT
