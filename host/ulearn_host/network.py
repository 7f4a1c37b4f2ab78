"""A quantised network, as every importer delivers it and the compiler takes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Loss = Literal["softmax_ce", "mse"]


@dataclass(frozen=True)
class Quantisation:
    """real = (code - zero) * scale, codes int8."""

    scale: float
    zero: int

    def codes(self, real: NDArray[np.floating]) -> NDArray[np.int8]:
        """Real numbers of any shape as int8 codes, rounded half away from zero and saturated."""
        steps = np.asarray(real, dtype=np.float64) / self.scale
        codes: NDArray[np.int8] = np.clip(np.trunc(steps + np.copysign(0.5, steps)) + self.zero, -128, 127).astype(
            np.int8
        )
        return codes

    def real(self, codes: NDArray[np.integer]) -> NDArray[np.float64]:
        """Codes of any shape as real numbers."""
        return (np.asarray(codes).astype(np.float64) - self.zero) * self.scale


@dataclass(frozen=True)
class Dense:
    """A fully connected layer: y = act(x W^T + b).

    weights: int8 [outputs, inputs], symmetric, one scale a channel; bias: int32 [outputs] in units of
    input.scale * weight_scales; relu: whether negative outputs become 0.
    """

    name: str
    weights: NDArray[np.int8]
    bias: NDArray[np.int32]
    weight_scales: NDArray[np.float64]
    input: Quantisation
    output: Quantisation
    relu: bool

    @property
    def inputs(self) -> int:
        """How many numbers go in."""
        return int(self.weights.shape[1])

    @property
    def outputs(self) -> int:
        """How many numbers come out."""
        return int(self.weights.shape[0])


@dataclass(frozen=True)
class Network:
    """Layers in order, the loss they were trained with, and what a user calls the classes."""

    layers: tuple[Dense, ...]
    loss: Loss
    labels: tuple[str, ...] = ()
    input_shape: tuple[int, ...] = ()
    source: str = ""
    extra: dict[str, str] = field(default_factory=dict)
