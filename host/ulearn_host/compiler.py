"""From a quantised network and a scheme to a plan: differentiation, scheduling and memory planning at compile time."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ulearn_host import memory, scales
from ulearn_host import numbers as n
from ulearn_host.errors import UserError
from ulearn_host.lowering import Blob, Lowering, Record
from ulearn_host.network import Dense, Network, Reshape, Softmax, Tensor, Weighted
from ulearn_host.records import RECORD

Scheme = Literal["last", "bias", "last+bias", "full", "none"]
WeightType = Literal["int16", "int8"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
TRAINING_SCHEMES = tuple(scheme for scheme in SCHEMES if scheme != "none")
DEFAULT_SKIP = 1 / 16
# What a Trainer starts with when it is not told: best on the accelerometer windows (tests/adaptation.py), rounded to
# the cautious side where the best is broad.
_RATES: dict[Scheme, float] = {"last": 0.03, "bias": 0.3, "last+bias": 0.03, "full": 0.01, "none": 0.03}


@dataclass(frozen=True)
class Options:
    """How the trainable part is kept. fraction: fraction bits of int16 weights."""

    scheme: Scheme = "last+bias"
    weights: WeightType = "int16"
    fraction: int = 6
    gates: bool = True


@dataclass
class Trainable:
    """A trainable tensor as TENSORS describes it. scales: float32 [channels], real units of one step of the integer."""

    name: str
    dtype: int
    fraction: int
    shape: tuple[int, int, int, int]
    operand: int
    scales: NDArray[np.float32]


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
    tensors: list[Trainable]
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
    if scheme == "none":
        return False, False
    last = index == count - 1
    weights = scheme == "full" or (last and scheme in ("last", "last+bias"))
    return weights, scheme != "last" or last


def check_trainable(network: Network, scheme: Scheme) -> None:
    """Raise UserError where the scheme asks for gradients that are not supported yet."""
    if scheme == "none":
        return
    if network.loss == "none":
        raise UserError(
            "the network has no loss to train with; name one (--loss softmax_ce, --loss mse), or choose --scheme none"
        )
    if not network.layers:
        raise UserError("the network has no layer with weights to train; choose the scheme 'none'")
    flags = [trainable(i, len(network.layers), scheme) for i in range(len(network.layers))]
    deepest = network.layers[min(i for i, either in enumerate(flags) if any(either))]
    ops = [op for op in network.ops if not isinstance(op, Reshape)]
    if ops and isinstance(ops[-1], Softmax):
        ops.pop()
    for op in ops[ops.index(deepest) :]:
        if not isinstance(op, Dense) or op.rows > 1:
            raise UserError(
                f"{op.name}: the scheme '{scheme}' needs gradients of {type(op).__name__.lower()}, which are not "
                f"supported yet; choose 'last' where the last layer is dense, or 'none'"
            )
    last = ops[-1]
    if isinstance(last, Dense) and last.activation != (-128, 127):
        raise UserError(f"{last.name}: the last layer has an activation, which training cannot pass; choose 'none'")


class _Compiler:
    def __init__(self, network: Network, options: Options) -> None:
        check_trainable(network, options.scheme)
        self.network, self.options = network, options
        self.layers = network.layers
        self.frozen, self.train = Blob(n.BUF_FROZEN), Blob(n.BUF_TRAIN)
        self.lowering = Lowering(self.frozen, self.place)
        self.alias = _aliases(network)
        self.sizes: dict[str, int] = {}
        self.lowered: dict[int, list[Record]] = {}
        self.tensors: list[Trainable] = []
        flags = [trainable(i, len(self.layers), options.scheme) for i in range(len(self.layers))]
        self.deepest = min((i for i, either in enumerate(flags) if any(either)), default=len(self.layers))
        self.weights: dict[int, tuple[int, int, int]] = {}  # operand, dtype, fraction
        self.biases: dict[int, int] = {}
        for i in range(self.deepest, len(self.layers)):
            self._parameters(i, *flags[i])
        # Gates from the loss towards the input, one a trainable tensor.
        self.gate_of: dict[tuple[int, str], int] = {}
        for i in reversed(range(len(self.layers))):
            for kind, on in zip(("weight", "bias"), flags[i], strict=True):
                if on:
                    self.gate_of[i, kind] = len(self.gate_of)
        self.gains = max(0, len(self.layers) - 1 - self.deepest)
        self.first_gate = n.STATE_BYTES + n.GAIN_BYTES * self.gains

    def place(self, tensor: Tensor) -> int | str:
        """Where an activation lies: the caller's input, or the arena."""
        name = self.alias.get(tensor.name, tensor.name)
        if name == self.network.input.name:
            return n.BUF_INPUT << 28
        self.sizes["act " + name] = tensor.size
        return "act " + name

    def gradient(self, tensor: Tensor) -> str:
        """The arena tensor of a gradient at an activation."""
        name = "grad " + self.alias.get(tensor.name, tensor.name)
        self.sizes[name] = n.GRADIENT_HEADER + 2 * tensor.size
        return name

    def _parameters(self, i: int, weights: bool, bias: bool) -> None:
        layer = self.layers[i]
        dtype, fraction = n.DTYPE_INT8, 0
        outputs = len(layer.weights)
        if weights:
            values: NDArray[Any] = layer.weights
            if self.options.weights == "int16":
                dtype, fraction = n.DTYPE_INT16, self.options.fraction
                values = layer.weights.astype(np.int16) << fraction
            operand = self.train.add(values, shared=False)
            shape = (outputs, 1, 1, layer.weights[0].size)
            steps = (layer.weight_scales / 2**fraction).astype(np.float32)
            self.tensors.append(Trainable(layer.name + "/weights", dtype, fraction, shape, operand, steps))
        else:
            operand = self.frozen.add(layer.weights)
        self.weights[i] = operand, dtype, fraction
        if bias:
            operand = self.train.add(layer.bias, shared=False)
            steps = (layer.weight_scales * layer.input.scale).astype(np.float32)
            self.tensors.append(Trainable(layer.name + "/bias", n.DTYPE_INT32, 0, (outputs, 1, 1, 1), operand, steps))
        else:
            operand = self.frozen.add(layer.bias)
        self.biases[i] = operand

    def forward(self, training: bool) -> list[Record]:
        """The network's records; a training program has no use for the softmax behind the logits."""
        records: list[Record] = []
        index = {id(layer): i for i, layer in enumerate(self.layers)}
        for op in self.network.ops:
            if training and isinstance(op, Softmax) and op is self.network.ops[-1]:
                continue
            i = index.get(id(op), -1)
            if id(op) not in self.lowered:  # once, so that both programs read the same constants
                self.lowered[id(op)] = [self._trained(i)] if i >= self.deepest else self.lowering.records(op)
            records += self.lowered[id(op)]
        output = self.network.output
        if not isinstance(self.place(output), str):  # nothing but reshapes: the answer still lies in the arena
            self.sizes["act output"] = output.size
            fields = {"in_h": 1, "in_w": 1, "in_c": output.size, "out_h": 1, "out_w": 1, "out_c": output.size}
            operands: dict[int, int | str] = {0: self.place(output), 1: "act output"}
            records.append(Record(n.OP_COPY, "copy", operands, ("act output",), fields))
        return records

    def _trained(self, i: int) -> Record:
        """A dense layer whose weights a backward record reads or changes: they lie in canonical order."""
        layer = self.layers[i]
        weights, dtype, fraction = self.weights[i]
        more, rounding = self.lowering.quantised_sums(layer)
        fields = rounding | {
            "in_h": 0,
            "in_w": 0,
            "in_c": layer.input.size,
            "out_h": 0,
            "out_w": 0,
            "out_c": len(layer.weights),
            "act_min": layer.activation[0],
            "act_max": layer.activation[1],
            "w_dtype": dtype,
            "fraction": fraction,
        }
        operands: dict[int, int | str] = {2: weights, 3: self.biases[i]}
        return self.lowering.record(n.OP_DENSE, layer, operands | more, fields)

    def loss(self) -> Record:
        logits = self.network.logits
        gradient = self.gradient(logits)
        operands: dict[int, int | str] = {0: self.place(logits), 1: gradient, 3: n.BUF_TARGET << 28}
        fields = {"out_c": logits.size}
        if self.network.loss == "mse":
            return Record(n.OP_MSE, "mean squared error", operands, (gradient,), fields)
        last = self.network.ops[-1]
        table = scales.exponentials(logits.scale * (last.beta if isinstance(last, Softmax) else 1.0))
        operands[2] = self.frozen.add(table)
        fields["extra"] = len(table)
        return Record(n.OP_SOFTMAX_CE, "softmax cross-entropy", operands, (gradient,), fields)

    def backward(self) -> list[Record]:
        """Reverse-mode differentiation; a weight is updated as soon as its gradient was passed on."""
        records: list[Record] = []
        logits = self.network.logits
        unit = 1.0 if self.network.loss == "softmax_ce" else 2 * logits.scale / logits.size
        for i in reversed(range(self.deepest, len(self.layers))):
            layer = self.layers[i]
            gradient = self.gradient(layer.output)
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
                    "in_c": layer.input.size,
                    "out_c": layer.output.size,
                    "zero_in": layer.input.zero,
                    "w_dtype": dtype,
                    "fraction": fraction,
                    "scale_mant": mantissa,
                    "scale_exp": e + exponent,
                    "gate": self._gate(i, "weight"),
                }
                operands = base | {1: self.place(layer.input), 2: operand}
                records.append(Record(n.OP_UPDATE_WEIGHT, f"update {layer.name}/weights", operands, (), fields))
            if bias:
                mantissa, e = scales.mantissa11(unit / layer.input.scale)
                fields = {
                    "out_c": layer.output.size,
                    "scale_mant": mantissa,
                    "scale_exp": e + exponent,
                    "gate": self._gate(i, "bias"),
                }
                operands = base | {2: self.biases[i]}
                records.append(Record(n.OP_UPDATE_BIAS, f"update {layer.name}/bias", operands, (), fields))
        return records

    def _gate(self, layer: int, kind: str) -> int:
        return self.first_gate + self.gate_of[layer, kind] if self.options.gates else 0

    def _pass_on(self, i: int, layer: Weighted) -> Record:
        weights, dtype, fraction = self.weights[i]
        limit = (2**31 - 1) // (n.MANTISSA_MAX * _largest(dtype, fraction))
        outputs = layer.output.size
        if outputs > limit:
            raise UserError(
                f"{layer.name}: {outputs} channels meet in one gradient, at most {limit} are proved not to "
                f"overflow; choose the scheme 'last'"
            )
        table, exponent = scales.channel_scales(layer.weight_scales)
        below = self.layers[i - 1]
        deeper = [gate for (layer_, _), gate in self.gate_of.items() if layer_ < i]
        fields = {
            "in_c": layer.input.size,
            "out_c": outputs,
            "act_min": below.activation[0],
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
        passed = self.gradient(below.output)
        operands: dict[int, int | str] = {
            0: self.gradient(layer.output),
            1: passed,
            2: weights,
            3: self.frozen.add(table),
        }
        if below.masked:
            flags |= n.FLAG_MASK
            operands[4] = self.place(below.output)
        fields["flags"] = flags
        size = memory.aligned(2 * outputs)
        return Record(n.OP_DENSE_BACK, f"gradient of {layer.name}", operands, (passed,), fields, scratch=size)

    def program(self, name: str, kind: int, records: list[Record], state: int) -> Program:
        answer = self.network.logits if kind == n.KIND_TRAIN else self.network.output
        output = self.place(answer)
        output = output if isinstance(output, str) else "act output"
        lives = self._lives(records, output)
        offsets, arena = memory.plan(lives)
        scratch = memory.aligned(max(r.scratch for r in records))
        target = 0
        if kind == n.KIND_TRAIN:
            target = 2 if self.network.loss == "softmax_ce" else answer.size
        else:
            state = 0
        sizes = (self.network.input.size, arena, len(self.frozen.data), len(self.train.data), state, scratch, target)
        operand = n.BUF_ARENA << 28 | offsets[output]
        head = struct.pack("<16s7IIIHBB8x", _padded_name(name), *sizes, operand, answer.size, len(records), kind, 0)
        body = b"".join(_pack(record, offsets) for record in records)
        return Program(name, records, lives, offsets, arena, scratch, head + body)

    def _lives(self, records: list[Record], output: str) -> list[memory.Life]:
        """When each arena tensor is in use, and which may take the place of which."""
        spans: dict[str, list[int]] = {}
        for at, record in enumerate(records):
            for tensor in record.reads():
                spans.setdefault(tensor, []).append(at)
        # The output is read after the program has ended.
        spans[output].append(len(records))
        heirs: dict[str, str] = {}
        for at, record in enumerate(records):
            for before in record.in_place:
                last_use = spans[before][-1] == at and before != record.writes[0]
                if last_use and before not in heirs and record.writes[0] not in heirs.values():
                    heirs[before] = record.writes[0]
        return [memory.Life(t, self.sizes[t], s[0], s[-1], heirs.get(t)) for t, s in spans.items()]

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
    try:
        return RECORD.pack(
            *(record.op, n.MODE_APPLY, f("flags"), f("rounding"), f("gate"), f("gain")),
            *operands,
            *(f(name) for name in ("in_h", "in_w", "in_c", "out_h", "out_w", "out_c")),
            *(f(name) for name in ("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_top", "pad_left")),
            *(f("zero_in"), f("zero_out"), f("act_min"), f("act_max")),
            *(f("w_dtype"), f("fraction"), f("scale_mant"), f("scale_exp"), f("extra")),
        )
    except struct.error:
        raise UserError(
            f"{record.name}: a dimension is too large; height, width and channels go up to 65,535, kernels, strides "
            f"and padding up to 255"
        ) from None


def _section(kind: int, value: bytes, required: bool = True) -> bytes:
    return struct.pack("<HHI", kind, n.SECTION_REQUIRED if required else 0, len(value)) + value + bytes(-len(value) % 8)


def _aliases(network: Network) -> dict[str, str]:
    """Tensors that a reshape renames: the name of the one whose memory they are."""
    alias: dict[str, str] = {}
    for op in network.ops:
        if isinstance(op, Reshape):
            alias[op.output.name] = alias.get(op.input.name, op.input.name)
    return alias


def _shape(tensor: Tensor) -> tuple[int, int, int, int]:
    return *tensor.shape, 0


def _digest_value(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, tuple):
        return b"(" + b",".join(_digest_value(v) for v in value) + b")"
    return repr(value).encode()


def model_identity(network: Network, tensors: list[Trainable], scheme: str) -> bytes:
    """16 bytes that name the canonical content, whatever the packing: operators, quantisation, weights, what trains."""
    digest = hashlib.sha256(scheme.encode())
    for op in network.ops:
        digest.update(type(op).__name__.encode())
        for part in fields(op):
            digest.update(_digest_value(getattr(op, part.name)))
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
        taps = layer.weights[0].size
        if taps > limit:
            raise UserError(f"{layer.name}: {taps} inputs could overflow the accumulator, at most {limit} cannot")
    c = _Compiler(network, options)
    first_state = state or c.state()
    # All records first: they fill FROZEN, whose size each program's header tells.
    training = [] if options.scheme == "none" else [*c.forward(True), c.loss(), *c.backward()]
    forward = c.forward(False)
    programs = [c.program("forward", n.KIND_FORWARD, forward, 0)]
    if training:
        programs.append(c.program("train", n.KIND_TRAIN, training, len(first_state)))
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
    first, last, logits = network.input, network.output, network.logits
    losses = {"none": n.LOSS_NONE, "softmax_ce": n.LOSS_SOFTMAX_CE, "mse": n.LOSS_MSE}
    loss_scale = logits.scale**2 / logits.size if network.loss == "mse" else 1 / 1024
    io = struct.pack("<4Hfi", *_shape(first), first.scale, first.zero)
    io += struct.pack("<4Hfi", *_shape(last), last.scale, last.zero)
    io += struct.pack("<HHf", losses[network.loss], 0, loss_scale)
    meta = {
        "labels": list(network.labels),
        "scheme": options.scheme,
        "weights": options.weights,
        "source": network.source,
        "layers": [record.name for record in forward],
        "tensors": [t.name for t in c.tensors],
    }
    sections = [
        _section(n.SECTION_IO, io),
        _section(n.SECTION_TENSORS, entries),
        *(_section(n.SECTION_PROGRAM, p.section) for p in programs),
        _section(n.SECTION_CUTS, _cuts(c, programs[0])),
        _section(n.SECTION_STATE, first_state),
        _section(n.SECTION_FROZEN, bytes(c.frozen.data)),
        _section(n.SECTION_TRAIN, bytes(c.train.data)),
        _section(n.SECTION_SCALES, tables, required=False),
        _section(n.SECTION_META, json.dumps(meta, separators=(",", ":")).encode(), required=False),
    ]
    return Plan(seal(model_id, sections), programs, c.tensors, network, options, model_id)


def _cuts(c: _Compiler, forward: Program) -> bytes:
    """A cut behind every layer but the last; what goes into the last one is also called 'features'."""
    result = b""
    ends = {record.writes[0]: i + 1 for i, record in enumerate(forward.records) if record.writes}
    cuts = [(layer.name, layer.output) for layer in c.layers[:-1]]
    if c.layers:
        cuts.append(("features", c.layers[-1].input))
    taken: set[bytes] = set()
    for i, (name, tensor) in enumerate(cuts):
        place = c.place(tensor)
        if not isinstance(place, str):
            continue
        if _padded_name(name) in taken:  # names are cut to 16 bytes
            name = f"{name[:10]}_{i + 1}"
        taken.add(_padded_name(name))
        operand = n.BUF_ARENA << 28 | forward.offsets[place]
        result += struct.pack("<16sHHII", _padded_name(name), 0, ends[place], operand, tensor.size)
        result += struct.pack("<4Hfii", *_shape(tensor), tensor.scale, tensor.zero, 0)
    return result
