"""The demo's gains hold for seeds that it was not made with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ON_DEBIAN


@pytest.mark.parametrize("seed", (11, 12, 13, 14, 15))
def test_gains_hold(seed: int, tmp_path: Path) -> None:
    """Every board and the fleet gain at least ten points on samples that nobody trained on."""
    if not ON_DEBIAN:
        pytest.skip("not a Debian system: the emulated Cortex-M0 cannot be built")
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "ulearn_host.cli", "demo", "--seed", str(seed), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    print(result)
    assert [b["name"] for b in result["boards"]] == ["unix-1", "unix-2", "cortex-m0"]
    for board in result["boards"]:
        assert "micropython" in board["implementation"]
        assert board["after"] >= board["before"] + 0.10
    for when, of_board in (
        ("before", "before"),
        ("after", "federated"),
    ):  # all boards are in it, with equally many samples
        mean = sum(board[of_board] for board in result["boards"]) / 3
        assert result["federated"][when] == pytest.approx(mean)
    assert result["federated"]["after"] >= result["federated"]["before"] + 0.10
    assert result["federated"]["rounds"] >= 2 and result["seconds"] < 170
