"""Random networks with branches, every operator that gradients pass, and random choices of what trains."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

import cases
from ulearn_host.compiler import Options, Plan, compile_plan
from ulearn_host.errors import UserError
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
    Quantisation,
    Reshape,
    Shape,
    Tensor,
    Window,
)

Generator = np.random.Generator


@dataclass
class Builder:
    """Appends random operators; every method returns the new tensor."""

    rng: Generator
    ops: list[Op] = field(default_factory=list)

    def tensor(self, shape: Shape, like: Quantisation | None = None) -> Tensor:
        """A new activation, with a random quantisation or that of another."""
        q = like or Quantisation(float(2.0 ** self.rng.uniform(-6, -2)), int(self.rng.integers(-128, 100)))
        return Tensor(q.scale, q.zero, f"t{len(self.ops)}", shape)

    def append(self, op: Op) -> Tensor:
        """Take an operator on."""
        self.ops.append(op)
        return op.output

    def _parameters(self, x: Tensor, y: Tensor, shape: tuple[int, ...], dense: bool = False) -> dict[str, Any]:
        rng = self.rng
        spread = int(rng.integers(20, 128))
        weights = rng.integers(-spread, spread + 1, shape).astype(np.int8)
        taps = weights[0].size
        # Sums that reach the output's range without leaving it for good.
        scales = np.exp2(rng.uniform(-1, 1, shape[0])) * 60 / (np.sqrt(taps) * spread * 40) * y.scale / x.scale
        if rng.random() < 0.2:
            scales = np.full_like(scales, scales[0])
        bias = rng.integers(-3000, 3000, shape[0]).astype(np.int32)
        return {
            "weights": weights,
            "bias": bias,
            "weight_scales": scales.astype(np.float32).astype(np.float64),
            "activation": self.activation(y),
        }

    def activation(self, y: Quantisation) -> tuple[int, int]:
        """None, a ReLU, or a ReLU with an upper end."""
        kind = self.rng.random()
        if kind < 0.3:
            return -128, 127
        return max(-128, y.zero), 127 if kind < 0.85 else min(127, y.zero + 90)

    def window(self, shape: Shape, largest: int = 3) -> tuple[Window, int, int]:
        """A kernel, stride and padding that fit an image, and the output's size."""
        rng = self.rng
        kernel = tuple(int(rng.integers(1, min(largest, size) + 1)) for size in shape[:2])
        if rng.random() < 0.3:
            kernel = (1, 1)
        stride = tuple(int(rng.integers(1, 3)) if rng.random() < 0.4 else 1 for _ in kernel)
        pad = tuple(int(rng.integers(0, k)) for k in kernel)
        more = [int(rng.integers(0, k)) for k in kernel]
        out = [
            (size + p + m - k) // s + 1 for size, p, m, k, s in zip(shape[:2], pad, more, kernel, stride, strict=True)
        ]
        # A window must hold a cell of the image.
        out = [min(o, (size - 1 + p) // s + 1) for o, size, p, s in zip(out, shape[:2], pad, stride, strict=True)]
        return Window((kernel[0], kernel[1]), (stride[0], stride[1]), (pad[0], pad[1])), out[0], out[1]

    def conv(self, x: Tensor, channels: int, window: tuple[Window, int, int] | None = None) -> Tensor:
        """A convolution."""
        walk, h, w = window or self.window(x.shape)
        y = self.tensor((h, w, channels))
        more = self._parameters(x, y, (channels, *walk.kernel, x.shape[2]))
        return self.append(Conv(f"conv_{len(self.ops)}", (x,), y, window=walk, **more))

    def depthwise(self, x: Tensor) -> Tensor:
        """A depthwise convolution, now and then with two channels a channel."""
        walk, h, w = self.window(x.shape)
        channels = x.shape[2] * (2 if self.rng.random() < 0.2 and x.shape[2] < 8 else 1)
        y = self.tensor((h, w, channels))
        more = self._parameters(x, y, (channels, *walk.kernel, 1))
        return self.append(Depthwise(f"depthwise_{len(self.ops)}", (x,), y, window=walk, **more))

    def pool(self, x: Tensor) -> Tensor:
        """A pool of either kind."""
        walk, h, w = self.window(x.shape)
        kind: Literal["average", "max"] = "average" if self.rng.random() < 0.4 else "max"
        y = self.tensor((h, w, x.shape[2]), x)
        activation = self.activation(x) if self.rng.random() < 0.3 else (-128, 127)
        return self.append(Pool(f"pool_{len(self.ops)}", (x,), y, kind, walk, activation))

    def pad(self, x: Tensor) -> Tensor:
        """Rows, columns and channels of zeros around an image."""
        before = tuple(int(v) for v in self.rng.integers(0, 2, 3))
        after = self.rng.integers(0, 2, 3)
        h, w, c = (size + b + int(a) for size, b, a in zip(x.shape, before, after, strict=True))
        y = self.tensor((h, w, c), x)
        return self.append(Pad(f"pad_{len(self.ops)}", (x,), y, (before[0], before[1], before[2]), x.zero))

    def constant(self, x: Tensor, kind: Literal["add", "mul"]) -> Tensor:
        """A sum or product with a constant for all, for each channel or for each number."""
        shape = [(1, 1, 1), (1, 1, x.shape[2]), x.shape][int(self.rng.integers(0, 3))]
        b = self.rng.integers(-128, 128, shape).astype(np.int8)
        q = Quantisation(float(2.0 ** self.rng.uniform(-7, -4)), int(self.rng.integers(-20, 21)))
        y = self.tensor(x.shape)
        return self.append(Elementwise(f"{kind}_{len(self.ops)}", (x,), y, kind, self.activation(y), q, b))

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum of two branches."""
        y = self.tensor(a.shape)
        q = Quantisation(b.scale, b.zero)
        return self.append(Elementwise(f"sum_{len(self.ops)}", (a, b), y, "add", self.activation(y), q))

    def concat(self, a: Tensor, b: Tensor) -> Tensor:
        """Two branches of one quantisation side by side."""
        axis = int(self.rng.integers(0, 3))
        shape = list(a.shape)
        shape[axis] += b.shape[axis]
        y = self.tensor((shape[0], shape[1], shape[2]), a)
        return self.append(Concat(f"concat_{len(self.ops)}", (a, b), y, axis))

    def branch(self, x: Tensor) -> Tensor:
        """Two ways from one tensor that meet again."""
        rng = self.rng
        point = (Window((3, 3), (1, 1), (1, 1)), *x.shape[:2])
        left = self.conv(x, x.shape[2], point if rng.random() < 0.5 else (Window((1, 1)), *x.shape[:2]))
        if rng.random() < 0.3:
            left = self.constant(left, "mul")
        if rng.random() < 0.1:
            return self.add(left, left)
        if rng.random() < 0.6:
            return self.add(left, x if rng.random() < 0.5 else self.conv(x, x.shape[2], (Window((1, 1)), *x.shape[:2])))
        right = self.conv(x, x.shape[2], (Window((1, 1)), *x.shape[:2]))
        # Both take the left one's quantisation, as TFLite demands.
        last = self.ops[-1]
        self.ops[-1] = replace(last, output=Tensor(left.scale, left.zero, right.name, right.shape))
        return self.concat(left, self.ops[-1].output)

    def flatten(self, x: Tensor) -> Tensor:
        """The same numbers as a vector."""
        y = Tensor(x.scale, x.zero, f"t{len(self.ops)}", (1, 1, x.size))
        return self.append(Reshape(f"flat_{len(self.ops)}", (x,), y))

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the image."""
        y = self.tensor((1, 1, x.shape[2]))
        return self.append(Mean(f"mean_{len(self.ops)}", (x,), y))

    def dense(self, x: Tensor, outputs: int, last: bool = False) -> Tensor:
        """A fully connected layer."""
        y = self.tensor((1, 1, outputs))
        more = self._parameters(x, y, (outputs, x.size), dense=True)
        if last:
            more["activation"] = (-128, 127)
        return self.append(Dense(f"dense_{len(self.ops)}", (x,), y, **more))


def random_network(rng: Generator) -> Network:
    """An image of some 100 numbers, two to five blocks of operators, one or two dense layers, a loss."""
    b = Builder(rng)
    shape = (int(rng.integers(4, 12)), int(rng.integers(4, 12)), int(rng.integers(1, 5)))
    x = Tensor(float(2.0 ** rng.uniform(-6, -2)), int(rng.integers(-128, 128)), "input", shape)
    for _ in range(int(rng.integers(2, 6))):
        makers = [b.depthwise, b.pool, b.pool, b.pad, b.branch, b.branch]
        kind = int(rng.integers(0, 10))
        if kind < 3:
            x = b.conv(x, int(rng.integers(2, 17)))
        elif kind < 9:
            x = makers[kind - 3](x)
        else:
            x = b.constant(x, "mul" if rng.random() < 0.6 else "add")
    end = rng.random()
    x = b.mean(x) if end < 0.4 else b.flatten(x)
    if rng.random() < 0.4:
        x = b.dense(x, int(rng.integers(3, 12)))
    b.dense(x, int(rng.integers(2, 8)), last=True)
    losses: tuple[Loss, ...] = ("softmax_ce", "softmax_ce", "mse", "hinge")
    return Network(tuple(b.ops), losses[int(rng.integers(0, 4))])


def random_options(rng: Generator, network: Network) -> Options:
    """A scheme, mostly 'sparse' with a random choice of layers, and all else by chance."""
    scheme = (*("sparse",) * 3, "full", "bias", "last+bias", "last")[int(rng.integers(0, 7))]
    chosen = None
    if scheme == "sparse":
        parts = []
        for layer in network.layers:
            outputs = len(layer.weights)
            rows = int(rng.integers(0, outputs + 1)) if rng.random() < 0.4 else int(rng.integers(0, 2)) * outputs
            if isinstance(layer, Depthwise):
                rows = rows and outputs
            parts.append((rows, bool(rng.random() < 0.5)))
        if not any(rows or bias for rows, bias in parts):
            parts[-1] = (len(network.layers[-1].weights), True)
        chosen = tuple(parts)
    return Options(
        scheme,
        "int8" if rng.random() < 0.3 else "int16",
        fraction=6 if rng.random() < 0.7 else int(rng.integers(2, 7)),
        gates=bool(rng.random() < 0.7),
        selection=chosen,
        gradients="int8" if rng.random() < 0.4 else "int16",
        recompute=bool(rng.random() < 0.3),
    )


def random_case(seed: int) -> cases.Case:
    """The case of a seed: network, choice of layers, samples, rate."""
    rng = np.random.default_rng(10_000 + seed)
    while True:
        network = random_network(rng)
        try:
            plan: Plan = compile_plan(network, random_options(rng, network))
            break
        except UserError as refusal:
            if "overflow" not in str(refusal):
                raise
    inputs = rng.integers(-128, 128, (cases.STEPS, network.input.size)).astype(np.int8)
    outputs = network.output.size
    if network.loss == "mse":
        targets: np.ndarray[Any, Any] = rng.integers(-128, 128, (cases.STEPS, outputs)).astype(np.int8)
    else:
        targets = rng.integers(0, outputs, cases.STEPS).astype(np.uint16)
    rate = (int(rng.integers(1024, 2048)), int(rng.integers(-20, -8)))
    return cases.Case(seed, plan, inputs, targets, rate, 4096 if rng.random() < 0.3 else 0)
