"""The ARMv6-M assembler and the C that defines it, on the emulated Cortex-M0: every class of input and the extremes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import ulearn
from conftest import HERE, Device
from tflite_cases import Case, inputs_of
from ulearn_host import emulate
from ulearn_host import numbers as n
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.network import Conv, Dense, Depthwise, Network, Tensor, Weighted, Window, vector

CASES = 120
INPUTS = 8


def tensor(name: str, shape: tuple[int, int, int], rng: np.random.Generator) -> Tensor:
    """A tensor with a zero point anywhere, at the ends often."""
    zero = int(rng.choice([-128, -127, 0, 127, rng.integers(-128, 128)]))
    return Tensor(float(np.float32(rng.uniform(0.02, 0.1))), zero, name, shape)


def weights_of(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random ones, with -128 or without; all at one end; alternating ends; small ones, whose sums fit into 16 bits."""
    kind = rng.integers(0, 6)
    if kind == 5:
        return np.where(rng.random(shape) < 0.3, -128, rng.integers(-128, 128, shape)).astype(np.int8)
    if kind == 0:
        return np.full(shape, int(rng.choice([-127, 127])), dtype=np.int8)
    if kind == 1:
        return np.where(rng.random(shape) < 0.5, -127, 127).astype(np.int8)
    reach = 20 if kind == 2 else 127
    return rng.integers(-reach, reach + 1, shape).astype(np.int8)


def random_op(seed: int) -> Weighted:
    """A layer whose sums end anywhere: in the middle of the output's range, or far beyond it."""
    rng = np.random.default_rng(seed)
    kind = seed % 3
    if kind == 0:
        channels, taps = int(rng.integers(1, 40)), int(rng.integers(1, 300))
        x, y = vector("x", taps, tensor("x", (1, 1, taps), rng)), vector("y", channels, tensor("y", (1, 1, 1), rng))
        shape: tuple[int, ...] = (channels, taps)
    else:
        height, width, in_c = (int(v) for v in rng.integers(2, 9, 3))
        kernel = (3, 3) if kind == 2 or rng.random() < 0.5 else (int(rng.integers(1, 4)), int(rng.integers(1, 4)))
        kernel = (min(kernel[0], height), min(kernel[1], width)) if kind == 1 else kernel
        stride = (int(rng.integers(1, 3)), int(rng.integers(1, 3)))
        pad = (int(rng.integers(0, kernel[0])), int(rng.integers(0, kernel[1])))
        out = tuple(max(1, (s + p + (k - 1) // 2 - k) // t + 1)
                    for s, p, k, t in zip((height, width), pad, kernel, stride, strict=True))  # fmt: skip
        channels = int(rng.integers(1, 14)) if kind == 1 else in_c * int(rng.integers(1, 3))
        x, y = tensor("x", (height, width, in_c), rng), tensor("y", (out[0], out[1], channels), rng)
        shape = (channels, *kernel, in_c if kind == 1 else 1)
    weights = weights_of(shape, rng)
    terms = int(np.prod(shape[1:]))
    reals = 2.0 ** rng.uniform(-1, 1, channels) * 90 / (73.0 * 73.0 * np.sqrt(terms)) * 2.0 ** rng.uniform(-3, 4)
    if kind == 0 and rng.random() < 0.5:
        # Of such small multipliers many need more than 31 bits, where the biases are as large.
        reals = 2.0 ** rng.uniform(-21, -19, channels)
    if rng.random() < 0.2:
        reals = 2.0 ** np.round(np.log2(reals)) * (1 - 2.0**-22)  # multipliers just below 2^31
    if rng.random() < 0.4:
        reals[:] = reals[0]
    reach = np.minimum(100 / reals, 2.0**27)
    if rng.random() < 0.15:
        reach[:] = rng.choice([2.0**28, 2.0**30])  # within and beyond the assembler's limit
    # Sums lie around what the mean input makes of the weights.
    middle = (x.zero * weights.reshape(channels, -1).astype(np.int64).sum(axis=1)).clip(-(2**29), 2**29)
    bias = (rng.uniform(-reach, reach) + middle).astype(np.int32)
    low, high = sorted(int(v) for v in rng.integers(-128, 128, 2))
    bounds = (-128, 127) if rng.random() < 0.75 else (low, high)
    scales = (reals * y.scale / x.scale).astype(np.float32).astype(np.float64)
    common = ("layer", (x,), y, weights, bias, scales, bounds)
    if kind == 0:
        return Dense(*common)
    window = Window(kernel, stride, pad)
    return Conv(*common, window) if kind == 1 else Depthwise(*common, window)


def made() -> list[Case]:
    """Cases with the answers of the C core on this machine, which the independent reference judges."""
    cases = []
    for seed in range(CASES):
        op = random_op(seed)
        plan = compile_plan(Network((op,)), Options("none"))
        model = ulearn.load(plan.data)
        x = inputs_of(op.input.shape, INPUTS, seed)
        y = np.stack([np.frombuffer(bytes(model.output(v.tobytes())), dtype=np.int8) for v in x])
        cases.append(Case(f"layer{seed}", plan, x, y))
    return cases


def test_assembler_and_c(own_cortex_m0: Device, tmp_path: Path) -> None:
    """Both give the same answers, for every rounding, kernel, zero point and range."""
    cases = made()
    records = [case.plan.programs[0].records[0].fields for case in cases]
    assert {f["rounding"] for f in records} == {n.ROUND_SINGLE, n.ROUND_DOUBLE, n.ROUND_AWAY}
    assert any(f["flags"] & n.FLAG_FULL_RANGE for f in records)
    assert np.mean([len(np.unique(case.outputs)) > 20 for case in cases]) > 0.5
    (tmp_path / "layers.bin").write_bytes(b"".join(case.packed() for case in cases))
    files = (tmp_path / "layers.bin", HERE / "device" / "forward.py", emulate.find_native("armv6m", assembler=False))
    own_cortex_m0.put(*files)
    wanted = [f"{case.name} {line}" for case in cases for line in case.lines()]
    names = [case.name for case in cases for _ in range(INPUTS)]
    for kernels in ("ulab_kernels_c", "ulab_kernels"):
        printed = own_cortex_m0.fresh(f"import forward, {kernels}; forward.packed('layers.bin', {kernels}.run)")
        got = [f"{name} {line}" for name, line in zip(names, printed, strict=True)]
        assert got == wanted, kernels
