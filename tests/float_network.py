"""A quantised network in floating point: dequantised weights, back-propagation, plain stochastic gradient descent.

What integer training is judged by: the same network, with nothing rounded. Everything is written for a batch of samples
[n, height, width, channels] and works on one sample as a batch of one; a step of a small convolutional network takes
a few milliseconds. An activation is cut from below where it is a ReLU (Weighted.masked) and passes no gradient there;
it is cut from above where its activation ends below code 127, and passes the gradient there nevertheless, as a board
does (numerics.md, 6).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulearn_host.network import (
    Concat,
    Conv,
    Dense,
    Depthwise,
    Elementwise,
    Mean,
    Network,
    Op,
    Pad,
    Pool,
    Reshape,
    Softmax,
    Table,
    Weighted,
    Window,
)
from ulearn_host.schemes import aliases

Floats = NDArray[Any]  # float32, or float64 where that was asked for
Trains = Sequence[tuple[int, bool]]
Known = Mapping[str, Floats]


# ---- Losses ----------------------------------------------------------------------------------------------------------
# Each takes logits [n, classes] and n labels, or targets [n, outputs], and gives n losses and their gradient.


def softmax_ce(logits: Floats, labels: Any) -> tuple[Floats, Floats]:
    """Cross-entropy of the softmax."""
    rows = np.arange(len(logits))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    loss = -np.log(p[rows, labels])
    p[rows, labels] -= 1
    return loss, p


def mse(logits: Floats, targets: Any) -> tuple[Floats, Floats]:
    """Mean over the outputs of the squared difference."""
    difference = logits - np.asarray(targets, dtype=logits.dtype).reshape(logits.shape)
    return (difference**2).mean(axis=1), 2 / logits.shape[1] * difference


def hinge(logits: Floats, labels: Any, margin: float = 1.0) -> tuple[Floats, Floats]:
    """Crammer and Singer's hinge: max(0, margin + the largest other logit - the label's)."""
    rows = np.arange(len(logits))
    others = logits.copy()
    others[rows, labels] = -np.inf
    rival = others.argmax(axis=1)
    loss = np.maximum(0, margin + others[rows, rival] - logits[rows, labels])
    gradient = np.zeros_like(logits)
    gradient[rows, rival] = loss > 0
    gradient[rows, labels] = -gradient[rows, rival]
    return loss, gradient


# ---- Windows ---------------------------------------------------------------------------------------------------------


class _Walk:
    """A window over images: what lies under its kernel, and where that came from."""

    def __init__(self, op: Op, window: Window) -> None:
        self.inside, self.out = op.input.shape, op.output.shape[:2]
        self.kernel, self.stride, self.pad = window.kernel, window.stride, window.pad
        reach = [(o - 1) * s + k for o, s, k in zip(self.out, self.stride, self.kernel, strict=True)]
        self.field = [max(r, p + size) for r, p, size in zip(reach, self.pad, self.inside, strict=False)]
        self.point = self.kernel == self.stride == (1, 1) and self.out == self.inside[:2]
        self.bare = tuple(self.field) == self.inside[:2]  # nothing is padded

    def padded(self, x: Floats, value: float = 0.0) -> Floats:
        """Images with `value` around them, as far as the window reaches."""
        if self.bare:
            return x
        field = np.full((len(x), *self.field, x.shape[3]), value, x.dtype)
        self.middle(field)[...] = x
        return field

    def middle(self, field: Floats) -> Floats:
        """The images in what `padded` made, as a view."""
        (top, left), (height, width, _) = self.pad, self.inside
        return field[:, top : top + height, left : left + width]

    def taps(self, field: Floats) -> list[Floats]:
        """For each place in the kernel the cells that it meets, as views [n, out_h, out_w, c]."""
        (height, width), (down, right) = self.out, self.stride
        return [
            field[:, i : i + (height - 1) * down + 1 : down, j : j + (width - 1) * right + 1 : right]
            for i, j in product(*map(range, self.kernel))
        ]

    def columns(self, x: Floats) -> Floats:
        """[positions, kernel_h * kernel_w * c]: the cells under the kernel at every position."""
        if self.point:
            return x.reshape(-1, x.shape[3])
        return np.stack(self.taps(self.padded(x)), axis=3).reshape(len(x) * self.out[0] * self.out[1], -1)

    def scatter(self, taps: Sequence[Floats]) -> Floats:
        """The reverse of taps and padding: every cell gets the sum of what its appearances got."""
        n, _, _, c = taps[0].shape
        field = np.zeros((n, *self.field, c), taps[0].dtype)
        for into, tap in zip(self.taps(field), taps, strict=True):
            into += tap
        return self.middle(field)


# ---- Operators -------------------------------------------------------------------------------------------------------


class Node:
    """An operator in floating point. It keeps what its backward pass needs from its last forward pass."""

    def __init__(self, op: Op, dtype: Any) -> None:
        """dtype: what it computes in."""
        self.op, self.dtype = op, dtype
        low, high = getattr(op, "activation", (-128, 127))
        # Those that have their input's codes cut nothing unless their activation does.
        floor = low > -128 or (op.output.zero == -128 and isinstance(op, Weighted | Elementwise))
        self.low = (low - op.output.zero) * op.output.scale if floor else None
        self.high = (high - op.output.zero) * op.output.scale if high < 127 else None
        self.passes: Floats | None = None

    def forward(self, inputs: Sequence[Floats]) -> Floats:
        """The output of the operator, cut by its activation."""
        y = self.compute(inputs)
        if self.low is not None:
            self.passes = y > self.low
            y = np.maximum(y, self.dtype(self.low))
        return y if self.high is None else np.minimum(y, self.dtype(self.high))

    def uncut(self, gradient: Floats) -> Floats:
        """The gradient before the activation."""
        return gradient if self.low is None else gradient * self.passes

    def compute(self, inputs: Sequence[Floats]) -> Floats:
        """The output before the activation."""
        raise NotImplementedError

    def pass_on(self, gradient: Floats) -> list[Floats]:
        """Gradients at the inputs, given the one before the activation."""
        raise NotImplementedError


class Layer(Node):
    """An operator with weights [outputs, ...] and bias [outputs], which a step changes in place."""

    op: Weighted
    weights: Floats
    bias: Floats

    def __init__(self, op: Weighted, dtype: Any) -> None:
        """The weights are the operator's, dequantised."""
        super().__init__(op, dtype)
        self.reset()

    def reset(self) -> None:
        """Back to the quantised network's weights."""
        scales = self.op.weight_scales.reshape(-1, *[1] * (self.op.weights.ndim - 1))
        self.weights = (self.op.weights * scales).astype(self.dtype)
        self.bias = (self.op.bias * self.op.weight_scales * self.op.input.scale).astype(self.dtype)

    def weight_gradient(self, gradient: Floats, rows: int) -> Floats:
        """Of the last `rows` output channels' weights, summed over the batch."""
        raise NotImplementedError


