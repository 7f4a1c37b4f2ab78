"""A quantised network, as every importer delivers it and the compiler takes it: operators over named tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Loss = Literal["none", "softmax_ce", "mse", "hinge"]
Shape = tuple[int, int, int]  # height, width, channels; a vector is (1, 1, n)


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
class Tensor(Quantisation):
    """An int8 activation of one sample. Tensors are the same when their names are."""

    name: str
    shape: Shape

    @property
    def size(self) -> int:
        """How many numbers it has, which is how many bytes."""
        h, w, c = self.shape
        return h * w * c


def vector(name: str, length: int, quantisation: Quantisation) -> Tensor:
    """A tensor of one dimension."""
    return Tensor(quantisation.scale, quantisation.zero, name, (1, 1, length))


@dataclass(frozen=True)
class Window:
    """How a kernel walks over an image: (height, width) of the kernel and its stride, rows and columns of padding
    above and to the left. What is below and to the right follows from the output's shape."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Op:
    """An operator: reads inputs, writes output. name: what the user calls the layer."""

    name: str
    inputs: tuple[Tensor, ...]
    output: Tensor

    @property
    def input(self) -> Tensor:
        """The first input."""
        return self.inputs[0]


@dataclass(frozen=True)
class Weighted(Op):
    """An operator with weights: int8, symmetric, one scale an output channel; the last dimension is what is summed.

    bias: int32 [channels] in units of input.scale * weight_scales. activation: (lowest, highest) output code.
    """

    weights: NDArray[np.int8]
    bias: NDArray[np.int32]
    weight_scales: NDArray[np.float64]
    activation: tuple[int, int]

    @property
    def multipliers(self) -> list[float]:
        """What a channel's sum is multiplied by on its way to the output: one number where it is the same for all."""
        distinct = self.weight_scales[:1] if (self.weight_scales == self.weight_scales[0]).all() else self.weight_scales
        return [self.input.scale * float(scale) / self.output.scale for scale in distinct]

    @property
    def masked(self) -> bool:
        """Whether outputs are cut from below as a ReLU does: by the activation, or for want of codes below 0."""
        return self.activation[0] > -128 or self.output.zero == -128


@dataclass(frozen=True)
class Dense(Weighted):
    """A fully connected layer over each row of the flattened input; mostly there is one. weights: [outputs, inputs].

    output: (1, rows, outputs).
    """

    @property
    def rows(self) -> int:
        """How often the weights are applied."""
        return self.output.shape[1]


@dataclass(frozen=True)
class Conv(Weighted):
    """A convolution. weights: [out_c, kernel_h, kernel_w, in_c]."""

    window: Window


@dataclass(frozen=True)
class Depthwise(Weighted):
    """A depthwise convolution; output channel c reads input channel c // multiplier. weights: [out_c, kh, kw, 1]."""

    window: Window

    @property
    def multiplier(self) -> int:
        """Output channels an input channel."""
        return self.output.shape[2] // self.input.shape[2]


@dataclass(frozen=True)
class Pool(Op):
    """The mean or the largest of a window; only cells inside the image count. Input and output share a quantisation."""

    kind: Literal["average", "max"]
    window: Window
    activation: tuple[int, int]


@dataclass(frozen=True)
class Mean(Op):
    """The mean over height and width, requantised."""


@dataclass(frozen=True)
class Elementwise(Op):
    """a + b or a * b, requantised. b repeats: it has as many numbers as a, as many as a's channels, or one.

    constant: b's int8 codes where b is no activation; then inputs holds a alone and second b's quantisation.
    """

    kind: Literal["add", "mul"]
    activation: tuple[int, int]
    second: Quantisation
    constant: NDArray[np.int8] | None = None


@dataclass(frozen=True)
class Pad(Op):
    """The input with rows, columns and channels of one code around it. before: (top, left, front)."""

    before: Shape
    value: int


@dataclass(frozen=True)
class Concat(Op):
    """Inputs side by side along an axis: 0 height, 1 width, 2 channels; all share a quantisation.

    constants: of each input its int8 codes where it is no activation, else None; empty: none is constant.
    """

    axis: int
    constants: tuple[NDArray[np.int8] | None, ...] = ()


@dataclass(frozen=True)
class Table(Op):
    """A function of one code: y = table[x + 128]. function: what it is called. table: int8 [256]."""

    function: str
    table: NDArray[np.int8]


@dataclass(frozen=True)
class Reshape(Op):
    """The same numbers in the same order."""


@dataclass(frozen=True)
class Softmax(Op):
    """exp(beta * x) / sum, output scale 1/256 and zero point -128."""

    beta: float = 1.0


@dataclass(frozen=True)
class Network:
    """Operators in an order that can be run, the loss the network was trained with, what a user calls the classes.

    loss: 'none' where the importer cannot know it; then nothing trains. notes: what the importer did that a user
    may want to know, a sentence each.
    """

    ops: tuple[Op, ...]
    loss: Loss = "none"
    labels: tuple[str, ...] = ()
    source: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def input(self) -> Tensor:
        """What the network takes."""
        return self.ops[0].input

    @property
    def output(self) -> Tensor:
        """What the network answers."""
        return self.ops[-1].output

    @property
    def logits(self) -> Tensor:
        """What the loss takes: the output, or what goes into a softmax at the end."""
        return self.ops[-1].input if isinstance(self.ops[-1], Softmax) else self.output

    @property
    def layers(self) -> tuple[Weighted, ...]:
        """The operators with weights, in order."""
        return tuple(op for op in self.ops if isinstance(op, Weighted))
