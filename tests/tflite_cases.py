"""TFLite models as plans, with inputs and what LiteRT's reference kernels answer: what every executor is judged by."""

from __future__ import annotations

import struct
from binascii import crc32
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tflite_models
from tflite_oracle import Oracle
from ulearn_host.compiler import Options, Plan, compile_plan
from ulearn_host.tflite_import import load_tflite

Codes = np.ndarray[Any, np.dtype[np.int8]]


@dataclass(frozen=True)
class Case:
    """A plan, inputs int8 [n, inputs] and the reference's outputs int8 [n, outputs]."""

    name: str
    plan: Plan
    inputs: Codes
    outputs: Codes

    def write(self, folder: Path) -> str:
        """The plan and its inputs as tests/device/forward.py reads them; returns their common stem."""
        (folder / f"{self.name}.ulm").write_bytes(self.plan.data)
        (folder / f"{self.name}.x").write_bytes(self.inputs.tobytes())
        return self.name

    def packed(self) -> bytes:
        """Both in one piece, for forward.packed."""
        head = struct.pack("<III", len(self.plan.data), *self.inputs.shape)
        return head + self.plan.data + self.inputs.tobytes()

    def lines(self) -> list[str]:
        """What tests/device/forward.py must print."""
        return [f"{crc32(y.tobytes()):08x}" for y in self.outputs]


def inputs_of(shape: Sequence[int], count: int, seed: int, extreme: bool = True) -> Codes:
    """Random codes [count, size].

    extreme: the first three are all of the least, all of the greatest and all zeros, and half of the others use the
    ends of the range alone, so that sums reach as far as they can.
    """
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    codes = rng.integers(-128, 128, (count, size)).astype(np.int8)
    if extreme:
        codes[1::2] = np.where(codes[1::2] < 0, -128, 127)
        codes[:3] = np.array([[-128], [127], [0]], dtype=np.int8)[:count]
    return codes


def reference(oracle: Oracle, x: Codes, zero: int, scale: float) -> Codes:
    """The reference's answer to int8 codes, as int8 codes, whatever the model's borders are."""
    border = oracle.details.input
    if border.dtype == np.uint8:
        given: Any = (x.astype(np.int16) + 128).astype(np.uint8)
    elif border.dtype == np.float32:
        given = (x.astype(np.float32) - zero) * np.float32(scale)
    else:
        given = x
    y = oracle.run(given.reshape(border.shape).astype(border.dtype)).reshape(-1)
    border = oracle.details.output
    if border.dtype == np.uint8:
        return (y.astype(np.int16) - 128).astype(np.int8)
    return y


def case(name: str, model: bytes | Path, folder: Path, count: int, seed: int = 0) -> Case:
    """Import a model and ask the reference."""
    path = model if isinstance(model, Path) else folder / f"{name}.tflite"
    if isinstance(model, bytes):
        path.write_bytes(model)
    network = load_tflite(path)
    # The reference ends the process where many classes are all alike.
    inputs = inputs_of(network.input.shape, count, seed, extreme=network.output.size < 500)
    oracle = Oracle(path)
    outputs = [reference(oracle, x, network.input.zero, network.input.scale) for x in inputs]
    if outputs[0].dtype == np.float32:
        scale, zero = np.float32(network.output.scale), network.output.zero
        outputs = [(np.rint(y / scale) + zero).astype(np.int8) for y in outputs]
    return Case(name, compile_plan(network, Options("none")), inputs, np.stack(outputs))


def generated(folder: Path, count: int, randoms: int) -> list[Case]:
    """Every operator with every option, and random networks."""
    models = [*tflite_models.operator_models()]
    models += [(f"random_{seed}", tflite_models.random_model(seed)) for seed in range(randoms)]
    return [case(name, model, folder, count, seed) for seed, (name, model) in enumerate(models)]