class _Matrix(Layer):
    """A convolution by columns and one product of matrices; a dense layer is one with nothing to walk over."""

    def __init__(self, op: Conv | Dense, dtype: Any) -> None:
        super().__init__(op, dtype)
        self.walk = _Walk(op, op.window) if isinstance(op, Conv) else None

    def compute(self, inputs: Sequence[Floats]) -> Floats:
        (x,) = inputs
        matrix = self.weights.reshape(len(self.weights), -1)
        self.columns = self.walk.columns(x) if self.walk else x.reshape(-1, matrix.shape[1])
        return (self.columns @ matrix.T + self.bias).reshape(len(x), *self.op.output.shape)

    def weight_gradient(self, gradient: Floats, rows: int) -> Floats:
        sums = gradient.reshape(-1, len(self.weights))[:, -rows:].T @ self.columns
        return sums.reshape(rows, *self.weights.shape[1:])

    def pass_on(self, gradient: Floats) -> list[Floats]:
        matrix = self.weights.reshape(len(self.weights), -1)
        columns = gradient.reshape(-1, len(matrix)) @ matrix
        if self.walk is None or self.walk.point:
            return [columns.reshape(len(gradient), *self.op.input.shape)]
        cells = columns.reshape(len(gradient), *self.walk.out, -1, self.op.input.shape[2])
        return [self.walk.scatter([cells[:, :, :, i] for i in range(cells.shape[3])])]


