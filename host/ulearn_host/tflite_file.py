"""A .tflite file as plain Python objects, checked: everything an importer needs of the flatbuffer and nothing else."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulearn_host.errors import UserError

_DTYPES: dict[int, Any] = {0: np.float32, 2: np.int32, 3: np.uint8, 4: np.int64, 7: np.int16, 9: np.int8}
_TYPE_NAMES = {0: "float32", 1: "float16", 2: "int32", 3: "uint8", 4: "int64", 6: "bool", 7: "int16", 9: "int8"}
_MOST = 10_000  # tensors, operators: far above any network that fits a microcontroller
_BYTES_MAX = 1 << 28
_LEAST_SCALE = 1e-12  # products of three stay within float32


@dataclass(frozen=True)
class FileTensor:
    """shape: with the batch dimension; dynamic: whether another one is left open; scales, zeros: empty where it is not
    quantised; data: None for an activation."""

    index: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    dynamic: bool
    scales: NDArray[np.float32]
    zeros: NDArray[np.int64]
    axis: int
    data: NDArray[Any] | None


@dataclass(frozen=True)
class FileOp:
    """inputs: tensor numbers, -1 for one that is left out; options: of the operator by name, those that matter."""

    index: int
    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: dict[str, Any]


@dataclass
class File:
    """One subgraph."""

    tensors: list[FileTensor] = field(default_factory=list)
    ops: list[FileOp] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


def read(path: Path) -> File:
    """Read and check a .tflite file. Raises UserError naming the file and the fault."""
    try:
        size = path.stat().st_size
        if size > _BYTES_MAX:
            raise UserError(f"{path}: {size:,} bytes; a network for a microcontroller has less than {_BYTES_MAX:,}")
        data = path.read_bytes()
    except OSError as fault:
        raise UserError(f"{path}: {fault.strerror}; expected a .tflite file") from None
    if data[4:8] != b"TFL3":
        raise UserError(f"{path}: not a .tflite file (its identifier is missing)")
    try:
        return _read(data)
    except UserError as fault:
        raise UserError(f"{path}: {fault}") from None
    except (struct.error, IndexError, ValueError, TypeError, OverflowError, AttributeError, AssertionError) as fault:
        raise UserError(f"{path}: damaged ({type(fault).__name__.lower()} while it was read)") from None


def _read(data: bytes) -> File:
    import tflite

    model = tflite.Model.GetRootAsModel(data, 0)
    if model.Version() != 3:
        raise UserError(f"schema version {model.Version()}, expected 3")
    if model.SubgraphsLength() != 1:
        raise UserError(f"it has {model.SubgraphsLength()} subgraphs, expected 1 (no control flow, no signatures)")
    graph = model.Subgraphs(0)
    counts = (graph.TensorsLength(), graph.OperatorsLength(), model.OperatorCodesLength(), model.BuffersLength())
    if max(counts) > _MOST:
        raise UserError(f"it claims {max(counts):,} parts, at most {_MOST:,} are taken")
    file = File()
    for i in range(counts[0]):
        file.tensors.append(_tensor(i, graph.Tensors(i), model, counts[3]))
    kinds = [_kind(model.OperatorCodes(i)) for i in range(counts[2])]
    for i in range(counts[1]):
        op = graph.Operators(i)
        inputs, outputs = _numbers(op.InputsAsNumpy()), _numbers(op.OutputsAsNumpy())
        for number in (*inputs, *outputs):
            if not -1 <= number < counts[0]:
                raise UserError(f"operator {i} names tensor {number} of {counts[0]}")
        if not 0 <= op.OpcodeIndex() < counts[2]:
            raise UserError(f"operator {i} is of kind {op.OpcodeIndex()} of {counts[2]}")
        kind = kinds[op.OpcodeIndex()]
        file.ops.append(FileOp(i, kind, inputs, outputs, _options(tflite, op, kind)))
    file.inputs, file.outputs = _numbers(graph.InputsAsNumpy()), _numbers(graph.OutputsAsNumpy())
    for number in (*file.inputs, *file.outputs):
        if not 0 <= number < counts[0]:
            raise UserError(f"the network's border names tensor {number} of {counts[0]}")
    return file


def _numbers(values: Any) -> tuple[int, ...]:
    # flatbuffers answers 0 for a vector that is not there
    return () if isinstance(values, int) else tuple(int(v) for v in values[:_MOST])


def _kind(code: Any) -> str:
    import tflite

    number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
    names: dict[int, str] = {v: k for k, v in vars(tflite.BuiltinOperator).items() if isinstance(v, int)}
    if number == tflite.BuiltinOperator.CUSTOM:
        return f"custom operator {_text(code.CustomCode())}"
    return names.get(number, f"operator {number}")


# Operator to its option table and what is read of it.
_WALK = ("Padding", "StrideH", "StrideW", "FusedActivationFunction")
_OPTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "CONV_2D": ("Conv2DOptions", (*_WALK, "DilationHFactor", "DilationWFactor")),
    "DEPTHWISE_CONV_2D": ("DepthwiseConv2DOptions", (*_WALK, "DilationHFactor", "DilationWFactor")),
    "FULLY_CONNECTED": ("FullyConnectedOptions", ("FusedActivationFunction", "WeightsFormat")),
    "AVERAGE_POOL_2D": ("Pool2DOptions", (*_WALK, "FilterHeight", "FilterWidth")),
    "MAX_POOL_2D": ("Pool2DOptions", (*_WALK, "FilterHeight", "FilterWidth")),
    "ADD": ("AddOptions", ("FusedActivationFunction",)),
    "MUL": ("MulOptions", ("FusedActivationFunction",)),
    "CONCATENATION": ("ConcatenationOptions", ("Axis", "FusedActivationFunction")),
    "SOFTMAX": ("SoftmaxOptions", ("Beta",)),
}


def _options(tflite: Any, op: Any, kind: str) -> dict[str, Any]:
    name, wanted = _OPTIONS.get(kind, ("", ()))
    table = op.BuiltinOptions()
    if not wanted or table is None:
        return {}
    if op.BuiltinOptionsType() != getattr(tflite.BuiltinOptions, name):
        raise UserError(f"{kind} carries options of another operator")
    options = getattr(tflite, name)()
    options.Init(table.Bytes, table.Pos)
    return {field: getattr(options, field)() for field in wanted}


def _text(raw: bytes | None) -> str:
    # a name is for messages: one line, and nothing that a terminal would obey
    return "".join(c if c.isprintable() else "?" for c in (raw or b"")[:200].decode("utf-8", "replace"))


def _tensor(index: int, t: Any, model: Any, buffers: int) -> FileTensor:
    shape = _numbers(t.ShapeAsNumpy())
    name = _text(t.Name()) or f"tensor {index}"
    dtype = _TYPE_NAMES.get(t.Type(), f"type {t.Type()}")
    quantisation = t.Quantization()
    scales, zeros, axis = np.empty(0, np.float32), np.empty(0, np.int64), 0
    if quantisation is not None and quantisation.ScaleLength():
        scales = np.array(quantisation.ScaleAsNumpy(), dtype=np.float32)
        given = quantisation.ZeroPointAsNumpy()
        zeros = np.zeros(len(scales), np.int64) if isinstance(given, int) else np.array(given, dtype=np.int64)
        axis = quantisation.QuantizedDimension()
        if not ((scales > _LEAST_SCALE).all() and (scales < 1 / _LEAST_SCALE).all() and len(zeros) == len(scales)):
            raise UserError(f"{name}: its scales must lie between 1e-12 and 1e12, with a zero point each")
    if not 0 <= t.Buffer() < buffers:
        raise UserError(f"{name}: it names buffer {t.Buffer()} of {buffers}")
    dynamic = -1 in _numbers(t.ShapeSignatureAsNumpy())[1:]
    return FileTensor(index, name, dtype, shape, dynamic, scales, zeros, axis, _contents(name, t, shape, model))


def _contents(name: str, t: Any, shape: tuple[int, ...], model: Any) -> NDArray[Any] | None:
    raw = model.Buffers(t.Buffer()).DataAsNumpy()
    if isinstance(raw, int) or not len(raw):
        return None
    dtype = _DTYPES.get(t.Type())
    if dtype is None:
        return None
    count = 1
    for size in shape:
        if size < 0:
            raise UserError(f"{name}: it has the dimension {size}")
        count *= size
    if count * np.dtype(dtype).itemsize != len(raw):
        raise UserError(f"{name}: {len(raw)} bytes, expected {count} numbers of {t.Type()}")
    return np.frombuffer(raw.tobytes(), dtype=np.dtype(dtype).newbyteorder("<")).reshape(shape)
