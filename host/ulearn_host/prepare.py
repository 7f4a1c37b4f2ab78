"""From a network and calibration samples to a plan whose gains the host's own simulation has calibrated."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ulearn
from ulearn_host import numbers as n
from ulearn_host.compiler import Options, Plan, Scheme, check_trainable, compile_plan
from ulearn_host.errors import UserError
from ulearn_host.network import Loss, Network
from ulearn_host.quantise import FloatDense, quantise

CALIBRATION_STEPS = 256


def target_codes(network: Network, y: NDArray[Any]) -> NDArray[Any]:
    """Targets as a board takes them: uint16 labels, or int8 vectors in the output's quantisation."""
    if network.loss == "softmax_ce":
        return np.asarray(y).astype(np.uint16)
    return network.logits.codes(np.asarray(y, dtype=np.float64).reshape(len(y), -1))


def calibrated_state(plan: Plan, x: NDArray[np.int8], y: NDArray[Any]) -> bytes:
    """STATE with the largest gains that the samples need, found by the board's own code at learning rate 0.

    x: int8 [n, inputs]; y: uint16 [n] or int8 [n, outputs]. See numerics: one-pass scaling (UL_OP_DENSE_BACK).
    """
    model = ulearn.load(plan.data)
    trainer = ulearn.Trainer(model, learning_rate=0, skip=0)
    (count,) = struct.unpack_from("<H", model.state, n.S_N_GAINS)
    places = [n.STATE_BYTES + n.GAIN_BYTES * i for i in range(count)]
    for sample, target in zip(x[:CALIBRATION_STEPS], y[:CALIBRATION_STEPS], strict=True):
        trainer.step(sample, int(target) if y.ndim == 1 else target.tobytes())
        for at in places:
            model.state[at + 1] = min(model.state[at + 1], 1)  # it goes on looking
    state = bytearray(model.first_state)
    for at in places:
        gain = struct.unpack_from("<b", model.state, at)[0]
        seen = model.state[at + 1]
        struct.pack_into("<bB", state, at, gain, n.GAIN_SAMPLES if seen else 0)
    return bytes(state)


def best_scheme(network: Network) -> Scheme:
    """The scheme to take when none is named: the most that can be trained of a network, within reason.

    'last+bias' where every layer is dense, 'last' where the last one is, 'none' where nothing can be trained.
    """
    for scheme in ("last+bias", "last"):
        try:
            check_trainable(network, scheme)
        except UserError:
            continue
        return scheme
    return "none"


def from_network(
    network: Network,
    calibration: NDArray[np.int8] | None = None,
    targets: NDArray[Any] | None = None,
    *,
    options: Options | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Plan:
    """Compile a quantised network and calibrate its training.

    calibration: int8 codes [n, inputs]; targets: labels [n] or float [n, outputs]. Without them the board learns the
    gains itself in its first 16 steps.
    """
    progress("compiling")
    plan = compile_plan(network, options)
    if targets is None or calibration is None or plan.options.scheme == "none":
        return plan
    progress("calibrating")
    return compile_plan(network, options, calibrated_state(plan, calibration, target_codes(network, targets)))


def prepare(
    layers: Sequence[FloatDense],
    calibration: NDArray[np.floating],
    targets: NDArray[Any] | None = None,
    *,
    loss: Loss = "softmax_ce",
    labels: Sequence[str] = (),
    options: Options | None = None,
    source: str = "",
    progress: Callable[[str], None] = lambda step: None,
) -> Plan:
    """Quantise a float multi-layer perceptron, compile and calibrate.

    calibration: float [n, inputs]; targets: labels [n] or float [n, outputs].
    """
    progress("quantising")
    network = quantise(layers, calibration, loss, labels, source=source)
    return from_network(network, network.input.codes(calibration), targets, options=options, progress=progress)


def write(plan: Plan, path: Path) -> None:
    """Write a plan to a file. Raises UserError when that is not possible."""
    write_bytes(plan.data, path)


def write_bytes(data: bytes, path: Path) -> None:
    """Write beside the file's place, then rename: a reader never sees half of it."""
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError as fault:
        beside.unlink(missing_ok=True)
        raise UserError(f"{path}: {fault.strerror}; expected a place for a file") from None
