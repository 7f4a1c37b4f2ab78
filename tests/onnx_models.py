"""Small ONNX files made with onnx.helper, one per operator and option, and a float interpreter of what they become.

The interpreter is an independent check of the importer: it computes a network in real numbers from its dequantised
weights, with plain loops over windows, and rounds nothing; `quantised` rounds every activation to its code.
Everything is a pure function of the name or the seed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

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
    Tensor,
)

Array = np.ndarray


# ---- The float interpreter -------------------------------------------------------------------------------------------


def windows(op: Any, x: Array, outside: float) -> Array:
    """[out_h, out_w, c, kernel_h, kernel_w] of an image [h, w, c]."""
    (kh, kw), (sh, sw), (top, left) = op.window.kernel, op.window.stride, op.window.pad
    h, w, _ = op.output.shape
    below, right = (h - 1) * sh + kh, (w - 1) * sw + kw
    field = np.full((max(below, top + x.shape[0]), max(right, left + x.shape[1]), x.shape[2]), outside)
    field[top : top + x.shape[0], left : left + x.shape[1]] = x
    result = np.empty((h, w, x.shape[2], kh, kw))
    for i in range(h):
        for j in range(w):
            result[i, j] = field[i * sh : i * sh + kh, j * sw : j * sw + kw].transpose(2, 0, 1)
    return result


def weighted(op: Any, x: Array) -> Array:
    """A layer with dequantised weights and biases."""
    scales = op.weight_scales.reshape(-1, *(1 for _ in op.weights.shape[1:]))
    weights, bias = op.weights * scales, op.bias * (op.weight_scales * op.input.scale)
    if isinstance(op, Dense):
        return (x.reshape(-1, weights.shape[1]) @ weights.T + bias).reshape(op.output.shape)
    seen = windows(op, x, 0.0)
    if isinstance(op, Conv):
        return np.einsum("hwcij,oijc->hwo", seen, weights) + bias
    seen = np.repeat(seen, op.multiplier, axis=2)
    return np.einsum("hwcij,cij->hwc", seen, weights[..., 0]) + bias


def computed(op: Op, inputs: Sequence[Array]) -> Array:
    """One operator in real numbers; activations cut, nothing rounded, except tables, which are functions of codes."""
    x = inputs[0]
    if isinstance(op, Conv | Dense | Depthwise):
        y = weighted(op, x)
    elif isinstance(op, Pool):
        seen = windows(op, x, np.nan)
        y = np.nanmax(seen, axis=(3, 4)) if op.kind == "max" else np.nanmean(seen, axis=(3, 4))
    elif isinstance(op, Mean):
        y = x.mean(axis=(0, 1), keepdims=True)
    elif isinstance(op, Elementwise):
        other = inputs[1] if op.constant is None else op.second.real(op.constant)
        other = other.reshape(x.shape) if other.size == x.size else other.reshape(1, 1, -1)
        y = x + other if op.kind == "add" else x * other
    elif isinstance(op, Pad):
        y = np.full(op.output.shape, float(op.output.real(np.array(op.value))))
        (a, b, c), (h, w, d) = op.before, x.shape
        y[a : a + h, b : b + w, c : c + d] = x
    elif isinstance(op, Concat):
        y = np.concatenate(inputs, axis=op.axis)
    elif isinstance(op, Reshape):
        y = x.reshape(op.output.shape)
    elif isinstance(op, Table):
        y = op.output.real(op.table[op.input.codes(x).astype(int) + 128])
    else:
        assert isinstance(op, Softmax)
        e = np.exp(op.beta * (x - x.max()))
        y = e / e.sum()
    assert y.shape == op.output.shape, f"{op.name}: {y.shape} instead of {op.output.shape}"
    if hasattr(op, "activation"):
        # Saturation is part of it: a ReLU whose output begins at 0 is nothing else.
        low, high = op.output.real(np.array(op.activation))
        y = np.clip(y, low, high)
    return y


def interpret(network: Network, x: Array, *, rounded: bool) -> Array:
    """The network's answer in real numbers for one sample in its own order and real units.

    rounded: every activation is rounded to its code and saturated, as an ideal int8 machine does.
    """
    first = network.input
    values: dict[str, Array] = {first.name: _rounded(first, x.reshape(first.shape).astype(np.float64), rounded)}
    for op in network.ops:
        for tensor in op.inputs:
            assert values[tensor.name].shape == tensor.shape, f"{op.name} reads {tensor.name} in another shape"
        y = computed(op, [values[t.name] for t in op.inputs])
        assert op.output.name not in values, f"{op.output.name} is written twice"
        values[op.output.name] = _rounded(op.output, y, rounded)
    return values[network.output.name]


def _rounded(tensor: Tensor, y: Array, rounded: bool) -> Array:
    return tensor.real(tensor.codes(y)) if rounded else y


def check(network: Network) -> None:
    """What every operator of the IR asks for."""
    for op in network.ops:
        tensors = (*op.inputs, op.output)
        assert all(t.scale > 0 and -128 <= t.zero <= 127 and t.size > 0 for t in tensors), op.name
        if isinstance(op, Pool | Pad | Concat | Reshape):
            assert len({(t.scale, t.zero) for t in tensors}) == 1, f"{op.name} has several quantisations"
        if isinstance(op, Conv | Dense | Depthwise):
            assert (op.weights.dtype, op.bias.dtype) == (np.int8, np.int32)
            assert op.weight_scales.shape == op.bias.shape == op.weights.shape[:1]
        if isinstance(op, Elementwise):
            other = op.inputs[1].size if op.constant is None else op.constant.size
            assert other in (op.input.size, op.input.shape[2], 1)
        if hasattr(op, "activation"):
            assert -128 <= op.activation[0] <= op.activation[1] <= 127


# ---- Making files ----------------------------------------------------------------------------------------------------


def seeded(name: str) -> np.random.Generator:
    """A generator that a name decides."""
    return np.random.default_rng(zlib.crc32(name.encode()))


class Model:
    """Collects nodes and constants of one model; methods answer with the name of what they made."""

    def __init__(self, name: str, dims: Sequence[int | str | None], opset: int = 17, dtype: Any = np.float32) -> None:
        """dims: the input's shape with its batch."""
        self.name, self.dims, self.opset, self.dtype = name, list(dims), opset, np.dtype(dtype)
        self.rng = seeded(name)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.outputs: list[Any] = []
        self.x = "x"

    def const(self, values: Any, dtype: Any = np.float32) -> str:
        """A constant."""
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(values, dtype=dtype), name))
        return name

    def normal(self, *shape: int, scale: float = 1.0) -> str:
        """A constant of normal numbers."""
        return self.const(self.rng.normal(0, scale, shape))

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> str:
        """A node; the name of its first output."""
        names = [f"t{len(self.nodes)}" + ("" if i == 0 else f"_{i}") for i in range(outputs)]
        made = helper.make_node(kind, list(inputs), names, name=f"{kind.lower()}_{len(self.nodes)}", domain=domain)
        made.attribute.extend(helper.make_attribute(k, v) for k, v in sorted(attributes.items()))
        self.nodes.append(made)
        return names[0]

    def conv(self, x: str, c: int, out: int, *kernel: int, group: int = 1, bias: bool = True, **attributes: Any) -> str:
        """A convolution with weights that keep the variance."""
        fan = (c // group) * int(np.prod(kernel))
        inputs = [x, self.normal(out, c // group, *kernel, scale=fan**-0.5)]
        if bias:
            inputs.append(self.normal(out, scale=0.3))
        return self.op("Conv", *inputs, group=group, **attributes)

    def gemm(self, x: str, inputs: int, outputs: int) -> str:
        """A dense layer as PyTorch exports it."""
        return self.op("Gemm", x, self.normal(outputs, inputs, scale=inputs**-0.5), self.normal(outputs), transB=1)

    def batch_norm(self, x: str, c: int) -> str:
        """A batch normalisation with every number in use."""
        gain, spread = self.rng.uniform(0.5, 1.5, c), self.rng.uniform(0.5, 2, c)
        return self.op(
            "BatchNormalization", x, self.const(gain), self.normal(c), self.normal(c), self.const(spread), epsilon=1e-3
        )

    def done(self, output: str | Sequence[str]) -> onnx.ModelProto:
        """The model."""
        outputs = [output] if isinstance(output, str) else list(output)
        graph = helper.make_graph(
            self.nodes,
            self.name,
            [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(self.dtype), self.dims)],
            [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs],
            self.initializers,
        )
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid("ai.onnx.ml", 3)]
        return helper.make_model(graph, opset_imports=imports, ir_version=8)

    # Quantised

    def q(self, x: str, scale: float, zero: int = 0, dtype: Any = np.int8) -> str:
        """QuantizeLinear."""
        return self.op("QuantizeLinear", x, self.const(scale), self.const(zero, dtype))

    def dq(self, x: str, scale: Any, zero: Any = 0, dtype: Any = np.int8, **attributes: Any) -> str:
        """DequantizeLinear."""
        zeros = np.broadcast_to(zero, np.shape(scale))
        return self.op("DequantizeLinear", x, self.const(scale), self.const(zeros, dtype), **attributes)

    def qdq(self, x: str, scale: float, zero: int = 0, dtype: Any = np.int8) -> str:
        """Both, as around every activation."""
        return self.dq(self.q(x, scale, zero, dtype), scale, zero, dtype)

    def weights(self, *shape: int, axis: int | None = 0, scale: float = 0.01) -> tuple[str, Array]:
        """int8 weights behind a DequantizeLinear, and their scales: one a channel, or one (axis None)."""
        codes = self.const(self.rng.integers(-127, 128, shape), np.int8)
        if axis is None:
            return self.dq(codes, np.float32(scale)), np.full(1, scale, np.float32)
        scales = (scale * self.rng.uniform(0.5, 1, shape[axis])).astype(np.float32)
        return self.dq(codes, scales, axis=axis), scales

    def bias(self, scales: Array, count: int, reach: int = 3000) -> str:
        """An int32 bias behind a DequantizeLinear; scales: of the sums."""
        codes = self.const(self.rng.integers(-reach, reach, count), np.int32)
        scales = np.broadcast_to(scales, count).astype(np.float32) if len(scales) > 1 else np.float32(scales[0])
        return self.dq(codes, scales, dtype=np.int32, **({"axis": 0} if np.ndim(scales) else {}))


@dataclass
class Case:
    """A model and what to hold it to. steps: the largest difference allowed, in steps of the output's code."""

    build: Callable[[Model], str | Sequence[str]]
    dims: Sequence[int | str | None] = (1, 3, 9, 8)
    opset: int = 17
    steps: float = 3.0
    kinds: tuple[type[Op], ...] | None = None
    log: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def made(self, name: str) -> onnx.ModelProto:
        """The model."""
        model = Model(name, self.dims, self.opset, **self.options)
        return model.done(self.build(model))


def samples(name: str, case: Case, count: int = 24) -> Array:
    """Inputs [count, ...] of a case."""
    dims = [d for d in case.dims[1:] if isinstance(d, int)]
    return seeded(name + "/samples").normal(0.2, 1, (count, *dims)).astype(np.float32)


def save(model: onnx.ModelProto, path: Path) -> Path:
    """Write a model."""
    path.write_bytes(model.SerializeToString())
    return path


# ---- Float models, one per operator and option -----------------------------------------------------------------------


def _function(kind: str, **attributes: Any) -> Callable[[Model], str]:
    return lambda m: m.op(kind, m.conv(m.x, 3, 4, 3, 3), **attributes)


def _pool(kind: str, **attributes: Any) -> Callable[[Model], str]:
    return lambda m: m.op(kind, m.conv(m.x, 3, 4, 1, 1), **attributes)


def _conv(out: int, *kernel: int, **attributes: Any) -> Callable[[Model], str]:
    return lambda m: m.conv(m.x, 3, out, *kernel, **attributes)


def _clip(low: float | None, high: float | None) -> Callable[[Model], str]:
    def build(m: Model) -> str:
        bounds = ["" if b is None else m.const(b) for b in (low, high)]
        return m.op("Clip", m.conv(m.x, 3, 4, 3, 3), *bounds)

    return build


def _flat(m: Model) -> str:
    y = m.op("Relu", m.conv(m.x, 3, 4, 3, 3))
    return m.gemm(m.op("Flatten", y), 4 * 7 * 6, 5)


def _view(m: Model) -> str:
    """x.view(x.size(0), -1) as the TorchScript exporter writes it."""
    y = m.conv(m.x, 3, 4, 3, 3)
    size = m.op("Gather", m.op("Shape", y), m.const(0, np.int64), axis=0)
    batch = m.op("Unsqueeze", size, m.const([0], np.int64))
    return m.gemm(m.op("Reshape", y, m.op("Concat", batch, m.const([-1], np.int64), axis=0)), 4 * 7 * 6, 5)


def _reshape(*shape: int) -> Callable[[Model], str]:
    return lambda m: m.gemm(m.op("Reshape", m.conv(m.x, 3, 4, 3, 3), m.const(shape, np.int64)), 4 * 7 * 6, 5)


def _gemm(trans: int, bias: Any, **attributes: Any) -> Callable[[Model], str]:
    def build(m: Model) -> str:
        shape = (5, 12) if trans else (12, 5)
        inputs = [m.x, m.normal(*shape, scale=0.3)]
        return m.op("Gemm", *inputs, *([] if bias is None else [m.normal(*bias)]), transB=trans, **attributes)

    return build


def _matmul(m: Model) -> str:
    y = m.op("Add", m.op("MatMul", m.x, m.normal(12, 8, scale=0.3)), m.normal(8))
    return m.op("Add", m.normal(5), m.op("MatMul", m.op("Relu", y), m.normal(8, 5, scale=0.3)))


def _residual(m: Model) -> str:
    x = m.op("Relu", m.conv(m.x, 3, 4, 3, 3, pads=[1, 1, 1, 1]))
    return m.op("Relu", m.op("Add", x, m.batch_norm(m.conv(x, 4, 4, 1, 1, bias=False), 4)))


def _squeeze_and_excite(m: Model) -> str:
    x = m.op("Relu", m.conv(m.x, 3, 4, 3, 3))
    y = m.op("Flatten", m.op("GlobalAveragePool", x))
    gate = m.op("Sigmoid", m.gemm(m.op("Relu", m.gemm(y, 4, 3)), 3, 4))
    return m.op("Mul", m.op("Reshape", gate, m.const([1, 4, 1, 1], np.int64)), x)


def _silu(m: Model) -> str:
    x = m.conv(m.x, 3, 4, 3, 3)
    return m.op("Mul", x, m.op("Sigmoid", x))


def _hard_swish(m: Model) -> str:
    x = m.conv(m.x, 3, 4, 3, 3)
    gate = m.op("Clip", m.op("Add", x, m.const(3.0)), m.const(0.0), m.const(6.0))
    return m.op("Div", m.op("Mul", x, gate), m.const(6.0))


def _gelu(m: Model) -> str:
    x = m.conv(m.x, 3, 4, 3, 3)
    y = m.op("Add", m.op("Erf", m.op("Div", x, m.const(2**0.5))), m.const(1.0))
    return m.op("Mul", m.op("Mul", x, y), m.const(0.5))


def _constant_operand(kind: str, shape: tuple[int, ...], first: bool = False) -> Callable[[Model], str]:
    """Behind a ReLU, so that nothing can be folded."""

    def build(m: Model) -> str:
        x = m.op("Relu", m.conv(m.x, 3, 4, 3, 3))
        other = m.const(m.rng.uniform(0.5, 2, shape))
        return m.op(kind, *((other, x) if first else (x, other)))

    return build


def _folded(kind: str) -> Callable[[Model], str]:
    return lambda m: m.op("Relu", m.op(kind, m.conv(m.x, 3, 4, 3, 3), m.const(m.rng.uniform(0.5, 2, (1, 4, 1, 1)))))


def _pad(pads: Sequence[int], *, conv: bool = False, axes: Sequence[int] | None = None) -> Callable[[Model], str]:
    def build(m: Model) -> str:
        inputs = [m.x, m.const(pads, np.int64)]
        y = m.op("Pad", *inputs) if axes is None else m.op("Pad", *inputs, "", m.const(axes, np.int64))
        return m.conv(y, 3, 4, 3, 3, strides=[2, 2]) if conv else y

    return build


def _concat(axis: int, *outs: int) -> Callable[[Model], str]:
    return lambda m: m.op("Concat", *(m.op("Relu", m.conv(m.x, 3, out, 1, 1)) for out in outs), axis=axis)


def _concat_vectors(m: Model) -> str:
    return m.gemm(m.op("Concat", m.op("Tanh", m.gemm(m.x, 12, 4)), m.gemm(m.x, 12, 3), axis=-1), 7, 3)


def _keras(m: Model) -> str:
    """NHWC outside, NCHW inside, as tf2onnx leaves it."""
    x = m.op("Transpose", m.x, perm=[0, 3, 1, 2])
    a, b = (
        m.op("Relu", m.conv(x, 3, 4, 3, 3, auto_pad="SAME_UPPER", strides=[2, 2])),
        m.conv(x, 3, 2, 1, 1, strides=[2, 2]),
    )
    back = [m.op("Transpose", y, perm=[0, 2, 3, 1]) for y in (a, b)]
    y = m.op("Relu", m.op("Add", m.op("Concat", *back, axis=3), m.normal(6)))
    y = m.op("Reshape", y, m.const([-1, 5 * 4 * 6], np.int64))
    return m.op("Softmax", m.op("Add", m.op("MatMul", y, m.normal(120, 4, scale=0.1)), m.normal(4)))


def _keras_mean(m: Model) -> str:
    x = m.op("Transpose", m.conv(m.op("Transpose", m.x, perm=[0, 3, 1, 2]), 3, 4, 3, 3), perm=[0, 2, 3, 1])
    axes = m.const([1, 2], np.int64)
    return m.op("MatMul", m.op("ReduceMean", x, axes, keepdims=0), m.normal(4, 3))


def _series(m: Model) -> str:
    y = m.op("Relu", m.batch_norm(m.conv(m.x, 3, 8, 5, strides=[2], pads=[2, 2]), 8))
    y = m.op("MaxPool", m.conv(y, 8, 8, 3, group=8), kernel_shape=[2], strides=[2])
    return m.gemm(m.op("Flatten", m.op("AveragePool", y, kernel_shape=[3], strides=[1])), 8 * 4, 4)


def _rows(m: Model) -> str:
    y = m.op("Relu", m.op("Add", m.op("MatMul", m.x, m.normal(6, 8, scale=0.4)), m.normal(8)))
    return m.gemm(m.op("Reshape", y, m.const([1, 40], np.int64)), 40, 3)


def _mobile(m: Model) -> str:
    """The whole of a small network."""
    y = m.op("Relu", m.batch_norm(m.conv(m.x, 3, 8, 3, 3, strides=[2, 2], pads=[1, 1, 1, 1]), 8))
    z = _relu6(m, m.batch_norm(m.conv(y, 8, 8, 3, 3, group=8, pads=[1, 1, 1, 1], bias=False), 8))
    y = m.op("Add", y, m.batch_norm(m.conv(z, 8, 8, 1, 1, bias=False), 8))
    y = m.op("Dropout", m.op("Flatten", m.op("GlobalAveragePool", m.op("Identity", y))))
    return m.op("Softmax", m.gemm(y, 8, 4), axis=1)


def _relu6(m: Model, x: str) -> str:
    zero = m.op("Constant", value=numpy_helper.from_array(np.float32(0)))
    return m.op("Clip", x, zero, m.const(6.0))


def _classifier(m: Model) -> list[str]:
    """Label and probabilities, as skl2onnx exports an MLP behind a StandardScaler."""
    x = m.op("Scaler", m.x, domain="ai.onnx.ml", offset=[0.1] * 12, scale=[float(v) for v in m.rng.uniform(1, 2, 12)])
    y = m.op("Softmax", m.gemm(m.op("Relu", m.gemm(x, 12, 8)), 8, 3), axis=1)
    return [m.op("ArgMax", y, axis=1), m.op("ZipMap", y, domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2])]


