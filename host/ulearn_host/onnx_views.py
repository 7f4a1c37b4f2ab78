"""ONNX operators that move no number and compute none: shapes, and the borders of quantised tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ulearn_host.network import Quantisation
from ulearn_host.onnx_draft import DraftSoftmax, DraftTable, Value
from ulearn_host.onnx_file import Node
from ulearn_host.onnx_fold import new_shape, permutation, scalar_parameters
from ulearn_host.onnx_lower import Lowering, operator


@operator("Reshape", "Flatten", "Squeeze", "Unsqueeze", options="axis axes allowzero", inputs=2)
def _reshape(state: Lowering, node: Node) -> None:
    value = state.any_value(node)
    options = [None, *(state.constant(node, i) for i in range(1, len(node.inputs)))]
    shape = new_shape(node, value.index.shape, options, state.graph.opset)
    state.hold(node, value.index.size)  # numbers that do not lie one behind the other are copied
    state.values[node.outputs[0]] = replace(value, index=value.index.reshape(shape))


@operator("Transpose", options="perm")
def _transpose(state: Lowering, node: Node) -> None:
    value = state.any_value(node)
    moved = value.index.transpose(permutation(node, value.index.ndim))
    state.values[node.outputs[0]] = replace(value, index=moved)


@operator("Identity")
@operator("Dropout", options="ratio seed", inputs=3)
def _identity(state: Lowering, node: Node) -> None:
    value = state.any_value(node)
    if node.op == "Dropout" and len(node.inputs) > 2:
        training = state.constant(node, 2)
        if training is not None and training.values.any():
            raise node.refuse("is exported in training mode; call model.eval() before exporting")
    state.values[node.outputs[0]] = value


@operator("Cast", options="to saturate round_mode")
def _cast(state: Lowering, node: Node) -> None:
    value = state.value(node)
    if node.integer("to", 0) not in (1, 10, 11):
        raise node.refuse("to a type that is no float is not supported; export the model up to the layer before")
    state.values[node.outputs[0]] = value


@operator("QuantizeLinear", options="axis saturate block_size output_dtype precision", inputs=3)
def _quantize(state: Lowering, node: Node) -> None:
    value = state.any_value(node)
    if value.codes is not None:
        raise node.refuse("quantises what is quantised already; the file is damaged")
    scale, zero, dtype = _activation_parameters(state, node)
    fixed = Quantisation(scale, zero)
    tensor = value.tensor
    if isinstance(tensor.producer, DraftSoftmax):
        if fixed != tensor.fixed:
            state.notes.append("the softmax gives probabilities in steps of 1/256; the file's own scale is left away")
    elif tensor.fixed is None:
        tensor.fixed = fixed
    elif tensor.fixed != fixed:
        made = state.tensor(node, tensor.shape, value.index)
        made.fixed = fixed
        state.emit(DraftTable(node.name, [tensor], made, "requantise", []))
        value = Value(made, value.index)
    state.values[node.outputs[0]] = replace(value, codes=dtype)


@operator("DequantizeLinear", options="axis block_size output_dtype", inputs=3)
def _dequantize(state: Lowering, node: Node) -> None:
    value = state.any_value(node)
    if value.codes is None:
        raise node.refuse("has an input that is not quantised; the file is damaged")
    scale, zero, dtype = _activation_parameters(state, node)
    tensor, fixed = value.tensor, Quantisation(scale, zero)
    if tensor.fixed is None:
        tensor.fixed = fixed
    softmax = isinstance(tensor.producer, DraftSoftmax)
    if dtype != value.codes or (tensor.fixed != fixed and not softmax):
        raise node.refuse("has another scale, zero point or type than the QuantizeLinear before; that is not supported")
    state.values[node.outputs[0]] = replace(value, codes=None)


def _activation_parameters(state: Lowering, node: Node) -> tuple[float, int, np.dtype[Any]]:
    """Scale, zero point of the int8 codes, and the type that the file has them in."""
    given = [None, state.given(node, 1), state.constant(node, 2)]
    if given[2] is None and node.integer("output_dtype", 2) not in (0, 2):
        raise node.refuse("gives codes that are no uint8 without a zero point; add the zero point")
    scale, zero, dtype = scalar_parameters(node, given)
    return scale, zero - (128 if dtype == np.uint8 else 0), dtype
