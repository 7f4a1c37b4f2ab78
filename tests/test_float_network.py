"""The float network: its gradients against finite differences, its answers against another interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import onnx_models
from float_network import FloatNetwork
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
    Softmax,
    Table,
    Tensor,
    Window,
)

SHAPE = (5, 4, 3)
CLASSES = 4
LOSSES: tuple[Loss, ...] = ("softmax_ce", "mse", "hinge")  # type: ignore[assignment]
FULL = (-128, 127)


class Build:
    """Operators one after the other, with seeded weights; `x` is the tensor made last."""

    def __init__(self, seed: int = 0) -> None:
        """The input's zero point is 0."""
        self.rng = np.random.default_rng(seed)
        self.x = Tensor(0.1, 0, "input", SHAPE)
        self.ops: list[Op] = []

    def tensor(self, shape: Sequence[int], scale: float = 0.1, zero: int = 0) -> Tensor:
        """A new tensor."""
        return Tensor(scale, zero, f"t{len(self.ops)}", tuple(shape))  # type: ignore[arg-type]

    def add(self, op: Op) -> Build:
        """An operator that was made."""
        self.ops.append(op)
        self.x = op.output
        return self

    def weights(self, *shape: int) -> tuple[Any, Any, Any]:
        """Weights, biases and scales that keep sums near 1."""
        fan = int(np.prod(shape[1:]))
        weights = self.rng.integers(-127, 128, shape).astype(np.int8)
        scales = np.exp(self.rng.uniform(-0.5, 0.5, shape[0])) / 64 / fan**0.5
        return weights, self.rng.integers(-2000, 2000, shape[0]).astype(np.int32), scales

    def conv(self, channels: int, window: Window, size: tuple[int, int], **how: Any) -> Build:
        """A convolution; how: name, relu."""
        weights = self.weights(channels, *window.kernel, self.x.shape[2])
        y, activation = self.output((*size, channels), **how)
        return self.add(Conv(f"conv{len(self.ops)}", (self.x,), y, *weights, activation, window))

    def depthwise(self, multiplier: int, window: Window, size: tuple[int, int], **how: Any) -> Build:
        """A depthwise convolution."""
        channels = multiplier * self.x.shape[2]
        y, activation = self.output((*size, channels), **how)
        weights = self.weights(channels, *window.kernel, 1)
        return self.add(Depthwise(f"depthwise{len(self.ops)}", (self.x,), y, *weights, activation, window))

    def dense(self, outputs: int, rows: int = 1, **how: Any) -> Build:
        """A dense layer."""
        y, activation = self.output((1, rows, outputs), **how)
        weights = self.weights(outputs, self.x.size // rows)
        return self.add(Dense(f"dense{len(self.ops)}", (self.x,), y, *weights, activation))

    def output(self, shape: Sequence[int], relu: bool = False) -> tuple[Tensor, tuple[int, int]]:
        """A tensor, and the activation that makes a ReLU of it in one of the two ways there are."""
        if not relu:
            return self.tensor(shape), FULL
        shifted = self.rng.random() < 0.5
        return self.tensor(shape, zero=-128 if shifted else -20), FULL if shifted else (-20, 127)

    def pool(self, kind: Any, window: Window, size: tuple[int, int]) -> Build:
        """A pooling."""
        y = self.tensor((*size, self.x.shape[2]), self.x.scale, self.x.zero)
        return self.add(Pool(f"pool{len(self.ops)}", (self.x,), y, kind, window, FULL))

    def network(self, loss: Loss = "softmax_ce") -> Network:
        """With a dense layer at the end, and where the loss is cross-entropy a softmax."""
        self.dense(CLASSES)
        if loss == "softmax_ce":
            self.add(Softmax("softmax", (self.x,), Tensor(1 / 256, -128, "p", self.x.shape), beta=1.5))
        return Network(tuple(self.ops), loss)


SAME = Window((3, 3), (1, 1), (1, 1))
STRIDED = Window((3, 2), (2, 2), (1, 0))
POINT = Window((1, 1))


def _shortcut(b: Build) -> Build:
    """x + f(x): a tensor that is read twice."""
    x = b.conv(3, SAME, (5, 4), relu=True).x
    y = b.conv(3, SAME, (5, 4)).x
    return b.add(Elementwise("sum", (x, y), b.tensor(SHAPE, zero=-128), "add", FULL, y))


def _excite(b: Build) -> Build:
    """x * f(mean of x), a number a channel."""
    x = b.conv(3, POINT, (5, 4)).x
    b.add(Mean("mean", (x,), b.tensor((1, 1, 3))))
    y = b.dense(3, relu=True).x
    return b.add(Elementwise("scaled", (x, y), b.tensor(SHAPE), "mul", FULL, y))


def _square(b: Build) -> Build:
    x = b.conv(3, POINT, (5, 4)).x
    return b.add(Elementwise("square", (x, x), b.tensor(SHAPE), "mul", FULL, x))


def _constant(b: Build, kind: Any, count: int) -> Build:
    constant = b.rng.integers(-128, 128, count).astype(np.int8)
    x = b.conv(3, POINT, (5, 4)).x
    return b.add(Elementwise("constant", (x,), b.tensor(SHAPE), kind, FULL, Quantisation(0.02, 3), constant))


def _concat(b: Build, axis: int, constant: bool) -> Build:
    """Two activations side by side, if wanted with a constant between them."""
    shape = [*SHAPE]
    shape[axis] *= 2 + constant
    first = b.conv(3, SAME, (5, 4), relu=True).x
    second = b.conv(3, SAME, (5, 4)).x
    if not constant:
        return b.add(Concat("concat", (first, second), b.tensor(shape), axis))
    between = Tensor(0.1, 0, "between", SHAPE)
    codes = b.rng.integers(-128, 128, between.size).astype(np.int8)
    return b.add(Concat("concat", (first, between, second), b.tensor(shape), axis, (None, codes, None)))


def _pad(b: Build) -> Build:
    x = b.conv(3, POINT, (5, 4)).x
    return b.add(Pad("pad", (x,), b.tensor((8, 6, 5)), (1, 2, 1), 7))


def _table(b: Build) -> Build:
    x = b.conv(3, POINT, (5, 4)).x
    table = np.clip(np.arange(-128, 128) * 2, -128, 127).astype(np.int8)
    return b.add(Table("table", (x,), b.tensor(SHAPE), "double", table))


def _reshape(b: Build) -> Build:
    x = b.conv(3, POINT, (5, 4)).x
    return b.add(Reshape("reshape", (x,), b.tensor((4, 5, 3)))).conv(2, SAME, (4, 5))


NETWORKS: dict[str, Callable[[Build], Build]] = {
    "dense": lambda b: b.dense(6, relu=True).dense(5),
    "dense_rows": lambda b: b.dense(6, rows=4, relu=True),
    "conv": lambda b: b.conv(4, SAME, (5, 4), relu=True).conv(3, STRIDED, (3, 2), relu=True),
    "pointwise": lambda b: b.conv(4, POINT, (5, 4), relu=True).conv(4, Window((1, 1), (2, 2)), (3, 2)),
    "valid": lambda b: b.conv(4, Window((3, 2)), (3, 3), relu=True),
    "short": lambda b: b.conv(4, Window((2, 2), (3, 3)), (1, 1), relu=True),  # leaves cells unread
    "depthwise": lambda b: b.depthwise(1, SAME, (5, 4), relu=True).depthwise(2, STRIDED, (3, 2)),
    "average": lambda b: b.conv(3, SAME, (5, 4)).pool("average", SAME, (5, 4)).pool("average", STRIDED, (3, 2)),
    "global": lambda b: b.conv(3, SAME, (5, 4)).pool("average", Window((5, 4)), (1, 1)),
    "max": lambda b: b.conv(3, SAME, (5, 4)).pool("max", STRIDED, (3, 2)),
    "max_same": lambda b: b.conv(3, SAME, (5, 4)).pool("max", SAME, (5, 4)),  # a second one would meet equals
    "shortcut": _shortcut,
    "excite": _excite,
    "square": _square,
    "add_constant": lambda b: _constant(b, "add", 60),
    "mul_channels": lambda b: _constant(b, "mul", 3),
    "mul_one": lambda b: _constant(b, "mul", 1),
    "concat_0": lambda b: _concat(b, 0, False),
    "concat_1": lambda b: _concat(b, 1, False),
    "concat_2": lambda b: _concat(b, 2, False),
    "beside_a_constant": lambda b: _concat(b, 2, True),
    "pad": _pad,
    "table": _table,
    "reshape": _reshape,
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_finite_differences(name: str, loss: Loss) -> None:
    """Every weight's and bias' gradient is what the loss does when it moves; of every activation, likewise."""
    network = NETWORKS[name](Build(len(name))).network(loss)
    net, rng = FloatNetwork(network, np.float64), np.random.default_rng(1)
    x = rng.normal(size=(2, *SHAPE))
    logits = net.forward(x)
    target = rng.normal(size=logits.shape) if loss == "mse" else logits.argmin(axis=1)  # where a hinge has a slope
    gradients = net.backward(target)
    assert set(gradients) == {f"{layer.op.name}/{kind}" for layer in net.layers for kind in ("weights", "bias")}

    def loss_at(given: Any = x) -> float:
        net.forward(given)
        return float(net.loss(target).sum())

    for layer in net.layers:
        for kind in ("weights", "bias"):
            values, gradient = getattr(layer, kind), gradients[f"{layer.op.name}/{kind}"]
            assert gradient.shape == values.shape
            for at in rng.integers(0, values.size, 12):
                assert gradient.flat[at] == pytest.approx(_slope(loss_at, values, at), rel=1e-4, abs=1e-7), at
    # Activations: whatever is computed after a tensor is given runs on from there.
    values = {network.input.name: x}
    for node in net.nodes:
        values[node.op.output.name] = node.forward([values.get(t.name, np.zeros(0)) for t in node.op.inputs])
    net.forward(x)
    net.backward(target)
    for tensor, gradient in dict(net.activation_gradients).items():
        known = {t: v.copy() for t, v in values.items() if _before(network, t, tensor)}
        for at in rng.integers(0, gradient.size, 6):
            slope = _slope(lambda known=known: loss_at(known), known[tensor], at)
            assert gradient.flat[at] == pytest.approx(slope, rel=1e-4, abs=1e-7), (tensor, at)


def _before(network: Network, tensor: str, last: str) -> bool:
    names = [network.input.name, *(op.output.name for op in network.ops)]
    return names.index(tensor) <= names.index(last)


def _slope(loss: Callable[[], float], values: np.ndarray, at: int) -> float:
    before, h = values.flat[at], 1e-6
    sides = []
    for value in (before + h, before - h):
        values.flat[at] = value
        sides.append(loss())
    values.flat[at] = before
    return (sides[0] - sides[1]) / (2 * h)


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"table", "beside_a_constant"}))
def test_forward_is_what_another_interpreter_says(name: str) -> None:
    """The logits of onnx_models.interpret, which knows no constant in a concat, and tables by their codes alone."""
    network = NETWORKS[name](Build(len(name))).network("mse")
    x = np.random.default_rng(2).normal(size=(3, *SHAPE)) / 2  # it cuts what is beyond the codes' range
    wanted = [onnx_models.interpret(network, one, rounded=False).reshape(-1) for one in x]
    net = FloatNetwork(network, np.float64)
    assert net.forward(x) == pytest.approx(np.array(wanted), rel=1e-9, abs=1e-9)
    assert net.forward(x[1]) == pytest.approx(wanted[1], rel=1e-9, abs=1e-9)
    assert FloatNetwork(network).forward(x).dtype == np.float32


