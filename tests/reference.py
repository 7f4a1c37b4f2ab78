"""The plan format and its arithmetic once more: slow, readable, and independent of the C core that it judges.

Written from the comments of ulab_kernels/ul_format.h alone. Numbers are exact Python integers; every rounding is
written as the mathematical statement, a floor of a quotient, never as the shift that a fast implementation would use.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reference_arithmetic import (
    INT32_MAX,
    Scale,
    clamp,
    log2q,
    max_abs,
    mul11,
    round_half_up,
    rshift,
    stochastic_rshift,
    wq,
    wrap_int32,
    xorshift32,
)
from reference_forward import FORWARD
from reference_plan import (
    ARENA,
    BUFFER_NAMES,
    DTYPE_INT8,
    DTYPE_INT16,
    FLAG_GATE_DEEPER,
    FLAG_MASK,
    FLAG_ONE_SCALE,
    MODE_APPLY,
    NOTHING_TO_LEARN,
    READ_ONLY,
    ROUND_AWAY,
    ROUND_SINGLE,
    SCRATCH,
    STATE_BYTES,
    Operand,
    Plan,
    Program,
    Record,
    parse,
)

__all__ = ["Machine", "execute", "parse"]

GAIN_SAMPLES = 16
GAIN_MAX = 31
GRADIENT_HEADER = 4
MANTISSA_MAX = 2047
EXPONENT_MAX = 8192
BIAS_MAX = 2**30 - 1


# ---- STATE -----------------------------------------------------------------------------------------------------------

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


# ---- One board -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gradient:
    """Real value of element n: mantissas[n] * 2^exponent."""

    exponent: int
    mantissas: list[int]


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

    def read_scales(self, record: Record) -> list[Scale]:
        """Multiplier and shift, operands 4 and 5, by output channel; with ONE_SCALE the same one for all of them."""
        count = 1 if record.flags & FLAG_ONE_SCALE else record.out_c
        upper = self.read(record.operands[4], "i", count)
        lower = self.read(record.operands[4], "i", count, 4 * count) if record.rounding == ROUND_AWAY else [0] * count
        shift = self.read(record.operands[5], "b", count)
        scales = [Scale(upper[n], lower[n], shift[n], record.rounding) for n in range(count)]
        return scales * record.out_c if record.flags & FLAG_ONE_SCALE else scales


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


# ---- The records -----------------------------------------------------------------------------------------------------


def dense(machine: Machine, record: Record) -> None:
    """y[n] = clamp(round(bias[n] + sum_k (x[k] - zero_in) * wq(w[n][k])) + zero_out, act_min, act_max)"""
    if record.rounding not in (ROUND_SINGLE, ROUND_AWAY):
        raise ValueError(f"dense: rounding {record.rounding}, expected {ROUND_SINGLE} or {ROUND_AWAY}")
    x = machine.read(record.operands[0], "b", record.in_c)
    weights = machine.read_layer_weights(record)
    bias = machine.read(record.operands[3], "i", record.out_c)
    scales = machine.read_scales(record)
    y = []
    for n in range(record.out_c):
        exact = bias[n] + sum((x[k] - record.zero_in) * weights[n][k] for k in range(record.in_c))
        rounded = scales[n].round(wrap_int32(exact))
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
    **FORWARD,
}
BACKWARD = (DENSE_BACK, UPDATE_WEIGHT, UPDATE_BIAS)
