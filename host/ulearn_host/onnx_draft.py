"""A network between the file and its quantisation: NHWC operators in float, fused, some scales known already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ulearn_host.network import Quantisation, Shape, Window

Numbers = NDArray[np.float64]
Function = Callable[[Numbers], Numbers]


@dataclass(eq=False)
class DraftTensor:
    """An activation in memory order.

    source: the tensor of the file that holds the same numbers ('': none). order: int, in the source's shape, where each
    of its numbers lies here. fixed: the quantisation that the file gives.
    """

    name: str
    shape: Shape
    source: str
    order: NDArray[np.int32]
    fixed: Quantisation | None = None
    producer: DraftOp | None = None

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    def arranged(self, numbers: NDArray[Any]) -> NDArray[Any]:
        """Numbers in the source's shape (or broadcastable to it), flat in memory order."""
        result = np.empty(self.order.size, dtype=numbers.dtype)
        result[self.order.ravel()] = np.broadcast_to(numbers, self.order.shape).ravel()
        return result


@dataclass(eq=False)
class DraftOp:
    """An operator; name: what the file calls it."""

    name: str
    inputs: list[DraftTensor]
    output: DraftTensor

    @property
    def input(self) -> DraftTensor:
        """The first input."""
        return self.inputs[0]


@dataclass(eq=False)
class Clipped(DraftOp):
    """An operator whose output is cut at two real numbers."""

    low: float = field(default=-np.inf, kw_only=True)
    high: float = field(default=np.inf, kw_only=True)


@dataclass(eq=False)
class DraftWeighted(Clipped):
    """weights: float [out, ..., summed], as in the IR. codes, scales [out]: where the file is quantised already.
    bias_codes: its int32 bias in units of bias_scales [out]."""

    kind: Literal["dense", "conv", "depthwise"]
    weights: Numbers
    bias: Numbers
    window: Window | None = None
    codes: NDArray[np.int8] | None = None
    scales: Numbers | None = None
    bias_codes: NDArray[np.int32] | None = None
    bias_scales: Numbers | None = None


@dataclass(eq=False)
class DraftPool(Clipped):
    """As network.Pool."""

    kind: Literal["average", "max"]
    window: Window


@dataclass(eq=False)
class DraftMean(DraftOp):
    """As network.Mean."""


@dataclass(eq=False)
class DraftElementwise(Clipped):
    """As network.Elementwise; constant: real numbers, or codes in `second`."""

    kind: Literal["add", "mul"]
    constant: NDArray[Any] | None = None
    second: Quantisation | None = None


@dataclass(eq=False)
class DraftPad(DraftOp):
    """As network.Pad."""

    before: Shape


@dataclass(eq=False)
class DraftConcat(DraftOp):
    """As network.Concat."""

    axis: int


@dataclass(eq=False)
class DraftTable(DraftOp):
    """Functions of one number, one applied to what the other gives. bounds: the range of the last one's values where
    that is known without samples."""

    function: str
    steps: list[Function]
    bounds: tuple[float, float] | None = None

    def compute(self, x: Numbers) -> Numbers:
        """All of them."""
        for step in self.steps:
            x = step(x)
        return x


@dataclass(eq=False)
class DraftReshape(DraftOp):
    """As network.Reshape."""


@dataclass(eq=False)
class DraftSoftmax(DraftOp):
    """As network.Softmax."""


@dataclass(frozen=True)
class Value:
    """A tensor of the file: index, int in its own shape (batch included): where each number lies in `tensor`.

    sole: whether nothing else reads what lies there. codes: the type of the codes, between QuantizeLinear and
    DequantizeLinear.
    """

    tensor: DraftTensor
    index: NDArray[np.int32]
    sole: bool = True
    codes: np.dtype[Any] | None = None


def joined(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that both broadcast to, if there is one."""
    try:
        return np.broadcast_shapes(a, b)
    except ValueError:
        return None
