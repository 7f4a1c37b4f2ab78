"""Constants of an ONNX model, and operators that have nothing but constants to work on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulearn_host.onnx_file import MAX_NUMBERS, Node

Array = NDArray[Any]
LEAST_SCALE, LARGEST_SCALE = 1e-20, 1e20


@dataclass(frozen=True)
class Constant:
    """values: as the operators see them. codes, scales, zeros: what they were dequantised from, all of one shape."""

    values: Array
    codes: Array | None = None
    scales: Array | None = None
    zeros: Array | None = None

    def mapped(self, function: Callable[[Array], Array]) -> Constant:
        """The same numbers moved by a function that moves and does not change."""
        parts = (self.codes, self.scales, self.zeros)
        return Constant(function(self.values), *(None if p is None else function(p) for p in parts))


def fold(node: Node, inputs: Sequence[Constant | None], opset: int) -> Constant:
    """What a node gives whose inputs are all constant (None: left out).

    Raises UserError when the operator is none of those that exporters leave on constants, or its inputs do not fit.
    """
    try:
        if node.op in _MOVES:
            first = _needed(inputs, 0)
            move = _MOVES[node.op](node, first.values, inputs, opset)
            return _bounded(node, first.mapped(move))
        if node.op == "DequantizeLinear":
            return dequantised(node, inputs)
        if node.op in _COMPUTES:
            with np.errstate(all="ignore"):
                values = _COMPUTES[node.op](node, [None if c is None else c.values for c in inputs])
            return _bounded(node, Constant(np.asarray(values)))
    except (ValueError, IndexError, TypeError, OverflowError, KeyError, AttributeError, ZeroDivisionError) as fault:
        raise node.refuse(f"does not fit its constants ({fault}); the file is damaged") from None
    raise node.refuse("on constants is not supported; simplify the model first (onnxsim or onnxscript.optimizer)")


def _needed(inputs: Sequence[Constant | None], i: int) -> Constant:
    found = inputs[i]
    if found is None:
        raise ValueError(f"input {i} is missing")
    return found


def _bounded(node: Node, constant: Constant) -> Constant:
    values = constant.values
    if values.size > MAX_NUMBERS:
        raise node.refuse(f"gives {values.size} constants; at most {MAX_NUMBERS} are supported")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise node.refuse("gives constants that are not finite; train the network again")
    return constant


# ---- Axes and shapes -------------------------------------------------------------------------------------------------


def axes_of(node: Node, inputs: Sequence[Constant | None], rank: int, at: int = 1) -> list[int] | None:
    """Axes from an attribute or, in newer files, from a constant input; counted from the front. None: not given."""
    axes = node.integers("axes")
    if axes is None and len(inputs) > at and inputs[at] is not None:
        axes = integers(node, inputs[at])
    if axes is None:
        return None
    if any(not -rank <= a < rank for a in axes) or len({a % rank for a in axes}) != len(axes):
        raise node.refuse(f"has axes {axes} of {rank} dimensions; the file is damaged")
    return [a % rank for a in axes]


def integers(node: Node, constant: Constant | None, limit: int = 64) -> list[int]:
    """A short constant of integers."""
    if constant is None or constant.values.dtype.kind not in "iu" or constant.values.size > limit:
        raise node.refuse("has an option that is no list of integers; the file is damaged")
    return [int(v) for v in constant.values.ravel()]


def new_shape(node: Node, old: tuple[int, ...], inputs: Sequence[Constant | None], opset: int) -> tuple[int, ...]:
    """The shape that Reshape, Flatten, Squeeze or Unsqueeze gives."""
    rank = len(old)
    if node.op == "Reshape":
        wanted = integers(node, inputs[1] if len(inputs) > 1 else None)
        if len(wanted) > 8 or wanted.count(-1) > 1 or any(w < -1 for w in wanted):
            raise node.refuse(f"asks for shape {wanted}; the file is damaged")
        keep = not node.integer("allowzero", 0)
        if keep and 0 in wanted[rank:]:
            raise node.refuse(f"asks for shape {wanted} of {list(old)}; the file is damaged")
        shape = [old[i] if w == 0 and keep else w for i, w in enumerate(wanted)]
        if -1 in shape:
            shape[shape.index(-1)] = math.prod(old) // max(1, math.prod(s for s in shape if s != -1))
    elif node.op == "Flatten":
        axis = node.integer("axis", 1)
        if not -rank <= axis <= rank:
            raise node.refuse(f"has axis {axis} of {rank} dimensions; the file is damaged")
        axis += rank if axis < 0 else 0
        shape = [math.prod(old[:axis]), math.prod(old[axis:])]
    elif node.op == "Squeeze":
        axes = axes_of(node, inputs, rank)
        chosen = [i for i, d in enumerate(old) if d == 1] if axes is None else axes
        shape = [d for i, d in enumerate(old) if i not in chosen]
    else:
        count = len(node.integers("axes") or ([] if len(inputs) < 2 else integers(node, inputs[1])))
        if rank + count > 8:
            raise node.refuse("gives more than 8 dimensions; the file is damaged")
        axes = axes_of(node, inputs, rank + count) or []
        rest = iter(old)
        shape = [1 if i in axes else next(rest) for i in range(rank + count)]
    if math.prod(shape) != math.prod(old):
        raise node.refuse(f"makes shape {shape} of {list(old)}, which has another size; the file is damaged")
    return tuple(shape)


def permutation(node: Node, rank: int) -> list[int]:
    """The order of axes that Transpose gives."""
    order = node.integers("perm") or list(range(rank))[::-1]
    if sorted(order) != list(range(rank)):
        raise node.refuse(f"has perm {order} of {rank} dimensions; the file is damaged")
    return order


Move = Callable[[Array], Array]


def _reshape(node: Node, x: Array, inputs: Sequence[Constant | None], opset: int) -> Move:
    shape = new_shape(node, x.shape, inputs, opset)
    return lambda a: a.reshape(shape)


def _transpose(node: Node, x: Array, inputs: Sequence[Constant | None], opset: int) -> Move:
    order = permutation(node, x.ndim)
    return lambda a: a.transpose(order)


def _identity(node: Node, x: Array, inputs: Sequence[Constant | None], opset: int) -> Move:
    return lambda a: a


_MOVES = {
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "Transpose": _transpose,
    "Identity": _identity,
}


# ---- Arithmetic on constants -----------------------------------------------------------------------------------------


def _constant(node: Node, inputs: list[Any]) -> Array:
    numbers = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    if isinstance(node.attributes.get("value"), np.ndarray):
        return np.asarray(node.attributes["value"])
    for name, dtype in numbers.items():
        if name in node.attributes:
            return np.asarray(node.attributes[name], dtype=dtype)
    raise ValueError("no number in it")


def _binary(function: Callable[[Array, Array], Array]) -> Callable[[Node, list[Any]], Array]:
    def compute(node: Node, inputs: list[Any]) -> Array:
        a, b = inputs
        if math.prod(np.broadcast_shapes(a.shape, b.shape)) > MAX_NUMBERS:
            raise ValueError("the result is too large")
        return np.asarray(function(a, b)).astype(a.dtype)

    return compute


def _divide(a: Array, b: Array) -> Array:
    return np.trunc(a / b) if a.dtype.kind in "iu" else a / b


def _cast(node: Node, inputs: list[Any]) -> Array:
    types: dict[int, Any] = {
        1: np.float32,
        2: np.uint8,
        3: np.int8,
        6: np.int32,
        7: np.int64,
        9: np.bool_,
        10: np.float16,
        11: np.float64,
    }
    return np.asarray(inputs[0]).astype(types[node.integer("to", 0)])


def _gather(node: Node, inputs: list[Any]) -> Array:
    data, indices = inputs
    if indices.size * max(1, data.size) > MAX_NUMBERS:
        raise ValueError("the result is too large")
    return np.asarray(np.take(data, indices, axis=node.integer("axis", 0)))


def _concat(node: Node, inputs: list[Any]) -> Array:
    return np.concatenate(inputs, axis=node.integer("axis", 0))


def _slice(node: Node, inputs: list[Any]) -> Array:
    data, starts, ends = inputs[:3]
    axes = range(len(starts)) if len(inputs) < 4 or inputs[3] is None else inputs[3]
    steps = [1] * len(starts) if len(inputs) < 5 or inputs[4] is None else inputs[4]
    where = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        where[int(axis)] = slice(int(start), int(end), int(step))
    return np.asarray(data[tuple(where)])


def _constant_of_shape(node: Node, inputs: list[Any]) -> Array:
    shape = [int(v) for v in inputs[0].ravel()]
    if len(shape) > 8 or any(s < 0 for s in shape) or math.prod(shape) > MAX_NUMBERS:
        raise ValueError("the result is too large")
    value = np.asarray(node.attributes.get("value", np.zeros(1, np.float32)))
    return np.full(shape, value.ravel()[0], value.dtype)


def _quantised(node: Node, inputs: list[Any]) -> Array:
    """QuantizeLinear of weights, as exports of a simulated quantisation have it."""
    scale, zero = _parameters(node, inputs, inputs[0].shape)
    low, high = (0, 255) if zero.dtype == np.uint8 else (-128, 127)
    return np.asarray(np.clip(np.rint(inputs[0] / scale) + zero, low, high), dtype=zero.dtype)


_COMPUTES: dict[str, Callable[[Node, list[Any]], Array]] = {
    "Constant": _constant,
    "Add": _binary(np.add),
    "Sub": _binary(np.subtract),
    "Mul": _binary(np.multiply),
    "Div": _binary(_divide),
    "Neg": lambda node, inputs: np.negative(inputs[0]),
    "Sqrt": lambda node, inputs: np.sqrt(inputs[0]),
    "Reciprocal": lambda node, inputs: 1 / np.asarray(inputs[0]),
    "Cast": _cast,
    "Gather": _gather,
    "Concat": _concat,
    "Slice": _slice,
    "ConstantOfShape": _constant_of_shape,
    "QuantizeLinear": _quantised,
}


# ---- Scales ----------------------------------------------------------------------------------------------------------


def _parameters(node: Node, inputs: Sequence[Any], shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Scale and zero point of a quantisation, shaped to broadcast over `shape`."""
    scale = np.asarray(inputs[1])
    zero = np.zeros(scale.shape, np.uint8) if len(inputs) < 3 or inputs[2] is None else np.asarray(inputs[2])
    if node.integer("block_size", 0):
        raise node.refuse("has scales by block; quantise per tensor or per channel")
    if scale.dtype.kind != "f" or not ((scale > LEAST_SCALE) & (scale < LARGEST_SCALE)).all() or not scale.size:
        raise node.refuse("has a scale that is no positive number; quantise the model again")
    if zero.dtype not in (np.int8, np.uint8, np.int32) or zero.size != scale.size:
        raise node.refuse(f"has zero points of {zero.dtype}; quantise to 8 bits")
    if scale.size == 1:
        return scale.reshape(()).astype(np.float64), zero.reshape(())
    axis = node.integer("axis", 1)
    if scale.ndim != 1 or zero.ndim != 1 or not -len(shape) <= axis < len(shape) or shape[axis] != scale.size:
        raise node.refuse("has scales that do not fit its axis; quantise per tensor or per channel")
    wide = [1] * len(shape)
    wide[axis] = scale.size
    return scale.reshape(wide).astype(np.float64), zero.reshape(wide)


