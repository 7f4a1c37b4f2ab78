"""The plan format and its arithmetic once more: slow, readable, and independent of the C core that it judges.

Written from the comments of ulab_kernels/ul_format.h alone. Numbers are exact Python integers; every rounding is
written as the mathematical statement, a floor of a quotient, never as the shift that a fast implementation would use.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

MAGIC = 0x504D4C75
VERSION = 1
FILE_HEADER = struct.Struct("<I H H I H H 16s 32s 32s")
SECTION_HEADER = struct.Struct("<H H I")
IO_SECTION = struct.Struct("<4H f i 4H f i H 2x f")
TENSOR_ENTRY = struct.Struct("<H B B H H H 2x 4H I I 4x")
CUT_ENTRY = struct.Struct("<16s H H I I 4H f i 4x")
PROGRAM_HEADER = struct.Struct("<16s 7I I I H B B 8x")
RECORD = struct.Struct("<4B 2H 6I 6H 6B 4b 2B H h I")

SECTION_REQUIRED = 1
IO, TENSORS, PROGRAM, CUTS, FROZEN_BLOB, TRAIN_BLOB, STATE_BLOB, SCALES, META = range(1, 10)

INPUT, ARENA, FROZEN, TRAIN, STATE, SCRATCH, TARGET = range(7)
BUFFER_NAMES = ("INPUT", "ARENA", "FROZEN", "TRAIN", "STATE", "SCRATCH", "TARGET")
READ_ONLY = (INPUT, FROZEN, TARGET)
OPERAND_NONE = 0xFFFFFFFF

DTYPE_INT8, DTYPE_INT16 = 1, 2
MODE_APPLY = 0
FLAG_MASK, FLAG_GATE_DEEPER = 1, 2
ROUND_SINGLE = 1
NOTHING_TO_LEARN = 1

GAIN_SAMPLES = 16
GAIN_MAX = 31
GRADIENT_HEADER = 4
MANTISSA_MAX = 2047
EXPONENT_MAX = 8192
BIAS_MAX = 2**30 - 1
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


# ---- The file ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operand:
    buffer: int
    offset: int


@dataclass(frozen=True)
class Record:
    op: int
    mode: int
    flags: int
    rounding: int
    gate: int
    gain: int
    operands: tuple[Operand | None, ...]
    in_h: int
    in_w: int
    in_c: int
    out_h: int
    out_w: int
    out_c: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_top: int
    pad_left: int
    zero_in: int
    zero_out: int
    act_min: int
    act_max: int
    w_dtype: int
    fraction: int
    scale_mant: int
    scale_exp: int
    extra: int


@dataclass(frozen=True)
class Program:
    name: str
    sizes: tuple[int, ...]  # by buffer
    output: Operand | None
    output_bytes: int
    kind: int
    flags: int
    records: list[Record]


@dataclass(frozen=True)
class Tensor:
    id: int
    dtype: int
    fraction: int
    flags: int
    capacity: int
    active: int
    shape: tuple[int, ...]
    offset: int
    scales: int


@dataclass(frozen=True)
class Cut:
    name: str
    program: int
    record: int
    operand: Operand | None
    length: int
    shape: tuple[int, ...]
    scale: float
    zero: int


@dataclass(frozen=True)
class InputOutput:
    in_shape: tuple[int, ...]
    in_scale: float
    in_zero: int
    out_shape: tuple[int, ...]
    out_scale: float
    out_zero: int
    loss: int
    loss_scale: float


@dataclass
class Plan:
    model_id: bytes = b""
    tag: bytes = b""
    io: InputOutput | None = None
    tensors: list[Tensor] = field(default_factory=list)
    programs: dict[str, Program] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)
    frozen: bytes = b""
    train: bytes = b""
    state: bytes = b""
    scales: bytes = b""
    meta: bytes = b""


def parse(data: bytes) -> Plan:
    """The plan in the bytes of an .ulm file; ValueError where they are no intact file of this version."""
    data = bytes(data)
    if len(data) < FILE_HEADER.size:
        raise ValueError(f"file: {len(data)} bytes, a header alone has {FILE_HEADER.size}")
    magic, version, flags, length, sections, zero, model_id, digest, tag = FILE_HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ValueError(f"file: magic 0x{magic:08X}, expected 0x{MAGIC:08X}")
    if version != VERSION:
        raise ValueError(f"file: version {version}, expected {VERSION}")
    if flags or zero:
        raise ValueError("file: unknown flags in the header")
    if length != len(data):
        raise ValueError(f"file: {len(data)} bytes, the header says {length}")
    if hashlib.sha256(data[:32] + bytes(64) + data[96:]).digest() != digest:
        raise ValueError("file: the hash does not match")

    plan = Plan(model_id=model_id, tag=tag)
    offset = FILE_HEADER.size
    count = 0
    while offset < length:
        if offset + SECTION_HEADER.size > length:
            raise ValueError(f"section at {offset}: the file ends in its header")
        kind, section_flags, size = SECTION_HEADER.unpack_from(data, offset)
        begin = offset + SECTION_HEADER.size
        offset = -(-(begin + size) // 8) * 8
        if offset > length:
            raise ValueError(f"section of type {kind}: {size} bytes reach beyond the file")
        if any(data[begin + size : offset]):
            raise ValueError(f"section of type {kind}: the padding is not zero")
        _take_section(plan, kind, section_flags, data[begin : begin + size])
        count += 1
    if count != sections:
        raise ValueError(f"file: {count} sections, the header says {sections}")
    return plan


def _take_section(plan: Plan, kind: int, flags: int, value: bytes) -> None:
    if kind == IO:
        plan.io = _parse_io(value)
    elif kind == TENSORS:
        plan.tensors = [_parse_tensor(entry) for entry in _entries(value, TENSOR_ENTRY, "tensors")]
    elif kind == PROGRAM:
        program = _parse_program(value)
        if program.name in plan.programs:
            raise ValueError(f"program {program.name}: there are two of this name")
        plan.programs[program.name] = program
    elif kind == CUTS:
        plan.cuts = [_parse_cut(entry) for entry in _entries(value, CUT_ENTRY, "cuts")]
    elif kind == FROZEN_BLOB:
        plan.frozen = value
    elif kind == TRAIN_BLOB:
        plan.train = value
    elif kind == STATE_BLOB:
        if len(value) < STATE_BYTES:
            raise ValueError(f"state: {len(value)} bytes, expected at least {STATE_BYTES}")
        plan.state = value
    elif kind == SCALES:
        plan.scales = value
    elif kind == META:
        plan.meta = value
    elif flags & SECTION_REQUIRED:
        raise ValueError(f"section of type {kind}: required and unknown")


def _entries(value: bytes, layout: struct.Struct, what: str) -> list[tuple]:
    if len(value) % layout.size:
        raise ValueError(f"{what}: {len(value)} bytes are no multiple of {layout.size}")
    return list(layout.iter_unpack(value))


def _name(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode()


def _operand(word: int) -> Operand | None:
    return None if word == OPERAND_NONE else Operand(word // 2**28, word % 2**28)


def _parse_io(value: bytes) -> InputOutput:
    if len(value) != IO_SECTION.size:
        raise ValueError(f"io: {len(value)} bytes, expected {IO_SECTION.size}")
    v = IO_SECTION.unpack(value)
    return InputOutput(v[0:4], v[4], v[5], v[6:10], v[10], v[11], v[12], v[13])


def _parse_tensor(v: tuple) -> Tensor:
    return Tensor(*v[0:6], v[6:10], v[10], v[11])


def _parse_cut(v: tuple) -> Cut:
    return Cut(_name(v[0]), v[1], v[2], _operand(v[3]), v[4], v[5:9], v[9], v[10])


def _parse_program(value: bytes) -> Program:
    if len(value) < PROGRAM_HEADER.size:
        raise ValueError(f"program: {len(value)} bytes, its header alone has {PROGRAM_HEADER.size}")
    v = PROGRAM_HEADER.unpack_from(value)
    records = [_parse_record(entry) for entry in _entries(value[PROGRAM_HEADER.size :], RECORD, "records")]
    if len(records) != v[10]:
        raise ValueError(f"program {_name(v[0])}: {len(records)} records, the header says {v[10]}")
    return Program(_name(v[0]), v[1:8], _operand(v[8]), v[9], v[11], v[12], records)


def _parse_record(v: tuple) -> Record:
    return Record(*v[0:6], tuple(_operand(word) for word in v[6:12]), *v[12:])


# ---- STATE ---------------------------------------------------------------------------------------------------------

STATE_BYTES = 48
STATE_FIELDS = {  # name: offset and struct code
    "rng": (0, "I"),
    "step": (4, "I"),
    "lr_mant": (8, "H"),
    "lr_exp": (10, "h"),
    "saturated": (12, "I"),
    "clipped": (16, "I"),
    "skipped": (20, "I"),
    "loss": (24, "i"),
    "skip_below": (28, "H"),
    "flags": (30, "H"),
    "n_gains": (32, "H"),
    "n_gates": (34, "H"),
    "n_active": (36, "H"),
    "gates": (38, "H"),
}


def get_state(state: bytes | bytearray, name: str) -> int:
    offset, code = STATE_FIELDS[name]
    return struct.unpack_from("<" + code, state, offset)[0]


def set_state(state: bytearray, name: str, value: int) -> None:
    offset, code = STATE_FIELDS[name]
    try:
        struct.pack_into("<" + code, state, offset, value)
    except struct.error as error:
        raise ValueError(f"state: {name} = {value} does not fit") from error


def add_state(state: bytearray, name: str, amount: int) -> None:
    """Takes a u32 counter on; it goes round at 2^32."""
    set_state(state, name, (get_state(state, name) + amount) % 2**32)


def set_learning_rate(state: bytearray, mantissa: int, exponent: int) -> None:
    """learning rate = mantissa * 2^exponent"""
    if mantissa != 0 and not 1024 <= mantissa <= 2047:
        raise ValueError(f"learning rate: mantissa {mantissa}, expected 0 or 1024..2047")
    set_state(state, "lr_mant", mantissa)
    set_state(state, "lr_exp", exponent)


def get_gains(state: bytes | bytearray) -> list[tuple[int, int]]:
    """(gain, seen) of every gain."""
    return [struct.unpack_from("<bB", state, STATE_BYTES + 2 * i) for i in range(get_state(state, "n_gains"))]


def get_gates(state: bytes | bytearray) -> list[int]:
    begin = get_state(state, "gates")
    return list(state[begin : begin + get_state(state, "n_gates")])


def set_gate(state: bytearray, index: int, value: int) -> None:
    if not 0 <= index < get_state(state, "n_gates"):
        raise ValueError(f"state: there is no gate {index}")
    state[get_state(state, "gates") + index] = value


# ---- Arithmetic ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gradient:
    """Real value of element n: mantissas[n] * 2^exponent."""

    exponent: int
    mantissas: list[int]


def clamp(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))


def round_half_up(numerator: int, denominator: int) -> int:
    """floor(numerator / denominator + 1/2) for a denominator above 0"""
    return (2 * numerator + denominator) // (2 * denominator)


def max_abs(values: Sequence[int]) -> int:
    return max((abs(value) for value in values), default=0)


def wrap_int32(value: int) -> int:
    """The number from -2^31 to 2^31 - 1 that equals value mod 2^32."""
    return (value + 2**31) % 2**32 - 2**31


def rshift(p: int, s: int) -> int:
    """p / 2^s rounded half up; 0 for s > 30; for s <= 0 saturated to +-2^30."""
    if s > 30:
        return 0
    if s <= 0:
        return clamp(p * 2**-s, -(2**30), 2**30)
    return round_half_up(p, 2**s)


def wq(weight: int, fraction: int) -> int:
    """The weight that layers compute with: weight / 2^fraction, rounded half up. int8 weights have fraction 0."""
    return round_half_up(weight, 2**fraction)


def requantise(acc: int, multiplier: int, shift: int, rounding: int) -> int:
    """floor((acc * multiplier + 2^(30 - shift)) / 2^(31 - shift)), saturated to 32 bits"""
    if rounding != ROUND_SINGLE:
        raise ValueError(f"rounding {rounding} is refused, expected {ROUND_SINGLE}")
    shift = clamp(shift, -31, 30)
    return clamp((acc * multiplier + 2 ** (30 - shift)) // 2 ** (31 - shift), INT32_MIN, INT32_MAX)


def log2q(value: int) -> int:
    """1024 * log2(value), cut off, from the 16 leading bits of the value: ten squarings, one bit each."""
    n = value.bit_length() - 1
    x = value * 2**15 // 2**n
    result = n
    for _ in range(10):
        x = x * x // 2**15
        bit = x // 2**16
        x = x // 2 if bit else x
        result = 2 * result + bit
    return result


def mul11(a: int, b: int) -> tuple[int, int]:
    """(m, e) with a * b ~ m * 2^e and m in 1024..2047, for a and b in 1024..2047; (0, 0) where one of them is 0."""
    product = a * b
    if product == 0:
        return 0, 0
    exponent = 11 if product >= 2**21 else 10
    mantissa = round_half_up(product, 2**exponent)
    if mantissa == 2048:
        return 1024, exponent + 1
    return mantissa, exponent


def xorshift32(x: int) -> int:
    x ^= x * 2**13 % 2**32
    x ^= x // 2**17
    x ^= x * 2**5 % 2**32
    return x


def stochastic_rshift(p: int, s: int, r: int) -> int:
    """p / 2^s, rounded up with a probability equal to the fraction that is cut off; r is uniform in 0..2^32 - 1."""
    if s <= 0:
        return rshift(p, s)
    if s > 30:
        p //= 2 ** min(s - 30, 31)
        s = 30
    return (p + r // 2 ** (32 - s)) // 2**s


# ---- One board -----------------------------------------------------------------------------------------------------


class Machine:
    """One board: a plan, its own trainable weights and STATE, an arena that persists between runs."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.train = bytearray(plan.train)
        self.state = bytearray(plan.state)
        self.arena = bytearray(max((program.sizes[ARENA] for program in plan.programs.values()), default=0))
        self.scratch = bytearray(max((program.sizes[SCRATCH] for program in plan.programs.values()), default=0))
        self.input = b""
        self.target = b""

    def run(self, program: str, x: bytes, target: bytes = b"", first: int = 0, count: int | None = None) -> None:
        """Executes the records [first, first + count) of a program, to its end without a count."""
        chosen = self._program(program)
        if count is None:
            count = len(chosen.records) - first
        if first < 0 or count < 0 or first + count > len(chosen.records):
            raise ValueError(f"run: records {first} + {count} lie outside the program's {len(chosen.records)}")
        self.input, self.target = _as_bytes(x), _as_bytes(target)
        for buffer, needed in enumerate(chosen.sizes):
            if len(self.buffer(buffer)) < needed:
                raise ValueError(f"{BUFFER_NAMES[buffer]}: {len(self.buffer(buffer))} bytes, expected {needed}")
        for record in chosen.records[first : first + count]:
            execute(self, record)

    def output(self, program: str) -> bytes:
        chosen = self._program(program)
        if chosen.output is None:
            raise ValueError(f"program {program}: it has no output")
        begin = chosen.output.offset
        result = bytes(self.buffer(chosen.output.buffer)[begin : begin + chosen.output_bytes])
        if len(result) != chosen.output_bytes:
            raise ValueError(f"program {program}: its output lies outside its buffer")
        return result

    def predict(self, x: bytes) -> bytes:
        self.run("forward", x)
        return self.output("forward")

    def step(self, x: bytes, target: int | bytes) -> None:
        """One step of training towards a label or an int8 vector in the output's quantisation."""
        if isinstance(target, int):
            if not 0 <= target < 2**16:
                raise ValueError(f"step: label {target} is not within 0..65535")
            target = struct.pack("<H", target)
        self.run("train", x, target)

    def buffer(self, index: int) -> bytes | bytearray:
        buffers = (self.input, self.arena, self.plan.frozen, self.train, self.state, self.scratch, self.target)
        if index >= len(buffers):
            raise ValueError(f"operand: there is no buffer {index}")
        return buffers[index]

    def _program(self, name: str) -> Program:
        if name not in self.plan.programs:
            raise ValueError(f"plan: there is no program {name}")
        return self.plan.programs[name]

    # What records read and write: count integers of one struct code (b, B, h, H, i) at an operand.

    def read(self, operand: Operand | None, code: str, count: int, skip: int = 0) -> list[int]:
        if operand is None:
            raise ValueError("record: an operand is missing")
        try:
            return list(struct.unpack_from(f"<{count}{code}", self.buffer(operand.buffer), operand.offset + skip))
        except struct.error as error:
            raise ValueError(f"record: {operand} lies outside its buffer") from error

    def write(self, operand: Operand | None, code: str, values: Sequence[int], skip: int = 0) -> None:
        if operand is None:
            raise ValueError("record: an operand is missing")
        target = self.buffer(operand.buffer)
        if operand.buffer in READ_ONLY or not isinstance(target, bytearray):
            raise ValueError(f"record: {BUFFER_NAMES[operand.buffer]} is only read")
        try:
            struct.pack_into(f"<{len(values)}{code}", target, operand.offset + skip, *values)
        except struct.error as error:
            raise ValueError(f"record: {operand} lies outside its buffer, or a value outside its type") from error

    def read_gradient(self, operand: Operand | None, count: int) -> Gradient:
        return Gradient(self.read(operand, "h", 1)[0], self.read(operand, "h", count, GRADIENT_HEADER))

    def write_gradient(self, operand: Operand | None, gradient: Gradient) -> None:
        """i16 exponent, u16 max|mantissa|, i16 mantissa[n]"""
        self.write(operand, "h", [gradient.exponent])
        self.write(operand, "H", [max_abs(gradient.mantissas)], 2)
        self.write(operand, "h", gradient.mantissas, GRADIENT_HEADER)

    def read_layer_weights(self, record: Record) -> list[list[int]]:
        """wq(w[n][k]) of the weights at operand 2, by output channel."""
        code = _weight_code(record)
        fraction = record.fraction if record.w_dtype == DTYPE_INT16 else 0
        flat = [wq(w, fraction) for w in self.read(record.operands[2], code, record.out_c * record.in_c)]
        return [flat[n * record.in_c : (n + 1) * record.in_c] for n in range(record.out_c)]


