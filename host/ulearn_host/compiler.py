"""From a quantised network and a scheme to a plan: differentiation, scheduling and memory planning at compile time."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ulearn_host import memory, scales
from ulearn_host import numbers as n
from ulearn_host.errors import UserError
from ulearn_host.network import Dense, Network

Scheme = Literal["last", "bias", "last+bias", "full"]
WeightType = Literal["int16", "int8"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
DEFAULT_SKIP = 1 / 16
# What a Trainer starts with when it is not told: best on the accelerometer windows (tests/adaptation.py), rounded to
# the cautious side where the best is broad.
_RATES: dict[Scheme, float] = {"last": 0.03, "bias": 0.3, "last+bias": 0.03, "full": 0.01}


@dataclass(frozen=True)
class Options:
    """How the trainable part is kept. fraction: fraction bits of int16 weights."""

    scheme: Scheme = "last+bias"
    weights: WeightType = "int16"
    fraction: int = 6
    gates: bool = True


@dataclass
class _Blob:
    """A buffer that grows by aligned pieces."""

    buffer: int
    data: bytearray = field(default_factory=bytearray)
    known: dict[bytes, int] = field(default_factory=dict)

    def add(self, values: NDArray[Any], shared: bool = True) -> int:
        """Append an array (or find it again) and return its operand."""
        raw = values.tobytes()
        if shared and raw in self.known:
            return self.known[raw]
        self.data += bytes(-len(self.data) % memory.ALIGNMENT)
        operand = self.buffer << 28 | len(self.data)
        self.data += raw
        self.known[raw] = operand
        return operand


@dataclass
class Tensor:
    """A trainable tensor as TENSORS describes it. scales: float32 [channels], real units of one step of the integer."""

    name: str
    dtype: int
    fraction: int
    shape: tuple[int, int, int, int]
    operand: int
    scales: NDArray[np.float32]


@dataclass
class Record:
    """One record before its arena operands are known; operands are numbers or names of arena tensors."""

    op: int
    name: str
    operands: dict[int, int | str]
    writes: tuple[str, ...] = ()
    fields: dict[str, int] = field(default_factory=dict)

    def reads(self) -> list[str]:
        """Names of the arena tensors it touches."""
        return [o for o in self.operands.values() if isinstance(o, str)]


@dataclass
class Program:
    """A finished program: bytes of the section and what `inspect` shows of it."""

    name: str
    records: list[Record]
    lives: list[memory.Life]
    offsets: dict[str, int]
    arena: int
    scratch: int
    section: bytes


@dataclass
class Plan:
    """What was compiled. data: the plan file."""

    data: bytes
    programs: list[Program]
    tensors: list[Tensor]
    network: Network
    options: Options
    model_id: bytes


def _padded_name(name: str) -> bytes:
    return name.encode()[:16].ljust(16, b"\0")


def _largest(dtype: int, fraction: int) -> int:
    """The largest absolute value that a layer's weight can have in a sum, over all that training may do to it."""
    return n.WEIGHT_MAX >> fraction if dtype == n.DTYPE_INT16 else 128


def trainable(index: int, count: int, scheme: Scheme) -> tuple[bool, bool]:
    """Whether layer `index` of `count` trains its weights, and its bias."""
    last = index == count - 1
    weights = scheme == "full" or (last and scheme in ("last", "last+bias"))
    return weights, scheme != "last" or last


