"""Int8 TFLite models as quantised networks, operator by operator; what is not supported is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ulearn_host import fixedpoint
from ulearn_host.errors import UserError
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
    Quantisation,
    Reshape,
    Shape,
    Softmax,
    Table,
    Tensor,
    Window,
)
from ulearn_host.tflite_file import File, FileOp, FileTensor, read

_SAME = 0
_NONE, _RELU, _RELU_N1_TO_1, _RELU6 = 0, 1, 2, 3
_LIMITS = {_NONE: (None, None), _RELU: (0.0, None), _RELU_N1_TO_1: (-1.0, 1.0), _RELU6: (0.0, 6.0)}
_ELEMENTS_MAX = 1 << 24
_NAMES = {
    "CONV_2D": "conv",
    "DEPTHWISE_CONV_2D": "depthwise",
    "FULLY_CONNECTED": "dense",
    "AVERAGE_POOL_2D": "average_pool",
    "MAX_POOL_2D": "max_pool",
    "CONCATENATION": "concat",
}


def load_tflite(path: Path) -> Network:
    """The network in an int8 .tflite file.

    The loss is softmax_ce where the network ends in a softmax, else 'none'. float32 and uint8 borders (QUANTIZE and
    DEQUANTIZE at the ends) are left out: the network takes and gives the int8 codes behind them. Raises UserError that
    names the operator, the layer and what could be done.
    """
    return _Importer(path, read(path)).network()


def window_padding(size: int, kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """(output size, cells before the image) along one axis; with SAME the odd cell lies behind."""
    out = -(-size // stride) if padding == _SAME else (size - kernel) // stride + 1
    return out, max((out - 1) * stride + kernel - size, 0) // 2 if padding == _SAME else 0


def activation(fused: int, output: Quantisation) -> tuple[int, int]:
    """The codes between which a fused activation keeps an output: float32 division, halves away from zero."""
    bounds = []
    for real, end in zip(_LIMITS[fused], (-128, 127), strict=True):
        code = end
        if real is not None:
            code = int(fixedpoint.rounded(np.array(np.float32(real) / np.float32(output.scale)), output.zero))
        bounds.append(code)
    return bounds[0], bounds[1]


class _Importer:
    def __init__(self, path: Path, file: File) -> None:
        self.path, self.file = path, file
        self.tensors: dict[int, Tensor] = {}  # activations by number; several numbers may be one tensor
        self.made: set[int] = set()
        self.ops: list[Op] = []
        self.notes: list[str] = []
        self.names: dict[str, int] = {}
        self.handlers: dict[str, Callable[[FileOp, str], Op | None]] = {
            "CONV_2D": self._conv,
            "DEPTHWISE_CONV_2D": self._depthwise,
            "FULLY_CONNECTED": self._dense,
            "AVERAGE_POOL_2D": lambda op, name: self._pool(op, name, "average"),
            "MAX_POOL_2D": lambda op, name: self._pool(op, name, "max"),
            "MEAN": self._mean,
            "ADD": lambda op, name: self._elementwise(op, name, "add"),
            "MUL": lambda op, name: self._elementwise(op, name, "mul"),
            "PAD": self._pad,
            "PADV2": self._pad,
            "CONCATENATION": self._concat,
            "RESHAPE": self._reshape,
            "SQUEEZE": self._reshape,
            "EXPAND_DIMS": self._reshape,
            "SOFTMAX": self._softmax,
            "RELU": self._relu,
            "RELU6": self._relu,
            "RELU_N1_TO_1": self._relu,
            "LOGISTIC": self._curve,
            "TANH": self._curve,
            "QUANTIZE": self._quantize,
            "DEQUANTIZE": self._dequantize,
        }

    def refuse(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}")

    def network(self) -> Network:
        file = self.file
        if len(file.inputs) != 1 or len(file.outputs) != 1:
            raise self.refuse(
                f"{len(file.inputs)} inputs and {len(file.outputs)} outputs are not supported; export one of each"
            )
        if not file.ops:
            raise self.refuse("it has no operator; expected a network")
        entry = file.tensors[file.inputs[0]]
        self.made.add(entry.index)
        if entry.dtype == "int8":
            self.tensors[entry.index] = self._tensor(entry, "the input")
        elif entry.dtype not in ("float32", "uint8") or file.ops[0].kind != "QUANTIZE":
            raise self.refuse(
                f"its input '{_short(entry.name)}' is {entry.dtype}, expected int8; convert the model with full "
                f"integer quantisation"
            )
        for op in file.ops:
            self._operator(op)
        output = self._activation(file.outputs[0], "the output")
        if not self.ops:
            self.ops.append(Reshape("identity", (output,), replace(output, name="output")))
            output = self.ops[-1].output
        if output.name != self.ops[-1].output.name:
            raise self.refuse(
                "its output is not what the last operator makes; export it without what hangs off the side"
            )
        loss: Literal["softmax_ce", "none"] = "softmax_ce" if isinstance(self.ops[-1], Softmax) else "none"
        return Network(tuple(self.ops), loss, (), self.path.name, tuple(self.notes))

    def _operator(self, op: FileOp) -> None:
        where = self.file.tensors[op.outputs[0]].name if op.outputs and op.outputs[0] >= 0 else f"operator {op.index}"
        handler = self.handlers.get(op.kind)
        if handler is None:
            known = ", ".join(sorted(self.handlers))
            raise self.refuse(f"{op.kind} (layer '{_short(where)}') is not supported; build the model from {known}")
        if len(op.outputs) != 1 or op.outputs[0] < 0 or not op.inputs:
            raise self.refuse(f"{op.kind} (layer '{_short(where)}') has {len(op.outputs)} outputs, expected one")
        if op.outputs[0] in self.made:
            raise self.refuse(f"{op.kind} (layer '{_short(where)}') writes a tensor that is written already")
        made = handler(op, self._name(op.kind))
        self.made.add(op.outputs[0])
        if made is not None:
            self.tensors[op.outputs[0]] = made.output
            self.ops.append(made)

    def _name(self, kind: str) -> str:
        """A layer's name: Keras leaves none that is short and unique, so it is the operator and a number."""
        base = _NAMES.get(kind, kind.lower())
        self.names[base] = self.names.get(base, 0) + 1
        return f"{base}_{self.names[base]}"

    def fail(self, op: FileOp, what: str) -> UserError:
        return self.refuse(f"{op.kind} (layer '{_short(self.file.tensors[op.outputs[0]].name)}') {what}")

    # Tensors.

    def _tensor(self, t: FileTensor, what: str) -> Tensor:
        if t.dtype != "int8" or len(t.scales) != 1:
            kind = t.dtype if t.dtype != "int8" else f"int8 with {len(t.scales)} scales"
            raise self.refuse(
                f"{what} '{_short(t.name)}' is {kind}, expected int8 with one scale; convert the model with full "
                f"integer quantisation"
            )
        if not -128 <= t.zeros[0] <= 127:
            raise self.refuse(f"{what} '{_short(t.name)}' has the zero point {t.zeros[0]}, expected -128 to 127")
        return Tensor(float(t.scales[0]), int(t.zeros[0]), f"{t.index}", self._shape(t, what))

    def _shape(self, t: FileTensor, what: str) -> Shape:
        shape = t.shape
        if len(shape) > 4 or any(size < 1 for size in shape) or t.dynamic:
            raise self.refuse(
                f"{what} '{_short(t.name)}' has the shape {list(shape)}, expected 1 to 4 fixed dimensions"
            )
        if len(shape) > 1:
            if shape[0] != 1:
                raise self.refuse(
                    f"{what} '{_short(t.name)}' has a batch of {shape[0]}, expected 1; export with batch size 1"
                )
            shape = shape[1:]
        h, w, c = (1,) * (3 - len(shape)) + shape
        if h * w * c > _ELEMENTS_MAX:
            raise self.refuse(
                f"{what} '{_short(t.name)}' has {h * w * c:,} elements, at most {_ELEMENTS_MAX:,} are supported"
            )
        return h, w, c

    def _activation(self, number: int, what: str) -> Tensor:
        if number in self.tensors:
            return self.tensors[number]
        name = _short(self.file.tensors[number].name) if number >= 0 else "none"
        raise self.refuse(f"{what} reads '{name}', which no operator before it makes")

    def _input(self, op: FileOp, index: int = 0) -> Tensor:
        if index >= len(op.inputs):
            raise self.fail(op, f"has {len(op.inputs)} inputs, expected {index + 1}")
        return self._activation(
            op.inputs[index], f"{op.kind} (layer '{_short(self.file.tensors[op.outputs[0]].name)}')"
        )

    def _output(self, op: FileOp, shape: Shape) -> Tensor:
        """The operator's output, whose shape in the file must be what the operator makes of its inputs."""
        t = self._tensor(self.file.tensors[op.outputs[0]], f"the output of {op.kind}")
        if t.size != shape[0] * shape[1] * shape[2]:
            raise self.fail(op, f"claims an output of {list(t.shape)}, it makes {list(shape)}")
        return Tensor(t.scale, t.zero, t.name, shape)

    def _constant(self, op: FileOp, index: int, dtype: str, what: str) -> FileTensor:
        number = op.inputs[index] if index < len(op.inputs) else -1
        t = self.file.tensors[number] if number >= 0 else None
        if t is None or t.data is None or t.dtype != dtype:
            found = "missing" if t is None else "not a constant" if t.data is None else t.dtype
            raise self.fail(op, f"has {what} that are {found}, expected {dtype} constants")
        return t

    def _weights(self, op: FileOp, axis: int, rank: int) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
        t = self._constant(op, 1, "int8", "weights")
        assert t.data is not None
        if t.data.ndim != rank or 0 in t.data.shape:
            raise self.fail(op, f"has weights of the shape {list(t.data.shape)}, expected {rank} dimensions")
        channels = t.data.shape[axis]
        if t.zeros.any() or len(t.scales) not in (1, channels) or (len(t.scales) > 1 and t.axis != axis):
            raise self.fail(op, "has asymmetric weights, or scales that are not one or one an output channel")
        return t.data.astype(np.int8), np.broadcast_to(t.scales.astype(np.float64), channels).copy()

    def _bias(self, op: FileOp, channels: int) -> NDArray[np.int32]:
        if len(op.inputs) < 3 or op.inputs[2] < 0:
            return np.zeros(channels, np.int32)
        t = self._constant(op, 2, "int32", "biases")
        assert t.data is not None
        if t.data.size != channels:
            raise self.fail(op, f"has {t.data.size} biases for {channels} channels")
        return t.data.reshape(-1).astype(np.int32)

    def _fused(self, op: FileOp, output: Quantisation) -> tuple[int, int]:
        fused = op.options["FusedActivationFunction"] if op.options else _NONE
        if fused not in _LIMITS:
            raise self.fail(op, f"has the fused activation {fused}, expected none, RELU, RELU6 or RELU_N1_TO_1")
        return activation(fused, output)

    # Operators.

    def _window(self, op: FileOp, x: Tensor, kernel: tuple[int, int]) -> tuple[Window, tuple[int, int]]:
        options = op.options
        if not options:
            raise self.fail(op, "has no options")
        if options.get("DilationHFactor", 1) != 1 or options.get("DilationWFactor", 1) != 1:
            raise self.fail(op, "is dilated, which is not supported; train it with dilation 1")
        stride = options["StrideH"], options["StrideW"]
        if min(*stride, *kernel) < 1 or max(*stride, *kernel) > 255:
            raise self.fail(op, f"has kernel {kernel} and stride {stride}, expected 1 to 255")
        out_h, top = window_padding(x.shape[0], kernel[0], stride[0], options["Padding"])
        out_w, left = window_padding(x.shape[1], kernel[1], stride[1], options["Padding"])
        if out_h < 1 or out_w < 1:
            raise self.fail(op, f"has a kernel of {kernel} for an image of {x.shape[:2]}")
        return Window(kernel, stride, (top, left)), (out_h, out_w)

    def _conv(self, op: FileOp, name: str) -> Op:
        x = self._input(op)
        weights, scales = self._weights(op, 0, 4)
        if weights.shape[3] != x.shape[2]:
            raise self.fail(
                op, f"takes {weights.shape[3]} of {x.shape[2]} channels; grouped convolution is not supported"
            )
        window, size = self._window(op, x, (weights.shape[1], weights.shape[2]))
        y = self._output(op, (*size, len(weights)))
        return Conv(name, (x,), y, weights, self._bias(op, len(weights)), scales, self._fused(op, y), window)

    def _depthwise(self, op: FileOp, name: str) -> Op:
        x = self._input(op)
        weights, scales = self._weights(op, 3, 4)
        channels = weights.shape[3]
        if weights.shape[0] != 1 or channels % x.shape[2]:
            raise self.fail(
                op, f"has weights {list(weights.shape)} for {x.shape[2]} channels, expected [1, h, w, n * channels]"
            )
        window, size = self._window(op, x, (weights.shape[1], weights.shape[2]))
        y = self._output(op, (*size, channels))
        own = np.ascontiguousarray(np.moveaxis(weights[0], 2, 0))[..., None]
        return Depthwise(name, (x,), y, own, self._bias(op, channels), scales, self._fused(op, y), window)

    def _dense(self, op: FileOp, name: str) -> Op:
        x = self._input(op)
        weights, scales = self._weights(op, 0, 2)
        if op.options and op.options["WeightsFormat"]:
            raise self.fail(op, "has shuffled weights; export it without that optimisation")
        rows, rest = divmod(x.size, weights.shape[1])
        if rest:
            raise self.fail(op, f"has weights {list(weights.shape)} for {x.size} inputs")
        y = self._output(op, (1, rows, len(weights)))
        return Dense(name, (x,), y, weights, self._bias(op, len(weights)), scales, self._fused(op, y))

    def _pool(self, op: FileOp, name: str, kind: Literal["average", "max"]) -> Op:
        x = self._input(op)
        kernel = (op.options["FilterHeight"], op.options["FilterWidth"]) if op.options else (0, 0)
        window, size = self._window(op, x, kernel)
        y = self._same(op, x, (*size, x.shape[2]))
        return Pool(name, (x,), y, kind, window, self._fused(op, y))

    def _same(self, op: FileOp, x: Tensor, shape: Shape) -> Tensor:
        """An output that must share the input's quantisation."""
        y = self._output(op, shape)
        if (y.scale, y.zero) != (x.scale, x.zero):
            raise self.fail(op, "changes the quantisation, which its kernel does not; convert the model anew")
        return y

    def _axes(self, op: FileOp, index: int) -> list[int]:
        t = self._constant(op, index, "int32", "axes")
        assert t.data is not None
        rank = len(self.file.tensors[op.inputs[0]].shape)
        axes = [int(a) + (rank if a < 0 else 0) for a in t.data.reshape(-1)]
        return [a + 3 - rank for a in axes]  # of (h, w, c)

    def _mean(self, op: FileOp, name: str) -> Op:
        x = self._input(op)
        axes = {a for a in self._axes(op, 1) if not 0 <= a < 3 or x.shape[a] > 1}
        if not axes <= {0, 1} or any(x.shape[a] > 1 for a in {0, 1} - axes):
            raise self.fail(op, "averages over other axes than height and width, which is not supported")
        return Mean(name, (x,), self._output(op, (1, 1, x.shape[2])))

    def _elementwise(self, op: FileOp, name: str, kind: Literal["add", "mul"]) -> Op:
        if len(op.inputs) != 2:
            raise self.fail(op, f"has {len(op.inputs)} inputs, expected 2")
        order = list(op.inputs)
        sizes = [self.file.tensors[i].data is not None for i in order]
        smaller = not any(sizes) and self._input(op, 0).size < self._input(op, 1).size
        if sizes[0] > sizes[1] or smaller:
            order.reverse()
        first = self._activation(order[0], op.kind)
        second = self.file.tensors[order[1]]
        constant = None
        if second.data is not None:
            b = self._tensor(second, f"the constant of {op.kind}")
            constant = second.data.astype(np.int8).reshape(-1)
        else:
            b = self._activation(order[1], op.kind)
        repeats = b.shape == first.shape or b.size == 1 or (b.shape[:2] == (1, 1) and b.shape[2] == first.shape[2])
        if not repeats:
            raise self.fail(
                op,
                f"combines {list(first.shape)} with {list(b.shape)}; expected equal shapes, or one number (a channel)",
            )
        y = self._output(op, first.shape)
        inputs = (first,) if constant is not None else (first, b)
        return Elementwise(name, inputs, y, kind, self._fused(op, y), Quantisation(b.scale, b.zero), constant)

    def _pad(self, op: FileOp, name: str) -> Op:
        x = self._input(op)
        t = self._constant(op, 1, "int32", "paddings")
        assert t.data is not None
        if t.data.ndim != 2 or t.data.shape[1] != 2 or len(t.data) > 4 or (t.data < 0).any():
            raise self.fail(op, f"has paddings {t.data.tolist()}, expected a pair a dimension")
        pairs = [[0, 0]] * (4 - len(t.data)) + t.data.tolist()
        if pairs[0] != [0, 0]:
            raise self.fail(op, "pads the batch")
        value = x.zero
        if op.kind == "PADV2":
            constant = self._constant(op, 2, "int8", "a value").data
            assert constant is not None
            value = int(constant.reshape(-1)[0])
        before = (pairs[1][0], pairs[2][0], pairs[3][0])
        h, w, c = (size + a + b for size, (a, b) in zip(x.shape, pairs[1:], strict=True))
        y = self._same(op, x, (h, w, c))
        return Pad(name, (x,), y, before, value)

    def _concat(self, op: FileOp, name: str) -> Op:
        constants = tuple(self._codes(number) for number in op.inputs)
        inputs = tuple(
            self._input(op, i) if c is None else self._tensor(self.file.tensors[op.inputs[i]], "the constant of CONCAT")
            for i, c in enumerate(constants)
        )
        if not op.options:
            raise self.fail(op, "has no options")
        rank = len(self.file.tensors[op.inputs[0]].shape)
        named = op.options["Axis"]
        axis = named + (rank if named < 0 else 0) + 3 - rank
        if op.options["FusedActivationFunction"] != _NONE:
            raise self.fail(op, "has a fused activation, which is not supported")
        shape = [*inputs[0].shape]
        if not 0 <= axis < 3:
            raise self.fail(op, f"joins along axis {named}, expected height, width or channels")
        for x in inputs[1:]:
            if any(x.shape[a] != shape[a] for a in range(3) if a != axis):
                raise self.fail(op, f"joins {[list(x.shape) for x in inputs]} along axis {axis}")
            shape[axis] += x.shape[axis]
        y = self._output(op, (shape[0], shape[1], shape[2]))
        if any((x.scale, x.zero) != (y.scale, y.zero) for x in inputs):
            raise self.fail(op, "joins tensors of different quantisation; convert the model anew")
        return Concat(name, inputs, y, axis, constants)

    def _codes(self, number: int) -> NDArray[np.int8] | None:
        t = self.file.tensors[number] if number >= 0 else None
        return t.data.astype(np.int8) if t is not None and t.data is not None and t.dtype == "int8" else None

    def _reshape(self, op: FileOp, name: str) -> Op:
        x = self._input(op)
        t = self._tensor(self.file.tensors[op.outputs[0]], f"the output of {op.kind}")
        return Reshape(name, (x,), self._same(op, x, t.shape))

    def _softmax(self, op: FileOp, name: str) -> Op:
        x = self._input(op)
        y = self._output(op, x.shape)
        beta = float(op.options["Beta"]) if op.options else 1.0
        if y.scale != 1 / 256 or y.zero != -128:
            raise self.fail(op, f"gives scale {y.scale:g} and zero point {y.zero}, expected 1/256 and -128")
        if not x.scale * beta * 2**26 > 1 or not np.isfinite(beta):
            raise self.fail(op, f"has beta {beta:g}, expected a number above 0")
        if x.shape[2] >= 8192:
            raise self.fail(op, f"has {x.shape[2]} classes, at most 8,191 are supported")
        return Softmax(name, (x,), y, beta)

    def _relu(self, op: FileOp, name: str) -> Op:
        x = self._input(op)
        y = self._output(op, x.shape)
        fused = {"RELU": _RELU, "RELU6": _RELU6, "RELU_N1_TO_1": _RELU_N1_TO_1}[op.kind]
        quotient = float(np.float32(x.scale) / np.float32(y.scale))
        table = fixedpoint.requantised(x.scale, x.zero, y.scale, y.zero, activation(fused, y), quotient)
        return Table(name, (x,), y, op.kind.lower(), table)

    def _curve(self, op: FileOp, name: str) -> Op:
        x = self._input(op)
        y = self._output(op, x.shape)
        wanted = 1 / 256 if op.kind == "LOGISTIC" else 1 / 128
        if y.scale != wanted:
            raise self.fail(op, f"gives scale {y.scale:g}, expected {wanted:g}")
        curve = fixedpoint.logistic if op.kind == "LOGISTIC" else fixedpoint.tanh
        return Table(name, (x,), y, op.kind.lower(), curve(x.scale, x.zero, y.scale, y.zero))

    # Borders.

    def _quantize(self, op: FileOp, name: str) -> Op | None:
        source, target = self.file.tensors[op.inputs[0]], self.file.tensors[op.outputs[0]]
        if source.index == self.file.inputs[0] and source.dtype in ("float32", "uint8"):
            y = self._tensor(target, "the output of QUANTIZE")
            if source.dtype == "uint8":
                shifted = self._shifted(source)
                if shifted.shape != y.shape:
                    raise self.fail(op, "changes the shape")
                self.notes.append("it takes int8 codes: the model's uint8 input minus 128")
                if (shifted.scale, shifted.zero) != (y.scale, y.zero):
                    self.tensors[source.index] = shifted
                    return self._requantise(name, shifted, y)
            self.tensors[target.index] = y
            return None
        x = self._input(op)
        if target.index == self.file.outputs[0] and target.dtype == "uint8":
            y = self._shifted(target)
            self.notes.append("it gives int8 codes: the model's uint8 output minus 128")
            if (x.scale, x.zero) == (y.scale, y.zero):
                self.tensors[target.index] = x
                return None
            return self._requantise(name, x, y)
        return self._requantise(name, x, self._output(op, x.shape))

    def _shifted(self, t: FileTensor) -> Tensor:
        if len(t.scales) != 1 or not 0 <= t.zeros[0] <= 255:
            raise self.refuse(f"'{_short(t.name)}' is uint8, expected one scale and a zero point from 0 to 255")
        return Tensor(float(t.scales[0]), int(t.zeros[0]) - 128, f"{t.index}", self._shape(t, "uint8"))

    def _requantise(self, name: str, x: Tensor, y: Tensor) -> Op:
        table = fixedpoint.requantised(x.scale, x.zero, y.scale, y.zero, (-128, 127), x.scale / y.scale)
        return Table(name, (x,), y, "quantize", table)

    def _dequantize(self, op: FileOp, name: str) -> Op | None:
        x = self._input(op)
        if op.outputs[0] != self.file.outputs[0]:
            raise self.fail(op, "leaves int8 in the middle of the network; convert it with full integer quantisation")
        self.tensors[op.outputs[0]] = x
        return None


def _short(name: str) -> str:
    """The first of the names that a converter has strung together."""
    return name.split(";")[0][:60]