def _as_bytes(values: bytes) -> bytes:
    return bytes(memoryview(values).cast("B"))


def _weight_code(record: Record) -> str:
    if record.w_dtype == DTYPE_INT8:
        return "b"
    if record.w_dtype == DTYPE_INT16:
        return "h"
    raise ValueError(f"record: weights of type {record.w_dtype}, expected {DTYPE_INT8} or {DTYPE_INT16}")


def execute(machine: Machine, record: Record) -> None:
    """One record: refused, passed over, or run."""
    if record.op not in RECORDS:
        raise ValueError(f"record: type {record.op} is unknown")
    if record.mode != MODE_APPLY:
        raise ValueError(f"record: mode {record.mode} is refused in version 1")
    if not gate_is_on(machine.state, record):
        return
    if record.op in BACKWARD and get_state(machine.state, "flags") & NOTHING_TO_LEARN:
        return
    RECORDS[record.op](machine, record)


def gate_is_on(state: bytes | bytearray, record: Record) -> bool:
    """No gate is an open one. With GATE_DEEPER, any gate from the record's own to the last one will do."""
    if record.gate == 0:
        return True
    end = record.gate + 1
    if record.flags & FLAG_GATE_DEEPER:
        end = max(end, get_state(state, "gates") + get_state(state, "n_gates"))
    gates = state[record.gate : end]
    if not gates:
        raise ValueError(f"record: its gate at {record.gate} lies outside STATE")
    return any(gates)


