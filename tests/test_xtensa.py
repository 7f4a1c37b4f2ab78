"""The modules for the ESP32 compute the reference's bits, on an emulated Xtensa.

By hand, since their compiler comes from a Debian that is not released: `make native-all`, then `pytest -m xtensa`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ulab_kernels

import branches
import cases
import reference
import steps
import ulearn
import xtensa_image
from test_native import COMMITTED, operator_plans
from ulearn import loader
from ulearn_host import emulate

pytestmark = pytest.mark.xtensa

PLANS = 40


def kept(table: list[Any]) -> tuple[bytes | None, ...]:
    """A copy of the buffers."""
    return tuple(None if block is None else bytes(block) for block in table)


def recorder() -> tuple[Callable[..., int], list[xtensa_image.Call]]:
    """CPython's kernels as an executor, and the list of the calls that are made of it."""
    calls = []

    def run(program: Any, table: list[Any], first: int, count: int, index: int = -1) -> int:
        before = kept(table)
        code = ulab_kernels.run(program, table, first, count, index)
        assert index == -1
        calls.append(xtensa_image.Call(bytes(program), before, first, count, code, kept(table)))
        return code

    return run, calls


def trained(case: cases.Case, folder: Path) -> list[xtensa_image.Call]:
    """The calls that train a case, to the reference's bits."""
    run, calls = recorder()
    assert steps.run(str(folder), cases.write(case, folder), run) == cases.expected(case)
    return calls


def agree(calls: list[xtensa_image.Call], folder: Path) -> set[str]:
    """Every call leaves the same bits in every buffer, in each module that knows its records; those modules."""
    if not (emulate.cache_dir() / "clang-xtensa").exists():
        pytest.skip("no clang for Xtensa: run `make native-all`")
    names = set()
    for name in emulate.NATIVE_MODULES:
        known = [call for call in calls if name in loader.modules([call.program])]
        if not known:
            continue
        names.add(name)
        results = xtensa_image.run((COMMITTED / "xtensawin" / f"{name}.mpy").read_bytes(), known, folder)
        for call, (code, after) in zip(known, results, strict=True):
            assert (code, after) == (call.code, call.after), name
    return names


@pytest.mark.parametrize("kind", [branches, cases])
def test_trains(kind: Any, tmp_path: Path) -> None:
    """Random plans, a step and a prediction in turns."""
    calls = [call for seed in range(PLANS) for call in trained(kind.random_case(seed), tmp_path)]
    assert len(calls) > 20 * PLANS
    reached = agree(calls, tmp_path)
    assert reached == set(emulate.NATIVE_MODULES) if kind is cases else {"ulab_last", "ulab_kernels"} <= reached


def test_infers(tmp_path: Path) -> None:
    """Every operator of TensorFlow Lite that gets in."""
    run, calls = recorder()
    for plan, x in operator_plans(tmp_path):
        model = ulearn.load(bytearray(plan), run)
        assert bytes(model.output(x)) == reference.Machine(reference.parse(plan)).predict(x)
    assert len(calls) > 100
    assert agree(calls, tmp_path) == set(emulate.NATIVE_MODULES)