def test_upper_cuts_pass_the_gradient_and_lower_ones_do_not() -> None:
    """ReLU6: cut at both ends, and only the lower one stops learning."""
    network = NETWORKS["dense"](Build(1)).network()
    first = replace(network.ops[0], activation=(network.ops[0].output.zero, network.ops[0].output.zero + 6))
    network = replace(network, ops=(first, *network.ops[1:]))
    net = FloatNetwork(network, np.float64)
    x = np.random.default_rng(3).normal(size=SHAPE)
    sums = net.layers[0].compute([x[None]]).ravel()
    assert min(sums) < 0 and max(sums) > 6 * first.output.scale
    net.forward(x)
    gradient = net.backward(2)[first.name + "/bias"]
    assert ((gradient != 0) == (sums > 0)).all()
    assert net.activation_gradients[first.output.name].ravel()[sums > 0] == pytest.approx(gradient[sums > 0])


@pytest.mark.parametrize("name", ["conv", "depthwise", "shortcut", "excite", "concat_2"])
@pytest.mark.parametrize("deepest", [0, 1, 2])
def test_what_does_not_train_is_left_out(name: str, deepest: int) -> None:
    """Of a selection of layers the same gradients and nothing else; from the frozen activations the same logits."""
    network = NETWORKS[name](Build(5)).network()
    net, rng = FloatNetwork(network, np.float64), np.random.default_rng(4)
    x, labels = rng.normal(size=(4, *SHAPE)), rng.integers(0, CLASSES, 4)
    trains = [(0, False)] * deepest + [(2, False), (0, True), (CLASSES, True)][: len(net.layers) - deepest]
    trains += [(0, False)] * (len(net.layers) - len(trains))
    whole = net.forward(x)
    everything = dict(net.backward(labels))
    frozen = net.frozen(x, trains)
    assert net.forward(frozen) == pytest.approx(whole)
    found = net.backward(labels, trains)
    wanted = {}
    for layer, (rows, bias) in zip(net.layers, trains, strict=True):
        if rows:
            wanted[layer.op.name + "/weights"] = everything[layer.op.name + "/weights"][-rows:]
        if bias:
            wanted[layer.op.name + "/bias"] = everything[layer.op.name + "/bias"]
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert found[key] == pytest.approx(gradient), key
    below = {layer.op.output.name for layer in net.layers[:deepest]} | {network.input.name}
    assert not below & net.activation_gradients.keys()
    # A step on one sample: what trains goes down its gradient, the rest stays.
    before = [(layer.weights.copy(), layer.bias.copy()) for layer in net.layers]
    net.step({tensor: values[:1] for tensor, values in frozen.items()}, int(labels[0]), 0.5, trains)
    for layer, (weights, bias) in zip(net.layers, before, strict=True):
        gradient = np.zeros_like(weights)
        rows = net.gradients.get(layer.op.name + "/weights")
        if rows is not None:
            gradient[-len(rows) :] = rows
        assert layer.weights == pytest.approx(weights - 0.5 * gradient)
        assert layer.bias == pytest.approx(bias - 0.5 * net.gradients.get(layer.op.name + "/bias", 0 * bias))
    net.reset()
    assert all((layer.weights == weights).all() for layer, (weights, _) in zip(net.layers, before, strict=True))