# ---- The records ---------------------------------------------------------------------------------------------------


def dense(machine: Machine, record: Record) -> None:
    """y[n] = clamp(round(bias[n] + sum_k (x[k] - zero_in) * wq(w[n][k])) + zero_out, act_min, act_max)"""
    x = machine.read(record.operands[0], "b", record.in_c)
    weights = machine.read_layer_weights(record)
    bias = machine.read(record.operands[3], "i", record.out_c)
    multiplier = machine.read(record.operands[4], "i", record.out_c)
    shift = machine.read(record.operands[5], "b", record.out_c)
    y = []
    for n in range(record.out_c):
        exact = bias[n] + sum((x[k] - record.zero_in) * weights[n][k] for k in range(record.in_c))
        rounded = requantise(wrap_int32(exact), multiplier[n], shift[n], record.rounding)
        y.append(clamp(rounded + record.zero_out, record.act_min, record.act_max))
    machine.write(record.operands[1], "b", y)


def relu(machine: Machine, record: Record) -> None:
    """y[k] = clamp(x[k], act_min, act_max)"""
    x = machine.read(record.operands[0], "b", record.in_c)
    machine.write(record.operands[1], "b", [clamp(value, record.act_min, record.act_max) for value in x])


def softmax_ce(machine: Machine, record: Record) -> None:
    """gradient[n] = p[n] - (n == label), p = e / sum(e), e[n] = table[max(logits) - logits[n]]; loss = -ln p[label]"""
    logits = machine.read(record.operands[0], "b", record.out_c)
    table = machine.read(record.operands[2], "H", record.extra)
    label = machine.read(record.operands[3], "H", 1)[0]
    if label >= record.out_c:
        raise ValueError(f"softmax: label {label}, expected one below {record.out_c}")
    below_top = [max(logits) - logit for logit in logits]
    e = [table[distance] if distance < len(table) else 0 for distance in below_top]
    total = sum(e)
    if total == 0:
        raise ValueError("softmax: the exponentials sum to 0")
    d = [e[n] - (total if n == label else 0) for n in range(record.out_c)]
    loss = round_half_up((log2q(total) - log2q(max(1, e[label]))) * 710, 1024)
    certain = max_abs(d) * 65536 // total < get_state(machine.state, "skip_below")
    machine.write_gradient(record.operands[1], normalised(d, total))
    finish_loss(machine.state, loss, max_abs(d) == 0 or certain)


