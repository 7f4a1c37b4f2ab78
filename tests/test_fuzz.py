"""Hostile plans: the verifier refuses them or the core runs them, under sanitizers, without a fault."""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import resource
import shutil
import struct
import subprocess
import tempfile
import tracemalloc
from binascii import crc32
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

import branches
import cases
import fuzz_records
import reference
import tflite_models
import ulearn
from ulearn_host import numbers as n
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.prepare import best_scheme
from ulearn_host.tflite_import import load_tflite

ROOT = Path(__file__).resolve().parents[1]
CORE = sorted((ROOT / "ulab_kernels").glob("ul_*.c"))
DRIVER = Path(__file__).with_name("sanitized") / "driver.c"
STRICT = ["-std=c99", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
VARIANTS = {"long_multiply": [], "no_long_multiply": ["-DUL_NO_LONG_MULTIPLY"]}
ENVIRONMENT = {"ASAN_OPTIONS": "quarantine_size_mb=8:detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
MUTATIONS = {"inferring": 10_000, "training": 8_000}  # by family of plans
CASES = {"dense": 200, "branches": 60}
LIMITS = 12_000
FILL = 0xA5  # what ARENA and SCRATCH hold before the first run


# ---- The core under sanitizers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=VARIANTS)
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/sanitized/driver.c with the core, in one of the two variants of the multiplication."""
    binary = tmp_path_factory.mktemp("driver") / request.param
    include = f"-I{ROOT / 'ulab_kernels'}"
    command = ["gcc", *STRICT, *SANITIZE, *VARIANTS[request.param], include, DRIVER, *CORE, "-o", binary]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return binary


@dataclass
class Session:
    """A stream of calls on one table of buffers. which: the place of its program in the plan; fill: see the driver."""

    programs: Sequence[bytes]
    sizes: Sequence[int]
    frozen: bytes
    train: bytes
    state: bytes
    calls: list[tuple[int, int, int, bytes, bytes]] = field(default_factory=list)
    answer: bool = False
    which: int = 0
    fill: int = FILL

    def packed(self) -> Iterator[bytes]:
        yield struct.pack("<III", self.answer, self.fill, len(self.programs))
        for program in self.programs:
            yield struct.pack("<I", len(program))
            yield bytes(program)
        yield struct.pack("<7I", *self.sizes)
        contents = {n.BUF_FROZEN: self.frozen, n.BUF_TRAIN: self.train, n.BUF_STATE: self.state}
        for buffer in sorted(contents):
            yield contents[buffer][: self.sizes[buffer]]
        yield struct.pack("<I", len(self.calls))
        for which, first, count, x, target in self.calls:
            assert (len(x), len(target)) == (self.sizes[n.BUF_INPUT], self.sizes[n.BUF_TARGET])
            yield struct.pack("<III", which, first, count) + x + target

    def answer_bytes(self) -> int:
        blocks = sum(self.sizes[b] for b in (n.BUF_TRAIN, n.BUF_STATE, n.BUF_ARENA)) if self.answer else 0
        return (4 + blocks) * len(self.calls)


def execute(driver: Path, sessions: Sequence[Session], folder: Path) -> tuple[list[bytes], list[tuple[int, str]]]:
    """Answers of every session, and (index, report) of those that a sanitizer stopped (at most five)."""
    answers: list[bytes] = []
    faults: list[tuple[int, str]] = []
    while len(answers) < len(sessions) and len(faults) < 5:
        begin = len(answers)
        with open(folder / "in", "wb") as f:
            for session in sessions[begin:]:
                f.writelines(session.packed())
        with open(folder / "in", "rb") as f, open(folder / "out", "wb") as out:
            run = subprocess.run([driver, "run"], stdin=f, stdout=out, stderr=subprocess.PIPE, env=ENVIRONMENT)
        data = (folder / "out").read_bytes()
        at = 0
        while len(answers) < len(sessions):
            size = sessions[len(answers)].answer_bytes()
            if at + size > len(data):
                break
            answers.append(data[at : at + size])
            at += size
        if run.returncode:
            report = run.stderr.decode(errors="replace")
            faults.append((min(len(answers), len(sessions) - 1), "\n".join(report.splitlines()[:12])))
            answers.append(b"")
        else:
            assert len(answers) == len(sessions), "the driver stopped early without a word"
    return answers, faults


def described(faults: list[tuple[int, str]], names: Sequence[object]) -> str:
    return "\n\n".join(f"{names[i]}: {report}" for i, report in faults)


# ---- Taking plans apart ----------------------------------------------------------------------------------------------


@dataclass
class Part:
    kind: int
    flags: int
    value: bytearray


def take_apart(data: bytes) -> list[Part]:
    parts = []
    at = n.HEADER_BYTES
    while at < len(data):
        kind, flags, size = struct.unpack_from("<HHI", data, at)
        parts.append(Part(kind, flags, bytearray(data[at + 8 : at + 8 + size])))
        at += 8 + size + (-size & 7)
    return parts


def put_together(head: bytes, parts: Sequence[Part]) -> bytearray:
    body = b"".join(
        struct.pack("<HHI", p.kind, p.flags, len(p.value)) + p.value + bytes(-len(p.value) & 7) for p in parts
    )
    data = bytearray(head[: n.HEADER_BYTES]) + body
    struct.pack_into("<IH", data, n.H_LENGTH, len(data), len(parts))
    return data


def seal(data: bytearray) -> bytes:
    """The same bytes with a SHA-256 that fits, as `ulearn_host.compiler.seal` makes it."""
    if len(data) >= n.HEADER_BYTES:
        blank = bytes(n.HEADER_BYTES - n.H_HASH)
        digest = hashlib.sha256(bytes(data[: n.H_HASH]) + blank + bytes(data[n.HEADER_BYTES :])).digest()
        data[n.H_HASH : n.H_TAG] = digest
    return bytes(data)


def find(parts: Sequence[Part], kind: int) -> list[Part]:
    return [p for p in parts if p.kind == kind and len(p.value)]


# Fields as (offset, struct code).
FILE_FIELDS = [(0, "I"), (4, "H"), (6, "H"), (8, "I"), (12, "H"), (14, "H"), (16, "I"), (64, "I")]
SECTION_FIELDS = [(0, "H"), (2, "H"), (4, "I")]
PROGRAM_FIELDS = [
    *((16 + 4 * i, "I") for i in range(7)),
    (44, "I"),
    (48, "I"),
    (52, "H"),
    (54, "B"),
    (55, "B"),
    (56, "I"),
]
RECORD_FIELDS = [
    *((i, "B") for i in range(4)),
    *((i, "H") for i in (4, 6)),
    *((8 + 4 * i, "I") for i in range(6)),
    *((32 + 2 * i, "H") for i in range(6)),
    *((i, "B") for i in range(44, 56)),
    (56, "H"),
    (58, "h"),
    (60, "I"),
]
TENSOR_FIELDS = [(0, "H"), (2, "B"), (3, "B"), *((4 + 2 * i, "H") for i in range(8)), (20, "I"), (24, "I"), (28, "I")]
CUT_FIELDS = [(16, "H"), (18, "H"), (20, "I"), (24, "I"), (28, "H"), (36, "f"), (40, "i")]
IO_FIELDS = [
    *((2 * i, "H") for i in range(4)),
    *((8, "f"), (12, "i")),
    *((16 + 2 * i, "H") for i in range(4)),
    *((24, "f"), (28, "i"), (32, "H"), (34, "H"), (36, "f")),
]
STATE_FIELDS = [
    *((0, "I"), (4, "I"), (8, "H"), (10, "h"), (12, "I"), (16, "I"), (20, "I"), (24, "i")),
    *((28 + 2 * i, "H") for i in range(6)),
    (40, "I"),
]
# What a record computes with, as opposed to where it reads and writes.
RECORD_PARAMETERS = [(50, "b"), (51, "b"), (52, "b"), (53, "b"), (56, "H"), (58, "h")]
STATE_PARAMETERS = [(0, "I"), (4, "I"), (10, "h"), (12, "I"), (16, "I"), (20, "I"), (24, "i"), (28, "H"), (30, "H")]


def hostile(rng: random.Random, old: int, bits: int, signed: bool) -> int:
    top = 1 << bits
    choice = rng.randrange(6)
    if choice == 0:
        v = rng.choice((0, 1, 2, 3, 4, 7, 15, 16, 31, 32))
    elif choice == 1:
        v = rng.choice((top - 1, top // 2, top // 2 - 1, top - 2, top // 2 + 1, top - 4, top * 15 // 16))
    elif choice == 2:
        v = old + rng.choice((-64, -8, -4, -2, -1, 1, 2, 4, 8, 64))
    elif choice == 3:
        v = rng.choice((old * 2, old // 2, -old, old ^ top // 2))
    elif choice == 4:
        v = 1 << rng.randrange(bits)
    else:
        v = rng.randrange(top)
    v %= top
    return v - top if signed and v >= top // 2 else v


def set_field(rng: random.Random, data: bytearray, base: int, spot: tuple[int, str]) -> None:
    at, code = base + spot[0], spot[1]
    if at + struct.calcsize(code) > len(data):
        return
    if code == "f":
        struct.pack_into("<I", data, at, rng.choice((0, 0x7F800000, 0x7FC00000, 0xFF800000, 1, rng.randrange(2**32))))
        return
    old = struct.unpack_from("<" + code, data, at)[0]
    struct.pack_into("<" + code, data, at, hostile(rng, old, 8 * struct.calcsize(code), code.islower()))


def entry(rng: random.Random, value: bytearray, head: int, size: int) -> int:
    count = (len(value) - head) // size
    return head + size * rng.randrange(max(1, count))


# ---- Mutations: each takes the parts and the first 96 bytes, and answers the whole file without its hash -------------

Mutation = Callable[[random.Random, bytes, list[Part]], bytearray]


def flip_bits(rng: random.Random, head: bytes, parts: list[Part]) -> bytearray:
    data = put_together(head, parts)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        data[rng.randrange(n.HEADER_BYTES, len(data))] ^= 1 << rng.randrange(8)
    return data


def file_header(rng: random.Random, head: bytes, parts: list[Part]) -> bytearray:
    data = put_together(head, parts)
    set_field(rng, data, 0, rng.choice(FILE_FIELDS))
    return data


def section_header(rng: random.Random, head: bytes, parts: list[Part]) -> bytearray:
    data = put_together(head, parts)
    at = n.HEADER_BYTES
    for part in parts[: rng.randrange(len(parts))]:
        at += 8 + len(part.value) + (-len(part.value) & 7)
    set_field(rng, data, at, rng.choice(SECTION_FIELDS))
    return data


def fields_of(kind: int, head_bytes: int, size: int, fields: list[tuple[int, str]]) -> Mutation:
    def mutation(rng: random.Random, head: bytes, parts: list[Part]) -> bytearray:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            found = find(parts, kind)
            if found:
                value = rng.choice(found).value
                set_field(rng, value, entry(rng, value, head_bytes, size), rng.choice(fields))
        return put_together(head, parts)

    return mutation


def program_header(rng: random.Random, head: bytes, parts: list[Part]) -> bytearray:
    for _ in range(rng.choice((1, 1, 2))):
        set_field(rng, rng.choice(find(parts, n.SECTION_PROGRAM)).value, 0, rng.choice(PROGRAM_FIELDS))
    return put_together(head, parts)


def sections(rng: random.Random, head: bytes, parts: list[Part]) -> bytearray:
    i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
    what = rng.randrange(6)
    if what == 0:
        parts[i], parts[j] = parts[j], parts[i]  # order alone means nothing
    elif what == 1:
        parts[i].value, parts[j].value = parts[j].value, parts[i].value
    elif what == 2:
        del parts[i]
    elif what == 3:
        parts.insert(j, Part(parts[i].kind, parts[i].flags, bytearray(parts[i].value)))
    elif what == 4:
        parts[i].value = parts[i].value[: rng.randrange(len(parts[i].value) + 1)]
    else:
        parts[i].value += rng.randbytes(rng.choice((1, 4, 32, 48, 64)))
    return put_together(head, parts)


def records(rng: random.Random, head: bytes, parts: list[Part]) -> bytearray:
    """Records removed, doubled and exchanged, with the header's count made to fit."""
    value = rng.choice(find(parts, n.SECTION_PROGRAM)).value
    size = n.RECORD_BYTES
    table = [bytes(value[at : at + size]) for at in range(n.PROGRAM_BYTES, len(value), size)]
    for _ in range(rng.randrange(1, 4)):
        i, j = rng.randrange(len(table)), rng.randrange(len(table))
        what = rng.randrange(3)
        if what == 0 and len(table) > 1:
            del table[i]
        elif what == 1:
            table.insert(j, table[i])
        else:
            table[i], table[j] = table[j], table[i]
    value[n.PROGRAM_BYTES :] = b"".join(table)
    struct.pack_into("<H", value, n.P_RECORDS, len(table))
    return put_together(head, parts)


def operands(rng: random.Random, head: bytes, parts: list[Part]) -> bytearray:
    """Operands pointed elsewhere: at another operand of the program, at another buffer, a little further."""
    value = rng.choice(find(parts, n.SECTION_PROGRAM)).value
    spots = [
        at + n.R_OPERANDS + 4 * i
        for at in range(n.PROGRAM_BYTES, len(value), n.RECORD_BYTES)
        for i in range(n.OPERANDS)
        if struct.unpack_from("<I", value, at + n.R_OPERANDS + 4 * i)[0] != n.OPERAND_NONE
    ]
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.choice(spots)
        old = struct.unpack_from("<I", value, at)[0]
        other = struct.unpack_from("<I", value, rng.choice(spots))[0]
        new = rng.choice(
            (other, old + rng.choice((-4, -2, -1, 1, 2, 4, 16)), old & 0x0FFFFFFF | rng.randrange(16) << 28)
        )
        struct.pack_into("<I", value, at, new % 2**32)
    return put_together(head, parts)


def extremes(rng: random.Random, size: int) -> bytes:
    pattern = rng.choice((b"\x00", b"\xff", b"\x80", b"\x7f", b"\xff\x7f", b"\x00\x80", b"\x01\x80\xff\x7f", b""))
    if not pattern:
        return rng.randbytes(size)
    return (pattern * (size // len(pattern) + 1))[:size]


def contents(rng: random.Random, head: bytes, parts: list[Part]) -> bytearray:
    """Weights, biases, multipliers, shifts and tables at their extremes, over all of a section or a stretch of it."""
    for _ in range(rng.choice((1, 2, 3))):
        found = find(parts, rng.choice((n.SECTION_TRAIN, n.SECTION_FROZEN)))
        if found:
            value = found[0].value
            begin = 4 * rng.randrange(len(value) // 4 + 1) if rng.random() < 0.7 else 0
            end = rng.randrange(begin, len(value) + 1) if rng.random() < 0.7 else len(value)
            value[begin:end] = extremes(rng, end - begin)
    return put_together(head, parts)


def parameters(rng: random.Random, head: bytes, parts: list[Part]) -> bytearray:
    """Zero points, ranges, scales, rates, gains, gates: whatever a record computes with, legal or not."""
    for _ in range(rng.randrange(1, 5)):
        if rng.random() < 0.6:
            value = rng.choice(find(parts, n.SECTION_PROGRAM)).value
            at = entry(rng, value, n.PROGRAM_BYTES, n.RECORD_BYTES)
            set_field(rng, value, at, rng.choice(RECORD_PARAMETERS))
            if rng.random() < 0.7:  # back into what is legal
                low, high = sorted(struct.unpack_from("<bb", value, at + n.R_ACT_MIN))
                struct.pack_into("<bb", value, at + n.R_ACT_MIN, low, high)
                mantissa = struct.unpack_from("<H", value, at + n.R_SCALE_MANT)[0]
                struct.pack_into("<H", value, at + n.R_SCALE_MANT, 1024 + mantissa % 1024)
        else:
            value = find(parts, n.SECTION_STATE)[0].value
            if rng.random() < 0.5 and len(value) > n.STATE_BYTES:
                value[rng.randrange(n.STATE_BYTES, len(value))] = rng.randrange(256)
            else:
                set_field(rng, value, 0, rng.choice(STATE_PARAMETERS))
    return put_together(head, parts)


def set_fraction(parts: list[Part], fraction: int, finer: int = 0) -> None:
    """Another number of fraction bits, in every tensor and record of int16 weights; so many of them in forward sums."""
    for part in parts:
        if part.kind == n.SECTION_TENSORS:
            for at in range(0, len(part.value), n.TENSOR_BYTES):
                if part.value[at + n.T_DTYPE] == n.DTYPE_INT16:
                    part.value[at + n.T_FRACTION] = fraction
        elif part.kind == n.SECTION_PROGRAM:
            for at in range(n.PROGRAM_BYTES, len(part.value), n.RECORD_BYTES):
                if part.value[at + n.R_W_DTYPE] == n.DTYPE_INT16:
                    forward = part.value[at + n.R_OP] in (n.OP_DENSE, n.OP_CONV_TRAINED, n.OP_DEPTHWISE_TRAINED)
                    part.value[at + n.R_FRACTION] = fraction + n.FINER * finer * forward


def fractions(rng: random.Random, head: bytes, parts: list[Part]) -> bytearray:
    fraction = rng.randrange(9)
    set_fraction(parts, fraction, rng.randint(0, rng.choice((fraction, 15))))
    return contents(rng, head, parts)


MUTATION_KINDS: dict[str, tuple[int, Mutation]] = {  # weight, mutation
    "bits flipped": (3, flip_bits),
    "file header": (1, file_header),
    "section header": (1, section_header),
    "sections": (1, sections),
    "program header": (1, program_header),
    "record fields": (2, fields_of(n.SECTION_PROGRAM, n.PROGRAM_BYTES, n.RECORD_BYTES, RECORD_FIELDS)),
    "records moved": (1, records),
    "operands": (2, operands),
    "tensor fields": (1, fields_of(n.SECTION_TENSORS, 0, n.TENSOR_BYTES, TENSOR_FIELDS)),
    "cut fields": (1, fields_of(n.SECTION_CUTS, 0, n.CUT_BYTES, CUT_FIELDS)),
    "io fields": (1, fields_of(n.SECTION_IO, 0, n.IO_BYTES, IO_FIELDS)),
    "state fields": (1, fields_of(n.SECTION_STATE, 0, 1 << 16, STATE_FIELDS)),
    "contents": (4, contents),
    "parameters": (4, parameters),
    "fractions": (1, fractions),
}


@functools.cache
def imported() -> list[bytes]:
    """Small plans of imported networks: every fifth operator model, and a dozen random networks; some train."""
    models = [model for _, model in tflite_models.operator_models()][::5]
    models += [tflite_models.random_model(seed) for seed in range(12)]
    plans = []
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            path = Path(folder) / "model.tflite"
            path.write_bytes(model)
            network = load_tflite(path)
            network = replace(network, loss="mse" if network.loss == "none" else network.loss)
            plans.append(compile_plan(network, Options(best_scheme(network))).data)
    return [plan for plan in plans if len(plan) < 12_000]


@functools.cache
def training() -> list[bytes]:
    """Small plans that train convolutions, branches and all else (tests/branches.py): of every record of training those
    with it, of wide and narrow gradients and either kind of weights; some of several training programs."""
    plans, seen = [], Counter[tuple[int, ...]]()
    for seed in range(150):
        case = branches.random_case(seed)
        if len(case.plan.data) > 14_000:
            continue
        records = [record for program in case.plan.programs[1:] for record in program.records]
        kinds = {(r.op, r.fields.get("flags", 0) & NARROW, r.fields.get("w_dtype", 0)) for r in records}
        if all(seen[kind] >= 3 for kind in kinds):
            continue
        seen.update(kinds)
        plans.append(case.plan.data)
        if seed % 4 == 0:
            plans.append(numbered(compile_plan(case.plan.network, replace(case.plan.options, layerwise=True)).data))
    return plans


NARROW = n.FLAG_NARROW_OUT | n.FLAG_NARROW_IN


def numbered(data: bytes) -> bytes:
    """The same plan, each program called by its number: names of layers may be too long to differ."""
    parts = take_apart(data)
    for i, part in enumerate(find(parts, n.SECTION_PROGRAM)):
        part.value[: n.P_SIZES] = f"program {i}".encode().ljust(n.P_SIZES, b"\0")
    return seal(put_together(data, parts))


@functools.cache
def bases(family: str) -> list[bytes]:
    """What is mutated: two dozen perceptrons and as many imported networks; or networks whose convolutions train."""
    if family == "training":
        return training()
    return [cases.random_case(seed, widest).plan.data for seed in range(12) for widest in (12, 96)] + imported()


def mutants(count: int, family: str = "inferring", first: int = 0) -> Iterator[tuple[str, bytes]]:
    """(kind and number, file) of seeded mutations of a family's plans. first: number of the first."""
    names = list(MUTATION_KINDS)
    weights = [MUTATION_KINDS[name][0] for name in names]
    for i in range(first, first + count):
        rng = random.Random(i)
        name = rng.choices(names, weights)[0]
        base = rng.choice(bases(family))
        mutation = MUTATION_KINDS[name][1]
        yield f"{name} #{i}", seal(mutation(rng, base, take_apart(base)))


def sessions_of(rng: random.Random, model: ulearn.Model) -> Iterator[Session]:
    """A forward run and runs of all training programs of a verified plan, each with buffers of the sizes its program
    asks for."""
    for which, program in enumerate((model.forward, *model.trainings)):
        sizes = struct.unpack_from("<7I", program, n.P_SIZES)
        count = struct.unpack_from("<H", program, n.P_RECORDS)[0]
        blobs = bytes(model.table[n.BUF_FROZEN]), bytes(model.train_blob), bytes(model.state)
        session = Session([bytes(program)], sizes, *blobs, which=which)
        for i in range(6 if which else 2):
            x = (
                rng.choice((b"\x80", b"\x7f", b"\x00")) * sizes[n.BUF_INPUT]
                if i % 2
                else rng.randbytes(sizes[n.BUF_INPUT])
            )
            target = rng.randbytes(sizes[n.BUF_TARGET])
            if model.labelled and sizes[n.BUF_TARGET]:
                target = struct.pack("<H", rng.randrange(min(65535, model.classes + (i == 5))))
            first = rng.randrange(count) if i == 4 else 0  # a run may start at any record
            session.calls.append((0, first, count - first, x, target))
        yield session


# ---- Tests -----------------------------------------------------------------------------------------------------------


@dataclass
class Judged:
    """Mutations through the verifier: sessions of the accepted, their names, counts of accepted and refused."""

    sessions: list[Session] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    accepted: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)


@pytest.fixture(scope="module", params=MUTATIONS)
def judged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """Every mutation of a family."""
    path = tmp_path_factory.mktemp("mutants") / "mutant.ulm"
    found = Judged()
    bases(request.param)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i, (name, data) in enumerate(mutants(MUTATIONS[request.param], request.param)):
        kind = name.split(" #")[0]
        source: str | bytes = data
        if i % 4 == 0:
            path.write_bytes(data)
            source = str(path)
        try:
            model = ulearn.load(source, run=_never)
        except ValueError as e:
            wanted = str(path) if i % 4 == 0 else "plan"
            assert str(e).startswith(wanted + ": ") and len(str(e)) > len(wanted) + 5, f"{name}: {e}"
            found.refused[kind] += 1
            continue
        except Exception as e:
            raise AssertionError(f"{name}: {type(e).__name__} instead of ValueError: {e}") from e
        found.accepted[kind] += 1
        for session in sessions_of(random.Random(i), model):
            found.sessions.append(session)
            found.names.append(name)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 400 * 1024, f"loading hostile plans took {grown} KiB"
    return found


def _never(*_: object) -> int:
    raise AssertionError("loading a plan must not run it")


def test_mutations_are_refused_or_run(
    driver: Path, judged: Judged, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    accepted, refused = judged.accepted, judged.refused
    for kind in MUTATION_KINDS:
        record_property(kind, f"{accepted[kind]} accepted, {refused[kind]} refused")
        print(f"{kind:16} {accepted[kind]:5} accepted {refused[kind]:5} refused")
    print(f"{'all':16} {accepted.total():5} accepted {refused.total():5} refused, {len(judged.sessions)} programs run")
    total = accepted.total() + refused.total()
    assert total in MUTATIONS.values()
    assert accepted.total() >= 0.3 * total and refused.total() >= 0.2 * total
    answers, faults = execute(driver, judged.sessions, tmp_path)
    assert not faults, described(faults, judged.names)
    # Most steps are really taken, not turned away for their label or a table.
    codes = Counter(c[0] for a in answers for c in struct.iter_unpack("<i", a))
    done = sum(count for code, count in codes.items() if code > 0)
    assert done > 0.9 * codes.total(), codes
    assert {code for code in codes if code < 0} <= {n.E_LABEL, n.E_DATA}, codes


def test_what_is_mutated_trains_everything() -> None:
    """Every record of training occurs in three plans at least, with narrow gradients wherever it may, and with either
    kind of weights; and some plans have several training programs."""
    count, several = Counter[tuple[int, int]](), 0
    for data in training():
        programs = find(take_apart(data), n.SECTION_PROGRAM)
        several += len(programs) > 2
        records = [p.value[at : at + 64] for p in programs[1:] for at in range(64, len(p.value), n.RECORD_BYTES)]
        count.update({(r[n.R_OP], r[n.R_FLAGS] & n.FLAG_NARROW_OUT) for r in records})
        count.update({(-r[n.R_OP], r[n.R_W_DTYPE]) for r in records})
    assert several >= 5
    for op in (n.OP_SOFTMAX_CE, n.OP_MSE, n.OP_HINGE, n.OP_DENSE, n.OP_MASK, n.OP_DENSE_BACK, n.OP_UPDATE_WEIGHT):
        assert count[op, 0] >= 3, op
    for op in (n.OP_UPDATE_BIAS, *range(n.OP_CONV_BACK, n.OP_RELU_BACK + 1)):
        assert count[op, 0] >= 3 and count[op, n.FLAG_NARROW_OUT] >= 1, op
    for op in (n.OP_CONV_TRAINED, n.OP_DEPTHWISE_TRAINED, n.OP_CONV_BACK, n.OP_UPDATE_CONV, n.OP_UPDATE_DEPTHWISE):
        assert count[-op, n.DTYPE_INT8] >= 3 and count[-op, n.DTYPE_INT16] >= 3, op


@pytest.mark.parametrize("family", MUTATIONS)
def test_accepted_plans_fail_by_name(family: str) -> None:
    # What a board does around the core with an accepted plan may refuse an input, and nothing else may go wrong.
    used = 0
    for name, data in mutants(4000 if family == "inferring" else 2000, family):
        try:
            model = ulearn.load(data, run=lambda *_: 0)
        except ValueError:
            continue
        if model.input_bytes + model.target_bytes > 100_000:
            continue
        used += 1
        for call in (predict, features, apply, step):
            try:
                call(model)
            except ValueError:
                pass
            except Exception as e:
                raise AssertionError(f"{name}: {call.__name__}: {type(e).__name__}: {e}") from e
    assert used > 500


def predict(model: ulearn.Model) -> None:
    model.predict([0.1] * model.input_bytes)


def features(model: ulearn.Model) -> None:
    model.features([0.1] * model.input_bytes)


def apply(model: ulearn.Model) -> None:
    model.apply(model.update(1))


def step(model: ulearn.Model) -> None:
    for program in range(len(model.trainings)):
        target = 1 if model.labelled else [0.1] * model.target_bytes
        ulearn.Trainer(model).step([0.1] * model.input_bytes, target, program)


COMPUTING = ("contents", "parameters", "fractions", "state fields")  # what leaves the flow of data as it is


@pytest.mark.parametrize("family", MUTATIONS)
def test_accepted_mutants_compute_what_the_format_says(driver: Path, family: str, tmp_path: Path) -> None:
    sessions, names, wanted = [], [], []
    for name, data in mutants(2400 if family == "inferring" else 900, family):
        if name.split(" #")[0] not in COMPUTING:
            continue
        try:
            model = ulearn.load(data, run=_never)
        except ValueError:
            continue
        rng = random.Random(name)
        for session in sessions_of(rng, model):
            del session.calls[3:]
            session.answer = True
            sessions.append(session)
            names.append(name)
            try:
                wanted.append(referred(data, session))
            except ValueError as e:
                raise AssertionError(f"{name}, program {session.which}, which the verifier accepts: {e}") from e
    answers, faults = execute(driver, sessions, tmp_path)
    assert not faults, described(faults, names)
    assert len(sessions) > 400
    wrong = [
        name for name, want, session, a in zip(names, wanted, sessions, answers, strict=True) if want != got(session, a)
    ]
    assert not wrong, f"{len(wrong)} of {len(sessions)} differ from tests/reference.py: {wrong[:20]}"


def referred(data: bytes, session: Session) -> list[tuple[bytes, bytes, bytes] | None]:
    """TRAIN, STATE and the output after every call as the reference has them; None and the end where it refuses."""
    machine = reference.Machine(reference.parse(data))
    machine.arena[:] = bytes((FILL,)) * len(machine.arena)  # a record may read what none has written
    programs = machine.plan.programs.items()
    kinds = [[name for name, p in programs if p.kind == kind] for kind in (n.KIND_FORWARD, n.KIND_TRAIN)]
    program = (kinds[0] + kinds[1])[session.which]
    result: list[tuple[bytes, bytes, bytes] | None] = []
    for _, _, _, x, target in session.calls:
        try:
            machine.run(program, x, target)
        except ValueError as e:
            if "sum to 0" not in str(e):
                raise
            return [*result, None]
        train, state = (
            bytes(b[: session.sizes[i]]) for b, i in ((machine.train, n.BUF_TRAIN), (machine.state, n.BUF_STATE))
        )
        result.append((train, state, machine.output(program)))
    return result


def got(session: Session, answer: bytes) -> list[tuple[bytes, bytes, bytes] | None]:
    """The same from the core."""
    train, state, arena = (session.sizes[b] for b in (n.BUF_TRAIN, n.BUF_STATE, n.BUF_ARENA))
    output, size = struct.unpack_from("<II", session.programs[0], n.P_OUTPUT)
    result: list[tuple[bytes, bytes, bytes] | None] = []
    for at in range(0, len(answer), 4 + train + state + arena):
        if struct.unpack_from("<i", answer, at)[0] == n.E_DATA:
            return [*result, None]
        begin = at + 4 + train + state + (output & 0x0FFFFFFF)
        result.append(
            (
                answer[at + 4 : at + 4 + train],
                answer[at + 4 + train : at + 4 + train + state],
                answer[begin : begin + size],
            )
        )
    return result


def test_records_that_overwrite_what_they_read_are_refused() -> None:
    # The core and the ulab executor would see different things.
    tried = 0
    for seed in range(12):
        base = cases.random_case(seed, 24).plan.data
        count = len(find(take_apart(base), n.SECTION_PROGRAM)[1].value) // n.RECORD_BYTES - 1
        for record in range(count):
            parts = take_apart(base)
            value = find(parts, n.SECTION_PROGRAM)[1].value
            at = n.PROGRAM_BYTES + record * n.RECORD_BYTES
            if value[at] not in (n.OP_DENSE, n.OP_SOFTMAX_CE, n.OP_MSE, n.OP_DENSE_BACK):
                continue
            spot = at + n.R_OPERANDS
            source = struct.unpack_from("<I", value, spot)[0]
            if source >> 28 != n.BUF_ARENA:
                continue
            struct.pack_into("<I", value, spot + 4, source & ~3)
            tried += 1
            with pytest.raises(ValueError, match=f"record {record}: "):
                ulearn.load(seal(put_together(base, parts)), run=_never)
    assert tried > 40


# Records that write a gradient or activations and read at operand 0 what is larger than two bytes.
WRITING = (n.OP_CONV_TRAINED, n.OP_DEPTHWISE_TRAINED, n.OP_CONV_BACK, n.OP_DEPTHWISE_BACK, *range(36, 42))


def test_records_of_training_write_in_place_or_apart() -> None:
    """No record's output may begin within its input, but where the input begins; nor lie over another input."""
    tried = Counter[int]()
    for base in training():
        for p, program in enumerate(find(take_apart(base), n.SECTION_PROGRAM)[1:], 1):
            for at in range(n.PROGRAM_BYTES, len(program.value), n.RECORD_BYTES):
                op = program.value[at]
                source = struct.unpack_from("<I", program.value, at + n.R_OPERANDS)[0]
                h, w, c = struct.unpack_from("<3H", program.value, at + n.R_IN_H)
                if op not in WRITING or source >> 28 != n.BUF_ARENA or h * w * c < 3:
                    continue
                parts = take_apart(base)
                value = find(parts, n.SECTION_PROGRAM)[p].value
                struct.pack_into("<I", value, at + n.R_OPERANDS + 4, source + 2)
                tried[op] += 1
                with pytest.raises(ValueError, match=f"record {at // n.RECORD_BYTES - 1}: "):
                    ulearn.load(seal(put_together(base, parts)), run=_never)
    assert min(tried[op] for op in WRITING) >= 3, tried


def test_widest_weights_never_overflow(driver: Path, tmp_path: Path) -> None:
    # Every number of fraction bits, every weight and input at the end of its range: refused, or run.
    plans = {}
    for seed in range(8):
        for widest in (12, 96, 400):
            network = cases.random_network(np.random.default_rng(seed), widest)
            plans[f"seed {seed}, width {widest}"] = compile_plan(network, Options("full", fraction=6)).data
        network = branches.random_network(np.random.default_rng(seed))
        plans[f"branches {seed}"] = compile_plan(network, Options("full", fraction=6)).data
    sessions, names = [], []
    for name, base in plans.items():
        for fraction, finer in itertools.product(range(8), (0, 3)):
            for pattern in (b"\xff\x7f", b"\x00\x80"):
                parts = take_apart(base)
                set_fraction(parts, fraction, finer)
                for part in parts:
                    if part.kind == n.SECTION_TRAIN:
                        part.value[:] = (pattern * len(part.value))[: len(part.value)]
                try:
                    model = ulearn.load(seal(put_together(base, parts)), run=_never)
                except ValueError:
                    continue
                for session in sessions_of(random.Random(name), model):
                    sessions.append(session)
                    names.append(f"{name}, {fraction} fraction bits, {finer} in sums, weights {pattern.hex()}")
    assert len(sessions) > 200 and any(name.startswith("branches") for name in names)
    _, faults = execute(driver, sessions, tmp_path)
    assert not faults, described(faults, names)


HUGE = (2**16, 2**24, 2**24 + 1, 2**28 - 1, 2**28, 2**30, 2**31 - 1, 2**31, 2**32 - 4, 2**32 - 1)


@pytest.mark.parametrize("as_file", [False, True])
def test_hostile_sizes_allocate_nothing(as_file: bool, tmp_path: Path) -> None:
    base = cases.random_case(1, 12).plan.data
    count = 0
    tracemalloc.start()
    try:
        for data in _huge(base):
            source: str | bytes = data
            if as_file:
                (tmp_path / "huge.ulm").write_bytes(data)
                source = str(tmp_path / "huge.ulm")
            tracemalloc.reset_peak()
            try:
                ulearn.load(source, run=_never)
            except ValueError:
                count += 1
            _, peak = tracemalloc.get_traced_memory()
            assert peak < 64 << 20, f"{peak} bytes were allocated"  # ARENA and SCRATCH may have 16 MB each
    finally:
        tracemalloc.stop()
    assert count > 200


def _huge(base: bytes) -> Iterator[bytes]:
    for value in HUGE:
        for at, code in FILE_FIELDS:
            data = bytearray(base)
            struct.pack_into("<" + code, data, at, value & (2 ** (8 * struct.calcsize(code)) - 1))
            yield seal(data)
        at = n.HEADER_BYTES
        for part in take_apart(base):
            data = bytearray(base)
            struct.pack_into("<I", data, at + 4, value)
            yield seal(data)
            at += 8 + len(part.value) + (-len(part.value) & 7)
        for kind, fields in ((n.SECTION_PROGRAM, PROGRAM_FIELDS[:9]), (n.SECTION_TENSORS, [(20, "I")])):
            for spot, _ in fields:
                parts = take_apart(base)
                struct.pack_into("<I", find(parts, kind)[0].value, spot, value)
                yield seal(put_together(base, parts))
    for shape in ((65535,) * 4, (65535, 65535, 65535, 0), (256, 256, 257, 0), (256, 256, 256, 0)):
        for kind, spot in ((n.SECTION_IO, 0), (n.SECTION_IO, 16), (n.SECTION_TENSORS, 12)):
            parts = take_apart(base)
            struct.pack_into("<4H", find(parts, kind)[0].value, spot, *shape)
            yield seal(put_together(base, parts))


def test_records_at_their_limits_are_refused_or_run(driver: Path, tmp_path: Path) -> None:
    """Records of training one by one (tests/fuzz_records.py), with everything at the ends of what fits."""
    sessions, names = [], []
    accepted = Counter[int]()
    for seed in range(LIMITS):
        attack = fuzz_records.random_attack(seed)
        try:
            model = ulearn.load(attack.data, run=_never)
        except ValueError as e:
            assert str(e).startswith("plan: "), attack
            continue
        accepted[attack.op] += 1
        sessions.append(session_of_attack(attack, model))
        names.append(repr(attack))
    print(", ".join(f"{fuzz_records.NAMES[op]} {count}" for op, count in sorted(accepted.items())))
    assert min(accepted[op] for op in fuzz_records.OPERATIONS) > LIMITS // 200, accepted
    _, faults = execute(driver, sessions, tmp_path)
    assert not faults, described(faults, names)


def session_of_attack(attack: fuzz_records.Attack, model: ulearn.Model) -> Session:
    sizes = struct.unpack_from("<7I", model.training, n.P_SIZES)
    blobs = bytes(model.table[n.BUF_FROZEN]), bytes(model.train_blob), bytes(model.state)
    session = Session([bytes(model.training)], sizes, *blobs, fill=attack.fill)
    for value in attack.inputs:
        session.calls.append((0, 0, 1, bytes((value,)) * sizes[n.BUF_INPUT], bytes(sizes[n.BUF_TARGET])))
    return session


# ---- The core against the reference ----------------------------------------------------------------------------------


def session_of_case(case: cases.Case) -> Session:
    """As tests/device/steps.py: every step of the training program, and after each a forward run."""
    plan = reference.parse(case.plan.data)
    state = bytearray(plan.state)
    struct.pack_into("<I", state, 0, case.seed + 1)
    reference.set_learning_rate(state, *case.rate)
    struct.pack_into("<H", state, 28, case.skip_below)
    programs = [bytes(p.value) for p in find(take_apart(case.plan.data), n.SECTION_PROGRAM)]
    sizes = [max(s) for s in zip(*(struct.unpack_from("<7I", p, n.P_SIZES) for p in programs), strict=True)]
    session = Session(programs, sizes, plan.frozen, plan.train, bytes(state), answer=True)
    counts = [struct.unpack_from("<H", p, n.P_RECORDS)[0] for p in programs]
    for x, target in zip(case.inputs, case.targets, strict=True):
        session.calls.append((1, 0, counts[1], x.tobytes(), target.tobytes()))
        session.calls.append((0, 0, counts[0], x.tobytes(), bytes(sizes[n.BUF_TARGET])))
    return session


def lines_of(session: Session, answer: bytes) -> list[str]:
    train, state, arena = (session.sizes[b] for b in (n.BUF_TRAIN, n.BUF_STATE, n.BUF_ARENA))
    output, size = struct.unpack_from("<II", session.programs[0], n.P_OUTPUT)
    output &= 0x0FFFFFFF
    lines = []
    step = 4 + train + state + arena
    for at in range(step, len(answer), 2 * step):  # of the forward run behind every step
        assert struct.unpack_from("<i", answer, at)[0] > 0
        blocks = answer[at + 4 : at + step]
        y = blocks[train + state + output : train + state + output + size]
        lines.append(" ".join(f"{crc32(b):08x}" for b in (blocks[:train], blocks[train : train + state], y)))
    return lines


KINDS: dict[str, Callable[[int], cases.Case]] = {
    "dense": lambda seed: cases.random_case(seed, 40),
    "branches": branches.random_case,
}


@pytest.fixture(scope="module", params=CASES)
def judgement(request: pytest.FixtureRequest) -> list[tuple[cases.Case, list[str]]]:
    make = cases.random_case if request.param == "dense" else branches.random_case
    found = [make(seed) for seed in range(CASES[request.param])]
    return [(case, cases.expected(case)) for case in found]


def test_cases_under_sanitizers(driver: Path, judgement: list[tuple[cases.Case, list[str]]], tmp_path: Path) -> None:
    sessions = [session_of_case(case) for case, _ in judgement]
    answers, faults = execute(driver, sessions, tmp_path)
    assert not faults, described(faults, [f"case {case.seed}" for case, _ in judgement])
    wrong = [
        case.seed
        for (case, lines), session, answer in zip(judgement, sessions, answers, strict=True)
        if lines_of(session, answer) != lines
    ]
    assert not wrong, f"cases {wrong} differ from tests/reference.py"


def extreme_case(seed: int, kind: str) -> cases.Case:
    """A random case with weights, tables, inputs, gains and rates at the ends of their ranges."""
    case = KINDS[kind](seed)
    rng = random.Random(seed)
    parts = take_apart(case.plan.data)
    for part in parts:
        if part.kind in (n.SECTION_TRAIN, n.SECTION_FROZEN) and rng.random() < 0.6:
            begin = 4 * rng.randrange(len(part.value) // 4 + 1)
            part.value[begin:] = extremes(rng, len(part.value) - begin)
        elif part.kind == n.SECTION_STATE:
            for at in range(n.STATE_BYTES, n.STATE_BYTES + 2 * struct.unpack_from("<H", part.value, 32)[0]):
                part.value[at] = rng.choice((0, 1, 15, 16, 31, 127, 128, 255))
        elif part.kind == n.SECTION_PROGRAM:
            for at in range(n.PROGRAM_BYTES, len(part.value), n.RECORD_BYTES):
                if rng.random() < 0.3:
                    struct.pack_into("<h", part.value, at + n.R_SCALE_EXP, rng.choice((-32768, -60, -9, 0, 9, 32767)))
                if part.value[at] == n.OP_DENSE and rng.random() < 0.3:
                    struct.pack_into(
                        "<bb", part.value, at + n.R_ZERO_IN, rng.choice((-128, 127)), rng.choice((-128, 127))
                    )
    data = seal(put_together(case.plan.data, parts))
    ends = np.frombuffer(rng.randbytes(case.inputs.size), dtype=np.int8).reshape(case.inputs.shape)
    inputs = np.where(ends < 0, -128, 127).astype(np.int8)
    targets = case.targets
    if targets.ndim == 2:
        targets = np.where(targets < 0, -128, 127).astype(np.int8)
    rate = (rng.choice((0, 1024, 2047)), rng.choice((-32768, -40, -20, -10, 0, 20, 32767)))
    plan = type(case.plan)(data, *(getattr(case.plan, f) for f in list(case.plan.__dataclass_fields__)[1:]))
    return cases.Case(seed, plan, inputs, targets, rate, case.skip_below)


@pytest.fixture(scope="module", params=CASES)
def extreme_judgement(request: pytest.FixtureRequest) -> list[tuple[cases.Case, list[str]]]:
    result = []
    for seed in range(CASES[request.param]):
        case = extreme_case(seed, request.param)
        try:
            ulearn.load(case.plan.data, run=_never)
        except ValueError:
            continue
        try:
            result.append((case, cases.expected(case)))
        except ValueError as e:
            if "sum to 0" not in str(e):  # a table of exponentials without one: the step is refused
                raise AssertionError(f"extreme case {seed}, which the verifier accepts: {e}") from e
    return result


def test_extreme_cases_under_sanitizers(
    driver: Path, extreme_judgement: list[tuple[cases.Case, list[str]]], tmp_path: Path
) -> None:
    assert len(extreme_judgement) > 25
    test_cases_under_sanitizers(driver, extreme_judgement, tmp_path)


# ---- Rounding --------------------------------------------------------------------------------------------------------

ROUNDINGS = 1_000_000


def roundings() -> list[tuple[int, int, int]]:
    """(acc, multiplier, shift): extremes with every shift, then random ones of every magnitude."""
    ends = [
        0,
        1,
        2,
        3,
        2**15 - 1,
        2**15,
        2**16 - 1,
        2**16,
        2**16 + 1,
        2**30 - 1,
        2**30,
        2**30 + 1,
        2**31 - 2,
        2**31 - 1,
    ]
    ends = sorted({*ends, *(-v for v in ends), -(2**31)})
    result = [(a, m, s) for a in ends for m in ends for s in (*range(-31, 31), -128, -32, 31, 127)]
    rng = random.Random(1)
    while len(result) < ROUNDINGS:
        a = rng.getrandbits(32) - 2**31 >> rng.randrange(32)
        m = rng.getrandbits(32) - 2**31 >> rng.randrange(32)
        result.append((a, m, rng.randrange(-31, 31)))
    return result


def rounded(acc: int, multiplier: int, shift: int) -> int:
    """UL_ROUND_SINGLE in exact integers."""
    shift = max(-31, min(30, shift))
    value = (acc * multiplier + 2 ** (30 - shift)) // 2 ** (31 - shift)
    return max(-(2**31), min(2**31 - 1, value))


def test_rounding_is_exact(driver: Path) -> None:
    triples = roundings()
    sent = struct.pack("<I", len(triples)) + b"".join(struct.pack("<iii", *t) for t in triples)
    run = subprocess.run([driver, "round"], input=sent, capture_output=True, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr.decode(errors="replace")
    answers = struct.unpack(f"<{len(triples)}i", run.stdout)
    wrong = [(t, a) for t, a in zip(triples, answers, strict=True) if a != rounded(*t)]
    assert not wrong, f"{len(wrong)} of {len(triples)} are wrong, the first: {wrong[:5]}"


# ---- The build check -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", ["-Os", "-O2"])
def test_core_builds_without_a_warning(variant: str, level: str, tmp_path: Path) -> None:
    for compiler in ("gcc", "clang"):
        if compiler == "clang" and not shutil.which(compiler):
            continue
        for source in CORE:
            command = [compiler, *STRICT, "-Wpedantic", level, *VARIANTS[variant], "-c", source, "-o", tmp_path / "o"]
            built = subprocess.run(command, capture_output=True, text=True)
            assert built.returncode == 0, built.stderr