VECTOR = (1, 12)
SAME = {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}
PADDED = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
FLOAT: dict[str, Case] = {
    "conv": Case(_conv(4, 3, 3), kinds=(Conv,)),
    "conv without bias": Case(_conv(4, 3, 3, bias=False), kinds=(Conv,)),
    "conv 1x1": Case(_conv(5, 1, 1)),
    "conv 5x2": Case(_conv(4, 5, 2)),
    "conv stride": Case(_conv(4, 3, 3, strides=[2, 3])),
    "conv pads": Case(_conv(4, 3, 3, pads=[0, 1, 2, 1], strides=[2, 1])),
    "conv same upper": Case(_conv(4, 3, 2, auto_pad="SAME_UPPER", strides=[2, 2])),
    "conv same lower": Case(_conv(4, 4, 2, auto_pad="SAME_LOWER", strides=[2, 1])),
    "conv valid": Case(_conv(4, 3, 3, auto_pad="VALID")),
    "conv opset 11": Case(_conv(4, 3, 3), opset=11),
    "conv opset 22": Case(_conv(4, 3, 3), opset=22),
    "symbolic batch": Case(_conv(4, 3, 3), dims=("n", 3, 9, 8)),
    "no batch size": Case(_conv(4, 3, 3), dims=(None, 3, 9, 8)),
    "double": Case(lambda m: m.op("Relu", m.op("Cast", m.x, to=1)), options={"dtype": np.float64}),
    "depthwise": Case(_conv(3, 3, 3, group=3, pads=[1, 1, 1, 1]), kinds=(Depthwise,)),
    "depthwise multiplier 2": Case(_conv(6, 3, 3, group=3, strides=[2, 2]), kinds=(Depthwise,)),
    "conv 1d": Case(_conv(4, 5, pads=[2, 2], strides=[2]), dims=(1, 3, 20)),
    "depthwise 1d": Case(_conv(3, 3, group=3), dims=(1, 3, 20)),
    "series": Case(_series, dims=(1, 3, 28), steps=4),
    "relu": Case(_function("Relu"), kinds=(Conv,)),
    "clip 0 6": Case(_clip(0, 6), kinds=(Conv,)),
    "clip -1 1": Case(_clip(-1, 1), kinds=(Conv,), steps=5),
    "clip below": Case(_clip(-0.5, None), kinds=(Conv,)),
    "clip above": Case(_clip(None, 0.5), kinds=(Conv,)),
    "min max": Case(
        lambda m: m.op("Min", m.op("Max", _conv(4, 3, 3)(m), m.const(0.0)), m.const(1.0)), kinds=(Conv,), steps=7
    ),
    "relu of the input": Case(lambda m: m.op("Relu", m.x), kinds=(Table,)),
    "relu beside": Case(lambda m: (lambda x: m.op("Add", x, m.op("Relu", x)))(_conv(4, 3, 3)(m)), kinds=(Conv, Table)),
    "sigmoid": Case(_function("Sigmoid"), kinds=(Conv, Table)),
    "hard sigmoid": Case(_function("HardSigmoid", alpha=0.25, beta=0.4), steps=5),
    "hard swish": Case(_function("HardSwish")),
    "hard swish in parts": Case(_hard_swish, kinds=(Conv, Table)),
    "tanh": Case(_function("Tanh"), steps=7),
    "leaky relu": Case(_function("LeakyRelu", alpha=0.1)),
    "elu": Case(_function("Elu", alpha=0.7)),
    "selu": Case(_function("Selu")),
    "softplus": Case(_function("Softplus")),
    "softsign": Case(_function("Softsign"), steps=6),
    "mish": Case(_function("Mish"), opset=18),
    "abs": Case(_function("Abs")),
    "neg": Case(_function("Neg")),
    "prelu": Case(lambda m: m.op("PRelu", _conv(4, 3, 3)(m), m.const([0.2]))),
    "gelu": Case(_function("Gelu"), opset=20),
    "gelu tanh": Case(_function("Gelu", approximate="tanh"), opset=20),
    "gelu in parts": Case(_gelu, kinds=(Conv, Table)),
    "silu": Case(_silu, kinds=(Conv, Table)),
    "batch norm folded": Case(lambda m: m.batch_norm(_conv(4, 3, 3)(m), 4), kinds=(Conv,)),
    "batch norm and relu": Case(lambda m: m.op("Relu", m.batch_norm(_conv(4, 3, 3)(m), 4)), kinds=(Conv,)),
    "batch norm of a dense layer": Case(lambda m: m.batch_norm(m.gemm(m.x, 12, 5), 5), dims=VECTOR, kinds=(Dense,)),
    "batch norm alone": Case(lambda m: m.batch_norm(m.x, 3), kinds=(Depthwise,)),
    "batch norm of a vector": Case(lambda m: m.gemm(m.batch_norm(m.x, 12), 12, 4), dims=VECTOR, steps=4),
    "batch norm behind relu": Case(lambda m: m.batch_norm(m.op("Relu", _conv(4, 3, 3)(m)), 4), kinds=(Conv, Depthwise)),
    "gemm": Case(_gemm(0, (5,)), dims=VECTOR, kinds=(Dense,)),
    "gemm transposed": Case(_gemm(1, (1, 5)), dims=VECTOR),
    "gemm alpha beta": Case(_gemm(1, (5,), alpha=0.5, beta=2.0), dims=VECTOR),
    "gemm scalar bias": Case(_gemm(0, (1,)), dims=VECTOR),
    "gemm without bias": Case(_gemm(0, None), dims=VECTOR),
    "matmul": Case(_matmul, dims=VECTOR, kinds=(Dense, Dense), steps=4),
    "matmul of rows": Case(_rows, dims=(1, 5, 6), kinds=(Dense, Dense), steps=4),
    "flatten": Case(_flat, kinds=(Conv, Dense), steps=4),
    "view": Case(_view, kinds=(Conv, Dense), steps=4),
    "view of any batch": Case(_view, dims=("n", 3, 9, 8), steps=4),
    "reshape 1 -1": Case(_reshape(1, -1), steps=4),
    "reshape 0 -1": Case(_reshape(0, -1), steps=4),
    "reshape -1 n": Case(_reshape(-1, 168), steps=4),
    "flatten first": Case(lambda m: m.gemm(m.op("Flatten", m.x), 216, 4)),
    "squeeze": Case(lambda m: m.op("Squeeze", m.op("Unsqueeze", _conv(4, 9, 8)(m), m.const([4], np.int64)))),
    "squeeze opset 11": Case(
        lambda m: m.op("Squeeze", m.op("Unsqueeze", _conv(4, 9, 8)(m), axes=[0]), axes=[0, -1]), opset=11
    ),
    "image from a vector": Case(
        lambda m: m.conv(m.op("Reshape", m.x, m.const([1, 1, 3, 4], np.int64)), 1, 2, 2, 2), dims=VECTOR
    ),
    "max pool": Case(_pool("MaxPool", kernel_shape=[2, 2], strides=[2, 2]), kinds=(Conv, Pool)),
    "max pool padded": Case(_pool("MaxPool", **PADDED)),
    "max pool same": Case(_pool("MaxPool", **SAME)),
    "max pool stride 1": Case(_pool("MaxPool", kernel_shape=[3, 2])),
    "max pool ceil": Case(_pool("MaxPool", kernel_shape=[2, 3], strides=[2, 2], ceil_mode=1)),
    "max pool and relu": Case(lambda m: m.op("Relu", _pool("MaxPool", kernel_shape=[2, 2])(m)), kinds=(Conv, Pool)),
    "average pool": Case(_pool("AveragePool", kernel_shape=[2, 2], strides=[2, 2]), kinds=(Conv, Pool)),
    "average pool padded": Case(_pool("AveragePool", count_include_pad=0, **PADDED), kinds=(Conv, Pool)),
    "average pool counting": Case(_pool("AveragePool", count_include_pad=1, **PADDED), kinds=(Conv, Pad, Pool)),
    "average pool same": Case(_pool("AveragePool", **SAME)),
    "global average": Case(_pool("GlobalAveragePool"), kinds=(Conv, Mean)),
    "global max": Case(_pool("GlobalMaxPool"), kinds=(Conv, Pool)),
    "reduce mean": Case(_pool("ReduceMean", axes=[2, 3], keepdims=0), kinds=(Conv, Mean)),
    "reduce mean from the end": Case(_pool("ReduceMean", axes=[-1, -2])),
    "reduce mean opset 18": Case(
        lambda m: m.op("ReduceMean", _conv(4, 3, 3)(m), m.const([2, 3], np.int64), keepdims=1), opset=18
    ),
    "reduce max": Case(_pool("ReduceMax", axes=[2, 3], keepdims=0), kinds=(Conv, Pool)),
    "add": Case(lambda m: m.op("Add", _conv(4, 3, 3)(m), _conv(4, 3, 3)(m)), kinds=(Conv, Conv, Elementwise)),
    "mul": Case(lambda m: m.op("Mul", _conv(4, 3, 3)(m), _conv(4, 3, 3)(m)), steps=5),
    "residual": Case(_residual, kinds=(Conv, Conv, Elementwise), steps=4),
    "squeeze and excite": Case(_squeeze_and_excite, steps=5),
    "add to itself": Case(lambda m: (lambda x: m.op("Add", x, x))(_conv(4, 3, 3)(m)), kinds=(Conv, Table)),
    "square": Case(lambda m: (lambda x: m.op("Mul", x, x))(_conv(4, 3, 3)(m)), kinds=(Conv, Table), steps=5),
    "add channels": Case(_constant_operand("Add", (1, 4, 1, 1)), kinds=(Conv, Elementwise)),
    "mul channels": Case(_constant_operand("Mul", (4, 1, 1)), kinds=(Conv, Elementwise), steps=4),
    "sub channels": Case(_constant_operand("Sub", (4, 1, 1)), kinds=(Conv, Elementwise)),
    "div channels": Case(_constant_operand("Div", (4, 1, 1)), kinds=(Conv, Elementwise), steps=4),
    "channels less": Case(_constant_operand("Sub", (4, 1, 1), first=True), kinds=(Conv, Depthwise)),
    "add all": Case(_constant_operand("Add", (4, 7, 6)), kinds=(Conv, Elementwise)),
    "mul all": Case(_constant_operand("Mul", (1, 4, 7, 6)), kinds=(Conv, Elementwise), steps=4),
    "mul scalar": Case(_constant_operand("Mul", ()), kinds=(Conv, Table)),
    "add scalar": Case(_constant_operand("Add", (1,)), kinds=(Conv, Table)),
    "one less": Case(_constant_operand("Sub", (), first=True), kinds=(Conv, Table)),
    **{f"{kind.lower()} folded": Case(_folded(kind), kinds=(Conv,)) for kind in ("Add", "Sub", "Mul", "Div")},
    "normalised input": Case(lambda m: m.conv(m.op("Sub", m.x, m.normal(1, 3, 1, 1)), 3, 4, 3, 3), steps=4),
    "pad": Case(_pad([0, 0, 1, 2, 0, 0, 0, 3]), kinds=(Pad,)),
    "pad and conv": Case(_pad([0, 0, 0, 0, 0, 0, 1, 1], conv=True), kinds=(Conv,)),
    "pad channels": Case(_pad([0, 1, 0, 0, 0, 2, 0, 0]), kinds=(Pad,)),
    "pad axes": Case(_pad([1, 0, 1, 2], axes=[2, -1]), opset=18, kinds=(Pad,)),
    "concat channels": Case(_concat(1, 2, 3, 4), kinds=(Conv, Conv, Conv, Concat)),
    "concat height": Case(_concat(2, 3, 3)),
    "concat width": Case(_concat(-1, 3, 3)),
    "concat vectors": Case(_concat_vectors, dims=VECTOR, steps=4),
    "softmax": Case(lambda m: m.op("Softmax", m.gemm(m.x, 12, 5), axis=-1), dims=VECTOR, kinds=(Dense, Softmax)),
    "softmax opset 11": Case(lambda m: m.op("Softmax", m.gemm(m.x, 12, 5)), dims=VECTOR, opset=11),
    "log softmax": Case(lambda m: m.op("LogSoftmax", m.gemm(m.x, 12, 5), axis=1), dims=VECTOR, log=True, steps=5),
    "keras": Case(_keras, dims=(None, 9, 8, 3), steps=4),
    "keras mean": Case(_keras_mean, dims=(None, 9, 8, 3), opset=18, steps=4),
    "classifier": Case(_classifier, dims=(None, 12), steps=7),
    "mobile": Case(_mobile, steps=5),
}


