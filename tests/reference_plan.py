"""The plan format: what an .ulm file says, read from its bytes."""

from __future__ import annotations

import hashlib
import struct
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

INPUT, ARENA, TARGET, TRAIN, STATE, SCRATCH, FROZEN = range(7)
BUFFER_NAMES = ("INPUT", "ARENA", "TARGET", "TRAIN", "STATE", "SCRATCH", "FROZEN")
READ_ONLY = (INPUT, FROZEN, TARGET)
OPERAND_NONE = 0xFFFFFFFF

DTYPE_INT8, DTYPE_INT16, DTYPE_INT32, DTYPE_UINT8 = range(1, 5)
MODE_APPLY = 0
FLAG_BITS, FLAG_GATE_DEEPER, FLAG_FULL_RANGE, FLAG_ONE_SCALE, FLAG_NARROW_OUT, FLAG_NARROW_IN = 1, 2, 4, 8, 16, 32
FLAG_AGAIN = 64
ROUND_NONE, ROUND_SINGLE, ROUND_DOUBLE, ROUND_AWAY = range(4)
STATE_BYTES = 48
NOTHING_TO_LEARN = 1


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

    @property
    def narrow_out(self) -> bool:
        """Whether the gradient at operand 0 is narrow."""
        return bool(self.flags & FLAG_NARROW_OUT)

    @property
    def narrow_in(self) -> bool:
        """Whether the gradient at operand 1 is narrow."""
        return bool(self.flags & FLAG_NARROW_IN)


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