def normalised(d: Sequence[int], total: int) -> Gradient:
    """d / total as a gradient whose largest mantissa lies within 1024..2047."""
    largest = max_abs(d)
    if largest == 0:
        return Gradient(0, [0 for _ in d])
    j = 0
    while largest * 2**j < total:
        j += 1
    k = j + 10
    size = [min(MANTISSA_MAX, round_half_up(abs(value) * 2**k, total)) for value in d]
    return Gradient(-k, [-size[n] if d[n] < 0 else size[n] for n in range(len(d))])


def mse(machine: Machine, record: Record) -> None:
    """gradient[n] = output[n] - target[n], as mantissas of 11 bits; loss = sum of the differences' squares"""
    output = machine.read(record.operands[0], "b", record.out_c)
    target = machine.read(record.operands[3], "b", record.out_c)
    difference = [output[n] - target[n] for n in range(record.out_c)]
    j = 11 - max_abs(difference).bit_length() if max_abs(difference) else 0
    machine.write_gradient(record.operands[1], Gradient(-j, [d * 2**j for d in difference]))
    finish_loss(machine.state, sum(value * value for value in difference), max_abs(difference) == 0)


def finish_loss(state: bytearray, loss: int, nothing_to_learn: bool) -> None:
    """What every loss leaves in STATE."""
    set_state(state, "loss", loss)
    add_state(state, "step", 1)
    flags = get_state(state, "flags")
    if nothing_to_learn:
        set_state(state, "flags", flags | NOTHING_TO_LEARN)
        add_state(state, "skipped", 1)
    else:
        set_state(state, "flags", flags & ~NOTHING_TO_LEARN)


