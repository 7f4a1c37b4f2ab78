"""Heap that package and native module take on a freshly started Cortex-M0, for each of the native modules.

For `make bench` (the README's table) and tests/test_code_heap.py, which holds it to a limit.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import bench_networks
import tflite_models
from conftest import HERE
from ulearn_host import deploy, emulate, report
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.errors import UserError
from ulearn_host.network import Network
from ulearn_host.quantise import FloatDense, quantise
from ulearn_host.tflite_import import load_tflite

STORE = 2  # samples in the store, as in device/code_heap.py
# Of a sample, on a 32-bit board: an object and blocks of 16 bytes.
_OBJECT_BYTES, _BLOCK_BYTES = 16, 16


@dataclass(frozen=True)
class Taken:
    """Bytes of heap, the plan and its samples not counted: a plan being loaded; once steps were taken and predictions
    made; in the midst of a fit over a sample store. The last two are None of what only infers."""

    module: str
    loaded: int
    stepped: int | None
    fitting: int | None


def perceptron() -> Network:
    """A 64-32-10 perceptron of seeded numbers: the same bytes on every machine."""
    import numpy as np

    rng = np.random.default_rng(0)
    layers = [
        FloatDense(rng.normal(0, 0.2, (o, i)), np.zeros(o), relu) for i, o, relu in ((64, 32, True), (32, 10, False))
    ]
    return quantise(layers, rng.uniform(0, 1, (100, 64)), "softmax_ce")


def convolution() -> Network:
    """A convolution and what makes numbers for a loss of its outputs, to be trained whole."""
    return Network((bench_networks.conv((4, 4, 4), 8),), "mse")


def plans() -> dict[str, bytes]:
    """For each native module a plan of which it is the smallest that knows all records."""
    found = {
        "ulab_infer": compile_plan(perceptron(), Options("none")).data,
        "ulab_dense": compile_plan(perceptron(), Options("full")).data,
        "ulab_kernels": compile_plan(convolution(), Options("full")).data,
    }
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        for seed in itertools.count():
            if set(found) == set(emulate.NATIVE_MODULES):
                return {module: found[module] for module in emulate.NATIVE_MODULES}
            path.write_bytes(tflite_models.random_model(seed))
            try:
                data = compile_plan(replace(load_tflite(path), loss="softmax_ce"), Options("last")).data
            except UserError:
                continue
            path.write_bytes(data)
            found.setdefault(report.read(path).modules[0], data)
    raise AssertionError("unreachable")


def measure(board: emulate.EmulatedBoard, plan: Path) -> Taken:
    """Deploy a plan and measure it."""
    deploy.deploy(board.port, plan)
    deploy.mpremote(board.port, "fs", "cp", str(HERE / "device" / "code_heap.py"), ":")
    code = f"import code_heap; code_heap.main('{plan.name}')"
    said = dict(line.split() for line in deploy.mpremote(board.port, "soft-reset", "exec", code).splitlines())
    read = report.read(plan)
    return taken(read, {name: int(size) for name, size in said.items()})


def taken(read: report.Report, said: Mapping[str, int]) -> Taken:
    """What a board said, less the plan and what device/code_heap.py makes itself."""
    held = read.ram_bytes
    inputs, targets = _elements(read.input["shape"]), 2 if read.loss in ("softmax_ce", "hinge") else 0
    targets = targets or _elements(read.output["shape"])
    x = _object(inputs + 1)
    store = _object(STORE * inputs) + _object(STORE * targets)
    if "stepped" not in said:
        return Taken(read.modules[0], said["loaded"] - held, None, None)
    return Taken(read.modules[0], said["loaded"] - held, said["stepped"] - held - x, said["fitting"] - held - x - store)


def _elements(shape: list[int]) -> int:
    count = 1
    for dimension in shape:
        count *= dimension
    return count


def _object(data_bytes: int) -> int:
    return _OBJECT_BYTES + -(-data_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


@cache
def measured() -> tuple[Taken, ...]:
    """Of all modules, the smallest first."""
    result = []
    with TemporaryDirectory() as temporary, emulate.start("QEMU_CORTEX_M0") as board:
        for module, data in plans().items():
            path = Path(temporary) / "code.ulm"
            path.write_bytes(data)
            result.append(measure(board, path))
            assert result[-1].module == module
    return tuple(result)


def table() -> str:
    """Those, as the README has them."""
    rows = [["native module", "its file", "to infer", "training, step by step", "in a fit over a sample store"]]
    rows.append(["---", *["---:"] * 4])
    for found in measured():
        size = emulate.find_native("armv6m", module=found.module).stat().st_size
        sizes = [size, found.loaded, found.stepped, found.fitting]
        rows.append([f"`{found.module}`", *("" if s is None else f"{s:,}" for s in sizes)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