# ---- Quantised models ------------------------------------------------------------------------------------------------


def _q_conv(
    group: int = 1, axis: int | None = 0, dtype: Any = np.int8, zero: int = 3, after: str = "", bias: str = "int32"
) -> Callable[[Model], str]:
    def build(m: Model) -> str:
        x = m.qdq(m.x, 0.02, zero, dtype)
        w, scales = m.weights(6, 3 // group, 3, 3, axis=axis)
        inputs = [x, w]
        if bias:
            inputs.append(m.bias(0.02 * scales, 6) if bias == "int32" else m.normal(6))
        y = m.op("Conv", *inputs, group=group, pads=[1, 1, 1, 1], strides=[2, 2])
        y = m.op(after, y) if after else y
        low = -128 if after else -5
        return m.qdq(y, 0.03, low + (128 if dtype == np.uint8 else 0), dtype)

    return build


def _q_dense(kind: str) -> Callable[[Model], str]:
    def build(m: Model) -> str:
        x = m.qdq(m.x, 0.02, 1)
        if kind == "Gemm":
            w, scales = m.weights(5, 12)
            y = m.op("Gemm", x, w, m.bias(0.02 * scales, 5), transB=1)
        else:
            w, scales = m.weights(12, 5, axis=1)
            y = m.op("Add", m.op("MatMul", x, w), m.bias(0.02 * scales, 5))
        return m.qdq(y, 0.05, -3)

    return build


def _q_two(kind: str) -> Callable[[Model], str]:
    def build(m: Model) -> str:
        a, b = _q_conv()(m), m.op("AveragePool", m.qdq(m.x, 0.02, 3), kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
        b = m.qdq(m.op("Concat", b, b, axis=1), 0.021, -2)
        return m.qdq(m.op(kind, a, m.qdq(b, 0.025, 0)), 0.06, 1)

    return build


def _q_behind(kind: str, scale: float, zero: int, **attributes: Any) -> Callable[[Model], str]:
    return lambda m: m.qdq(m.op(kind, _q_conv()(m), **attributes), scale, zero)


def _q_concat(m: Model) -> str:
    return m.qdq(m.op("Concat", _q_conv(dtype=np.int8)(m), m.qdq(_q_conv()(m), 0.05, 9), axis=1), 0.04, -7)


def _q_constant(kind: str) -> Callable[[Model], str]:
    def build(m: Model) -> str:
        codes = m.const(m.rng.integers(-127, 128, (6, 1, 1)), np.int8)
        return m.qdq(m.op(kind, _q_conv()(m), m.dq(codes, np.float32(0.01))), 0.05, 2)

    return build


def _q_weights_from_float(m: Model) -> str:
    """QuantizeLinear of float weights, as an export of simulated quantisation leaves it."""
    return m.qdq(m.op("Conv", m.qdq(m.x, 0.02, 3), m.qdq(m.normal(6, 3, 3, 3, scale=0.3), 0.01)), 0.05, 2)


def _q_codes(m: Model) -> str:
    """int8 codes go in and come out."""
    x = m.dq(m.op("Reshape", m.x, m.const([1, 3, 9, 8], np.int64)), np.float32(0.02), 4)
    w, scales = m.weights(6, 3, 3, 3)
    return m.dq(m.q(m.op("Conv", x, w, m.bias(0.02 * scales, 6)), 0.04, 1), np.float32(0.04), 1)


def _q_network(m: Model) -> str:
    y = m.qdq(m.op("MaxPool", _q_conv(after="Relu")(m), kernel_shape=[2, 2], strides=[2, 2]), 0.03, -128)
    y = m.qdq(m.op("GlobalAveragePool", y), 0.015, -120)
    w, scales = m.weights(4, 6)
    y = m.qdq(m.op("Gemm", m.op("Flatten", y), w, m.bias(0.015 * scales, 4), transB=1), 0.02, 5)
    return m.op("Softmax", y, axis=1)


QUANTISED: dict[str, Case] = {
    "q conv": Case(_q_conv(), kinds=(Conv,)),
    "q conv per tensor": Case(_q_conv(axis=None), kinds=(Conv,)),
    "q conv relu": Case(_q_conv(after="Relu"), kinds=(Conv,)),
    "q conv float bias": Case(_q_conv(bias="float"), kinds=(Conv,)),
    "q conv no bias": Case(_q_conv(bias=""), kinds=(Conv,)),
    "q conv uint8": Case(_q_conv(dtype=np.uint8, zero=131), kinds=(Conv,)),
    "q conv uint8 relu": Case(_q_conv(dtype=np.uint8, zero=131, after="Relu"), kinds=(Conv,)),
    "q depthwise": Case(_q_conv(group=3), kinds=(Depthwise,)),
    "q gemm": Case(_q_dense("Gemm"), dims=VECTOR, kinds=(Dense,)),
    "q matmul": Case(_q_dense("MatMul"), dims=VECTOR, kinds=(Dense,)),
    "q add": Case(_q_two("Add")),
    "q mul": Case(_q_two("Mul")),
    "q relu": Case(_q_behind("Relu", 0.02, -128), kinds=(Conv, Table)),
    "q sigmoid": Case(_q_behind("Sigmoid", 1 / 256, -128), kinds=(Conv, Table)),
    "q max pool": Case(_q_behind("MaxPool", 0.03, -5, kernel_shape=[2, 2]), kinds=(Conv, Pool)),
    "q max pool rescaled": Case(_q_behind("MaxPool", 0.025, 7, kernel_shape=[2, 2]), kinds=(Conv, Pool, Table)),
    "q average pool": Case(_q_behind("AveragePool", 0.03, -5, kernel_shape=[2, 2]), kinds=(Conv, Pool)),
    "q mean": Case(_q_behind("GlobalAveragePool", 0.01, 4), kinds=(Conv, Mean)),
    "q concat": Case(_q_concat),
    "q add constant": Case(_q_constant("Add"), kinds=(Conv, Elementwise)),
    "q mul constant": Case(_q_constant("Mul"), kinds=(Conv, Elementwise)),
    "q weights from float": Case(_q_weights_from_float, kinds=(Conv,)),
    "q codes": Case(_q_codes, dims=(1, 3, 9, 8), options={"dtype": np.int8}),
    "q softmax": Case(
        lambda m: m.qdq(m.op("Softmax", _q_dense("Gemm")(m), axis=1), 1 / 255, -128),
        dims=VECTOR,
        kinds=(Dense, Softmax),
    ),
    "q network": Case(_q_network, kinds=(Conv, Pool, Mean, Dense, Softmax)),
}
for _case in QUANTISED.values():
    _case.opset = 19  # below, the evaluator has no quantisation


# ---- What is refused -------------------------------------------------------------------------------------------------


def _refused(kind: str, *inputs: str, **attributes: Any) -> Callable[[Model], str]:
    """An operator behind a convolution; inputs beyond the first are given."""
    return lambda m: m.op(kind, m.conv(m.x, 3, 4, 3, 3), *inputs, **attributes)


def _gru(m: Model) -> str:
    return m.op("GRU", m.x, m.normal(1, 12, 3), m.normal(1, 12, 4), hidden_size=4)


def _shuffle(m: Model) -> str:
    """Channels shuffled between groups, as ShuffleNet does."""
    x = m.op("Reshape", m.conv(m.x, 3, 4, 3, 3), m.const([1, 2, 2, 7, 6], np.int64))
    x = m.op("Transpose", x, perm=[0, 2, 1, 3, 4])
    return m.conv(m.op("Reshape", x, m.const([1, 4, 7, 6], np.int64)), 4, 2, 1, 1)


def _nan(m: Model) -> str:
    return m.op("Conv", m.x, m.const(np.full((4, 3, 3, 3), np.nan)))


def _missing(m: Model) -> str:
    return m.op("Conv", m.x, "nowhere")


def _twice(m: Model) -> str:
    y = m.conv(m.x, 3, 4, 3, 3)
    m.nodes.append(m.nodes[-1])
    return y


def _circle(m: Model) -> str:
    m.nodes.append(helper.make_node("Relu", ["b"], ["a"], name="one"))
    m.nodes.append(helper.make_node("Relu", ["a"], ["b"], name="two"))
    return m.op("Add", m.x, "b")


def _q_asymmetric(m: Model) -> str:
    codes = m.const(m.rng.integers(-127, 128, (6, 3, 3, 3)), np.int8)
    return m.qdq(m.op("Conv", m.qdq(m.x, 0.02), m.dq(codes, np.float32(0.01), 5)), 0.05)


def _q_int16(m: Model) -> str:
    return m.conv(m.qdq(m.x, 0.02, 0, np.int16), 3, 4, 3, 3)


def _q_other_scale(m: Model) -> str:
    return m.conv(m.dq(m.q(m.x, 0.02), np.float32(0.03)), 3, 4, 3, 3)


def _q_by_channel(m: Model) -> str:
    scales = [0.1, 0.2, 0.3]
    return m.op("QuantizeLinear", m.x, m.const(scales), m.const([0, 0, 0], np.int8), axis=1)


def _qlinear(m: Model) -> str:
    return m.op("QLinearConv", m.x, *[m.const(0.1), m.const(0, np.int8)] * 3)


def _q_not_a_scale(m: Model) -> str:
    return m.conv(m.qdq(m.x, -0.02), 3, 4, 3, 3)


def _softmax_inside(m: Model) -> str:
    return m.gemm(m.op("Softmax", m.gemm(m.x, 12, 5), axis=1), 5, 3)


def _two_outputs(m: Model) -> list[str]:
    return [m.gemm(m.x, 12, 5), m.gemm(m.x, 12, 5)]


def _transposed_rows(m: Model) -> str:
    return m.op("MatMul", m.op("Transpose", m.x, perm=[0, 2, 1]), m.normal(5, 3))


# What the error says: the operator with its node's name, then why.
REFUSED: dict[str, tuple[Case, str]] = {
    "gru": (Case(_gru, dims=(1, 5, 3)), "GRU 'gru_0' is not supported; recurrent layers do not run"),
    "unknown": (Case(_refused("Cos")), "Cos 'cos_1' is not supported"),
    "another domain": (Case(_refused("Relu", domain="com.example")), "Relu 'relu_1' of 'com.example' is not supported"),
    "unknown option": (Case(_refused("Relu", slope=1.0)), "Relu 'relu_1' has the option slope"),
    "dilation": (Case(_conv(4, 3, 3, dilations=[2, 2])), "Conv 'conv_0' has dilations .2, 2."),
    "groups": (Case(_conv(4, 3, 3, group=2), dims=(1, 4, 9, 8)), "Conv 'conv_0' has weights"),
    "two groups": (
        Case(lambda m: m.conv(m.x, 4, 4, 3, 3, group=2), dims=(1, 4, 9, 8)),
        "Conv 'conv_0' has 2 groups; 1 and 4 .depthwise. are supported",
    ),
    "3d": (Case(lambda m: m.conv(m.x, 3, 4, 3, 3, 3), dims=(1, 3, 5, 5, 5)), "input 'x' has 5 dimensions"),
    "negative pads": (Case(_conv(4, 3, 3, pads=[-1, 0, 0, 0])), "Conv 'conv_0' has auto_pad NOTSET and pads"),
    "padding alone": (Case(_conv(4, 3, 3, pads=[3, 0, 0, 0])), "windows of .3, 3. that lie in the padding alone"),
    "stride 0": (Case(_conv(4, 3, 3, strides=[0, 1])), "Conv 'conv_0' has strides .0, 1."),
    "wrong kernel": (Case(_conv(4, 3, 3, kernel_shape=[2, 2])), "kernel_shape that is not its weights'"),
    "wrong channels": (Case(_conv(4, 3, 3), dims=(1, 5, 9, 8)), "Conv 'conv_0' has weights"),
    "dilated pool": (
        Case(_pool("MaxPool", kernel_shape=[2, 2], dilations=[2, 2])),
        "MaxPool 'maxpool_1' has dilations",
    ),
    "indices": (
        Case(lambda m: m.op("Add", m.op("MaxPool", m.x, kernel_shape=[1, 1], outputs=2), "t0_1")),
        "Add 'add_1' reads 't0_1', which is missing or a second output",
    ),
    "reduce channels": (Case(_pool("ReduceMean", axes=[1])), "ReduceMean 'reducemean_1' over axes .1. of"),
    "reflect": (Case(lambda m: m.op("Pad", m.x, m.const([0] * 8, np.int64), mode="reflect")), "Pad 'pad_0' with other"),
    "pad ones": (
        Case(lambda m: m.op("Pad", m.x, m.const([0, 0, 1, 1] * 2, np.int64), m.const(1.0))),
        "Pad 'pad_0' with other than zeros",
    ),
    "sub": (Case(lambda m: m.op("Sub", m.x, m.op("Relu", m.x))), "Sub 'sub_1' of two computed tensors"),
    "div by 0": (Case(lambda m: m.op("Div", m.x, m.const(0.0))), "Div 'div_0' divides by"),
    "channel slopes": (Case(lambda m: m.op("PRelu", m.x, m.normal(3, 1, 1))), "PRelu 'prelu_0' has a slope for each"),
    "softmax inside": (Case(_softmax_inside, dims=VECTOR), "Gemm 'gemm_2' comes behind the softmax"),
    "softmax of images": (Case(_pool("Softmax", axis=1)), "Softmax 'softmax_1' over axis 1 of"),
    "shuffle": (Case(_shuffle), "Conv 'conv_4' would need its input's numbers moved"),
    "flat output": (Case(lambda m: m.op("Flatten", _conv(4, 3, 3)(m))), "output 't1' would need its numbers moved"),
    "moved rows": (Case(_transposed_rows, dims=(1, 5, 6)), "MatMul 'matmul_1' works on channels that do not lie"),
    "batch of 4": (Case(_conv(4, 3, 3), dims=(4, 3, 9, 8)), "takes batches of 4; export the model with a batch of 1"),
    "open size": (Case(_conv(4, 3, 3), dims=(1, 3, "h", 8)), "has a size that is not fixed"),
    "two outputs": (Case(_two_outputs, dims=VECTOR), "the model has 2 outputs, expected one"),
    "opset 10": (Case(_conv(4, 3, 3), opset=10), "opset 10, expected 11 to 22"),
    "opset 23": (Case(_conv(4, 3, 3), opset=23), "opset 23, expected 11 to 22"),
    "training": (
        Case(lambda m: m.op("BatchNormalization", m.x, *[m.const([1, 1, 1])] * 4, training_mode=1)),
        "BatchNormalization 'batchnormalization_0' is exported in training mode",
    ),
    "nan": (Case(_nan), "the weights 'c0' hold numbers that are not finite"),
    "missing weights": (Case(_missing), "Conv 'conv_0' reads 'nowhere', which nothing before it gives"),
    "given twice": (Case(_twice), "Conv 'conv_0' gives 't0', which exists already"),
    "circle": (Case(_circle), "Relu 'one' reads 'b', which nothing before it gives"),
    "nothing": (Case(lambda m: m.op("Identity", m.x)), "the model computes nothing"),
    "constant": (Case(lambda m: m.op("Add", m.normal(3), m.normal(3))), "does not depend on the input"),
    "asymmetric weights": (Case(_q_asymmetric), "Conv 'conv_3' has weights whose zero point is not 0"),
    "int16": (Case(_q_int16), "of type INT16, expected float32 or int8"),
    "two scales": (Case(_q_other_scale), "DequantizeLinear 'dequantizelinear_1' has another scale"),
    "scales by channel": (Case(_q_by_channel), "QuantizeLinear 'quantizelinear_0' has a scale for each channel"),
    "negative scale": (Case(_q_not_a_scale), "QuantizeLinear 'quantizelinear_0' has a scale that is no positive"),
    "operator format": (Case(_qlinear), "QLinearConv 'qlinearconv_0' is not supported; quantise with QuantFormat.QDQ"),
}