def dense_back(machine: Machine, record: Record) -> None:
    """gradient_in[k] = sum_n gradient_out[n] * channel_scale[n] * wq(w[n][k]), 0 where masked"""
    out = machine.read_gradient(record.operands[0], record.out_c)
    channel_scale = machine.read(record.operands[3], "H", record.out_c)
    g = [round_half_up(out.mantissas[n] * channel_scale[n], 65536) for n in range(record.out_c)]
    if max_abs(g) == 0:
        machine.write_gradient(record.operands[1], Gradient(0, [0] * record.in_c))
        return
    weights = machine.read_layer_weights(record)
    acc = [sum(g[n] * weights[n][k] for n in range(record.out_c)) for k in range(record.in_c)]
    if record.flags & FLAG_MASK:
        x = machine.read(record.operands[4], "b", record.in_c)
        acc = [0 if x[k] == record.act_min else acc[k] for k in range(record.in_c)]
    if max_abs(acc) > INT32_MAX:
        raise ValueError("dense_back: an accumulator needs more than 32 bits, which the host's bounds rule out")
    b = max_abs(g).bit_length()
    s = clamp(b + learned_gain(machine.state, record.gain, max_abs(acc).bit_length(), b) - 10, 0, 30)
    exact = [rshift(value, s) for value in acc]
    add_state(machine.state, "saturated", sum(abs(value) > MANTISSA_MAX for value in exact))
    exponent = clamp(out.exponent + record.scale_exp + s, -EXPONENT_MAX, EXPONENT_MAX)
    mantissas = [clamp(value, -MANTISSA_MAX, MANTISSA_MAX) for value in exact]
    machine.write_gradient(record.operands[1], Gradient(exponent, mantissas))


