"""ONNX operators with two operands, and scales and shifts by constants, folded into the layer before if possible."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulearn_host.network import Quantisation, Window
from ulearn_host.onnx_draft import (
    Clipped,
    DraftElementwise,
    DraftTable,
    DraftTensor,
    DraftWeighted,
    Function,
    Numbers,
    Value,
    joined,
)
from ulearn_host.onnx_file import Node
from ulearn_host.onnx_fold import Constant
from ulearn_host.onnx_layers import emit_weighted
from ulearn_host.onnx_lower import Lowering, operator

# ---- Scale and shift by constants ------------------------------------------------------------------------------------


@operator("BatchNormalization", options="epsilon momentum training_mode spatial", inputs=5)
def _batch_normalization(state: Lowering, node: Node) -> None:
    value = state.value(node)
    if node.integer("training_mode", 0):
        raise node.refuse("is exported in training mode; call model.eval() before exporting")
    dims = value.index.shape
    parts = [state.given(node, i).values for i in range(1, 5)]
    if len(dims) < 2 or any(p.shape != (dims[1],) or p.dtype.kind != "f" for p in parts):
        raise node.refuse(f"has numbers that do not fit {list(dims)}; the file is damaged")
    gain, offset, mean, variance = (p.astype(np.float64) for p in parts)
    deviation = np.sqrt(np.maximum(variance + node.number("epsilon", 1e-5), 0))
    if not (deviation > 0).all():
        raise node.refuse("has a variance that is not positive; the file is damaged")
    wide = (1, dims[1], *(1 for _ in dims[2:]))
    factor = gain / deviation
    _affine(state, node, value, factor.reshape(wide), (offset - mean * factor).reshape(wide))


@operator("Scaler", options="offset scale")
def _scaler(state: Lowering, node: Node) -> None:
    value = state.value(node)
    parts = [np.asarray(node.attributes.get(name), dtype=object) for name in ("offset", "scale")]
    dims = value.index.shape
    if any(p.ndim != 1 or p.size not in (1, dims[-1]) or None in p for p in parts):
        raise node.refuse("has numbers that do not fit its input; the file is damaged")
    offset, scale = (p.astype(np.float64) for p in parts)
    _affine(state, node, value, scale, -offset * scale)


def _affine(state: Lowering, node: Node, x: Value, factor: Numbers, shift: Numbers) -> None:
    """factor * x + shift, both in the file's shape or broadcastable: folded where possible, else an operator."""
    for numbers in (factor, shift):
        if joined(numbers.shape, x.index.shape) != x.index.shape:
            raise node.refuse(f"makes {list(x.index.shape)} larger by a constant; that is not supported")
        if not np.isfinite(numbers).all():
            raise node.refuse("computes with numbers that are not finite; train the network again")
    f, s = (_smallest(x, numbers) for numbers in (factor, shift))
    if (f == 1).all() and (s == 0).all():
        state.values[node.outputs[0]] = x
        return
    layer = x.tensor.producer
    channels = x.tensor.shape[2]
    by_channel = f.size <= channels and s.size <= channels
    if by_channel and isinstance(layer, DraftWeighted) and _open(x, layer) and _scalable(layer, f):
        wide = np.broadcast_to(f, channels)
        layer.weights = layer.weights * wide.reshape(-1, *(1 for _ in layer.weights.shape[1:]))
        layer.bias = layer.bias * wide + s
        layer.bias_codes = None
        state.again(node, x)
        return
    if f.size == s.size == 1:
        a, b = float(f[0]), float(s[0])
        state.table(node, x, f"{a:g} x + {b:g}", lambda v: a * v + b)
    elif (f == 1).all() or (s == 0).all():
        kind: Any
        kind, numbers = ("add", s) if (f == 1).all() else ("mul", f)
        output = state.tensor(node, x.tensor.shape, x.index)
        state.emit(DraftElementwise(node.name, [x.tensor], output, kind, numbers))
    elif by_channel:
        weights = Constant(np.broadcast_to(f, channels).reshape(-1, 1, 1, 1))
        bias = Constant(np.broadcast_to(s, channels))
        out = x.tensor.shape
        emit_weighted(
            state, node, "depthwise", x.tensor, lambda: state.tensor(node, out, x.index), weights, bias, Window((1, 1))
        )
    else:
        raise node.refuse("scales and shifts every number by itself; use one number a channel")


def _scalable(layer: DraftWeighted, factor: Numbers) -> bool:
    """Codes that the file gives are kept as they are."""
    return layer.codes is None or bool((factor == 1).all())


def _smallest(x: Value, numbers: NDArray[Any]) -> NDArray[Any]:
    """Numbers for a value, in memory order: one, one a channel, or all."""
    flat = np.empty(x.index.size, dtype=numbers.dtype)
    flat[x.index.ravel()] = np.broadcast_to(numbers, x.index.shape).ravel()
    if (flat == flat[0]).all():
        return flat[:1]
    rows = flat.reshape(-1, x.tensor.shape[2])
    return rows[0] if (rows == rows[0]).all() else flat


def _open(x: Value, op: Clipped) -> bool:
    """Whether what follows may still be folded into the operator that gives x."""
    return x.sole and x.tensor.fixed is None and op.low == -np.inf and op.high == np.inf