class _Depthwise(Layer):
    op: Depthwise

    def __init__(self, op: Depthwise, dtype: Any) -> None:
        super().__init__(op, dtype)
        self.walk = _Walk(op, op.window)

    def kernels(self) -> Floats:
        """[taps, channels]"""
        return np.ascontiguousarray(self.weights.reshape(len(self.weights), -1).T)

    def compute(self, inputs: Sequence[Floats]) -> Floats:
        (x,) = inputs
        if self.op.multiplier > 1:
            x = np.repeat(x, self.op.multiplier, axis=3)
        self.seen = self.walk.taps(self.walk.padded(x))
        y = np.empty((len(x), *self.op.output.shape), x.dtype)
        y[...] = self.bias
        for seen, kernel in zip(self.seen, self.kernels(), strict=True):
            y += seen * kernel
        return y

    def weight_gradient(self, gradient: Floats, rows: int) -> Floats:
        flat = np.ascontiguousarray(gradient[..., -rows:])
        taps = [np.einsum("nhwc,nhwc->c", seen[..., -rows:], flat) for seen in self.seen]
        return np.stack(taps, axis=1).reshape(rows, *self.weights.shape[1:])

    def pass_on(self, gradient: Floats) -> list[Floats]:
        below = self.walk.scatter([gradient * kernel for kernel in self.kernels()])
        if self.op.multiplier > 1:
            below = below.reshape(*below.shape[:3], -1, self.op.multiplier).sum(axis=4)
        return [below]


class _Pool(Node):
    op: Pool

    def __init__(self, op: Pool, dtype: Any) -> None:
        super().__init__(op, dtype)
        self.walk = _Walk(op, op.window)
        ones = np.ones((1, *op.input.shape), dtype)
        self.share = 1 / sum(self.walk.taps(self.walk.padded(ones)))
        self.whole = op.output.shape[:2] == (1, 1) and op.window.kernel == op.input.shape[:2] and self.walk.bare

    def compute(self, inputs: Sequence[Floats]) -> Floats:
        (self.x,) = inputs
        if self.op.kind == "average":
            if self.whole:
                return self.x.mean(axis=(1, 2), keepdims=True)
            return sum(self.walk.taps(self.walk.padded(self.x))) * self.share
        self.y = np.maximum.reduce(self.walk.taps(self.walk.padded(self.x, -np.inf)))
        return self.y

    def pass_on(self, gradient: Floats) -> list[Floats]:
        if self.op.kind == "average":
            if self.whole:
                return [np.broadcast_to(gradient * self.share, self.x.shape)]
            return [self.walk.scatter([gradient * self.share] * (self.walk.kernel[0] * self.walk.kernel[1]))]
        left, taps = np.ones(gradient.shape, bool), []
        for seen in self.walk.taps(self.walk.padded(self.x, -np.inf)):  # the first of equals gets it all
            hit = left & (seen == self.y)
            left &= ~hit
            taps.append(gradient * hit)
        return [self.walk.scatter(taps)]


class _Mean(Node):
    def compute(self, inputs: Sequence[Floats]) -> Floats:
        return inputs[0].mean(axis=(1, 2), keepdims=True)

    def pass_on(self, gradient: Floats) -> list[Floats]:
        height, width, _ = self.op.input.shape
        return [np.broadcast_to(gradient / (height * width), (len(gradient), *self.op.input.shape))]


