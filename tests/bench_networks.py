"""Networks of one operator with seeded weights, to be measured: the same bytes on every machine."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from ulearn_host.compiler import Options, compile_plan
from ulearn_host.network import (
    Concat,
    Conv,
    Dense,
    Depthwise,
    Elementwise,
    Loss,
    Mean,
    Network,
    Op,
    Pad,
    Pool,
    Shape,
    Softmax,
    Table,
    Tensor,
    Weighted,
    Window,
)

_ALL = (-128, 127)
# Spread of activations and of sums in codes: outputs use their range without saturating.
_SPREAD = 50.0


def plan(op: Op) -> bytes:
    """The plan of a network of one operator."""
    return compile_plan(Network((op,)), Options("none")).data


def trained(inputs: int, outputs: int, weights: Literal["int8", "int16"]) -> bytes:
    """The plan of a dense layer whose weights train: the core reads them in canonical order."""
    op = dense(inputs, outputs)
    loss: Loss = "mse"
    return compile_plan(Network((op,), loss), Options("last", weights)).data


def tensor(name: str, shape: Shape, scale: float = 0.05, zero: int = -5) -> Tensor:
    """An activation."""
    return Tensor(scale, zero, name, shape)


def full_range(op: Weighted) -> Weighted:
    """The same with a weight of -128, which the core handles with more care."""
    weights = op.weights.copy()
    weights.flat[0] = -128
    return replace(op, weights=weights)


def _weights(shape: tuple[int, ...]) -> tuple[Any, Any, Any, float]:
    """Weights as training leaves them: normal, the largest of each channel at +-127; bias, scales, spread of a sum."""
    rng = np.random.default_rng(zlib.crc32(repr(shape).encode()))
    real = rng.normal(size=shape)
    largest = np.abs(real.reshape(shape[0], -1)).max(axis=1)
    weights = np.rint(real / largest.reshape(-1, *[1] * (len(shape) - 1)) * 127).astype(np.int8)
    scales = 0.01 * np.exp(rng.uniform(-0.5, 0.5, shape[0]))
    spread = float(_SPREAD * np.sqrt((weights.astype(float) ** 2).reshape(shape[0], -1).sum(axis=1)).mean())
    bias = rng.normal(0, spread / 4, shape[0]).astype(np.int32)
    return weights, bias, scales, spread


def _output(x: Tensor, shape: Shape, scales: Any, spread: float) -> Tensor:
    return tensor("y", shape, x.scale * float(scales.mean()) * spread / _SPREAD, 3)


def dense(inputs: int, outputs: int, rows: int = 1) -> Dense:
    """A fully connected layer, one scale for all channels as most importers have it."""
    weights, bias, scales, spread = _weights((outputs, inputs))
    scales = np.full(outputs, scales.mean())
    x = tensor("x", (1, rows, inputs))
    y = _output(x, (1, rows, outputs), scales, spread)
    return Dense("dense", (x,), y, weights, bias, scales, _ALL)


def _window(shape: Shape, kernel: tuple[int, int], stride: int, same: bool) -> tuple[Window, tuple[int, int]]:
    """A window over an image, and the height and width of its output, as TFLite's SAME or VALID has them."""
    if not same:
        return Window(kernel, (stride, stride)), (
            (shape[0] - kernel[0]) // stride + 1,
            (shape[1] - kernel[1]) // stride + 1,
        )
    out = (-(-shape[0] // stride), -(-shape[1] // stride))
    pad = [max(0, (out[i] - 1) * stride + kernel[i] - shape[i]) // 2 for i in (0, 1)]
    return Window(kernel, (stride, stride), (pad[0], pad[1])), out


def conv(shape: Shape, channels: int, kernel: tuple[int, int] = (3, 3), stride: int = 1, same: bool = True) -> Conv:
    """A convolution."""
    weights, bias, scales, spread = _weights((channels, *kernel, shape[2]))
    window, out = _window(shape, kernel, stride, same)
    x = tensor("x", shape)
    return Conv("conv", (x,), _output(x, (*out, channels), scales, spread), weights, bias, scales, _ALL, window)


def depthwise(
    shape: Shape, kernel: tuple[int, int] = (3, 3), stride: int = 1, multiplier: int = 1, same: bool = True
) -> Depthwise:
    """A depthwise convolution."""
    channels = shape[2] * multiplier
    weights, bias, scales, spread = _weights((channels, *kernel, 1))
    window, out = _window(shape, kernel, stride, same)
    x = tensor("x", shape)
    y = _output(x, (*out, channels), scales, spread)
    return Depthwise("depthwise", (x,), y, weights, bias, scales, _ALL, window)


def pool(
    shape: Shape, kernel: tuple[int, int], stride: int, kind: Literal["average", "max"] = "average", same: bool = False
) -> Pool:
    """A pooling."""
    window, out = _window(shape, kernel, stride, same)
    return Pool("pool", (tensor("x", shape),), tensor("y", (*out, shape[2])), kind, window, _ALL)


def mean(shape: Shape) -> Mean:
    """The mean over an image."""
    return Mean("mean", (tensor("x", shape),), tensor("y", (1, 1, shape[2]), 0.03))


def elementwise(shape: Shape, kind: Literal["add", "mul"], repeated: bool = False) -> Elementwise:
    """Input with a constant of the same shape, or of one number a channel."""
    x, second = tensor("x", shape), tensor("b", shape, 0.04, 7)
    count = shape[2] if repeated else x.size
    constant = np.random.default_rng(count).integers(-128, 128, count).astype(np.int8)
    scale = 0.07 if kind == "add" else 0.05 * 0.04 * _SPREAD
    return Elementwise(kind, (x,), tensor("y", shape, scale), kind, _ALL, second, constant)


def pad(shape: Shape, before: Shape, after: Shape) -> Pad:
    """Rows, columns and channels around an image."""
    h, w, c = (size + b + a for size, b, a in zip(shape, before, after, strict=True))
    return Pad("pad", (tensor("x", shape),), tensor("y", (h, w, c)), before, -5)


def concat(shape: Shape, channels: int) -> Concat:
    """An image beside a constant of as many channels."""
    constant = np.zeros((*shape[:2], channels), np.int8)
    x, b = tensor("x", shape), tensor("b", (*shape[:2], channels))
    return Concat("concat", (x, b), tensor("y", (*shape[:2], shape[2] + channels)), 2, (None, constant))


def table(shape: Shape) -> Table:
    """A function of one code."""
    values = np.arange(-128, 128).astype(np.int8)[::-1].copy()
    return Table("table", (tensor("x", shape),), tensor("y", shape), "mirror", values)


def softmax(rows: int, classes: int) -> Softmax:
    """A softmax."""
    x = tensor("x", (1, rows, classes), 0.06)
    return Softmax("softmax", (x,), Tensor(1 / 256, -128, "y", x.shape))
