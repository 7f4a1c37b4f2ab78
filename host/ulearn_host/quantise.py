"""Post-training int8 quantisation of a float multi-layer perceptron, from calibration samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ulearn_host.errors import UserError
from ulearn_host.network import Dense, Loss, Network, Quantisation, Tensor, vector

_BIAS_MAX = 2**30 - 1


@dataclass(frozen=True)
class FloatDense:
    """weights: float [outputs, inputs]; bias: float [outputs]; relu: applied to the outputs."""

    weights: NDArray[np.float64]
    bias: NDArray[np.float64]
    relu: bool


def forward(layers: Sequence[FloatDense], x: NDArray[np.floating]) -> list[NDArray[np.float64]]:
    """Every layer's output for samples x [n, inputs], in float64."""
    outputs: list[NDArray[np.float64]] = []
    for layer in layers:
        y: NDArray[np.float64] = np.asarray(x, dtype=np.float64) @ layer.weights.T + layer.bias
        x = y * (y > 0) if layer.relu else y
        outputs.append(np.asarray(x, dtype=np.float64))
    return outputs


def span(values: NDArray[np.floating], widen: float = 1.0) -> Quantisation:
    """The asymmetric int8 quantisation that spans the values and zero (Jacob et al. 2018, equation 1)."""
    low, high = min(0.0, float(values.min()) * widen), max(0.0, float(values.max()) * widen)
    scale = (high - low) / 255 or 1.0
    return Quantisation(float(np.float32(scale)), int(np.clip(round(-128 - low / scale), -128, 127)))


def weight_scales(weights: NDArray[np.float64], energy: NDArray[np.float64]) -> NDArray[np.float64]:
    """One symmetric scale an output channel, chosen to disturb the layer's sums least on the calibration samples.

    weights: [outputs, inputs]; energy: [inputs], mean square of each input. Of a ladder of scales from the one that
    holds the largest weight downwards, the one with the least sum of energy * (weight - quantised weight)^2: a large
    weight on an input that hardly ever speaks is clipped rather than allowed to coarsen all others.
    """
    largest = np.abs(weights).max(axis=1)
    floor = (float(largest.max()) or 1.0) * 1e-4
    largest = np.where(largest > floor, largest, floor)
    best, least = largest / 127, np.full(len(weights), np.inf)
    for factor in 2.0 ** (-np.arange(0, 24) / 4):
        scale = (largest * factor / 127)[:, None]
        error = ((weights - np.clip(np.rint(weights / scale), -127, 127) * scale) ** 2) @ (energy + 1e-12)
        better = error < least
        best, least = np.where(better, scale[:, 0], best), np.where(better, error, least)
    return best.astype(np.float32).astype(np.float64)


def quantise(
    layers: Sequence[FloatDense],
    calibration: NDArray[np.floating],
    loss: Loss,
    labels: Sequence[str] = (),
    source: str = "",
    output_headroom: float = 1.5,
) -> Network:
    """Quantise a float network per output channel (symmetric weights, asymmetric activations).

    calibration: float [n, inputs], samples like those the board will see; their ranges decide the activations' scales.
    output_headroom: how much wider than seen the output's range is made, since training moves the logits.
    Raises UserError when shapes do not fit or numbers are not finite.
    """
    if not layers:
        raise UserError("the network has no layer; expected at least one dense layer")
    calibration = np.asarray(calibration, dtype=np.float64)
    if calibration.ndim != 2 or calibration.shape[1] != layers[0].weights.shape[1] or not len(calibration):
        raise UserError(
            f"calibration samples have shape {calibration.shape}, expected (n, {layers[0].weights.shape[1]})"
        )
    if layers[-1].relu:
        raise UserError("the last layer has a ReLU, which training cannot pass; expected a linear last layer")
    for i, (layer, above) in enumerate(zip(layers, layers[1:], strict=False)):
        if above.weights.shape[1] != layer.weights.shape[0]:
            raise UserError(
                f"layer {i + 1} takes {above.weights.shape[1]} inputs, layer {i} gives {layer.weights.shape[0]}"
            )
    values = [calibration, *(a for layer in layers for a in (layer.weights, layer.bias))]
    if not all(np.isfinite(v).all() for v in values):
        raise UserError("weights or calibration samples hold numbers that are not finite")
    x = vector("input", calibration.shape[1], span(calibration))
    result = []
    outputs = forward(layers, calibration)
    seen: list[NDArray[np.float64]] = [calibration.astype(np.float64), *outputs]
    for i, (layer, output) in enumerate(zip(layers, outputs, strict=True)):
        last = i == len(layers) - 1
        y = vector(f"dense_{i + 1}", output.shape[1], span(output, output_headroom if last else 1.0))
        result.append(dense(f"dense_{i + 1}", layer, x, y, seen[i]))
        x = y
    return Network(tuple(result), loss, tuple(labels), source)


def dense(name: str, layer: FloatDense, x: Tensor, y: Tensor, seen: NDArray[np.float64]) -> Dense:
    """A float layer quantised between two tensors. seen: [n, inputs], what goes in, in real units."""
    scales = weight_scales(layer.weights, np.mean(seen**2, axis=0))
    weights = np.clip(np.rint(layer.weights / scales[:, None]), -127, 127).astype(np.int8)
    bias = np.clip(np.rint(layer.bias / (scales * x.scale)), -_BIAS_MAX, _BIAS_MAX).astype(np.int32)
    return Dense(name, (x,), y, weights, bias, scales, (y.zero if layer.relu else -128, 127))
