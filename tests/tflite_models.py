"""Small TensorFlow Lite files made without TensorFlow: one per operator and option, random networks, and refusals.

A file is assembled from tensors and operators with the object interface of the flatbuffer schema. The weights, the
biases and the output scales are chosen so that int8 activations spread over their range instead of saturating, because
a comparison of saturated numbers compares nothing. Everything is a pure function of the name or the seed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

Array = np.ndarray
NONE, RELU, RELU_N1_TO_1, RELU6 = 0, 1, 2, 3
ACTIVATIONS = {"none": NONE, "relu": RELU, "relu6": RELU6}
SAME, VALID = 0, 1
PADDINGS = {"same": SAME, "valid": VALID}
TYPES = {
    "float32": schema.TensorType.FLOAT32,
    "int8": schema.TensorType.INT8,
    "uint8": schema.TensorType.UINT8,
    "int16": schema.TensorType.INT16,
    "int32": schema.TensorType.INT32,
    "int64": schema.TensorType.INT64,
}


# ---- The file ------------------------------------------------------------------------------------------------------


class ModelBuilder:
    """Collects tensors and operators of one subgraph and writes the file."""

    def __init__(self) -> None:
        """Start an empty model; buffer 0 is the empty buffer that the format asks for."""
        self.tensors: list[schema.TensorT] = []
        self.operators: list[schema.OperatorT] = []
        self.codes: list[schema.OperatorCodeT] = []
        self.buffers = [schema.BufferT()]
        self._code_index: dict[tuple[int, str], int] = {}

    def tensor(
        self,
        shape: Sequence[int],
        dtype: str = "int8",
        scale: float | Sequence[float] | Array | None = None,
        zero_point: int = 0,
        data: Array | None = None,
        axis: int = 0,
        signature: Sequence[int] | None = None,
    ) -> int:
        """Add a tensor and return its index; several scales mean one per slice along `axis`."""
        made = schema.TensorT()
        made.shape = np.asarray(shape, np.int32)
        made.type = TYPES[dtype]
        made.name = f"tensor{len(self.tensors)}"
        made.hasRank = True
        if signature is not None:
            made.shapeSignature = np.asarray(signature, np.int32)
        if scale is not None:
            scales = np.atleast_1d(np.asarray(scale, np.float32))
            made.quantization = schema.QuantizationParametersT()
            made.quantization.scale = scales
            made.quantization.zeroPoint = np.full(len(scales), zero_point, np.int64)
            made.quantization.quantizedDimension = axis if len(scales) > 1 else 0
        made.buffer = 0
        if data is not None:
            stored = schema.BufferT()
            stored.data = np.frombuffer(np.ascontiguousarray(data, dtype).tobytes(), np.uint8)
            made.buffer = len(self.buffers)
            self.buffers.append(stored)
        self.tensors.append(made)
        return len(self.tensors) - 1

    def operator(
        self, name: str, inputs: Sequence[int], outputs: Sequence[int], options: Any = None, version: int = 1
    ) -> None:
        """Add an operator by its name in the schema; another name makes a custom operator."""
        custom = not hasattr(schema.BuiltinOperator, name)
        code = schema.BuiltinOperator.CUSTOM if custom else getattr(schema.BuiltinOperator, name)
        key = (code, name)
        if key not in self._code_index:
            entry = schema.OperatorCodeT()
            entry.builtinCode = code
            entry.deprecatedBuiltinCode = min(code, 127)
            entry.customCode = name if custom else None
            entry.version = version
            self._code_index[key] = len(self.codes)
            self.codes.append(entry)
        made = schema.OperatorT()
        made.opcodeIndex = self._code_index[key]
        made.inputs = np.asarray(inputs, np.int32)
        made.outputs = np.asarray(outputs, np.int32)
        if options is not None:
            made.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__[:-1])
            made.builtinOptions = options
        self.operators.append(made)

    def finish(self, inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
        """Return the file with these tensors as the inputs and outputs of the model."""
        graph = schema.SubGraphT()
        graph.name = "main"
        graph.tensors = self.tensors
        graph.operators = self.operators
        graph.inputs = np.asarray(inputs, np.int32)
        graph.outputs = np.asarray(outputs, np.int32)
        model = schema.ModelT()
        model.version = 3
        model.description = "ulearn test"
        model.operatorCodes = self.codes
        model.subgraphs = [graph]
        model.buffers = self.buffers
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


def options(name: str, **values: Any) -> Any:
    """An options table of the schema by its name, with fields set."""
    made = getattr(schema, name + "T")()
    for key, value in values.items():
        if not hasattr(made, key):
            raise AttributeError(f"{name} has no field {key}")
        setattr(made, key, value)
    return made


# ---- Layers --------------------------------------------------------------------------------------------------------


@dataclass
class Activation:
    """A tensor of the network: its index, shape, quantisation, and the rough mean and spread of its int8 values."""

    index: int
    shape: tuple[int, ...]
    scale: float
    zero_point: int
    mean: float = 0.0
    spread: float = 74.0


def output_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Length of a window operator's output along one axis."""
    return -(-size // stride) if padding == SAME else (size - kernel) // stride + 1


class Net:
    """A network under construction: every method adds an operator and returns its output."""

    def __init__(self, seed: int | str) -> None:
        """Start an empty network; a name or a number seeds every choice."""
        number = zlib.crc32(seed.encode()) if isinstance(seed, str) else seed
        self.random = np.random.default_rng(number)
        self.builder = ModelBuilder()
        self.inputs: list[int] = []

    # -- Choices

    def zero_point(self) -> int:
        """A zero point anywhere in int8, the extremes often."""
        return int(self.random.choice([-128, 127, 0, *self.random.integers(-128, 128, 3)]))

    def scale(self, low: float = 0.004, high: float = 0.2) -> float:
        """A float32 scale, log-uniform."""
        return float(np.float32(np.exp(self.random.uniform(np.log(low), np.log(high)))))

    def activation(
        self, shape: Sequence[int], scale: float, zero_point: int, mean: float = 0.0, spread: float = 50.0
    ) -> Activation:
        """Add an int8 activation tensor."""
        scale = float(np.float32(scale))
        shape = tuple(int(size) for size in shape)
        index = self.builder.tensor(shape, "int8", scale, zero_point)
        return Activation(index, shape, scale, zero_point, mean, spread)

    def clipped(self, shape: Sequence[int], scale: float, zero_point: int, mean: float, fused: int) -> Activation:
        """Add the output of an operator with a fused activation, with the statistics that are left after clipping."""
        made = self.activation(shape, scale, zero_point, mean)
        low = zero_point if fused in (RELU, RELU6) else -128
        high = min(127, zero_point + round(6 / made.scale)) if fused == RELU6 else 127
        values = np.clip(mean + 50 * np.linspace(-2, 2, 41), low, max(low, high))
        made.mean, made.spread = float(values.mean()), float(max(values.std(), 5))
        return made

    def output_zero_point(self, fused: int, zero_point: int | None) -> int:
        """A zero point for an output; with a clipping activation one that leaves something above it."""
        if zero_point is not None:
            return zero_point
        return int(self.random.choice([-128, -128, -90, -17])) if fused else self.zero_point()

    def near(self, chosen: dict[str, Any]) -> int | None:
        """An input zero point that suits a requantising MEAN: the mean of the input has to land inside int8."""
        if "scale" not in chosen:
            return None
        return int(self.random.integers(20, 60)) * (1 if chosen["zero_point"] > 0 else -1)

    # -- Borders

    def input(
        self, shape: Sequence[int], scale: float | None = None, zero_point: int | None = None, dtype: str = "int8"
    ) -> Activation:
        """Add an input of the model; float32 and uint8 inputs are followed by QUANTIZE."""
        scale = float(np.float32(self.scale() if scale is None else scale))
        zero_point = self.zero_point() if zero_point is None else zero_point
        shape = tuple(int(size) for size in shape)
        if dtype == "int8":
            made = self.activation(shape, scale, zero_point, 0.0, 74.0)
            self.inputs.append(made.index)
            return made
        border = (
            self.builder.tensor(shape, "float32")
            if dtype == "float32"
            else self.builder.tensor(shape, dtype, scale, zero_point + 128)
        )
        self.inputs.append(border)
        made = self.activation(shape, scale, zero_point, 0.0, 74.0)
        self.builder.operator("QUANTIZE", [border], [made.index], options("QuantizeOptions"))
        return made

    def finish(self, *outputs: Activation, dtype: str = "int8") -> bytes:
        """Return the file; a uint8 or float32 output goes through QUANTIZE or DEQUANTIZE."""
        indices = []
        for made in outputs:
            index = made.index
            if dtype == "float32":
                index = self.builder.tensor(made.shape, "float32")
                self.builder.operator("DEQUANTIZE", [made.index], [index], options("DequantizeOptions"))
            elif dtype == "uint8":
                index = self.builder.tensor(made.shape, "uint8", made.scale, made.zero_point + 128)
                self.builder.operator("QUANTIZE", [made.index], [index], options("QuantizeOptions"))
            indices.append(index)
        return self.builder.finish(self.inputs, indices)

    # -- Weighted layers

    @staticmethod
    def accumulator_spread(x: Activation, terms: int, bias: bool) -> float:
        """Expected spread of a sum of `terms` products; without a bias nothing compensates the input's offset."""
        offset = 0.0 if bias else x.mean - x.zero_point
        return float(np.sqrt(terms * (x.spread**2 + offset**2)) * 73)

    def weights(
        self,
        shape: Sequence[int],
        channels: int,
        axis: int,
        per_channel: bool,
        base: float | None = None,
        least: int = -127,
    ) -> tuple[int, Array, Array]:
        """Add weights; returns the tensor, its values and one scale per channel."""
        values = self.random.integers(least, 128, shape).astype(np.int8)
        base = self.scale(0.001, 0.02) if base is None else base
        scales = base * np.exp(self.random.uniform(-0.7, 0.7, channels)) if per_channel else np.full(channels, base)
        scales = scales.astype(np.float32)
        stored = scales if per_channel and channels > 1 else scales[:1]
        return self.builder.tensor(shape, "int8", stored, 0, values, axis), values, scales

    def weight_scale(self, x: Activation, terms: int, bias: bool, fused: int, gain: float) -> float | None:
        """A weight scale with which the clip at 6 lies inside the output's range; None where any will do."""
        if fused not in (RELU6, RELU_N1_TO_1):
            return None
        wanted = self.random.uniform(6 / 255, 6 / 110) / (1 if fused == RELU6 else 3)
        return float(wanted * 50 * gain / self.accumulator_spread(x, terms, bias) / x.scale)

    def bias(self, x: Activation, sums: Array, scales: Array, spread: float, wanted: Array) -> int:
        """Add an int32 bias that moves the mean accumulator of every channel to `wanted`."""
        values = np.rint(wanted - sums * (x.mean - x.zero_point) + self.random.normal(0, spread * 0.2, len(sums)))
        bias_scale = np.float32(x.scale) * scales
        stored = bias_scale if len(set(bias_scale.tolist())) > 1 else bias_scale[:1]
        return self.builder.tensor([len(sums)], "int32", stored, 0, values.astype(np.int32))

    def weighted(
        self,
        x: Activation,
        values: Array,
        scales: Array,
        terms: int,
        shape: Sequence[int],
        bias: bool,
        fused: int,
        zero_point: int | None,
        gain: float = 1.0,
    ) -> tuple[Activation, list[int]]:
        """Choose the output's quantisation and the bias of a layer whose channels lie along axis 0 of `values`."""
        flat = values.reshape(values.shape[0], -1).astype(np.float64)
        spread = self.accumulator_spread(x, terms, bias)
        multiplier = 50 * gain / spread
        scale = float(np.float32(x.scale * float(scales.mean()) / multiplier))
        chosen = self.output_zero_point(fused, zero_point)
        mean = float(self.random.uniform(-30, 30)) if bias else float(chosen)
        wanted = (mean - chosen) / (x.scale * scales.astype(np.float64) / scale)
        extra = [self.bias(x, flat.sum(axis=1), scales, spread, wanted)] if bias else []
        return self.clipped(shape, scale, chosen, mean, fused), extra

    def conv(
        self,
        x: Activation,
        out_c: int,
        kernel: tuple[int, int] = (3, 3),
        stride: tuple[int, int] = (1, 1),
        padding: int = SAME,
        fused: int = NONE,
        per_channel: bool = True,
        bias: bool = True,
        zero_point: int | None = None,
        gain: float = 1.0,
        dilation: int = 1,
        groups: int = 1,
    ) -> Activation:
        """CONV_2D; LiteRT refuses an int8 one without a bias."""
        in_c = x.shape[3] // groups
        terms = kernel[0] * kernel[1] * in_c
        base = self.weight_scale(x, terms, bias, fused, gain)
        index, values, scales = self.weights([out_c, *kernel, in_c], out_c, 0, per_channel, base)
        reach = [(size - 1) * dilation + 1 for size in kernel]
        size = [output_size(x.shape[1 + i], reach[i], stride[i], padding) for i in (0, 1)]
        y, extra = self.weighted(x, values, scales, terms, [1, *size, out_c], bias, fused, zero_point, gain)
        chosen = options(
            "Conv2DOptions",
            padding=padding,
            strideH=stride[0],
            strideW=stride[1],
            dilationHFactor=dilation,
            dilationWFactor=dilation,
            fusedActivationFunction=fused,
        )
        self.builder.operator("CONV_2D", [x.index, index, *extra], [y.index], chosen, 3)
        return y

    def depthwise(
        self,
        x: Activation,
        multiplier: int = 1,
        kernel: tuple[int, int] = (3, 3),
        stride: tuple[int, int] = (1, 1),
        padding: int = SAME,
        fused: int = NONE,
        per_channel: bool = True,
        bias: bool = True,
        zero_point: int | None = None,
        gain: float = 1.0,
        dilation: int = 1,
    ) -> Activation:
        """DEPTHWISE_CONV_2D."""
        out_c = x.shape[3] * multiplier
        terms = kernel[0] * kernel[1]
        base = self.weight_scale(x, terms, bias, fused, gain)
        index, values, scales = self.weights([1, *kernel, out_c], out_c, 3, per_channel, base)
        reach = [(size - 1) * dilation + 1 for size in kernel]
        size = [output_size(x.shape[1 + i], reach[i], stride[i], padding) for i in (0, 1)]
        rows = np.moveaxis(values, 3, 0)
        y, extra = self.weighted(x, rows, scales, terms, [1, *size, out_c], bias, fused, zero_point, gain)
        chosen = options(
            "DepthwiseConv2DOptions",
            padding=padding,
            strideH=stride[0],
            strideW=stride[1],
            depthMultiplier=multiplier,
            dilationHFactor=dilation,
            dilationWFactor=dilation,
            fusedActivationFunction=fused,
        )
        self.builder.operator("DEPTHWISE_CONV_2D", [x.index, index, *extra], [y.index], chosen, 3)
        return y

    def dense(
        self,
        x: Activation,
        units: int,
        fused: int = NONE,
        per_channel: bool = False,
        bias: bool = True,
        keep_dims: bool = False,
        zero_point: int | None = None,
        gain: float = 1.0,
        least: int = -127,
    ) -> Activation:
        """FULLY_CONNECTED; an input of higher rank is flattened unless its dimensions are kept."""
        terms = x.shape[-1] if keep_dims else int(np.prod(x.shape[1:]))
        base = self.weight_scale(x, terms, bias, fused, gain)
        index, values, scales = self.weights([units, terms], units, 0, per_channel, base, least)
        shape = [*x.shape[:-1], units] if keep_dims else [1, units]
        y, extra = self.weighted(x, values, scales, terms, shape, bias, fused, zero_point, gain)
        chosen = options("FullyConnectedOptions", fusedActivationFunction=fused, keepNumDims=keep_dims)
        inputs = [x.index, index, *extra] if extra else [x.index, index, -1]
        self.builder.operator("FULLY_CONNECTED", inputs, [y.index], chosen, 4)
        return y

    # -- Windows

    def pool(
        self,
        x: Activation,
        kind: str = "AVERAGE",
        kernel: tuple[int, int] = (2, 2),
        stride: tuple[int, int] = (2, 2),
        padding: int = VALID,
        fused: int = NONE,
    ) -> Activation:
        """AVERAGE_POOL_2D or MAX_POOL_2D; the quantisation stays."""
        size = [output_size(x.shape[1 + i], kernel[i], stride[i], padding) for i in (0, 1)]
        y = self.clipped([1, *size, x.shape[3]], x.scale, x.zero_point, x.mean, fused)
        chosen = options(
            "Pool2DOptions",
            padding=padding,
            strideH=stride[0],
            strideW=stride[1],
            filterHeight=kernel[0],
            filterWidth=kernel[1],
            fusedActivationFunction=fused,
        )
        self.builder.operator(f"{kind}_POOL_2D", [x.index], [y.index], chosen, 2)
        return y

    def mean(
        self,
        x: Activation,
        keep_dims: bool = False,
        axes: Sequence[int] = (1, 2),
        scale: float | None = None,
        zero_point: int | None = None,
    ) -> Activation:
        """MEAN, by default over height and width."""
        gone = {axis % len(x.shape) for axis in axes}
        if keep_dims:
            shape = [1 if i in gone else size for i, size in enumerate(x.shape)]
        else:
            shape = [size for i, size in enumerate(x.shape) if i not in gone]
        y = self.activation(
            shape, x.scale if scale is None else scale, x.zero_point if zero_point is None else zero_point, 0.0, 40.0
        )
        index = self.builder.tensor([len(axes)], "int32", data=np.asarray(axes))
        self.builder.operator("MEAN", [x.index, index], [y.index], options("ReducerOptions", keepDims=keep_dims), 2)
        return y

    # -- Two operands

    def constant(self, shape: Sequence[int], scale: float | None = None, zero_point: int | None = None) -> Activation:
        """Add constant int8 values."""
        scale = float(np.float32(self.scale() if scale is None else scale))
        zero_point = self.zero_point() if zero_point is None else zero_point
        values = self.random.integers(-128, 128, shape).astype(np.int8)
        index = self.builder.tensor(shape, "int8", scale, zero_point, values)
        return Activation(index, tuple(shape), scale, zero_point)

    def binary(
        self,
        name: str,
        a: Activation,
        b: Activation,
        fused: int = NONE,
        scale: float | None = None,
        zero_point: int | None = None,
    ) -> Activation:
        """ADD or MUL, with the broadcasting of numpy."""
        chosen = self.output_zero_point(fused, zero_point)
        real_a = np.hypot(a.spread, a.mean - a.zero_point) * a.scale
        real_b = np.hypot(b.spread, b.mean - b.zero_point) * b.scale
        spread = real_a * real_b if name == "MUL" else np.hypot(a.spread * a.scale, b.spread * b.scale)
        mean = (a.mean - a.zero_point) * a.scale
        other = (b.mean - b.zero_point) * b.scale
        mean = mean * other if name == "MUL" else mean + other
        if scale is None:
            room = 127 - chosen if mean > 0 else chosen + 128
            scale = spread / 50 if abs(mean) < spread else max(spread / 50, abs(mean) / max(room * 0.8, 40))
        shape = np.broadcast_shapes(a.shape, b.shape)
        at = float(np.clip(chosen + mean / scale, -100, 100))
        y = self.clipped(shape, float(scale), chosen, at, fused)
        table = options("MulOptions" if name == "MUL" else "AddOptions", fusedActivationFunction=fused)
        self.builder.operator(name, [a.index, b.index], [y.index], table, 2)
        return y

    def concatenate(self, parts: Sequence[Activation], axis: int) -> Activation:
        """CONCATENATION of tensors of one quantisation."""
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        first = parts[0]
        y = self.activation(shape, first.scale, first.zero_point, first.mean, first.spread)
        table = options("ConcatenationOptions", axis=axis)
        self.builder.operator("CONCATENATION", [part.index for part in parts], [y.index], table, 2)
        return y

    # -- Shape and element

    def pad(self, x: Activation, paddings: Sequence[tuple[int, int]], value: int | None = None) -> Activation:
        """PAD with the zero point, or PADV2 with a constant."""
        shape = [size + sum(pair) for size, pair in zip(x.shape, paddings, strict=True)]
        y = self.activation(shape, x.scale, x.zero_point, x.mean, x.spread)
        index = self.builder.tensor([len(paddings), 2], "int32", data=np.asarray(paddings))
        if value is None:
            self.builder.operator("PAD", [x.index, index], [y.index], options("PadOptions"), 2)
        else:
            constant = self.builder.tensor([1], "int8", x.scale, x.zero_point, np.asarray([value]))
            self.builder.operator("PADV2", [x.index, index, constant], [y.index], options("PadV2Options"), 2)
        return y

    def reshape(self, x: Activation, shape: Sequence[int]) -> Activation:
        """RESHAPE to a shape that may contain one -1."""
        known = -int(np.prod(shape))
        made = [int(np.prod(x.shape)) // known if size == -1 else size for size in shape]
        y = self.activation(made, x.scale, x.zero_point, x.mean, x.spread)
        index = self.builder.tensor([len(shape)], "int32", data=np.asarray(shape))
        self.builder.operator(
            "RESHAPE", [x.index, index], [y.index], options("ReshapeOptions", newShape=np.asarray(shape, np.int32))
        )
        return y

    def softmax(self, x: Activation, beta: float = 1.0) -> Activation:
        """SOFTMAX; its output quantisation is fixed by the operator."""
        y = self.activation(x.shape, 1 / 256, -128, -100.0, 30.0)
        self.builder.operator("SOFTMAX", [x.index], [y.index], options("SoftmaxOptions", beta=beta), 2)
        return y

    def unary(
        self, name: str, x: Activation, scale: float | None = None, zero_point: int | None = None, table: Any = None
    ) -> Activation:
        """An elementwise operator: RELU, RELU6, LOGISTIC, TANH, QUANTIZE and the like."""
        scale = x.scale if scale is None else scale
        zero_point = x.zero_point if zero_point is None else zero_point
        moved = (x.mean - x.zero_point) * x.scale / scale + zero_point
        y = self.activation(x.shape, scale, zero_point, float(np.clip(moved, -100, 100)), 40.0)
        self.builder.operator(name, [x.index], [y.index], table, 2)
        return y

    def logistic(self, x: Activation, zero_point: int = -128) -> Activation:
        """LOGISTIC; its output scale is fixed by the operator."""
        return self.unary("LOGISTIC", x, 1 / 256, zero_point)

    def requantize(self, x: Activation, scale: float, zero_point: int) -> Activation:
        """QUANTIZE from int8 to int8."""
        return self.unary("QUANTIZE", x, scale, zero_point, options("QuantizeOptions"))


# ---- One model per operator and option -----------------------------------------------------------------------------


def conv_models() -> Iterator[tuple[str, bytes]]:
    """Convolutions: kernels, strides, paddings, channels, activations, kinds of weights, bias, extreme multipliers."""
    cases: list[tuple[tuple[int, int, int], int, dict[str, Any]]] = [
        ((6, 7, 8), 4, {"kernel": (1, 1)}),
        ((6, 7, 8), 5, {"kernel": (1, 1), "per_channel": False, "fused": RELU}),
        ((7, 5, 3), 8, {"kernel": (3, 3)}),
        ((7, 5, 3), 7, {"kernel": (3, 3), "padding": VALID, "fused": RELU6}),
        ((9, 8, 1), 6, {"kernel": (5, 5), "stride": (2, 2)}),
        ((9, 8, 4), 3, {"kernel": (5, 5), "stride": (3, 3), "padding": VALID, "per_channel": False}),
        ((8, 9, 16), 10, {"kernel": (3, 3), "stride": (2, 1)}),
        ((8, 9, 20), 9, {"kernel": (3, 3), "stride": (1, 3), "padding": VALID}),
        ((8, 8, 4), 1, {"kernel": (3, 3), "stride": (2, 2), "fused": RELU}),
        ((7, 7, 3), 16, {"kernel": (3, 3), "stride": (2, 2), "fused": RELU6, "zero_point": -128}),
        ((5, 6, 4), 11, {"kernel": (5, 6), "padding": VALID}),
        ((5, 6, 4), 2, {"kernel": (5, 6), "padding": SAME, "per_channel": False}),
        ((10, 4, 1), 8, {"kernel": (10, 4), "stride": (2, 2)}),
        ((1, 16, 3), 6, {"kernel": (1, 5), "stride": (1, 2)}),
        ((12, 1, 2), 6, {"kernel": (3, 1), "stride": (3, 1), "padding": VALID}),
        ((3, 3, 8), 5, {"kernel": (1, 1), "stride": (2, 2), "zero_point": 127}),
        ((4, 4, 1), 4, {"kernel": (1, 1), "gain": 40.0}),
        ((4, 4, 2), 4, {"kernel": (1, 1), "gain": 4000.0, "per_channel": False}),
        ((6, 6, 24), 24, {"kernel": (5, 5), "gain": 0.02}),
        ((6, 6, 8), 8, {"kernel": (3, 3), "fused": RELU_N1_TO_1}),
    ]
    for number, (shape, out_c, chosen) in enumerate(cases):
        name = f"conv_{number}"
        net = Net(name)
        yield name, net.finish(net.conv(net.input([1, *shape]), out_c, **chosen))


def depthwise_models() -> Iterator[tuple[str, bytes]]:
    """Depthwise convolutions, with channel multipliers."""
    cases: list[tuple[tuple[int, int, int], int, dict[str, Any]]] = [
        ((7, 6, 8), 1, {}),
        ((7, 6, 8), 1, {"padding": VALID, "fused": RELU6, "per_channel": False}),
        ((7, 6, 3), 2, {"stride": (2, 2), "fused": RELU}),
        ((8, 9, 1), 8, {"kernel": (5, 5), "stride": (2, 2)}),
        ((8, 9, 4), 3, {"kernel": (5, 5), "padding": VALID, "bias": False}),
        ((5, 5, 16), 1, {"kernel": (1, 1)}),
        ((5, 5, 20), 1, {"kernel": (5, 5), "padding": VALID}),
        ((5, 5, 5), 2, {"kernel": (5, 5), "padding": SAME, "per_channel": False, "bias": False}),
        ((9, 7, 4), 1, {"stride": (3, 3), "zero_point": -128}),
        ((9, 7, 4), 1, {"stride": (1, 2), "zero_point": 127}),
        ((9, 7, 4), 2, {"kernel": (3, 5), "stride": (2, 1), "padding": VALID, "fused": RELU}),
        ((6, 6, 7), 1, {"kernel": (1, 1), "gain": 100.0}),
        ((10, 4, 1), 8, {"kernel": (8, 3), "stride": (2, 2), "fused": RELU}),
    ]
    for number, (shape, multiplier, chosen) in enumerate(cases):
        name = f"depthwise_{number}"
        net = Net(name)
        yield name, net.finish(net.depthwise(net.input([1, *shape]), multiplier, **chosen))


def dense_models() -> Iterator[tuple[str, bytes]]:
    """Fully connected layers, some with scales whose products are powers of two, where ties are common."""
    cases: list[tuple[tuple[int, ...], int, dict[str, Any]]] = [
        ((16,), 10, {}),
        ((16,), 7, {"bias": False}),
        ((33,), 9, {"per_channel": True}),
        ((33,), 9, {"per_channel": True, "bias": False, "fused": RELU}),
        ((64,), 12, {"fused": RELU, "least": -128}),
        ((64,), 12, {"fused": RELU6, "least": -128, "per_channel": True}),
        ((3, 4, 5), 8, {}),
        ((3, 4, 5), 6, {"keep_dims": True}),
        ((4, 6), 5, {"keep_dims": True, "per_channel": True, "bias": False}),
        ((300,), 1, {"zero_point": -128}),
        ((1,), 5, {"gain": 60.0, "zero_point": 127}),
        ((2,), 5, {"gain": 3000.0}),
        ((500,), 20, {"gain": 0.02}),
    ]
    for number, (shape, units, chosen) in enumerate(cases):
        name = f"dense_{number}"
        net = Net(name)
        yield name, net.finish(net.dense(net.input([1, *shape]), units, **chosen))
    for number, per_channel in enumerate((False, True)):
        name = f"dense_ties_{number}"
        yield name, tie_model(name, "FULLY_CONNECTED", per_channel)
    for operator, label in (("FULLY_CONNECTED", "dense"), ("CONV_2D", "conv"), ("DEPTHWISE_CONV_2D", "depthwise")):
        for number, (low, high) in enumerate(((1e-7, 1e-6), (1e-4, 1e-2), (0.05, 3.0))):
            for per_channel in (False, True):
                name = f"{label}_probe_{number}_{'channels' if per_channel else 'tensor'}"
                yield name, probe_model(name, operator, per_channel, low, high)
    yield "conv_ties_0", tie_model("conv_ties_0", "CONV_2D", True)
    yield "depthwise_ties_0", tie_model("depthwise_ties_0", "DEPTHWISE_CONV_2D", True)


def probe_model(name: str, operator: str, per_channel: bool, low: float, high: float) -> bytes:
    """A layer whose weights are 0: the output is the rescaled bias, which lies where the rounding is decided."""
    net = Net(name)
    channels = 240
    dense = operator == "FULLY_CONNECTED"
    x = net.input([1, 2] if dense else [1, 1, 1, channels if operator == "DEPTHWISE_CONV_2D" else 2])
    shape = {
        "FULLY_CONNECTED": [channels, 2],
        "CONV_2D": [channels, 1, 1, 2],
        "DEPTHWISE_CONV_2D": [1, 1, 1, channels],
    }[operator]
    real = np.exp(net.random.uniform(np.log(low), np.log(high), channels if per_channel else 1))
    y = net.activation([1, channels] if dense else [1, 1, 1, channels], net.scale(), int(net.random.integers(-9, 10)))
    scales = (real * y.scale / x.scale).astype(np.float32)
    real = np.broadcast_to(x.scale * scales.astype(np.float64) / y.scale, channels)
    sums = np.rint((net.random.integers(-118, 118, channels) + 0.5) / real) + net.random.integers(-1, 2, channels)
    sums = np.clip(sums, -(2**31), 2**31 - 1).astype(np.int32)
    axis = 3 if operator == "DEPTHWISE_CONV_2D" else 0
    index = net.builder.tensor(shape, "int8", scales, 0, np.zeros(shape), axis)
    bias = net.builder.tensor([channels], "int32", scales * np.float32(x.scale), 0, sums)
    net.builder.operator(operator, [x.index, index, bias], [y.index], pointwise_options(operator), 3)
    return net.finish(y)


def pointwise_options(operator: str) -> Any:
    """The options of a layer with weights: stride 1, SAME, no activation."""
    common = {"strideH": 1, "strideW": 1, "dilationHFactor": 1, "dilationWFactor": 1}
    if operator == "CONV_2D":
        return options("Conv2DOptions", **common)
    if operator == "DEPTHWISE_CONV_2D":
        return options("DepthwiseConv2DOptions", depthMultiplier=1, **common)
    return options("FullyConnectedOptions")


def tie_model(name: str, operator: str, per_channel: bool) -> bytes:
    """A layer of small weights whose multiplier is a power of two: many results lie exactly between two integers."""
    net = Net(name)
    channels = 12
    dense = operator == "FULLY_CONNECTED"
    x = net.input([1, 12] if dense else [1, 5, 5, 12], 1 / 16, -3)
    shapes = {
        "FULLY_CONNECTED": [channels, 12],
        "CONV_2D": [channels, 1, 1, 12],
        "DEPTHWISE_CONV_2D": [1, 3, 3, channels],
    }
    values = net.random.integers(-2, 3, shapes[operator]).astype(np.int8)
    scales = np.float32(2.0) ** -np.arange(4, 4 + channels) if per_channel else np.asarray([2**-7])
    scales = np.maximum(scales, 2**-8).astype(np.float32)
    index = net.builder.tensor(shapes[operator], "int8", scales, 0, values, 3 if operator == "DEPTHWISE_CONV_2D" else 0)
    bias = net.builder.tensor([channels], "int32", scales / 16, 0, net.random.integers(-9, 10, channels))
    y = net.activation([1, channels] if dense else [1, 5, 5, channels], 1 / 32, 5)
    net.builder.operator(operator, [x.index, index, bias], [y.index], pointwise_options(operator), 3)
    return net.finish(y)


def pool_models() -> Iterator[tuple[str, bytes]]:
    """Average and maximum pooling, and MEAN."""
    cases: list[tuple[tuple[int, int, int], dict[str, Any]]] = [
        ((6, 8, 5), {}),
        ((7, 7, 4), {"padding": SAME}),
        ((7, 6, 3), {"kernel": (3, 3), "stride": (2, 2), "padding": SAME}),
        ((7, 6, 3), {"kernel": (3, 3), "stride": (1, 1), "padding": SAME, "fused": RELU}),
        ((7, 6, 3), {"kernel": (3, 2), "stride": (1, 3), "padding": VALID, "fused": RELU6}),
        ((5, 6, 9), {"kernel": (5, 6), "stride": (1, 1), "padding": VALID}),
        ((8, 8, 2), {"kernel": (5, 5), "stride": (3, 3), "padding": SAME}),
    ]
    for kind in ("AVERAGE", "MAX"):
        for number, (shape, chosen) in enumerate(cases):
            name = f"{kind.lower()}_pool_{number}"
            net = Net(name)
            zero_point = -20 if chosen.get("fused") else None
            yield name, net.finish(net.pool(net.input([1, *shape], 0.05, zero_point), kind, **chosen))
    means: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((4, 4, 8), {}),
        ((4, 4, 8), {"keep_dims": True}),
        ((5, 7, 6), {}),
        ((5, 7, 6), {"keep_dims": True, "axes": (2, 1)}),
        ((5, 7, 6), {"scale": 0.031, "zero_point": -128}),
        ((7, 7, 6), {"keep_dims": True, "scale": 0.0171, "zero_point": 5}),
        ((3, 1, 6), {"scale": 0.2, "zero_point": 127}),
        ((12, 12, 3), {"scale": 0.011, "zero_point": -9, "axes": (-3, -2)}),
        ((1, 1, 10), {}),
        ((1, 1, 10), {"scale": 0.013, "zero_point": 3}),
    ]
    for number, (shape, chosen) in enumerate(means):
        name = f"mean_{number}"
        net = Net(name)
        yield name, net.finish(net.mean(net.input([1, *shape], 0.05, net.near(chosen)), **chosen))


def binary_models() -> Iterator[tuple[str, bytes]]:
    """ADD and MUL of two tensors, with constants and broadcasting, with the operands in both orders."""
    for name in ("ADD", "MUL"):
        for label, fused in ACTIVATIONS.items():
            key = f"{name.lower()}_two_{label}"
            net = Net(key)
            x = net.input([1, 5, 6, 4])
            a = net.conv(x, 4, (1, 1))
            yield key, net.finish(net.binary(name, a, x, fused))
        for label, shape in {"same": (1, 5, 6, 4), "channel": (1, 1, 1, 4), "vector": (4,), "scalar": (1,)}.items():
            for swapped in (False, True):
                key = f"{name.lower()}_{label}{'_swapped' if swapped else ''}"
                net = Net(key)
                x = net.input([1, 5, 6, 4])
                c = net.constant(shape)
                pair = (c, x) if swapped else (x, c)
                yield key, net.finish(net.binary(name, *pair, RELU if swapped else NONE))
        triples = {"equal": (0.05, 0.05, 0.05), "powers": (0.5, 0.25, 0.25), "wide": (0.9, 0.0007, 0.8)}
        for label, scales in triples.items():
            key = f"{name.lower()}_scales_{label}"
            net = Net(key)
            x = net.input([1, 6, 6, 5], scales[0], 11)
            c = net.constant([1, 6, 6, 5], scales[1], -6)
            scale = (8.0 if label == "powers" else None) if name == "MUL" else scales[2]
            yield key, net.finish(net.binary(name, x, c, scale=scale, zero_point=3))
        key = f"{name.lower()}_itself"
        net = Net(key)
        x = net.input([1, 6, 6, 5])
        yield key, net.finish(net.binary(name, x, x))
        key = f"{name.lower()}_broadcast_spatial"
        net = Net(key)
        x = net.input([1, 6, 5, 4])
        gate = net.logistic(net.mean(x, True))
        yield key, net.finish(net.binary(name, x, gate))


def shape_models() -> Iterator[tuple[str, bytes]]:
    """PAD, PADV2, CONCATENATION and RESHAPE."""
    pads = {
        "space": [(0, 0), (1, 2), (0, 3), (0, 0)],
        "symmetric": [(0, 0), (1, 1), (1, 1), (0, 0)],
        "channel": [(0, 0), (0, 0), (0, 0), (2, 1)],
        "all": [(0, 0), (2, 0), (1, 1), (0, 3)],
    }
    for label, paddings in pads.items():
        for name, value in (("pad", None), ("padv2", -77)):
            net = Net(f"{name}_{label}")
            x = net.input([1, 4, 5, 3])
            yield f"{name}_{label}", net.finish(net.pad(x, paddings, value))
    net = Net("pad_vector")
    yield "pad_vector", net.finish(net.pad(net.input([1, 7]), [(0, 0), (2, 3)]))
    for axis, label in ((3, "channel"), (2, "width"), (1, "height"), (-1, "last")):
        for count in (2, 3):
            net = Net(f"concat_{label}_{count}")
            parts = []
            for i in range(count):
                shape = [1, 4, 5, 3]
                shape[axis] += i
                parts.append(net.input(shape, 0.05, 7) if i == 0 else net.constant(shape, 0.05, 7))
            x = parts[0]
            parts[-1] = net.requantize(x, 0.05, 7) if axis in (3, -1) and count == 3 else parts[-1]
            yield f"concat_{label}_{count}", net.finish(net.concatenate(parts, axis))
    for number, (before, after) in enumerate((((4, 5, 3), (1, 60)), ((60,), (1, 4, 5, 3)), ((4, 6), (1, -1)))):
        net = Net(f"reshape_{number}")
        yield f"reshape_{number}", net.finish(net.reshape(net.input([1, *before]), after))


def unary_models() -> Iterator[tuple[str, bytes]]:
    """SOFTMAX, RELU, RELU6, LOGISTIC, TANH and QUANTIZE."""
    softmaxes = [
        (2, 0.1, 1.0), (2, 0.02, 1.0), (10, 0.05, 1.0), (10, 0.2, 1.0), (10, 0.003, 1.0), (12, 0.11, 1.0),
        (12, 0.07, 0.5), (12, 0.07, 2.5), (100, 0.06, 1.0), (1000, 0.08, 1.0), (1000, 0.022, 1.0), (3, 1.0, 1.0),
        (5, 25.0, 1.0), (1, 0.1, 1.0), (4, 0.0005, 1.0), (10, 0.1, 0.03),
    ]  # fmt: skip
    for number, (classes, scale, beta) in enumerate(softmaxes):
        net = Net(f"softmax_{number}")
        yield f"softmax_{number}", net.finish(net.softmax(net.input([1, classes], scale), beta))
    net = Net("softmax_image")
    yield "softmax_image", net.finish(net.softmax(net.input([1, 4, 3, 6], 0.06)))
    for name in ("RELU", "RELU6"):
        cases = (
            (0.05, -7, 0.05, -7), (0.05, 3, 0.03, -128), (0.05, -100, 0.11, 20), (0.02, 127, 0.02, -128),
            (0.1, -128, 0.025, -128), (0.5, 0, 0.25, 1),
        )  # fmt: skip
        for number, (scale, zero_point, out_scale, out_zero_point) in enumerate(cases):
            net = Net(f"{name.lower()}_{number}")
            y = net.unary(name, net.input([1, 8, 8, 4], scale, zero_point), out_scale, out_zero_point)
            yield f"{name.lower()}_{number}", net.finish(y)
    for number, (scale, zero_point, out_zero_point) in enumerate(
        ((0.05, 3, -128), (0.1, -128, -128), (0.013, 127, -128), (0.4, -20, -128), (0.03, 0, 0))
    ):
        net = Net(f"logistic_{number}")
        y = net.logistic(net.input([1, 8, 8, 4], scale, zero_point), out_zero_point)
        yield f"logistic_{number}", net.finish(y)
    for number, (scale, zero_point, out_zero_point) in enumerate(((0.02, 3, 0), (0.005, -128, -5), (0.3, 9, 0))):
        net = Net(f"tanh_{number}")
        y = net.unary("TANH", net.input([1, 8, 8, 4], scale, zero_point), 1 / 128, out_zero_point)
        yield f"tanh_{number}", net.finish(y)
    for number, (scale, zero_point, out_scale, out_zero_point) in enumerate(
        ((0.05, 3, 0.07, -5), (0.05, -128, 0.05, 127), (0.04, 100, 0.013, -30), (0.5, 0, 1.0, 7), (0.2, 1, 0.0009, 0))
    ):
        net = Net(f"quantize_{number}")
        y = net.requantize(net.input([1, 8, 8, 4], scale, zero_point), out_scale, out_zero_point)
        yield f"quantize_{number}", net.finish(y)
    for dtype in ("float32", "uint8"):
        for number, (scale, zero_point) in enumerate(((0.0235, -5), (0.0078125, -128), (0.1, 127))):
            net = Net(f"border_{dtype}_{number}")
            x = net.input([1, 5, 5, 3], scale, zero_point, dtype)
            y = net.conv(x, 4) if number else x
            yield f"border_{dtype}_{number}", net.finish(y, dtype=dtype)
    net = Net("border_float32_uint8")
    yield "border_float32_uint8", net.finish(net.conv(net.input([1, 5, 5, 3], dtype="float32"), 4), dtype="uint8")
    net = Net("border_uint8_rescaled")
    border = net.builder.tensor([1, 6, 6, 2], "uint8", 0.02, 30)
    net.inputs.append(border)
    x = net.activation([1, 6, 6, 2], 0.03, -11)
    net.builder.operator("QUANTIZE", [border], [x.index], options("QuantizeOptions"))
    y = net.builder.tensor([1, 6, 6, 2], "uint8", 0.017, 99)
    net.builder.operator("QUANTIZE", [x.index], [y], options("QuantizeOptions"))
    yield "border_uint8_rescaled", net.builder.finish(net.inputs, [y])


def graph_models() -> Iterator[tuple[str, bytes]]:
    """Whole small networks: residual, inception, shared tensors, a classifier and a depthwise-separable one."""
    net = Net("residual")
    x = net.input([1, 8, 8, 6])
    a = net.conv(x, 6, fused=RELU)
    b = net.conv(a, 6)
    yield "residual", net.finish(net.binary("ADD", b, x, RELU))
    net = Net("inception")
    x = net.input([1, 8, 8, 6])
    a = net.conv(x, 4, (1, 1), fused=RELU)
    b = net.conv(net.conv(x, 3, (1, 1), fused=RELU), 5, fused=RELU)
    c = net.conv(net.pool(x, "MAX", (3, 3), (1, 1), SAME), 2, (1, 1), fused=RELU)
    scale, zero_point = max(a.scale, b.scale, c.scale), -128
    yield "inception", net.finish(net.concatenate([net.requantize(t, scale, zero_point) for t in (a, b, c)], 3))
    net = Net("two_readers")
    x = net.input([1, 8, 8, 4])
    a = net.conv(x, 8, fused=RELU)
    b = net.mean(a)
    c = net.dense(net.pool(a, "MAX", (4, 4), (4, 4)), 8, zero_point=-3)
    yield "two_readers", net.finish(net.dense(net.binary("ADD", b, c), 5))
    net = Net("classifier")
    x = net.input([1, 12, 12, 1], 1 / 255, -128)
    a = net.pool(net.conv(x, 6, fused=RELU), "MAX")
    a = net.pool(net.conv(a, 10, fused=RELU), "MAX")
    a = net.reshape(a, (1, -1))
    yield "classifier", net.finish(net.softmax(net.dense(net.dense(a, 16, RELU), 10)))
    net = Net("separable")
    x = net.input([1, 12, 12, 3], dtype="uint8")
    a = net.conv(x, 8, (3, 3), (2, 2), fused=RELU6)
    a = net.conv(net.depthwise(a, fused=RELU6), 16, (1, 1), fused=RELU6)
    a = net.pad(a, [(0, 0), (0, 1), (0, 1), (0, 0)])
    a = net.conv(net.depthwise(a, stride=(2, 2), padding=VALID, fused=RELU6), 20, (1, 1), fused=RELU6)
    yield "separable", net.finish(net.softmax(net.dense(net.mean(a), 12)), dtype="uint8")
    net = Net("squeeze_excite")
    x = net.input([1, 6, 6, 8])
    a = net.conv(x, 8, fused=RELU)
    gate = net.mean(a, True)
    gate = net.logistic(net.conv(net.conv(gate, 4, (1, 1), fused=RELU), 8, (1, 1)))
    yield "squeeze_excite", net.finish(net.binary("MUL", a, gate))


def operator_models() -> Iterator[tuple[str, bytes]]:
    """Small models (name, file) that together cover every supported operator and option."""
    yield from conv_models()
    yield from depthwise_models()
    yield from dense_models()
    yield from pool_models()
    yield from binary_models()
    yield from shape_models()
    yield from unary_models()
    yield from graph_models()


# ---- Random networks -----------------------------------------------------------------------------------------------


def random_model(seed: int) -> bytes:
    """A network of 3 to 12 operators with branches, unusual zero points, and activations that use their range."""
    net = Net(1000 + seed)
    pick = net.random.choice
    border = str(pick(["int8", "int8", "int8", "uint8", "float32"]))
    shape = [1, int(net.random.integers(4, 13)), int(net.random.integers(4, 13)), int(pick([1, 2, 3, 4, 6, 8]))]
    x = net.input(shape, dtype=border)
    live = [x]
    wanted = int(net.random.integers(3, 11)) - (border != "int8")
    tail = int(net.random.integers(0, 4))
    while len(net.builder.operators) < max(3, wanted - (0, 2, 3, 5)[tail]):
        x = live[-1] if net.random.random() < 0.75 else live[int(net.random.integers(len(live)))]
        live.append(random_layer(net, x, live))
    x = live[-1]
    if tail >= 1:
        flat = [lambda: net.mean(x), lambda: net.reshape(x, (1, -1)), lambda: x]
        x = flat[int(net.random.integers(3))]()
        dense = bool(net.random.random() < 0.5)
        x = net.dense(x, int(net.random.integers(1, 14)), per_channel=dense, bias=bool(net.random.random() < 0.8))
    if tail >= 2:
        x = net.dense(x, int(net.random.integers(2, 14)), int(pick([NONE, RELU])))
    if tail >= 3:
        x = net.softmax(net.requantize(x, net.scale(0.02, 0.2), net.zero_point()))
    return net.finish(x, dtype=border)


def random_layer(net: Net, x: Activation, live: Sequence[Activation]) -> Activation:
    """Add one layer that reads `x` and perhaps another tensor of the same shape."""
    pick = net.random.choice
    fused = int(pick([NONE, RELU, RELU6]))
    padding = int(pick([SAME, SAME, VALID]))
    _, height, width, channels = x.shape
    kernel = tuple(int(pick([k for k in (1, 2, 3, 5) if k <= size])) for size in (height, width))
    stride = (1, 1) if min(height, width) < 6 else tuple(int(s) for s in pick([1, 1, 2, 3], 2))
    common: dict[str, Any] = {"kernel": kernel, "stride": stride, "padding": padding, "fused": fused}
    common |= {"per_channel": bool(net.random.random() < 0.8), "bias": bool(net.random.random() < 0.8)}
    partners = [t for t in live if t is not x and t.shape == x.shape]
    layers: list[Callable[[], Activation]] = [
        lambda: net.conv(x, int(net.random.integers(1, 25)), **(common | {"bias": True})),
        lambda: net.conv(x, int(net.random.integers(1, 25)), **(common | {"kernel": (1, 1), "bias": True})),
        lambda: net.conv(x, channels, (1, 1), fused=fused),
        lambda: net.conv(x, channels, (3, 3), fused=fused),
        lambda: net.pool(x, str(pick(["AVERAGE", "MAX"])), kernel, stride, padding),
        lambda: net.binary("MUL", x, net.constant([1, 1, 1, channels]), fused),
        lambda: net.binary("ADD", x, net.constant([1, 1, 1, channels]), fused),
        lambda: net.logistic(x),
        lambda: net.unary("RELU", x, x.scale * float(pick([1, 0.7, 1.3])), net.output_zero_point(RELU, None)),
        lambda: net.requantize(x, x.scale * float(net.random.uniform(0.6, 1.6)), net.zero_point()),
        lambda: net.binary("MUL", x, net.logistic(net.mean(x, True))),
    ]
    if channels <= 12:
        layers += [lambda: net.depthwise(x, int(pick([1, 1, 2])), **common)] * 2
    if height <= 10 and width <= 10:
        layers.append(lambda: net.pad(x, [(0, 0), (1, 0), (1, 1), (0, 0)]))
    if partners:
        other = partners[int(net.random.integers(len(partners)))]
        layers += [lambda: net.binary("ADD", x, other, fused)] * 3 + [lambda: net.binary("MUL", x, other, fused)]
        if 2 * channels <= 24:
            layers += [lambda: net.concatenate([x, net.requantize(other, x.scale, x.zero_point)], 3)] * 2
    return layers[int(net.random.integers(len(layers)))]()


# ---- Models to refuse ----------------------------------------------------------------------------------------------


def unsupported_models() -> Iterator[tuple[str, bytes, str]]:
    """Models an importer must refuse (name, file, operator or property to name)."""
    net = Net("dilated_conv")
    yield "dilated_conv", net.finish(net.conv(net.input([1, 8, 8, 3]), 4, dilation=2)), "CONV_2D"
    net = Net("dilated_depthwise")
    yield "dilated_depthwise", net.finish(net.depthwise(net.input([1, 8, 8, 3]), dilation=2)), "DEPTHWISE_CONV_2D"
    net = Net("grouped_conv")
    yield "grouped_conv", net.finish(net.conv(net.input([1, 6, 6, 8]), 6, groups=2)), "CONV_2D"
    net = Net("transpose_conv")
    x = net.input([1, 4, 4, 3])
    index, _, _ = net.weights([4, 3, 3, 3], 4, 0, True)
    size = net.builder.tensor([4], "int32", data=np.asarray([1, 8, 8, 4]))
    y = net.activation([1, 8, 8, 4], 0.05, 0)
    table = options("TransposeConvOptions", padding=SAME, strideH=2, strideW=2)
    net.builder.operator("TRANSPOSE_CONV", [size, index, x.index], [y.index], table, 2)
    yield "transpose_conv", net.finish(y), "TRANSPOSE_CONV"
    yield from unsupported_types()
    net = Net("batch_two")
    yield "batch_two", net.finish(net.conv(net.input([2, 6, 6, 3]), 4)), "batch"
    net = Net("dynamic_shape")
    builder = net.builder
    index = builder.tensor([1, 1, 6, 3], "int8", 0.1, 0, signature=[1, -1, 6, 3])
    net.inputs.append(index)
    x = Activation(index, (1, 1, 6, 3), 0.1, 0)
    y = net.unary("RELU", x)
    builder.tensors[y.index].shapeSignature = np.asarray([1, -1, 6, 3], np.int32)
    yield "dynamic_shape", net.finish(y), "shape"
    net = Net("two_inputs")
    yield "two_inputs", net.finish(net.binary("ADD", net.input([1, 4, 4, 2]), net.input([1, 4, 4, 2]))), "input"
    net = Net("two_outputs")
    x = net.input([1, 4, 4, 2])
    yield "two_outputs", net.finish(net.conv(x, 2), net.conv(x, 3)), "output"
    net = Net("custom")
    x = net.input([1, 4, 4, 2])
    yield "custom", net.finish(net.unary("MyOperator", x)), "MyOperator"
    net = Net("lstm")
    x = net.input([1, 4, 6])
    y = net.activation([1, 4, 5], 0.05, 0)
    table = options("UnidirectionalSequenceLSTMOptions")
    net.builder.operator("UNIDIRECTIONAL_SEQUENCE_LSTM", [x.index], [y.index], table)
    yield "lstm", net.finish(y), "UNIDIRECTIONAL_SEQUENCE_LSTM"
    net = Net("asymmetric_weights")
    x = net.input([1, 8])
    values = net.random.integers(-127, 128, (4, 8)).astype(np.int8)
    index = net.builder.tensor([4, 8], "int8", 0.01, 9, values)
    y = net.activation([1, 4], 0.1, 0)
    net.builder.operator("FULLY_CONNECTED", [x.index, index, -1], [y.index], options("FullyConnectedOptions"), 4)
    yield "asymmetric_weights", net.finish(y), "FULLY_CONNECTED"
    net = Net("pool_rescaled")
    x = net.input([1, 4, 4, 2], 0.1, 0)
    y = net.activation([1, 2, 2, 2], 0.05, 3)
    table = options("Pool2DOptions", padding=VALID, strideH=2, strideW=2, filterHeight=2, filterWidth=2)
    net.builder.operator("AVERAGE_POOL_2D", [x.index], [y.index], table, 2)
    yield "pool_rescaled", net.finish(y), "AVERAGE_POOL_2D"
    net = Net("mean_channels")
    yield "mean_channels", net.finish(net.mean(net.input([1, 4, 4, 6]), axes=(3,))), "MEAN"
    net = Net("computed_weights")
    x = net.input([1, 6])
    index = net.reshape(x, (1, 6)).index
    y = net.activation([1, 1], 0.1, 0)
    net.builder.operator("FULLY_CONNECTED", [x.index, index, -1], [y.index], options("FullyConnectedOptions"), 4)
    yield "computed_weights", net.finish(y), "FULLY_CONNECTED"


def unsupported_types() -> Iterator[tuple[str, bytes, str]]:
    """Networks of other number formats: float32, int16, hybrid, uint8."""
    random = np.random.default_rng(5)
    builder = ModelBuilder()
    x = builder.tensor([1, 8], "float32")
    w = builder.tensor([4, 8], "float32", data=random.normal(size=(4, 8)))
    y = builder.tensor([1, 4], "float32")
    builder.operator("FULLY_CONNECTED", [x, w, -1], [y], options("FullyConnectedOptions"))
    yield "float32", builder.finish([x], [y]), "FULLY_CONNECTED"
    builder = ModelBuilder()
    x = builder.tensor([1, 8], "float32")
    w = builder.tensor([4, 8], "int8", 0.01, 0, random.integers(-127, 128, (4, 8)))
    y = builder.tensor([1, 4], "float32")
    builder.operator("FULLY_CONNECTED", [x, w, -1], [y], options("FullyConnectedOptions"), 3)
    yield "hybrid", builder.finish([x], [y]), "FULLY_CONNECTED"
    builder = ModelBuilder()
    x = builder.tensor([1, 8], "int16", 0.001)
    w = builder.tensor([4, 8], "int8", 0.01, 0, random.integers(-127, 128, (4, 8)))
    b = builder.tensor([4], "int64", 0.00001, 0, random.integers(-999, 999, 4))
    y = builder.tensor([1, 4], "int16", 0.01)
    builder.operator("FULLY_CONNECTED", [x, w, b], [y], options("FullyConnectedOptions"), 7)
    yield "int16", builder.finish([x], [y]), "FULLY_CONNECTED"
    builder = ModelBuilder()
    x = builder.tensor([1, 8], "uint8", 0.1, 128)
    w = builder.tensor([4, 8], "uint8", 0.01, 120, random.integers(0, 256, (4, 8)))
    y = builder.tensor([1, 4], "uint8", 0.1, 128)
    builder.operator("FULLY_CONNECTED", [x, w, -1], [y], options("FullyConnectedOptions"))
    yield "uint8", builder.finish([x], [y]), "FULLY_CONNECTED"