def learned_gain(state: bytearray, offset: int, a: int, b: int) -> int:
    """The largest a - b of the first 16 samples that had an accumulator other than 0; 0 for a record without a gain."""
    if offset == 0:
        return 0
    gain, seen = struct.unpack_from("<bB", state, offset)
    if a > 0 and seen < GAIN_SAMPLES:
        gain = a - b if seen == 0 else max(gain, a - b)
        struct.pack_into("<bB", state, offset, gain, seen + 1)
    return clamp(gain, -GAIN_MAX, GAIN_MAX)


def update_factor(state: bytes | bytearray, record: Record, exponent_out: int, entry: int) -> tuple[int, int]:
    """(m, s): learning rate * scale of the record * reciprocal of the channel's weight scale * 2^exponent_out
    = m * 2^-s"""
    m, i = mul11(record.scale_mant, get_state(state, "lr_mant"))
    m, j = mul11(m, 1024 + entry % 1024)
    return m, -(exponent_out + record.scale_exp + get_state(state, "lr_exp") + i + j + entry // 1024)


def update_weight(machine: Machine, record: Record) -> None:
    """w[n][k] -= learning rate * gradient_out[n] * (x[k] - zero_in), in units of the stored weight"""
    out = machine.read_gradient(record.operands[0], record.out_c)
    x = machine.read(record.operands[1], "b", record.in_c)
    table = machine.read(record.operands[3], "H", record.out_c)
    code = _weight_code(record)
    weights = machine.read(record.operands[2], code, record.out_c * record.in_c)
    limit = 127 if record.w_dtype == DTYPE_INT8 else 32767
    rng = get_state(machine.state, "rng")
    clipped = 0
    for n in range(record.out_c):
        if out.mantissas[n] == 0:
            continue
        m, s = update_factor(machine.state, record, out.exponent, table[n])
        for k in range(record.in_c):
            p = out.mantissas[n] * m * (x[k] - record.zero_in)
            if record.w_dtype == DTYPE_INT8:
                rng = xorshift32(rng)
                change = stochastic_rshift(p, s, rng)
            else:
                change = rshift(p, s)
            exact = weights[n * record.in_c + k] - change
            weights[n * record.in_c + k] = clamp(exact, -limit, limit)
            clipped += abs(exact) > limit
    machine.write(record.operands[2], code, weights)
    set_state(machine.state, "rng", rng)
    add_state(machine.state, "clipped", clipped)


def update_bias(machine: Machine, record: Record) -> None:
    """bias[n] -= learning rate * gradient_out[n], in units of the accumulator"""
    out = machine.read_gradient(record.operands[0], record.out_c)
    bias = machine.read(record.operands[2], "i", record.out_c)
    table = machine.read(record.operands[3], "H", record.out_c)
    clipped = 0
    for n in range(record.out_c):
        if out.mantissas[n] == 0:
            continue
        m, s = update_factor(machine.state, record, out.exponent, table[n])
        exact = clamp(bias[n], -BIAS_MAX, BIAS_MAX) - rshift(out.mantissas[n] * m, s)
        bias[n] = clamp(exact, -BIAS_MAX, BIAS_MAX)
        clipped += abs(exact) > BIAS_MAX
    machine.write(record.operands[2], "i", bias)
    add_state(machine.state, "clipped", clipped)


DENSE, RELU, SOFTMAX_CE, MSE, DENSE_BACK, UPDATE_WEIGHT, UPDATE_BIAS = range(1, 8)
RECORDS: dict[int, Callable[[Machine, Record], None]] = {
    DENSE: dense,
    RELU: relu,
    SOFTMAX_CE: softmax_ce,
    MSE: mse,
    DENSE_BACK: dense_back,
    UPDATE_WEIGHT: update_weight,
    UPDATE_BIAS: update_bias,
}
BACKWARD = (DENSE_BACK, UPDATE_WEIGHT, UPDATE_BIAS)
