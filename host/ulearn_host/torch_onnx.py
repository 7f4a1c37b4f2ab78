"""Traced PyTorch modules as ONNX files, float or with the fake quantisation of `qat` as QuantizeLinear nodes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ulearn_host.errors import UserError
from ulearn_host.torch_network import (
    CUTTING,
    FAKE,
    MAX_POOLS,
    MEAN_POOLS,
    MEANS,
    PASSES,
    RESHAPES,
    SHARING,
    WEIGHTED,
    kind,
    option,
    shape,
)

_OPSET = 17
_BIAS_MAX = 2**30 - 1
# ONNX operators and their options by (ours, the module's, its place in a call, the default).
_OPERATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "sigmoid": ("Sigmoid", {}),
    "tanh": ("Tanh", {}),
    "hardsigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "hardswish": ("HardSwish", {}),
    "leakyrelu": ("LeakyRelu", {"alpha": ("negative_slope", 1, 0.01)}),
    "elu": ("Elu", {"alpha": ("alpha", 1, 1.0)}),
}
_PAIRS = {"add": "Add", "iadd": "Add", "mul": "Mul", "imul": "Mul"}


def write(graph: Any) -> bytes:
    """A simplified module (`torch_network.simplified`, or `qat.quantisable`) as an ONNX file of opset 17.

    Raises UserError, with the layer's name, for what is not supported.
    """
    return _Writer(graph).file()


class _Writer:
    """Writes a traced module node by node."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.names: dict[Any, str] = {}
        self.scales: dict[str, float] = {}

    def file(self) -> bytes:
        """The whole model."""
        from onnx import TensorProto, helper

        dims: list[int] = []
        output = ""
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                if dims:
                    raise UserError("the module has several inputs, expected one")
                dims, self.names[node] = self._input(node), "x"
            elif node.op == "output":
                if node.args[0] not in self.names:
                    raise UserError("the module gives no single tensor; expected one output")
                output = self.names[node.args[0]]
            elif shape(node) is not None:  # else a size, which the shapes hold already
                self.names[node] = result = self._write(node)
                first = self.names[_tensors(node)[0]]
                if kind(self.graph, node) in SHARING and first in self.scales:
                    self.scales[result] = self.scales[first]
        made = helper.make_graph(
            self.nodes,
            "module",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.constants,
        )
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=8)
        data: bytes = model.SerializeToString()
        return data

    def _input(self, node: Any) -> list[int]:
        """The input's shape; one that is flattened at once is flat: the board's order is then the module's."""
        dims = list(shape(node) or ())
        readers = [r for user in node.users for r in (user.users if kind(self.graph, user) == FAKE else [user])]
        flat = any(kind(self.graph, r) in RESHAPES and len(shape(r) or ()) == 2 for r in readers)
        return [1, math.prod(dims)] if flat else dims

    def _constant(self, values: Any, dtype: Any = np.float32) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), f"c{len(self.constants)}"))
        return f"c{len(self.constants) - 1}"

    def _add(self, node: Any, operator: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        result = f"{node.name}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [result], name=node.name, **attributes))
        return result

    def _write(self, node: Any) -> str:
        """Write a node; the name of what it gives."""
        what, dims = kind(self.graph, node), shape(node) or ()
        if (what in WEIGHTED and node.op != "call_module") or any(n not in self.names for n in _tensors(node)):
            raise UserError(f"'{node.name}' works on weights that belong to no layer; use the modules of torch.nn")
        inputs = [self.names[n] for n in _tensors(node)]
        if what == FAKE:
            return self._fake(node, inputs[0])
        if what in WEIGHTED:
            return self._weighted(node, what, inputs[0])
        if what in CUTTING:
            return self._cut(node, what, inputs[0])
        if what in (*MAX_POOLS, *MEAN_POOLS):
            return self._pool(node, what, inputs[0])
        if what in MEANS:
            return self._mean(node, inputs[0])
        if what in RESHAPES:
            return self._add(node, "Reshape", inputs[0], self._constant(dims, np.int64))
        if what in PASSES:
            return inputs[0]
        if what in _PAIRS and list(node.args) == node.all_input_nodes and not node.kwargs and len(inputs) == 2:
            return self._add(node, _PAIRS[what], *inputs)
        if what in ("cat", "concat"):
            names = [self.names[n] for n in node.args[0]]
            return self._add(node, "Concat", *names, axis=int(self._option(node, "dim", 1, 0)))
        if what in _OPERATORS:
            operator, given = _OPERATORS[what]
            options = {k: self._option(node, *v) if isinstance(v, tuple) else v for k, v in given.items()}
            return self._add(node, operator, inputs[0], **options)
        if what.startswith("batchnorm") and node.op == "call_module":
            norm = self.graph.get_submodule(node.target)
            parts = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            if any(p is None for p in parts):
                raise UserError(f"'{node.name}' has no weights or no running statistics; use it with both")
            numbers = [self._constant(p.detach().numpy()) for p in parts]
            return self._add(node, "BatchNormalization", inputs[0], *numbers, epsilon=float(norm.eps))
        raise UserError(f"'{node.name}' ({what}) is not supported; replace it by layers that the manual lists")

    def _option(self, node: Any, name: str, place: int, default: Any) -> Any:
        return option(self.graph, node, name, place, default)

    def _fake(self, node: Any, x: str) -> str:
        if not node.kwargs.get("observe", True):
            return x
        known = self.graph.get_submodule(node.target).quantisation()
        parts = [self._constant(known.scale), self._constant(known.zero, np.int8)]
        result = self._add(node, "DequantizeLinear", self._add(node, "QuantizeLinear", x, *parts), *parts)
        self.scales[result] = known.scale
        return result

    def _weighted(self, node: Any, what: str, x: str) -> str:
        layer, dims = self.graph.get_submodule(node.target), shape(node) or ()
        weights = layer.weight.detach()
        bias = np.zeros(len(weights), np.float32) if layer.bias is None else layer.bias.detach().numpy()
        if hasattr(layer, "parametrizations"):
            inputs = [x, self._codes(node, layer, weights.numpy(), bias, x), self._constant(bias)]
        else:
            inputs = [x, self._constant(weights.numpy()), self._constant(bias)]
        if what == "linear":
            if len(dims) != 2:
                raise UserError(f"'{node.name}' works on {list(dims)}, expected one vector a sample; flatten before it")
            return self._add(node, "Gemm", *inputs, transB=1)
        if layer.padding_mode != "zeros":
            raise UserError(f"'{node.name}' pads with '{layer.padding_mode}'; pad with zeros")
        pads = list(layer._reversed_padding_repeated_twice)
        return self._add(
            node,
            "Conv",
            *inputs,
            strides=list(layer.stride),
            dilations=list(layer.dilation),
            group=layer.groups,
            pads=[*pads[0::2][::-1], *pads[1::2][::-1]],
        )

    def _codes(self, node: Any, layer: Any, weights: Any, bias: Any, x: str) -> str:
        """int8 weights behind a DequantizeLinear. A channel that is all but dead still needs a scale in which its bias
        has 31 bits."""
        scales = layer.parametrizations.weight[0].scales(layer.parametrizations.weight.original).numpy()
        if x in self.scales:
            scales = np.maximum(scales, np.abs(bias) / (self.scales[x] * _BIAS_MAX) * 1.001).astype(np.float32)
        codes = np.clip(np.rint(weights / scales.reshape(-1, *(1 for _ in weights.shape[1:]))), -127, 127)
        zeros = self._constant(np.zeros(len(scales)), np.int8)
        return self._add(
            node, "DequantizeLinear", self._constant(codes, np.int8), self._constant(scales), zeros, axis=0
        )

    def _cut(self, node: Any, what: str, x: str) -> str:
        if what == "relu":
            return self._add(node, "Relu", x)
        ends = (
            (0, 6) if what == "relu6" else (self._option(node, "min_val", 1, -1), self._option(node, "max_val", 2, 1))
        )
        return self._add(node, "Clip", x, *map(self._constant, ends))

    def _pool(self, node: Any, what: str, x: str) -> str:
        count = len(shape(node) or ()) - 2
        kernel = _repeated(self._option(node, "kernel_size", 1, None), count)
        stride = _repeated(self._option(node, "stride", 2, None) or kernel, count)
        pad = _repeated(self._option(node, "padding", 3, 0), count)
        attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": stride, "pads": pad * 2}
        if what in MAX_POOLS:
            attributes["ceil_mode"] = int(self._option(node, "ceil_mode", 5, False))
            if any(d != 1 for d in _repeated(self._option(node, "dilation", 4, 1), count)):
                raise UserError(f"'{node.name}' pools with a dilation, which is not supported")
            return self._add(node, "MaxPool", x, **attributes)
        attributes["ceil_mode"] = int(self._option(node, "ceil_mode", 4, False))
        attributes["count_include_pad"] = int(self._option(node, "count_include_pad", 5, True))
        return self._add(node, "AveragePool", x, **attributes)

    def _mean(self, node: Any, x: str) -> str:
        before, after = shape(node.all_input_nodes[0]) or (), shape(node) or ()
        if kind(self.graph, node) == "mean":
            axes = _repeated(self._option(node, "dim", 1, ()), 1)
            whole = sorted(a % len(before) for a in axes) == list(range(2, len(before)))
        else:
            whole = math.prod(after[2:]) == 1
        if not whole:
            raise UserError(f"'{node.name}' averages {list(before)} to {list(after)}; average the whole image instead")
        result = self._add(node, "GlobalAveragePool", x)
        return (
            result if len(before) == len(after) else self._add(node, "Reshape", result, self._constant(after, np.int64))
        )


def _tensors(node: Any) -> list[Any]:
    """The tensors that a node reads; sizes are none."""
    return [n for n in node.all_input_nodes if n.op == "get_attr" or shape(n) is not None]


def _repeated(value: Any, count: int) -> list[int]:
    """An option of one number, or one a dimension, as a list."""
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)] * count