# ---- Two operands ----------------------------------------------------------------------------------------------------


@operator("Add", "Mul", "Sub", "Div", inputs=2)
def _binary(state: Lowering, node: Node) -> None:
    if len(node.inputs) != 2:
        raise node.refuse("has no two inputs; the file is damaged")
    constant = [name in state.constants for name in node.inputs]
    if any(constant):
        _with_constant(state, node, constant.index(True))
    elif node.op in ("Sub", "Div"):
        raise node.refuse("of two computed tensors is not supported; use an addition or a product with a factor")
    else:
        _two(state, node, state.value(node, 0), state.value(node, 1))


def _with_constant(state: Lowering, node: Node, which: int) -> None:
    found = state.given(node, which)
    x = state.value(node, 1 - which)
    if found.values.dtype.kind != "f":
        raise node.refuse(f"has a constant of {found.values.dtype}; the file is damaged")
    numbers = found.values.astype(np.float64)
    if found.codes is not None and node.op in ("Add", "Mul") and _quantised_constant(state, node, x, found):
        return
    one, none = np.ones(()), np.zeros(())
    if node.op == "Add":
        _affine(state, node, x, one, numbers)
    elif node.op == "Mul":
        _affine(state, node, x, numbers, none)
    elif node.op == "Sub":
        _affine(state, node, x, *((-one, numbers) if which == 0 else (one, -numbers)))
    elif which == 0 or not numbers.all():
        raise node.refuse("divides by a computed tensor or by 0; multiply by a constant instead")
    else:
        _affine(state, node, x, 1 / numbers, none)


def _quantised_constant(state: Lowering, node: Node, x: Value, found: Constant) -> bool:
    """Keep the codes that the file gives for a constant operand, where they are int8 and not a bias to fold."""
    layer = x.tensor.producer
    if isinstance(layer, DraftWeighted) and _open(x, layer) and node.op == "Add":
        return False
    assert found.codes is not None and found.scales is not None and found.zeros is not None
    scales, zeros = np.unique(found.scales), np.unique(found.zeros)
    if found.codes.dtype != np.int8 or len(scales) != 1 or len(zeros) != 1:
        return False
    if joined(found.codes.shape, x.index.shape) != x.index.shape:
        return False
    output = state.tensor(node, x.tensor.shape, x.index)
    kind: Any = node.op.lower()
    second = Quantisation(float(scales[0]), int(zeros[0]))
    state.emit(DraftElementwise(node.name, [x.tensor], output, kind, _smallest(x, found.codes), second))
    return True


def _two(state: Lowering, node: Node, a: Value, b: Value) -> None:
    combine: Callable[[Numbers, Numbers], Numbers] = np.add if node.op == "Add" else np.multiply
    if joined(a.index.shape, b.index.shape) is None:
        raise node.refuse(f"joins {list(a.index.shape)} and {list(b.index.shape)}; the file is damaged")
    if a.index.shape == b.index.shape and _same_argument(state, node, a, b, combine):
        return
    if b.index.size > a.index.size:
        a, b = b, a
    shape = joined(a.index.shape, b.index.shape)
    if shape is None or math.prod(shape) != a.index.size:
        raise node.refuse("makes both its inputs larger; that is not supported")
    index = a.index.reshape(shape)
    channels = a.tensor.shape[2]
    place = np.broadcast_to(b.index, shape)
    other = b.tensor
    if b.index.size == a.index.size:
        fits = (place == index).all()
        other = state.reshaped(node, other, a.tensor.shape) if fits else other
    else:
        fits = b.index.size == 1 or (b.index.size == channels and (place == index % channels).all())
    if not fits:
        raise node.refuse("joins tensors whose numbers lie in another order; give both the same shape and layout")
    output = state.tensor(node, a.tensor.shape, index)
    kind: Any = node.op.lower()
    state.emit(DraftElementwise(node.name, [a.tensor, other], output, kind))


def _same_argument(
    state: Lowering, node: Node, a: Value, b: Value, combine: Callable[[Numbers, Numbers], Numbers]
) -> bool:
    """x * sigmoid(x) and its like: two functions of one tensor are one function."""
    tables = [_as_function(v) for v in (a, b)]
    if tables[0][0] is not tables[1][0] or (a.index != b.index).any():
        return False
    for v in (a, b):
        if v.tensor is not tables[0][0] and v.tensor.producer in state.ops:
            state.ops.remove(v.tensor.producer)
    base, (first, one), (second, two) = tables[0][0], tables[0][1:], tables[1][1:]
    sign = "+" if node.op == "Add" else "*"
    output = state.tensor(node, base.shape, a.index)
    function = f"({one}) {sign} ({two})"
    state.emit(DraftTable(node.name, [base], output, function, [lambda x: combine(first(x), second(x))]))
    return True


def _as_function(v: Value) -> tuple[DraftTensor, Function, str]:
    """A value as a function of another tensor that nothing else reads, or of itself."""
    table = v.tensor.producer
    if isinstance(table, DraftTable) and v.sole and v.tensor.fixed is None:
        return table.input, table.compute, table.function
    return v.tensor, lambda x: x, "x"
