"""ONNX operators with weights: convolutions and dense layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulearn_host.network import Window
from ulearn_host.onnx_draft import (
    DraftPad,
    DraftTensor,
    DraftWeighted,
    Value,
    joined,
)
from ulearn_host.onnx_file import Node
from ulearn_host.onnx_fold import Constant
from ulearn_host.onnx_lower import Lowering, in_order, operator
from ulearn_host.onnx_windows import MAX_CELLS, PLACES, pair, window_of


def _weights(state: Lowering, node: Node, i: int, rank: int | None = None) -> Constant:
    """Weights as constants; those quantised must be int8 and symmetric."""
    found = state.given(node, i)
    if found.values.dtype.kind != "f" or (rank is not None and found.values.ndim != rank):
        raise node.refuse(f"has weights of {found.values.dtype} {list(found.values.shape)}; the file is damaged")
    if not found.values.size:
        raise node.refuse("has no weights; the file is damaged")
    if found.codes is not None and found.codes.dtype != np.int8:
        raise node.refuse("has weights of 32 bits; quantise weights to int8")
    if found.zeros is not None and found.zeros.any():
        raise node.refuse("has weights whose zero point is not 0; quantise weights symmetrically")
    return found


def emit_weighted(
    state: Lowering,
    node: Node,
    kind: Any,
    inputs: DraftTensor,
    make_output: Callable[[], DraftTensor],
    weights: Constant,
    bias: Constant | None,
    window: Window | None = None,
) -> None:
    """Emit an operator with weights that lie as in the IR; a quantised one keeps its codes."""
    values = weights.values.astype(np.float64)
    scales = None
    if weights.scales is not None:
        every = weights.scales.reshape(len(values), -1)
        scales = every[:, 0].astype(np.float64)
        if (every != scales[:, None]).any():
            raise node.refuse("has scales across its inputs; quantise weights per tensor or per output channel")
    real = np.zeros(len(values)) if bias is None else bias.values.astype(np.float64)
    if real.shape != (len(values),) or (bias is not None and bias.values.dtype.kind != "f"):
        raise node.refuse(f"has a bias of shape {list(real.shape)}, expected [{len(values)}]; the file is damaged")
    op = DraftWeighted(node.name, [inputs], make_output(), kind, values, real, window, weights.codes, scales)
    if bias is not None and bias.codes is not None and bias.codes.dtype == np.int32 and not np.any(bias.zeros):
        op.bias_codes, op.bias_scales = bias.codes, bias.scales
    state.emit(op)


@operator("Conv", options=f"{PLACES} group", inputs=3)
def _conv(state: Lowering, node: Node) -> None:
    value = state.value(node)
    count = value.index.ndim - 2
    weights, bias = _weights(state, node, 1, count + 2), state.constant(node, 2)
    tensor = state.image(node, value)
    (h, w, c), group = tensor.shape, node.integer("group", 1)
    out, per = weights.values.shape[:2]
    if group < 1 or per * group != c or out % group:
        raise node.refuse(f"has weights {list(weights.values.shape)} for {c} channels; the file is damaged")
    if group not in (1, c):
        raise node.refuse(f"has {group} groups; 1 and {c} (depthwise) are supported, use one of these")
    shape = pair(node, "kernel", list(weights.values.shape[2:]), count, 1)
    if node.integers("kernel_shape") not in (None, list(weights.values.shape[2:])):
        raise node.refuse("has a kernel_shape that is not its weights'; the file is damaged")
    tensor, padded = _without_pad(state, node, value, tensor, shape)
    window, _, size = window_of(node, (h, w), count, shape)
    cells = per * math.prod(shape) * math.prod(size)
    if cells * group > MAX_CELLS:
        raise node.refuse(f"has {cells * group} numbers under its windows, at most {MAX_CELLS} are supported")
    state.work(node, cells * out)
    if padded is not None:
        window = Window(window.kernel, window.stride, (window.pad[0] + padded[0], window.pad[1] + padded[1]))
    ohwi = weights.mapped(lambda a: a.reshape(out, per, *shape).transpose(0, 2, 3, 1))
    kind = "conv" if group == 1 else "depthwise"
    emit_weighted(state, node, kind, tensor, lambda: state.image_out(node, value, (*size, out)), ohwi, bias, window)


def _without_pad(
    state: Lowering, node: Node, value: Value, tensor: DraftTensor, kernel: tuple[int, int]
) -> tuple[DraftTensor, tuple[int, int] | None]:
    """The tensor before a Pad that this convolution alone reads, and its rows and columns: the kernel pads itself."""
    pad = tensor.producer
    if not isinstance(pad, DraftPad) or not value.sole or tensor.fixed not in (None, pad.input.fixed):
        return tensor, None
    top, left, _ = pad.before
    pads = node.integers("pads") or []
    if pad.input.shape[2] != tensor.shape[2] or any(pads) or node.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return tensor, None
    after = [tensor.shape[i] - pad.input.shape[i] - pad.before[i] for i in range(2)]
    if any(p >= k for p, k in zip((top, left, *after), (*kernel, *kernel), strict=True)):
        return tensor, None
    state.ops.remove(pad)
    return pad.input, (top, left)


@operator("Gemm", options="alpha beta transA transB", inputs=3)
def _gemm(state: Lowering, node: Node) -> None:
    value = state.value(node)
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
    weights, bias = _weights(state, node, 1, 2), state.constant(node, 2)
    if node.integer("transA", 0) or value.index.ndim != 2 or value.index.shape[0] != 1:
        raise node.refuse(
            f"takes {list(value.index.shape)}, expected one vector [1, n] and transA=0; flatten before it"
        )
    if not node.integer("transB", 0):
        weights = weights.mapped(np.transpose)
    if alpha != 1:
        weights = Constant(_scaled(node, weights, alpha))
    if bias is not None:
        wanted = (1, len(weights.values))
        if bias.values.dtype.kind != "f" or bias.values.ndim > 2 or joined(bias.values.shape, wanted) != wanted:
            raise node.refuse(f"has a bias of shape {list(bias.values.shape)}; the file is damaged")
        bias = bias.mapped(lambda a: np.broadcast_to(a, wanted)[0])
        bias = bias if beta == 1 else Constant(bias.values * beta)
    _dense(state, node, value, weights, bias)


def _scaled(node: Node, weights: Constant, alpha: float) -> NDArray[Any]:
    if weights.codes is not None:
        raise node.refuse("has alpha on quantised weights; export it with alpha=1")
    result: NDArray[Any] = weights.values * alpha
    return result


@operator("MatMul", inputs=2)
def _matmul(state: Lowering, node: Node) -> None:
    value = state.value(node)
    weights = _weights(state, node, 1, 2).mapped(np.transpose)
    if value.index.ndim < 2:
        raise node.refuse("takes no matrix; flatten to [1, n] before it")
    _dense(state, node, value, weights, None)


def _dense(state: Lowering, node: Node, value: Value, weights: Constant, bias: Constant | None) -> None:
    """weights: [outputs, inputs]; the value is one vector or several, each under the same weights."""
    outputs, inputs = weights.values.shape
    dims = value.index.shape
    if dims[-1] != inputs:
        raise node.refuse(f"takes {dims[-1]} numbers, its weights {inputs}; the file is damaged")
    rows = value.index.size // inputs
    state.work(node, rows * inputs * outputs)
    index = np.arange(rows * outputs, dtype=np.int32).reshape(*dims[:-1], outputs)
    if rows == 1:
        inverse = np.argsort(value.index.ravel())
        weights = weights.mapped(lambda a: a[:, inverse])
    elif not in_order(value.index):
        raise node.refuse("works on channels that do not lie side by side; use a convolution of 1 by 1 instead")
    shape = (1, rows, outputs)
    emit_weighted(state, node, "dense", value.tensor, lambda: state.tensor(node, shape, index), weights, bias)