class _Compiler:
    def __init__(self, network: Network, options: Options) -> None:
        self.network, self.options = network, options
        self.layers = network.layers
        self.frozen, self.train = _Blob(n.BUF_FROZEN), _Blob(n.BUF_TRAIN)
        self.tensors: list[Tensor] = []
        self.weights: list[tuple[int, int, int]] = []  # operand, dtype, fraction
        self.biases: list[int] = []
        for i, layer in enumerate(self.layers):
            self._parameters(layer, *trainable(i, len(self.layers), options.scheme))
        flags = [trainable(i, len(self.layers), options.scheme) for i in range(len(self.layers))]
        self.deepest = min(i for i, either in enumerate(flags) if any(either))
        # Gates from the loss towards the input, one a trainable tensor.
        self.gate_of: dict[tuple[int, str], int] = {}
        for i in reversed(range(len(self.layers))):
            for kind, on in zip(("weight", "bias"), flags[i], strict=True):
                if on:
                    self.gate_of[i, kind] = len(self.gate_of)
        self.gains = len(self.layers) - 1 - self.deepest
        self.first_gate = n.STATE_BYTES + n.GAIN_BYTES * self.gains

    def _parameters(self, layer: Dense, weights: bool, bias: bool) -> None:
        dtype, fraction = n.DTYPE_INT8, 0
        if weights:
            values: NDArray[Any] = layer.weights
            if self.options.weights == "int16":
                dtype, fraction = n.DTYPE_INT16, self.options.fraction
                values = layer.weights.astype(np.int16) << fraction
            operand = self.train.add(values, shared=False)
            shape = (layer.outputs, 1, 1, layer.inputs)
            steps = (layer.weight_scales / 2**fraction).astype(np.float32)
            self.tensors.append(Tensor(layer.name + "/weights", dtype, fraction, shape, operand, steps))
        else:
            operand = self.frozen.add(layer.weights)
        self.weights.append((operand, dtype, fraction))
        if bias:
            operand = self.train.add(layer.bias, shared=False)
            steps = (layer.weight_scales * layer.input.scale).astype(np.float32)
            self.tensors.append(
                Tensor(layer.name + "/bias", n.DTYPE_INT32, 0, (layer.outputs, 1, 1, 1), operand, steps)
            )
        else:
            operand = self.frozen.add(layer.bias)
        self.biases.append(operand)

    def activation(self, i: int) -> int | str:
        """What layer i reads: the caller's input, or the arena."""
        return n.BUF_INPUT << 28 if i == 0 else f"act{i}"

    def forward(self) -> list[Record]:
        records = []
        for i, layer in enumerate(self.layers):
            pairs = [scales.requantisation(layer.input.scale * s / layer.output.scale) for s in layer.weight_scales]
            weights, dtype, fraction = self.weights[i]
            fields = {
                "rounding": n.ROUND_SINGLE,
                "in_c": layer.inputs,
                "out_c": layer.outputs,
                "zero_in": layer.input.zero,
                "zero_out": layer.output.zero,
                "act_min": layer.output.zero if layer.relu else -128,
                "act_max": 127,
                "w_dtype": dtype,
                "fraction": fraction,
            }
            operands: dict[int, int | str] = {
                0: self.activation(i),
                1: f"act{i + 1}",
                2: weights,
                3: self.biases[i],
                4: self.frozen.add(np.array([m for m, _ in pairs], dtype=np.int32)),
                5: self.frozen.add(np.array([s for _, s in pairs], dtype=np.int8)),
            }
            records.append(Record(n.OP_DENSE, layer.name, operands, (f"act{i + 1}",), fields))
        return records

    def loss(self) -> Record:
        last = self.layers[-1]
        target = n.BUF_TARGET << 28
        top = len(self.layers)
        operands: dict[int, int | str] = {0: f"act{top}", 1: f"grad{top}", 3: target}
        fields = {"out_c": last.outputs}
        if self.network.loss == "mse":
            return Record(n.OP_MSE, "mean squared error", operands, (f"grad{top}",), fields)
        table = scales.exponentials(last.output.scale)
        operands[2] = self.frozen.add(table)
        fields["extra"] = len(table)
        return Record(n.OP_SOFTMAX_CE, "softmax cross-entropy", operands, (f"grad{top}",), fields)

    def backward(self) -> list[Record]:
        """Reverse-mode differentiation; a weight is updated as soon as its gradient was passed on."""
        records: list[Record] = []
        last = self.layers[-1].output.scale
        outputs = self.layers[-1].outputs
        unit = 1.0 if self.network.loss == "softmax_ce" else 2 * last / outputs
        for i in reversed(range(self.deepest, len(self.layers))):
            layer = self.layers[i]
            gradient = f"grad{i + 1}"
            if i > self.deepest:
                records.append(self._pass_on(i, layer))
            weights, bias = trainable(i, len(self.layers), self.options.scheme)
            table, exponent = scales.reciprocals(layer.weight_scales)
            entries = self.frozen.add(table)
            base: dict[int, int | str] = {0: gradient, 3: entries}
            if weights:
                operand, dtype, fraction = self.weights[i]
                mantissa, e = scales.mantissa11(unit * layer.input.scale * 2.0**fraction)
                fields = {
                    "in_c": layer.inputs,
                    "out_c": layer.outputs,
                    "zero_in": layer.input.zero,
                    "w_dtype": dtype,
                    "fraction": fraction,
                    "scale_mant": mantissa,
                    "scale_exp": e + exponent,
                    "gate": self._gate(i, "weight"),
                }
                operands = base | {1: self.activation(i), 2: operand}
                records.append(Record(n.OP_UPDATE_WEIGHT, f"update {layer.name}/weights", operands, (), fields))
            if bias:
                mantissa, e = scales.mantissa11(unit / layer.input.scale)
                fields = {
                    "out_c": layer.outputs,
                    "scale_mant": mantissa,
                    "scale_exp": e + exponent,
                    "gate": self._gate(i, "bias"),
                }
                operands = base | {2: self.biases[i]}
                records.append(Record(n.OP_UPDATE_BIAS, f"update {layer.name}/bias", operands, (), fields))
        return records

    def _gate(self, layer: int, kind: str) -> int:
        return self.first_gate + self.gate_of[layer, kind] if self.options.gates else 0

    def _pass_on(self, i: int, layer: Dense) -> Record:
        weights, dtype, fraction = self.weights[i]
        limit = (2**31 - 1) // (n.MANTISSA_MAX * _largest(dtype, fraction))
        if layer.outputs > limit:
            raise UserError(
                f"{layer.name}: {layer.outputs} channels meet in one gradient, at most {limit} are proved not to "
                f"overflow; choose the scheme 'last'"
            )
        table, exponent = scales.channel_scales(layer.weight_scales)
        below = self.layers[i - 1]
        deeper = [gate for (layer_, _), gate in self.gate_of.items() if layer_ < i]
        fields = {
            "in_c": layer.inputs,
            "out_c": layer.outputs,
            "act_min": below.output.zero if below.relu else -128,
            "act_max": 127,
            "w_dtype": dtype,
            "fraction": fraction,
            "scale_exp": exponent,
            "gain": n.STATE_BYTES + n.GAIN_BYTES * (len(self.layers) - 1 - i),
        }
        flags = 0
        if self.options.gates:
            fields["gate"] = self.first_gate + min(deeper)
            flags |= n.FLAG_GATE_DEEPER
        operands: dict[int, int | str] = {0: f"grad{i + 1}", 1: f"grad{i}", 2: weights, 3: self.frozen.add(table)}
        if below.relu:
            flags |= n.FLAG_MASK
            operands[4] = f"act{i}"
        fields["flags"] = flags
        return Record(n.OP_DENSE_BACK, f"gradient of {layer.name}", operands, (f"grad{i}",), fields)

    def size_of(self, tensor: str) -> int:
        """Bytes of an arena tensor by its name: actI or gradI, at the output of layer I."""
        outputs = self.layers[int(tensor.lstrip("actgrd")) - 1].outputs
        return outputs if tensor.startswith("act") else n.GRADIENT_HEADER + 2 * outputs

    def program(self, name: str, kind: int, records: list[Record], state: int) -> Program:
        spans: dict[str, list[int]] = {}
        for at, record in enumerate(records):
            for tensor in record.reads():
                spans.setdefault(tensor, []).append(at)
        # The output is read after the program has ended.
        spans[f"act{len(self.layers)}"].append(len(records))
        lives = [memory.Life(t, self.size_of(t), s[0], s[-1]) for t, s in spans.items()]
        offsets, arena = memory.plan(lives)
        scratch = memory.aligned(max((2 * r.fields["out_c"] for r in records if r.op == n.OP_DENSE_BACK), default=0))
        last = self.layers[-1]
        target = 0
        if kind == n.KIND_TRAIN:
            target = 2 if self.network.loss == "softmax_ce" else last.outputs
        else:
            state = 0
        sizes = (self.layers[0].inputs, arena, len(self.frozen.data), len(self.train.data), state, scratch, target)
        output = n.BUF_ARENA << 28 | offsets[f"act{len(self.layers)}"]
        head = struct.pack("<16s7IIIHBB8x", _padded_name(name), *sizes, output, last.outputs, len(records), kind, 0)
        body = b"".join(_pack(record, offsets) for record in records)
        return Program(name, records, lives, offsets, arena, scratch, head + body)

    def state(self) -> bytes:
        """The first STATE: every gate open, gains still to be learned, the default rate."""
        gates = len(self.gate_of)
        mantissa, exponent = scales.mantissa11(_RATES[self.options.scheme])
        head = struct.pack(
            "<IIHhIIIiHHHHHH8x",
            *(1, 0, mantissa, exponent, 0, 0, 0, 0, round(DEFAULT_SKIP * 65536), 0),
            *(self.gains, gates, 0, self.first_gate),
        )
        body = head + bytes(n.GAIN_BYTES * self.gains) + b"\1" * gates
        return body + bytes(-len(body) % 4)