class _Elementwise(Node):
    op: Elementwise

    def __init__(self, op: Elementwise, dtype: Any) -> None:
        super().__init__(op, dtype)
        self.constant = None if op.constant is None else op.second.real(op.constant).astype(dtype)[None]

    def compute(self, inputs: Sequence[Floats]) -> Floats:
        self.a, b = inputs[0], inputs[1] if self.constant is None else self.constant
        # It repeats along the channels, which are innermost.
        self.b = b.reshape(-1, *self.a.shape[1:]) if b[0].size == self.a[0].size else b.reshape(len(b), 1, 1, -1)
        return self.a + self.b if self.op.kind == "add" else self.a * self.b

    def pass_on(self, gradient: Floats) -> list[Floats]:
        a, b = (gradient, gradient) if self.op.kind == "add" else (gradient * self.b, gradient * self.a)
        if self.constant is not None:
            return [a]
        repeated = tuple(i for i in (1, 2, 3) if self.b.shape[i] == 1)
        return [a, b.sum(axis=repeated).reshape(len(b), *self.op.inputs[1].shape)]


class _Pad(Node):
    op: Pad

    def place(self, y: Floats) -> Floats:
        """Where the input lies in the output, as a view."""
        corner = zip(self.op.before, self.op.input.shape, strict=True)
        return y[(slice(None), *(slice(begin, begin + size) for begin, size in corner))]

    def compute(self, inputs: Sequence[Floats]) -> Floats:
        value = (self.op.value - self.op.output.zero) * self.op.output.scale
        y = np.full((len(inputs[0]), *self.op.output.shape), value, self.dtype)
        self.place(y)[...] = inputs[0]
        return y

    def pass_on(self, gradient: Floats) -> list[Floats]:
        return [self.place(gradient)]


class _Concat(Node):
    op: Concat

    def compute(self, inputs: Sequence[Floats]) -> Floats:
        constants = self.op.constants or (None,) * len(inputs)
        parts = []
        for given, codes, tensor in zip(inputs, constants, self.op.inputs, strict=True):
            if codes is not None:
                real = tensor.real(codes).reshape(1, *tensor.shape).astype(self.dtype)
                given = np.broadcast_to(real, (len(next(x for x in inputs if x.size)), *tensor.shape))
            parts.append(given)
        return np.concatenate(parts, axis=1 + self.op.axis)

    def pass_on(self, gradient: Floats) -> list[Floats]:
        ends = np.cumsum([tensor.shape[self.op.axis] for tensor in self.op.inputs])[:-1]
        return np.split(gradient, ends, axis=1 + self.op.axis)


class _Reshape(Node):
    def compute(self, inputs: Sequence[Floats]) -> Floats:
        return inputs[0].reshape(len(inputs[0]), *self.op.output.shape)

    def pass_on(self, gradient: Floats) -> list[Floats]:
        return [gradient.reshape(len(gradient), *self.op.input.shape)]


class _Table(Node):
    """A function known at 256 places: straight lines between them."""

    op: Table

    def __init__(self, op: Table, dtype: Any) -> None:
        super().__init__(op, dtype)
        self.places = op.input.real(np.arange(-128, 128))
        self.values = op.output.real(op.table)

    def compute(self, inputs: Sequence[Floats]) -> Floats:
        (self.x,) = inputs
        return np.interp(self.x, self.places, self.values).astype(self.dtype)

    def pass_on(self, gradient: Floats) -> list[Floats]:
        slopes = np.concatenate([[0], np.diff(self.values), [0]]) / self.op.input.scale
        return [gradient * slopes[np.searchsorted(self.places, self.x)].astype(self.dtype)]


