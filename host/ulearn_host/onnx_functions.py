"""ONNX operators that are functions of one number, and the softmax."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ulearn_host.network import Quantisation
from ulearn_host.onnx_draft import (
    Clipped,
    DraftSoftmax,
    Function,
    Numbers,
)
from ulearn_host.onnx_file import Node
from ulearn_host.onnx_lower import Lowering, in_order, operator


@operator("Relu")
def _relu(state: Lowering, node: Node) -> None:
    _clip(state, node, 0.0, np.inf)


@operator("Clip", inputs=3)
def _clip_node(state: Lowering, node: Node) -> None:
    _clip(state, node, _bound(state, node, 1, -np.inf), _bound(state, node, 2, np.inf))


@operator("Min", "Max", inputs=2)
def _min_max(state: Lowering, node: Node) -> None:
    if len(node.inputs) != 2 or node.inputs[1] not in state.constants:
        raise node.refuse("of computed tensors is not supported; a constant may come second")
    bound = _bound(state, node, 1, 0.0)
    _clip(state, node, *((-np.inf, bound) if node.op == "Min" else (bound, np.inf)))


def _bound(state: Lowering, node: Node, i: int, default: float) -> float:
    found = state.constant(node, i)
    if found is None:
        return default
    if found.values.size != 1 or found.values.dtype.kind != "f":
        raise node.refuse("has a bound that is no number; the file is damaged")
    return float(found.values.ravel()[0])


def _clip(state: Lowering, node: Node, low: float, high: float) -> None:
    """Cut at two numbers: by the operator before, when nothing else reads it."""
    x = state.value(node)
    if low > high:
        raise node.refuse(f"cuts at {low:g} and {high:g}, expected the lower bound first")
    op = x.tensor.producer
    if isinstance(op, Clipped) and x.sole and x.tensor.fixed is None and max(low, op.low) <= min(high, op.high):
        op.low, op.high = max(low, op.low), min(high, op.high)
        state.again(node, x)
        return
    name = "relu" if (low, high) == (0, np.inf) else f"clip {low:g} {high:g}"
    state.table(node, x, name, lambda v: np.clip(v, low, high))


def _gelu(node: Node) -> Function:
    if node.text("approximate", "none") == "tanh":
        return lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def _sigmoid(x: Numbers) -> Numbers:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -500, 500))))


def _softplus(x: Numbers) -> Numbers:
    return np.asarray(np.logaddexp(0, x))


_erf: Function = np.vectorize(math.erf, otypes=[np.float64])


def _hard_sigmoid(node: Node, alpha: float, beta: float) -> Function:
    return lambda x: np.clip(alpha * x + beta, 0, 1)


def _exponential(node: Node, alpha: float, gamma: float = 1.0) -> Function:
    return lambda x: gamma * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def _leaky(alpha: float) -> Function:
    return lambda x: np.where(x < 0, alpha * x, x)


_FUNCTIONS: dict[str, Callable[[Node], Function]] = {
    "Sigmoid": lambda node: _sigmoid,
    "Tanh": lambda node: np.tanh,
    "Erf": lambda node: _erf,
    "HardSigmoid": lambda node: _hard_sigmoid(node, node.number("alpha", 0.2), node.number("beta", 0.5)),
    "HardSwish": lambda node: lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "LeakyRelu": lambda node: _leaky(node.number("alpha", 0.01)),
    "Elu": lambda node: _exponential(node, node.number("alpha", 1.0)),
    "Selu": lambda node: _exponential(
        node, node.number("alpha", 1.6732632423543772), node.number("gamma", 1.0507009873554805)
    ),
    "Gelu": _gelu,
    "Softplus": lambda node: _softplus,
    "Softsign": lambda node: lambda x: x / (1 + np.abs(x)),
    "Mish": lambda node: lambda x: x * np.tanh(_softplus(x)),
    "Abs": lambda node: np.abs,
    "Neg": lambda node: np.negative,
}
# Of functions that are bounded the whole range is kept: a sample the calibration had not must not saturate.
_BOUNDS = {"Sigmoid": (0.0, 255 / 256), "HardSigmoid": (0.0, 255 / 256), "Tanh": (-1.0, 127 / 128)}


@operator(*_FUNCTIONS, options="alpha beta gamma approximate")
def _function(state: Lowering, node: Node) -> None:
    state.table(node, state.value(node), node.op.lower(), _FUNCTIONS[node.op](node), _BOUNDS.get(node.op))


@operator("PRelu", inputs=2)
def _prelu(state: Lowering, node: Node) -> None:
    slope = state.given(node, 1).values
    if slope.dtype.kind != "f" or not (slope == slope.ravel()[:1]).all() or not slope.size:
        raise node.refuse("has a slope for each channel; use one slope, or a LeakyReLU")
    alpha = float(slope.ravel()[0])
    state.table(node, state.value(node), "prelu", _leaky(alpha))


@operator("Softmax", "LogSoftmax", options="axis")
def _softmax(state: Lowering, node: Node) -> None:
    x = state.value(node)
    rank = x.index.ndim
    axis = node.integer("axis", 1 if state.graph.opset < 13 else -1)
    if not -rank <= axis < rank:
        raise node.refuse(f"has axis {axis} of {rank} dimensions; the file is damaged")
    dims = x.index.shape
    many = math.prod(dims[axis % rank :]) if state.graph.opset < 13 else dims[axis]
    if many != x.index.size or not in_order(x.index):
        raise node.refuse(f"over axis {axis} of {list(dims)} is not over the classes alone; export without it")
    if node.op == "LogSoftmax":
        state.notes.append("the board gives probabilities where the file gives their logarithms (LogSoftmax)")
    tensor = state.reshaped(node, x.tensor, (1, 1, x.index.size))
    output = state.tensor(node, tensor.shape, x.index)
    output.fixed = Quantisation(1 / 256, -128)
    state.emit(DraftSoftmax(node.name, [tensor], output))