def _pack(record: Record, offsets: dict[str, int]) -> bytes:
    operands = [n.OPERAND_NONE] * n.OPERANDS
    for index, operand in record.operands.items():
        operands[index] = n.BUF_ARENA << 28 | offsets[operand] if isinstance(operand, str) else operand
    f: Callable[[str], int] = lambda name: record.fields.get(name, 0)  # noqa: E731
    return struct.pack(
        "<4B2H6I6H6B4b2BHhI",
        *(record.op, n.MODE_APPLY, f("flags"), f("rounding"), f("gate"), f("gain")),
        *operands,
        *(0, 0, f("in_c"), 0, 0, f("out_c")),
        *(0, 0, 0, 0, 0, 0),
        *(f("zero_in"), f("zero_out"), f("act_min"), f("act_max")),
        *(f("w_dtype"), f("fraction"), f("scale_mant"), f("scale_exp"), f("extra")),
    )


def _section(kind: int, value: bytes, required: bool = True) -> bytes:
    return struct.pack("<HHI", kind, n.SECTION_REQUIRED if required else 0, len(value)) + value + bytes(-len(value) % 8)


def _shape(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """A shape as (h, w, c, 0): missing leading dimensions are 1."""
    h, w, c = (1,) * (3 - len(shape)) + shape if len(shape) <= 3 else (1, 1, int(np.prod(shape)))
    return h, w, c, 0


def model_identity(network: Network, tensors: list[Tensor], scheme: str) -> bytes:
    """16 bytes that name the canonical content, whatever the packing: layers, quantisation, weights, what trains."""
    digest = hashlib.sha256(scheme.encode())
    for layer in network.layers:
        head = [layer.name, layer.relu, *layer.weights.shape]
        digest.update(json.dumps(head).encode())
        digest.update(struct.pack("<dqdq", layer.input.scale, layer.input.zero, layer.output.scale, layer.output.zero))
        for array in (layer.weights, layer.bias, layer.weight_scales):
            digest.update(array.tobytes())
    for tensor in tensors:
        digest.update(json.dumps([tensor.name, tensor.dtype, tensor.fraction, *tensor.shape]).encode())
    digest.update(network.loss.encode())
    return digest.digest()[: n.ID_BYTES]


def seal(model_id: bytes, sections: list[bytes], count: int | None = None) -> bytes:
    """Header and sections as one file, closed by its SHA-256. count: of sections, where they are given as one piece."""
    body = b"".join(sections)
    count = len(sections) if count is None else count
    head = struct.pack("<IHHIHH16s", n.MAGIC, n.VERSION, 0, n.HEADER_BYTES + len(body), count, 0, model_id)
    digest = hashlib.sha256(head + bytes(n.HEADER_BYTES - n.H_HASH) + body).digest()
    return head + digest + bytes(n.HEADER_BYTES - n.H_TAG) + body


def compile_plan(network: Network, options: Options | None = None, state: bytes | None = None) -> Plan:
    """Compile a network and a scheme into a plan.

    state: a STATE block to start from in place of the default one, e.g. with calibrated gains.
    Raises UserError when a bound cannot be proved, with the layer's name.
    """
    options = options or Options()
    for i, layer in enumerate(network.layers):
        wide = options.weights == "int16" and trainable(i, len(network.layers), options.scheme)[0]
        limit = 2**30 // (255 * _largest(n.DTYPE_INT16 if wide else n.DTYPE_INT8, options.fraction))
        if layer.inputs > limit:
            raise UserError(
                f"{layer.name}: {layer.inputs} inputs could overflow the accumulator, at most {limit} cannot"
            )
    c = _Compiler(network, options)
    first_state = state or c.state()
    # All records first: they fill FROZEN, whose size each program's header tells.
    forward, training = c.forward(), [*c.forward(), c.loss(), *c.backward()]
    programs = [
        c.program("forward", n.KIND_FORWARD, forward, 0),
        c.program("train", n.KIND_TRAIN, training, len(first_state)),
    ]
    model_id = model_identity(network, c.tensors, f"{options.scheme} {options.weights}")
    entries, tables = b"", b""
    for i, t in enumerate(c.tensors):
        entries += struct.pack(
            "<HBBHHHH4HIII",
            *(i, t.dtype, t.fraction, n.TENSOR_SHARED, t.shape[0], t.shape[0], 0),
            *t.shape,
            *(t.operand & 0x0FFFFFFF, len(tables), 0),
        )
        tables += t.scales.tobytes()
    last = network.layers[-1]
    loss = n.LOSS_SOFTMAX_CE if network.loss == "softmax_ce" else n.LOSS_MSE
    loss_scale = 1 / 1024 if network.loss == "softmax_ce" else last.output.scale**2 / last.outputs
    first = network.layers[0]
    shape = _shape(network.input_shape or (first.inputs,))
    io = struct.pack("<4Hfi", *shape, first.input.scale, first.input.zero)
    io += struct.pack("<4Hfi", *_shape((last.outputs,)), last.output.scale, last.output.zero)
    io += struct.pack("<HHf", loss, 0, loss_scale)
    meta = {
        "labels": list(network.labels),
        "scheme": options.scheme,
        "weights": options.weights,
        "source": network.source,
        "layers": [layer.name for layer in network.layers],
        "tensors": [t.name for t in c.tensors],
    }
    sections = [
        _section(n.SECTION_IO, io),
        _section(n.SECTION_TENSORS, entries),
        *(_section(n.SECTION_PROGRAM, p.section) for p in programs),
        _section(n.SECTION_CUTS, _cuts(network, programs[0])),
        _section(n.SECTION_STATE, first_state),
        _section(n.SECTION_FROZEN, bytes(c.frozen.data)),
        _section(n.SECTION_TRAIN, bytes(c.train.data)),
        _section(n.SECTION_SCALES, tables, required=False),
        _section(n.SECTION_META, json.dumps(meta, separators=(",", ":")).encode(), required=False),
    ]
    return Plan(seal(model_id, sections), programs, c.tensors, network, options, model_id)


def _cuts(network: Network, forward: Program) -> bytes:
    """A cut behind every layer but the last; the one below the last layer is also called 'features'."""
    result = b""
    for i, layer in enumerate(network.layers[:-1], start=1):
        names = [layer.name, "features"] if i == len(network.layers) - 1 else [layer.name]
        for name in names:
            operand = n.BUF_ARENA << 28 | forward.offsets[f"act{i}"]
            result += struct.pack("<16sHHII", _padded_name(name), 0, i, operand, layer.outputs)
            result += struct.pack("<4Hfii", 1, 1, layer.outputs, 0, layer.output.scale, layer.output.zero, 0)
    return result
