"""The plan format and its arithmetic once more: slow, readable, and independent of the C core that it judges.

Written from the comments of ulab_kernels/ul_format.h alone. Numbers are exact Python integers; every rounding is
written as the mathematical statement, a floor of a quotient, never as the shift that a fast implementation would use.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from reference_arithmetic import (
    Gradient,
    Scale,
    clamp,
    log2q,
    max_abs,
    round_half_up,
    top,
    wrap_int32,
)
from reference_backward import BACKWARD
from reference_forward import FORWARD, read_trained_rows
from reference_plan import (
    ARENA,
    BUFFER_NAMES,
    FLAG_AGAIN,
    FLAG_GATE_DEEPER,
    FLAG_ONE_SCALE,
    MODE_APPLY,
    NOTHING_TO_LEARN,
    READ_ONLY,
    ROUND_AWAY,
    ROUND_SINGLE,
    SCRATCH,
    Operand,
    Plan,
    Program,
    Record,
    parse,
)
from reference_state import finish_loss, get_gains, get_gates, get_state, set_gate, set_learning_rate, set_state

__all__ = [
    "Machine",
    "execute",
    "get_gains",
    "get_gates",
    "get_state",
    "parse",
    "set_gate",
    "set_learning_rate",
    "set_state",
]

GRADIENT_HEADER = 4


# ---- One board -------------------------------------------------------------------------------------------------------


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
        buffers = (self.input, self.arena, self.target, self.train, self.state, self.scratch, self.plan.frozen)
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

    def read_gradient(self, operand: Operand | None, count: int, narrow: bool) -> Gradient:
        """Mantissas are cut to their range."""
        stored = self.read(operand, "b" if narrow else "h", count, GRADIENT_HEADER)
        mantissas = [clamp(mantissa, -top(narrow), top(narrow)) for mantissa in stored]
        return Gradient(self.read(operand, "h", 1)[0], mantissas)

    def read_largest(self, operand: Operand | None) -> int:
        """max|mantissa| as the header of a gradient says"""
        return self.read(operand, "H", 1, 2)[0]

    def write_gradient(self, operand: Operand | None, gradient: Gradient, narrow: bool) -> None:
        """i16 exponent, u16 max|mantissa|, i16 or i8 mantissa[n]"""
        self.write(operand, "h", [gradient.exponent])
        self.write(operand, "H", [max_abs(gradient.mantissas)], 2)
        self.write(operand, "b" if narrow else "h", gradient.mantissas, GRADIENT_HEADER)

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


def execute(machine: Machine, record: Record) -> None:
    """One record: refused, passed over, or run."""
    if record.op not in RECORDS:
        raise ValueError(f"record: type {record.op} is unknown")
    if record.mode != MODE_APPLY:
        raise ValueError(f"record: mode {record.mode} is refused in version 1")
    if not gate_is_on(machine.state, record):
        return
    if (record.op in BACKWARD or record.flags & FLAG_AGAIN) and get_state(machine.state, "flags") & NOTHING_TO_LEARN:
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
    """y[n] = clamp(round(bias[n] + coarse(sum_k (x[k] - zero_in) * wz(w[n][k]))) + zero_out, act_min, act_max)"""
    if record.rounding not in (ROUND_SINGLE, ROUND_AWAY):
        raise ValueError(f"dense: rounding {record.rounding}, expected {ROUND_SINGLE} or {ROUND_AWAY}")
    x = machine.read(record.operands[0], "b", record.in_c)
    finer = record.fraction // 16
    weights = read_trained_rows(machine, record, record.operands[2], record.out_c, record.in_c, finer).tolist()
    bias = machine.read(record.operands[3], "i", record.out_c)
    scales = machine.read_scales(record)
    y = []
    for n in range(record.out_c):
        fine = sum((x[k] - record.zero_in) * weights[n][k] for k in range(record.in_c))
        rounded = scales[n].round(wrap_int32(bias[n] + round_half_up(fine, 2**finer)))
        y.append(clamp(rounded + record.zero_out, record.act_min, record.act_max))
    machine.write(record.operands[1], "b", y)


def relu(machine: Machine, record: Record) -> None:
    """y[k] = clamp(x[k], act_min, act_max)"""
    x = machine.read(record.operands[0], "b", record.in_c)
    machine.write(record.operands[1], "b", [clamp(value, record.act_min, record.act_max) for value in x])


def softmax_ce(machine: Machine, record: Record) -> None:
    """gradient[n] = p[n] - (n == label), p = e / sum(e), e[n] = table[max(logits) - logits[n]]; loss = -ln p[label].
    A logit that int8 ends at is not pushed on: there the gradient is 0."""
    logits = machine.read(record.operands[0], "b", record.out_c)
    table = machine.read(record.operands[2], "H", record.extra)
    label = read_label(machine, record)
    below_top = [max(logits) - logit for logit in logits]
    e = [table[distance] if distance < len(table) else 0 for distance in below_top]
    total = sum(e)
    if total == 0:
        raise ValueError("softmax: the exponentials sum to 0")
    d = [0 if logit == -128 else e[n] for n, logit in enumerate(logits)]
    d[label] = 0 if logits[label] == 127 else e[label] - total
    loss = round_half_up((log2q(total) - log2q(max(1, e[label]))) * 710, 1024)
    certain = max_abs(d) * 65536 // total < get_state(machine.state, "skip_below")
    write_loss(machine, record, normalised(d, total), loss, max_abs(d) == 0 or certain)


def normalised(d: Sequence[int], total: int) -> Gradient:
    """d / total as a gradient whose largest mantissa lies within 1024..2047."""
    largest = max_abs(d)
    if largest == 0:
        return Gradient(0, [0 for _ in d])
    j = 0
    while largest * 2**j < total:
        j += 1
    k = j + 10
    size = [min(top(narrow=False), round_half_up(abs(value) * 2**k, total)) for value in d]
    return Gradient(-k, [-size[n] if d[n] < 0 else size[n] for n in range(len(d))])


def mse(machine: Machine, record: Record) -> None:
    """gradient[n] = output[n] - target[n], as mantissas of 11 bits; loss = sum of the differences' squares"""
    output = machine.read(record.operands[0], "b", record.out_c)
    target = machine.read(record.operands[3], "b", record.out_c)
    difference = [output[n] - target[n] for n in range(record.out_c)]
    j = 11 - max_abs(difference).bit_length() if max_abs(difference) else 0
    loss = sum(value * value for value in difference)
    write_loss(machine, record, Gradient(-j, [d * 2**j for d in difference]), loss, max_abs(difference) == 0)


