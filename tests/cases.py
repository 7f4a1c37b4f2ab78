"""Random plans with random samples: what every executor is judged by."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import reference
from ulearn_host.compiler import Options, Plan, compile_plan
from ulearn_host.errors import UserError
from ulearn_host.network import Dense, Network, Quantisation, vector
from ulearn_host.schemes import NAMED_SCHEMES

STEPS = 12


@dataclass(frozen=True)
class Case:
    """A plan, STEPS samples and the settings that are written into STATE before the first step."""

    seed: int
    plan: Plan
    inputs: np.ndarray[Any, np.dtype[np.int8]]  # [STEPS, inputs]
    targets: np.ndarray[Any, Any]  # uint16 [STEPS] or int8 [STEPS, outputs]
    rate: tuple[int, int]  # mantissa, exponent
    skip_below: int

    @property
    def samples(self) -> bytes:
        """Settings, inputs and targets as the device test reads them."""
        head = struct.pack("<IHhHH", self.seed + 1, *self.rate, self.skip_below, STEPS)
        return head + self.inputs.tobytes() + self.targets.tobytes()


def random_network(rng: np.random.Generator, widest: int = 96) -> Network:
    """One to four dense layers of random width; weights, biases and scales from tame to extreme."""
    depth = int(rng.integers(1, 5))
    widths = [int(rng.integers(1, widest)) for _ in range(depth)] + [int(rng.integers(2, 20))]
    quantisations = [Quantisation(float(2.0 ** rng.uniform(-8, 0)), int(rng.integers(-128, 128))) for _ in widths]
    tensors = [vector(f"x{i}", size, q) for i, (size, q) in enumerate(zip(widths, quantisations, strict=True))]
    extreme = rng.random() < 0.2
    layers = []
    for i in range(depth):
        inputs, outputs = widths[i], widths[i + 1]
        spread = 127 if extreme else int(rng.integers(1, 128))
        weights = rng.integers(-spread, spread + 1, (outputs, inputs)).astype(np.int8)
        bias = rng.integers(-(2**30) if extreme else -4000, 2**30 if extreme else 4000, outputs).astype(np.int32)
        # Aim the sums at the output's range, so that the deeper layers see more than the ends of it.
        reach = max(1.0, np.sqrt(inputs) * spread * 40)
        scales = np.exp2(rng.uniform(-1.5, 1.5, outputs)) * 100 / reach
        scales = scales * quantisations[i + 1].scale / quantisations[i].scale
        layers.append(
            Dense(
                f"dense_{i + 1}",
                (tensors[i],),
                tensors[i + 1],
                weights,
                bias,
                scales.astype(np.float32).astype(np.float64),
                (tensors[i + 1].zero if rng.random() < 0.7 and i < depth - 1 else -128, 127),
            )
        )
    return Network(tuple(layers), "softmax_ce" if rng.random() < 0.7 else "mse")


def random_case(seed: int, widest: int = 96) -> Case:
    """The case of a seed: network, scheme, kind of weights, samples, rate."""
    rng = np.random.default_rng(seed)
    network = random_network(rng, widest)
    options = Options(
        NAMED_SCHEMES[seed % 4],
        "int8" if rng.random() < 0.3 else "int16",
        fraction=6 if rng.random() < 0.6 else int(rng.integers(0, 8)),
        gates=bool(rng.random() < 0.8),
    )
    if options.fraction == 7 and options.weights == "int16":
        small = tuple(replace(d, weights=(d.weights // 2).astype(np.int8)) for d in network.layers)
        network = Network(small, network.loss)
    outputs = network.output.size
    inputs = rng.integers(-128, 128, (STEPS, network.input.size)).astype(np.int8)
    if network.loss == "softmax_ce":
        targets = rng.integers(0, outputs, STEPS).astype(np.uint16)
    else:
        targets = rng.integers(-128, 128, (STEPS, outputs)).astype(np.int8)
    rate = (int(rng.integers(1024, 2048)), int(rng.integers(-24, -6)))
    return Case(seed, _compiled(network, options), inputs, targets, rate, 4096 if rng.random() < 0.5 else 0)


def _compiled(network: Network, options: Options) -> Plan:
    """The plan with as few fraction bits as the accumulators' bounds allow: fewer bits, larger weights."""
    try:
        return compile_plan(network, options)
    except UserError:
        return _compiled(network, replace(options, fraction=options.fraction + 1))


def expected(case: Case) -> list[str]:
    """What the independent reference says: a line a step, as tests/device/steps.py prints them."""
    machine = reference.Machine(reference.parse(case.plan.data))
    reference.set_learning_rate(machine.state, *case.rate)
    struct.pack_into("<I", machine.state, 0, case.seed + 1)
    struct.pack_into("<H", machine.state, 28, case.skip_below)
    lines = []
    for x, target in zip(case.inputs, case.targets, strict=True):
        machine.step(x.tobytes(), int(target) if case.targets.ndim == 1 else target.tobytes())
        blocks = [bytes(machine.train), bytes(machine.state), machine.predict(x.tobytes())]
        lines.append(digest(blocks))
    return lines


def digest(blocks: list[bytes]) -> str:
    """Eight hexadecimal digits a block."""
    from binascii import crc32

    return " ".join(f"{crc32(block):08x}" for block in blocks)


def write(case: Case, folder: Path) -> str:
    """Put the case's two files into a folder; returns their common stem."""
    stem = f"case{case.seed}"
    (folder / f"{stem}.ulm").write_bytes(case.plan.data)
    (folder / f"{stem}.bin").write_bytes(case.samples)
    return stem
