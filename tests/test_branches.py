"""Networks with branches train to the bits of the independent reference on every executor (tests/branches.py)."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import branches
import cases
import steps
import ulearn
from conftest import HERE, Device
from test_bits import FIRMWARE, listing, micropython
from ulearn import ulab_executor
from ulearn_host import emulate
from ulearn_host import numbers as n
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.tflite_import import load_tflite

PLANS = 150
ON_THE_CHIP = 16


@pytest.fixture(scope="module")
def made() -> list[cases.Case]:
    """All cases."""
    return [branches.random_case(seed) for seed in range(PLANS)]


@pytest.fixture(scope="module")
def folder(made: list[cases.Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of all cases."""
    path = tmp_path_factory.mktemp("branches")
    for case in made:
        cases.write(case, path)
    return path


@pytest.fixture(scope="module")
def wanted(made: list[cases.Case]) -> dict[str, list[str]]:
    """The reference's lines by case."""
    return {f"case{case.seed}": cases.expected(case) for case in made}


def test_cases_cover_the_format(made: list[cases.Case], wanted: dict[str, list[str]]) -> None:
    """Every record of training occurs often, wide and narrow, and training changes weights nearly always."""
    count: dict[tuple[int, bool], int] = {}
    either = n.FLAG_NARROW_OUT | n.FLAG_NARROW_IN
    for case in made:
        for program in case.plan.programs[1:]:
            for key in {(r.op, bool(r.fields.get("flags", 0) & either)) for r in program.records}:
                count[key] = count.get(key, 0) + 1
    losses = (n.OP_SOFTMAX_CE, n.OP_MSE, n.OP_HINGE)
    forward = (n.OP_DENSE, n.OP_CONV_TRAINED, n.OP_DEPTHWISE_TRAINED, n.OP_MASK)
    dense = (n.OP_DENSE_BACK, n.OP_UPDATE_WEIGHT)
    for op in (*losses, *forward, *dense):
        assert count[op, False] >= 5, op
    for op in (n.OP_UPDATE_BIAS, *range(n.OP_CONV_BACK, n.OP_RELU_BACK + 1)):
        for narrow in (False, True):
            assert count.get((op, narrow), 0) >= 1, (op, narrow)
    again = [case for case in made if any("again" in str(r.writes) for p in case.plan.programs for r in p.records)]
    assert len(again) >= 5
    moving = [len({line.split()[0] for line in lines}) for lines in wanted.values()]
    assert sum(m > cases.STEPS // 2 for m in moving) > 0.8 * PLANS


def test_native_cpython(folder: Path, wanted: dict[str, list[str]]) -> None:
    """CPython with the C core."""
    assert ulearn.executor == "native"
    for stem, lines in wanted.items():
        assert steps.run(str(folder), stem) == lines, stem


def test_ulab_executor_with_numpy(folder: Path, wanted: dict[str, list[str]]) -> None:
    """CPython with numpy in ulab's place."""
    for stem, lines in wanted.items():
        assert steps.run(str(folder), stem, ulab_executor.run) == lines, stem


@pytest.mark.parametrize("kind", ["user module", "native module"])
def test_unix(kind: str, folder: Path, wanted: dict[str, list[str]], tmp_path: Path) -> None:
    """The Unix port with the kernels built in, and the stock one with the native .mpy."""
    if kind == "native module":
        for module in emulate.NATIVE_MODULES:
            shutil.copy(emulate.find_native("x64", module=module), tmp_path)
    interpreter = emulate.find_micropython(user_module=kind == "user module")
    code = f"import steps; steps.main('.', {list(wanted)})"
    lines = micropython(interpreter, folder, [tmp_path, FIRMWARE, HERE / "device"], code)
    assert lines == ["executor native", *listing(wanted)]


def test_cortex_m0(cortex_m0: Device, folder: Path, wanted: dict[str, list[str]]) -> None:
    """The emulated Cortex-M0: 32 bits, the inner loops in assembler."""
    chosen = {f"case{seed}": wanted[f"case{seed}"] for seed in range(ON_THE_CHIP)}
    files = [folder / f"{stem}{end}" for stem in chosen for end in (".ulm", ".bin")]
    cortex_m0.put(*files, HERE / "device" / "steps.py")
    lines = cortex_m0.run(f"import steps; steps.main('.', {list(chosen)})")
    assert lines == ["executor native", *listing(chosen)]


def test_keyword_spotting(cortex_m0: Device, shared_data: Path, tmp_path: Path) -> None:
    """kws01 on real clips, sparse and all of it, on CPython, the Unix port and the Cortex-M0."""
    network = replace(load_tflite(shared_data / "models" / "kws01_dscnn_int8.tflite"), loss="softmax_ce")
    count = len(network.layers)
    chosen = [(len(d.weights) // 2 if i in (count - 4, count - 2) else 0, i > 4) for i, d in enumerate(network.layers)]
    chosen[-1] = (len(network.layers[-1].weights), True)
    with np.load(shared_data / "kws" / "kws_test_4890_mfcc_int8.npz") as archive:
        x, y = archive["X"][: cases.STEPS].reshape(cases.STEPS, -1), archive["y"][: cases.STEPS].astype(np.uint16)
    y = (y + np.arange(cases.STEPS, dtype=np.uint16)) % 12  # most would be right, and move next to nothing
    plans = [
        compile_plan(network, Options("sparse", selection=tuple(chosen))),
        compile_plan(network, Options("full", gradients="int8", recompute=True)),
    ]
    made = [cases.Case(900 + i, plan, x, y, (1229, -18), 0) for i, plan in enumerate(plans)]
    wanted = {cases.write(case, tmp_path): cases.expected(case) for case in made}
    moving = [len({line.split()[0] for line in lines}) for lines in wanted.values()]
    assert min(moving) > cases.STEPS // 2, moving
    for stem, lines in wanted.items():
        assert steps.run(str(tmp_path), stem) == lines, stem
    code = f"import steps; steps.main('.', {list(wanted)})"
    interpreter = emulate.find_micropython(user_module=True)
    assert micropython(interpreter, tmp_path, [FIRMWARE, HERE / "device"], code)[1:] == listing(wanted)
    files = [tmp_path / f"{stem}{end}" for stem in wanted for end in (".ulm", ".bin")]
    cortex_m0.put(*files, HERE / "device" / "steps.py")
    for stem, lines in wanted.items():  # each in a heap of its own
        assert cortex_m0.fresh(f"import steps; steps.main('.', ['{stem}'])")[2:] == lines


def test_gates_switch_tensors_off(made: list[cases.Case]) -> None:
    """With one gate on alone, its tensors move and no other does; with none, nothing does."""
    tried = 0
    for case in made:
        options, network = case.plan.options, case.plan.network
        if not options.gates or options.weights == "int8":
            continue
        order = []  # from the last layer to the first, weights before biases
        for layer, part in reversed(list(zip(network.layers, options.parts(network), strict=True))):
            order += [f"{layer.name}/weights"] * (part.rows > 0) + [f"{layer.name}/bias"] * part.bias
        for on in [None, *range(len(order))]:
            model = ulearn.load(case.plan.data)
            trainer = ulearn.Trainer(model, skip=0)
            trainer.set_rate(*case.rate)
            assert len(trainer.gates) == len(order)
            trainer.gates[:] = bytes(i == on for i in range(len(order)))
            before = bytes(model.train_blob)
            for x, target in zip(case.inputs, case.targets, strict=True):
                trainer.step(x, int(target) if case.targets.ndim == 1 else target.tobytes())
            moved = set()
            for tensor in case.plan.tensors:
                begin = tensor.operand & 0x0FFFFFFF
                size = int(np.prod(tensor.shape)) << (tensor.dtype - 1)
                if before[begin : begin + size] != model.train_blob[begin : begin + size]:
                    moved.add(tensor.name.removesuffix(" of frozen weights"))
            assert moved <= ({order[on]} if on is not None else set()), (case.seed, on)
            tried += len(moved)
    assert tried > 200