def hinge(machine: Machine, record: Record) -> None:
    """loss = logits[r] - logits[label] + margin where that is above 0, r being the best of the wrong classes: the
    gradient is 1 at r and -1 at the label"""
    if record.out_c < 2:
        raise ValueError(f"hinge: {record.out_c} classes, expected 2 at least")
    logits = machine.read(record.operands[0], "b", record.out_c)
    label = read_label(machine, record)
    largest = max(logits[n] for n in range(record.out_c) if n != label)
    r = next(n for n in range(record.out_c) if n != label and logits[n] == largest)
    v = logits[r] - logits[label] + record.extra
    mantissas = [0] * record.out_c
    if v > 0:
        mantissas[r], mantissas[label] = 1024, -1024
    write_loss(machine, record, Gradient(-10 if v > 0 else 0, mantissas), max(0, v), v <= 0)


def read_label(machine: Machine, record: Record) -> int:
    label = machine.read(record.operands[3], "H", 1)[0]
    if label >= record.out_c:
        raise ValueError(f"loss: label {label}, expected one below {record.out_c}")
    return label


def write_loss(machine: Machine, record: Record, gradient: Gradient, loss: int, nothing_to_learn: bool) -> None:
    """What every loss leaves behind. Its gradient has 12 bits."""
    if record.narrow_in:
        raise ValueError("loss: its gradient cannot be narrow")
    machine.write_gradient(record.operands[1], gradient, narrow=False)
    finish_loss(machine.state, loss, nothing_to_learn)


DENSE, RELU, SOFTMAX_CE, MSE = range(1, 5)
HINGE = 8
RECORDS: dict[int, Callable[[Machine, Record], None]] = {
    DENSE: dense,
    RELU: relu,
    SOFTMAX_CE: softmax_ce,
    MSE: mse,
    HINGE: hinge,
    **FORWARD,
    **BACKWARD,
}
