"""ONNX operators that pool, average, pad and join images."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ulearn_host.network import Shape, Window
from ulearn_host.onnx_draft import (
    DraftConcat,
    DraftMean,
    DraftPad,
    DraftPool,
    DraftTensor,
    Value,
)
from ulearn_host.onnx_file import MAX_NUMBERS, Node
from ulearn_host.onnx_fold import axes_of, integers
from ulearn_host.onnx_lower import Lowering, Places, arranged_index, in_order, operator
from ulearn_host.onnx_windows import MAX_CELLS, PLACES, pair, window_of

# ---- Pooling and means -----------------------------------------------------------------------------------------------


@operator("MaxPool", "AveragePool", options=f"{PLACES} ceil_mode count_include_pad storage_order")
def _pool(state: Lowering, node: Node) -> None:
    value = state.value(node)
    tensor = state.image(node, value)
    count = value.index.ndim - 2
    h, w, c = tensor.shape
    kernel = pair(node, "kernel_shape", node.integers("kernel_shape", []), count, 1)
    window, after, size = window_of(node, (h, w), count, kernel)
    cells = math.prod(kernel) * math.prod(size) * c
    if cells > MAX_CELLS:
        raise node.refuse(f"has {cells} numbers under its windows, at most {MAX_CELLS} are supported")
    state.work(node, cells)
    state.places[node.outputs[0]] = Places(window, after, size)
    average = node.op == "AveragePool"
    if average and node.integer("count_include_pad", 0) and any((*window.pad, *after)):
        top, left = window.pad
        # The board's kernel counts cells inside the image only; make the padding part of the image.
        shape = (h + top + after[0], w + left + after[1], c)
        padded = DraftTensor(state.unique(f"{tensor.name}/pad"), shape, "", np.zeros(0, np.int32))
        state.emit(DraftPad(f"{node.name}/pad", [tensor], padded, (top, left, 0)))
        tensor, window = padded, Window(kernel, window.stride)
    output = state.image_out(node, value, (*size, c))
    state.emit(DraftPool(node.name, [tensor], output, "average" if average else "max", window))


@operator("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(state: Lowering, node: Node) -> None:
    value = state.value(node)
    tensor = state.image(node, value)
    (h, w, c), dims = tensor.shape, value.index.shape
    output = state.tensor(node, (1, 1, c), np.arange(c, dtype=np.int32).reshape(1, c, *(1 for _ in dims[2:])))
    if node.op == "GlobalAveragePool":
        state.emit(DraftMean(node.name, [tensor], output))
    else:
        state.emit(DraftPool(node.name, [tensor], output, "max", Window((h, w), (h, w))))


@operator("ReduceMean", "ReduceMax", options="axes keepdims noop_with_empty_axes", inputs=2)
def _reduce(state: Lowering, node: Node) -> None:
    value = state.value(node)
    dims = value.index.shape
    axes = axes_of(node, [None, state.constant(node, 1)], len(dims))
    chosen = [i for i in axes or [] if dims[i] > 1]
    kept = [i for i, d in enumerate(dims) if d > 1 and i not in chosen]
    # What is averaged must lie outside, what is kept inside: channels.
    c = math.prod(dims[i] for i in kept)
    moved = value.index.transpose([*(i for i in range(len(dims)) if i not in kept), *kept])
    if axes is None or not in_order(moved):
        raise node.refuse(f"over axes {axes} of {list(dims)} is not over height and width alone; that is not supported")
    shape = tuple(1 if i in axes else d for i, d in enumerate(dims))
    shape = shape if node.integer("keepdims", 1) else tuple(d for i, d in enumerate(dims) if i not in axes)
    h, w, channels = value.tensor.shape
    if channels != c:
        h, w = 1, value.index.size // c
    tensor = state.reshaped(node, value.tensor, (h, w, c))
    output = state.tensor(node, (1, 1, c), np.arange(c, dtype=np.int32).reshape(shape))
    if node.op == "ReduceMean":
        state.emit(DraftMean(node.name, [tensor], output))
    else:
        state.emit(DraftPool(node.name, [tensor], output, "max", Window((h, w), (h, w))))


# ---- Pad and Concat --------------------------------------------------------------------------------------------------


def _layout(values: list[Value]) -> list[int] | None:
    """The order of axes in which all values lie one number behind the other; channels last if that fits."""
    rank = values[0].index.ndim
    orders = [list(range(rank))]
    if rank in (3, 4):
        orders.insert(0, [0, *range(2, rank), 1])
    fitting = (o for o in orders if all(v.index.ndim == rank and in_order(v.index.transpose(o)) for v in values))
    return next(fitting, None)


def _memory(dims: tuple[int, ...], order: list[int]) -> Shape:
    """Dimensions in memory order as (h, w, c)."""
    inner = [1, 1, *(dims[i] for i in order)]
    return math.prod(inner[:-2]), inner[-2], inner[-1]


@operator("Pad", options="mode", inputs=4)
def _pad(state: Lowering, node: Node) -> None:
    value = state.value(node)
    rank = value.index.ndim
    zero = state.constant(node, 2)
    if node.text("mode", "constant") != "constant" or (zero is not None and zero.values.any()):
        raise node.refuse("with other than zeros is not supported; pad with zeros")
    axes = axes_of(node, [None, state.constant(node, 3)], rank) or list(range(rank))
    pads = integers(node, state.given(node, 1))
    if len(pads) != 2 * len(axes) or min(pads, default=0) < 0 or max(pads, default=0) > 65535:
        raise node.refuse(f"has pads {pads[:16]}; positive ones are supported")
    before, after = ([0] * rank, [0] * rank)
    for i, axis in enumerate(axes):
        before[axis], after[axis] = pads[i], pads[len(axes) + i]
    order = _layout([value])
    if order is None or rank not in (2, 3, 4) or before[0] or after[0]:
        raise node.refuse("pads the batch, or numbers that lie in another order; that is not supported")
    dims = tuple(d + b + a for d, b, a in zip(value.index.shape, before, after, strict=True))
    if math.prod(dims) == value.index.size:
        state.values[node.outputs[0]] = value
        return
    tensor = state.reshaped(node, value.tensor, _memory(value.index.shape, order))
    front = [0, 0, *(before[i] for i in order)][-3:]
    _, index = _arranged(node, dims, order)
    output = state.tensor(node, _memory(dims, order), index)
    state.emit(DraftPad(node.name, [tensor], output, (front[0], front[1], front[2])))


def _arranged(node: Node, dims: tuple[int, ...], order: list[int]) -> tuple[Shape, NDArray[np.int32]]:
    if math.prod(dims) > MAX_NUMBERS:
        raise node.refuse(f"gives {list(dims)}; that is more than any board holds")
    return arranged_index(dims, order)


@operator("Concat", options="axis", inputs=MAX_NUMBERS)
def _concat(state: Lowering, node: Node) -> None:
    values = [state.value(node, i) for i in range(len(node.inputs))]
    rank = values[0].index.ndim
    axis = node.integer("axis", rank)
    if not -rank <= axis < rank:
        raise node.refuse(f"has axis {axis} of {rank} dimensions; the file is damaged")
    axis %= rank
    rest = {tuple(d for i, d in enumerate(v.index.shape) if i != axis) for v in values}
    order = _layout(values)
    if len(rest) > 1 or rank > 4 or rank < 2 or axis == 0:
        raise node.refuse("joins shapes that do not fit, or batches; the file is damaged")
    if order is None:
        raise node.refuse("joins numbers that lie in another order; give all inputs the same layout")
    dims = list(values[0].index.shape)
    dims[axis] = sum(v.index.shape[axis] for v in values)
    tensors = [state.reshaped(node, v.tensor, _memory(v.index.shape, order)) for v in values]
    _, index = _arranged(node, tuple(dims), order)
    output = state.tensor(node, _memory(tuple(dims), order), index)
    state.emit(DraftConcat(node.name, tensors, output, order.index(axis) + 3 - rank))