_NODES: dict[type[Op], type[Any]] = {
    Conv: _Matrix,
    Dense: _Matrix,
    Depthwise: _Depthwise,
    Pool: _Pool,
    Mean: _Mean,
    Elementwise: _Elementwise,
    Pad: _Pad,
    Concat: _Concat,
    Reshape: _Reshape,
    Table: _Table,
}


# ---- The network -----------------------------------------------------------------------------------------------------


class FloatNetwork:
    """A network in floating point, up to the logits. layers: the operators with weights, as network.layers has them.

    gradients, activation_gradients and sum_gradients hold what the last backward pass found: of 'layer/weights' and
    'layer/bias', of every tensor by its name, and of every operator's output before its activation by its name.
    """

    def __init__(self, network: Network, dtype: Any = np.float32, margin: float = 1.0) -> None:
        """dtype: float64 to check gradients. margin: of the hinge loss, in units of the logits."""
        self.network, self.dtype = network, dtype
        last = network.ops[-1]
        ops = network.ops[:-1] if isinstance(last, Softmax) else network.ops
        self.beta = last.beta if isinstance(last, Softmax) else 1.0
        for op in ops:
            if type(op) not in _NODES:
                raise ValueError(f"{op.name}: {type(op).__name__} is not supported before the last operator")
        self.nodes: list[Node] = [_NODES[type(op)](op, dtype) for op in ops]
        logits = aliases(network).get(network.logits.name, network.logits.name)
        for node in self.nodes:
            if node.op.output.name == logits and getattr(node.op, "activation", (-128,))[0] == -128:
                node.low = None  # logits without codes below 0 are no ReLU
        self.layers: list[Layer] = [node for node in self.nodes if isinstance(node, Layer)]
        losses: dict[str, Callable[[Floats, Any], tuple[Floats, Floats]]] = {
            "softmax_ce": softmax_ce,
            "mse": mse,
            "hinge": lambda logits, labels: hinge(logits, labels, margin),
        }
        self.loss_of = losses.get(network.loss)
        self.everything: Trains = tuple((len(layer.weights), True) for layer in self.layers)
        self.logits = np.zeros((0, network.logits.size), dtype)
        self.gradients: dict[str, Floats] = {}
        self.activation_gradients: dict[str, Floats] = {}
        self.sum_gradients: dict[str, Floats] = {}
        self._plans: dict[Trains, tuple[list[Node], set[str]]] = {}

    def reset(self) -> None:
        """Back to the quantised network's weights."""
        for layer in self.layers:
            layer.reset()

    def forward(self, x: NDArray[Any] | Known) -> Floats:
        """Logits [n, outputs] of samples [n, ...] in real units; of one sample flat or [h, w, c]: [outputs].

        x may also be what `frozen` answers: then only what comes after runs.
        """
        if isinstance(x, Mapping):
            values, one = dict(x), False
        else:
            shape = self.network.input.shape
            one = np.shape(x) in (shape, (self.network.input.size,))
            values = {self.network.input.name: np.asarray(x, self.dtype).reshape(-1, *shape)}
        for node in self.nodes:
            known = all(tensor.name in values for tensor in _variable(node.op))
            if known and node.op.output.name not in values:
                values[node.op.output.name] = node.forward(_inputs(node.op, values))
        logits = values[self.network.logits.name]
        self.logits = logits.reshape(len(logits), -1)
        return self.logits[0] if one else self.logits

    def frozen(self, x: NDArray[Any], trains: Trains) -> dict[str, Floats]:
        """The activations of samples [n, ...] that no trained parameter can change and that those that can read."""
        _, moved = self._plan(trains)
        values = {self.network.input.name: np.asarray(x, self.dtype).reshape(-1, *self.network.input.shape)}
        for node in self.nodes:
            if node.op.output.name not in moved:
                values[node.op.output.name] = node.forward(_inputs(node.op, values))
        read = {t.name for node in self.nodes if node.op.output.name in moved for t in _variable(node.op)}
        return {name: value for name, value in values.items() if name in read}

    def _plan(self, trains: Trains) -> tuple[list[Node], set[str]]:
        """The operators that the backward pass visits, last first, and the tensors that training moves."""
        trains = tuple(trains)
        if trains not in self._plans:
            trained = {id(layer) for layer, (rows, bias) in zip(self.layers, trains, strict=True) if rows or bias}
            moved: set[str] = set()
            for node in self.nodes:
                if id(node) in trained or any(tensor.name in moved for tensor in _variable(node.op)):
                    moved.add(node.op.output.name)
            self._plans[trains] = [node for node in reversed(self.nodes) if node.op.output.name in moved], moved
        return self._plans[trains]

    def loss(self, target: Any) -> Floats:
        """The losses [n] of the last forward pass. target: as for backward."""
        return self._loss(target)[0]

    def _loss(self, target: Any) -> tuple[Floats, Floats]:
        if self.loss_of is None:
            raise ValueError("the network has no loss")
        if self.network.loss == "mse":
            return self.loss_of(self.logits, target)
        loss, gradient = self.loss_of(self.dtype(self.beta) * self.logits, np.atleast_1d(target))
        return loss, self.dtype(self.beta) * gradient

    def backward(self, target: Any, trains: Trains | None = None) -> dict[str, Floats]:
        """Gradients of the summed loss of the last forward pass by parameter: 'layer/weights', 'layer/bias'.

        target: the label or labels, or with mse the vector or vectors. trains: for every layer how many of its last
        output channels' weights are wanted, and whether its bias is; all where it is None. Nothing is computed that
        leads to nothing wanted.
        """
        trains = self.everything if trains is None else trains
        visited, moved = self._plan(trains)
        wanted = {id(layer): entry for layer, entry in zip(self.layers, trains, strict=True)}
        self.gradients, self.sum_gradients = {}, {}
        _, gradient = self._loss(target)
        logits = self.network.logits
        found = self.activation_gradients = {logits.name: gradient.reshape(-1, *logits.shape)}
        for node in visited:
            if node.op.output.name not in found:
                continue  # it leads nowhere
            gradient = self.sum_gradients[node.op.name] = node.uncut(found[node.op.output.name])
            if isinstance(node, Layer):
                rows, bias = wanted[id(node)]
                if rows:
                    self.gradients[node.op.name + "/weights"] = node.weight_gradient(gradient, rows)
                if bias:
                    self.gradients[node.op.name + "/bias"] = gradient.reshape(-1, len(node.bias)).sum(axis=0)
            if not any(tensor.name in moved for tensor in _variable(node.op)):
                continue
            for tensor, below in zip(node.op.inputs, node.pass_on(gradient), strict=True):
                if tensor.name in moved:
                    found[tensor.name] = found[tensor.name] + below if tensor.name in found else below
        return self.gradients

    def step(self, x: NDArray[Any] | Known, target: Any, rate: float, trains: Trains) -> None:
        """One step of plain gradient descent."""
        self.forward(x)
        gradients = self.backward(target, trains)
        step = self.dtype(rate)
        for layer in self.layers:
            weights = gradients.get(layer.op.name + "/weights")
            if weights is not None:
                layer.weights[-len(weights) :] -= step * weights
            bias = gradients.get(layer.op.name + "/bias")
            if bias is not None:
                layer.bias -= step * bias


def _variable(op: Op) -> list[Any]:
    """The inputs that are activations."""
    constants = op.constants if isinstance(op, Concat) and op.constants else (None,) * len(op.inputs)
    return [tensor for tensor, codes in zip(op.inputs, constants, strict=True) if codes is None]


def _inputs(op: Op, values: Known) -> list[Floats]:
    """The values of the inputs; of a constant nothing."""
    return [values.get(tensor.name, np.zeros((0,))) for tensor in op.inputs]
