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
from ulearn_host import scales
from ulearn_host.compiler import Options, Plan, check_trainable, compile_plan
from ulearn_host.errors import UserError
from ulearn_host.network import Dense, Loss, Network
from ulearn_host.quantise import FloatDense, quantise
from ulearn_host.schemes import Scheme

CALIBRATION_STEPS = 256


def target_codes(network: Network, y: NDArray[Any]) -> NDArray[Any]:
    """Targets as a board takes them: uint16 labels, or int8 vectors in the output's quantisation."""
    if network.loss != "mse":
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
    shown = np.linspace(0, len(x) - 1, min(len(x), CALIBRATION_STEPS)).astype(int)  # of all: files are sorted by class
    for sample, target in zip(x[shown], y[shown], strict=True):
        for program in range(len(trainer.programs)):  # of layers that train in turn each has its own
            trainer.step(sample, int(target) if y.ndim == 1 else target.tobytes(), program)
        for at in places:
            model.state[at + 1] = min(model.state[at + 1], 1)  # it goes on looking
    state = bytearray(model.first_state)
    for at in places:
        gain = struct.unpack_from("<b", model.state, at)[0]
        seen = model.state[at + 1]
        struct.pack_into("<bB", state, at, gain, n.GAIN_SAMPLES if seen else 0)
    return bytes(state)


def with_rate(state: bytes, learning_rate: float | None) -> bytes:
    """STATE with the learning rate that a board starts with; None: as it is."""
    if learning_rate is None:
        return state
    changed = bytearray(state)
    struct.pack_into("<Hh", changed, n.S_LR_MANT, *scales.mantissa11(learning_rate))
    return bytes(changed)


def rate_of(plan: Plan) -> float:
    """The learning rate that a board starts with."""
    mantissa, exponent = struct.unpack_from("<Hh", ulearn.load(plan.data).first_state, n.S_LR_MANT)
    return float(mantissa * 2.0**exponent)


def best_scheme(network: Network) -> Scheme:
    """The scheme to take when none is named: what mostly pays and fits.

    'last+bias' where every layer is dense, else 'last', and 'none' where nothing can be trained. Biases of
    convolutions would need every activation of the network at once.
    """
    dense = all(isinstance(layer, Dense) for layer in network.layers)
    schemes: tuple[Scheme, ...] = ("last+bias", "last") if dense else ("last",)
    for scheme in schemes:
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
    learning_rate: float | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Plan:
    """Compile a quantised network and calibrate its training.

    calibration: int8 codes [n, inputs]; targets: labels [n] or float [n, outputs]. Without them the board learns the
    gains itself in its first 16 steps. learning_rate: what a board starts with; None: the scheme's.
    """
    progress("compiling")
    plan = compile_plan(network, options)
    if plan.options.scheme == "none":
        return plan
    if targets is None or calibration is None:
        if learning_rate is None:
            return plan
        return compile_plan(network, options, with_rate(ulearn.load(plan.data).first_state, learning_rate))
    progress("calibrating")
    state = calibrated_state(plan, calibration, target_codes(network, targets))
    return compile_plan(network, options, with_rate(state, learning_rate))


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
