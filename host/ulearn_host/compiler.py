"""From a quantised network and a scheme to a plan: differentiation, scheduling and memory planning at compile time."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from ulearn_host import memory, scales
from ulearn_host import numbers as n
from ulearn_host.backward import Backward, Context, Slots, mask_name, masks
from ulearn_host.errors import UserError
from ulearn_host.lowering import Blob, Lowering, Record, shapes
from ulearn_host.network import Dense, Network, Op, Softmax, Tensor
from ulearn_host.parameters import Kept, Parameters, Trainable, WeightType
from ulearn_host.recompute import fewest_bytes, original
from ulearn_host.records import RECORD
from ulearn_host.schemes import NOTHING, Scheme, Selection, aliases, check, lowest, selection, upstream

GradientType = Literal["int16", "int8"]
DEFAULT_SKIP = 1 / 16
# What a Trainer starts with when it is not told and `prepare` had no samples to measure it on: of dense networks best
# on the accelerometer windows (tests/adaptation.py), rounded to the cautious side where the best is broad; of networks
# with convolutions, where a bias moves a whole image, as keywords need it (tests/speakers.py).
_RATES: dict[Scheme, float] = {
    "last": 0.03,
    "bias": 0.3,
    "last+bias": 0.03,
    "sparse": 0.03,
    "full": 0.01,
    "none": 0.03,
}
_RATES_OF_IMAGES = _RATES | {"bias": 0.01, "last+bias": 0.01, "sparse": 0.003, "full": 0.0003}


@dataclass(frozen=True)
class Options:
    """How a network is to be trained.

    selection: for the scheme 'sparse', (rows, bias) for each layer, see schemes.Part. fraction: fraction bits of int16
    weights. gradients: int16 keeps 12-bit mantissas everywhere, int8 8-bit ones for gradients of 256 numbers or more.
    gates: a board can switch each trainable tensor off. layerwise: one training program for each trained layer, so that
    nothing below it has to be kept. recompute: activations are computed again where that makes the arena smaller.
    """

    scheme: Scheme = "last+bias"
    weights: WeightType = "int16"
    fraction: int = 6
    gates: bool = True
    selection: tuple[tuple[int, bool], ...] | None = None
    gradients: GradientType = "int16"
    layerwise: bool = False
    recompute: bool = False

    def parts(self, network: Network) -> Selection:
        """What of each layer trains."""
        return selection(network, self.scheme, self.selection)


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


def check_trainable(network: Network, scheme: Scheme) -> None:
    """Raise UserError where a named scheme asks for gradients that are not supported."""
    check(network, selection(network, scheme), scheme)


class _Compiler:
    def __init__(self, network: Network, options: Options) -> None:
        self.network, self.options = network, options
        self.parts = options.parts(network)
        check(network, self.parts, options.scheme)
        self.layers = network.layers
        self.frozen, self.train = Blob(n.BUF_FROZEN), Blob(n.BUF_TRAIN)
        self.lowering = Lowering(self.frozen, self.place)
        self.alias = aliases(network)
        self.sizes: dict[str, int] = {}
        self.lowered: dict[int, list[Record]] = {}
        parameters = Parameters(self.lowering, self.train, options.weights, options.fraction)
        self.kept: dict[int, Kept] = {}
        deeper = upstream(network, self.parts)
        for i, (layer, part) in enumerate(zip(self.layers, self.parts, strict=True)):
            below = deeper[self.alias.get(layer.input.name, layer.input.name)]
            self.kept[i] = parameters.keep(layer, part, bool(below))
        self.tensors = parameters.tensors
        self.slots = Slots()
        # Gates from the loss towards the input, one a trainable tensor of the canonical network.
        for i in reversed(range(len(self.layers))):
            self.slots.gates += [(i, "weight")] * (self.parts[i].rows > 0) + [(i, "bias")] * self.parts[i].bias

    def place(self, tensor: Tensor) -> int | str:
        """Where an activation lies: the caller's input, or the arena."""
        name = self.alias.get(tensor.name, tensor.name)
        if name == self.network.input.name:
            return n.BUF_INPUT << 28
        self.sizes["act " + name] = tensor.size
        return "act " + name

    def forward(self, training: Selection | None = None) -> list[Record]:
        """The network's records; a training program has no use for the softmax behind the logits, but for masks.

        training: what it trains.
        """
        records: list[Record] = []
        index = {id(layer): i for i, layer in enumerate(self.layers)}
        masked = {id(op) for op in masks(self.network, training)} if training else set()
        for op in self.network.ops:
            if training and isinstance(op, Softmax) and op is self.network.ops[-1]:
                continue
            if id(op) not in self.lowered:  # once, so that both programs read the same constants
                i = index.get(id(op))
                self.lowered[id(op)] = self.lowering.records(op) if i is None else self.kept[i].records
            records += self.lowered[id(op)]
            if id(op) in masked:
                records.append(self._mask(op))
        output = self.network.output
        if not isinstance(self.place(output), str):  # nothing but reshapes: the answer still lies in the arena
            self.sizes["act output"] = output.size
            fields = {"in_h": 1, "in_w": 1, "in_c": output.size, "out_h": 1, "out_w": 1, "out_c": output.size}
            operands: dict[int, int | str] = {0: self.place(output), 1: "act output"}
            records.append(Record(n.OP_COPY, "copy", operands, ("act output",), fields))
        return records

    def _mask(self, op: Op) -> Record:
        name = mask_name(op)
        self.sizes[name] = -(-op.output.size // 8)
        fields = shapes(op.output.shape, op.output.shape) | {"act_min": lowest(op), "act_max": 127}
        operands: dict[int, int | str] = {0: self.place(op.output), 1: name}
        return Record(n.OP_MASK, f"which of {op.name} pass", operands, (name,), fields)

    def training(self) -> list[tuple[str, list[Record]]]:
        """The training programs' names and records."""
        trained = [i for i, part in enumerate(self.parts) if part.any]
        if not self.options.layerwise or len(trained) < 2:
            choices = [("train", self.parts)]
        else:
            choices = []
            for i in reversed(trained):
                choices.append(
                    (f"train {self.layers[i].name}", tuple(p if j == i else NOTHING for j, p in enumerate(self.parts)))
                )
        programs, gated = [], []
        for name, parts in choices:
            context = Context(
                network=self.network,
                frozen=self.frozen,
                sizes=self.sizes,
                place=self.place,
                kept=self.kept,
                slots=self.slots,
                narrow=self.options.gradients == "int8",
                gated=self.options.gates,
            )
            backward = Backward(context, parts)
            forward, back = self.forward(parts), backward.records()
            programs.append(
                (name, fewest_bytes(forward, back, self._lives) if self.options.recompute else forward + back)
            )
            gated += backward.gates
        for record, gate in gated:  # the gates lie behind the gains, of which all are known now
            record.fields["gate"] = self.slots.first_gate + gate
        return programs

    def program(self, name: str, kind: int, records: list[Record], state: int, short: bytes | None = None) -> Program:
        if len(records) > n.RECORDS_MAX:
            raise UserError(
                f"the program '{name}' would take {len(records):,} records, a plan has {n.RECORDS_MAX:,} at most; "
                f"choose a scheme that trains less of the network"
            )
        answer = self.network.logits if kind == n.KIND_TRAIN else self.network.output
        output = self.place(answer)
        output = output if isinstance(output, str) else "act output"
        lives = self._lives(records, output)
        offsets, arena = memory.plan(lives)
        scratch = memory.aligned(max(r.scratch for r in records))
        target = 0
        if kind == n.KIND_TRAIN:
            target = answer.size if self.network.loss == "mse" else 2
        else:
            state = 0
        sizes = (self.network.input.size, arena, target, len(self.train.data), state, scratch, len(self.frozen.data))
        operand = n.BUF_ARENA << 28 | offsets[output]
        head = struct.pack(
            "<16s7IIIHBB8x", short or _padded_name(name), *sizes, operand, answer.size, len(records), kind, 0
        )
        body = b"".join(_pack(record, offsets) for record in records)
        return Program(name, records, lives, offsets, arena, scratch, head + body)

    def _lives(self, records: list[Record], output: str | None = None) -> list[memory.Life]:
        """When each arena tensor is in use, and which may take the place of which. output: what is read at the end."""
        spans: dict[str, list[int]] = {}
        for at, record in enumerate(records):
            for tensor in record.reads():
                spans.setdefault(tensor, []).append(at)
        if output is not None:
            spans[output].append(len(records))
        heirs: dict[str, str] = {}
        for at, record in enumerate(records):
            for before in record.in_place:
                last_use = spans[before][-1] == at and before != record.writes[0]
                if last_use and before not in heirs and record.writes[0] not in heirs.values():
                    heirs[before] = record.writes[0]
        return [memory.Life(t, self._size(t), s[0], s[-1], heirs.get(t)) for t, s in spans.items()]

    def _size(self, tensor: str) -> int:
        """Bytes of an arena tensor; one that is made again is as large as it was."""
        return self.sizes[original(tensor)]

    def state(self) -> bytes:
        """The first STATE: every gate open, gains still to be learned, the default rate."""
        gains, gates = len(self.slots.gains), len(self.slots.gates) if self.options.gates else 0
        rates = _RATES if all(isinstance(layer, Dense) for layer in self.layers) else _RATES_OF_IMAGES
        mantissa, exponent = scales.mantissa11(rates[self.options.scheme])
        head = struct.pack(
            "<IIHhIIIiHHHHHH8x",
            *(1, 0, mantissa, exponent, 0, 0, 0, 0, round(DEFAULT_SKIP * 65536), 0),
            *(gains, gates, 0, self.slots.first_gate),
        )
        body = head + bytes(n.GAIN_BYTES * gains) + b"\1" * gates
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
    c = _Compiler(network, options)
    # All records first: they fill FROZEN, whose size each program's header tells.
    training = [] if options.scheme == "none" else c.training()
    first_state = state or c.state()
    forward = c.forward()
    programs = [c.program("forward", n.KIND_FORWARD, forward, 0)]
    taken: set[bytes] = set()
    for i, (name, records) in enumerate(training):
        short = _padded_name(name) if _padded_name(name) not in taken else _padded_name(f"train {i + 1}")
        taken.add(short)  # names are cut to 16 bytes
        programs.append(c.program(name, n.KIND_TRAIN, records, len(first_state), short))
    model_id = model_identity(network, c.tensors, f"{options.scheme} {options.weights} {c.parts}")
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
    losses = {
        "none": n.LOSS_NONE,
        "softmax_ce": n.LOSS_SOFTMAX_CE,
        "mse": n.LOSS_MSE,
        "hinge": n.LOSS_HINGE,
    }
    units = {"mse": logits.scale**2 / logits.size, "hinge": logits.scale}
    loss_scale = units.get(network.loss, 1 / 1024)
    io = struct.pack("<4Hfi", *_shape(first), first.scale, first.zero)
    io += struct.pack("<4Hfi", *_shape(last), last.scale, last.zero)
    io += struct.pack("<HHf", losses[network.loss], 0, loss_scale)
    meta = {
        "labels": list(network.labels),
        "scheme": options.scheme,
        "weights": options.weights,
        "gradients": options.gradients,
        "selection": [list(part) for part in c.parts],
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