def scalar_parameters(node: Node, inputs: Sequence[Constant | None]) -> tuple[float, int, np.dtype[Any]]:
    """Scale, zero point and type of the codes of a quantised activation. Raises UserError when it has several."""
    values = [None if c is None else c.values for c in inputs]
    if len(values) < 2 or values[1] is None:
        raise node.refuse("has a scale that is not constant; quantise the model statically")
    if values[1].size != 1:
        raise node.refuse("has a scale for each channel of an activation; quantise activations per tensor")
    scale, zero = _parameters(node, values, ())
    if zero.dtype == np.int32:
        raise node.refuse("quantises an activation to 32 bits; quantise to 8 bits")
    return float(scale), int(zero), zero.dtype


def dequantised(node: Node, inputs: Sequence[Constant | None]) -> Constant:
    """DequantizeLinear of weights or biases: values [as stored], and the codes they come from (uint8 less 128)."""
    codes = _needed(inputs, 0).values
    if codes.dtype not in (np.int8, np.uint8, np.int32):
        raise node.refuse(f"has codes of {codes.dtype}; quantise to 8 bits")
    given = [None if c is None else c.values for c in inputs]
    if len(given) < 3 or given[2] is None:
        given = [*given[:2], np.zeros_like(_needed(inputs, 1).values, dtype=codes.dtype)]
    scale, zero = _parameters(node, given, codes.shape)
    if zero.dtype != codes.dtype:
        raise node.refuse(f"has codes of {codes.dtype} and a zero point of {zero.dtype}; the file is damaged")
    shift = 128 if codes.dtype == np.uint8 else 0
    whole = codes.astype(np.int64) - shift
    zeros = zero.astype(np.int64) - shift
    values = ((whole - zeros) * scale).astype(np.float32)
    signed = whole.astype(np.int32 if codes.dtype == np.int32 else np.int8)
    spread = [np.broadcast_to(part, codes.shape) for part in (scale, zeros)]
    return _bounded(node, Constant(values, signed, *spread))
