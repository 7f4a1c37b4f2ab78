"""The operators of imported networks in the ulab executor: its outputs are those of the C core, bit for bit."""

from __future__ import annotations

import gc
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ulab_kernels

import forward
import tflite_models
import ulearn
from conftest import HERE
from test_bits import FIRMWARE, micropython
from ulearn import ulab_executor
from ulearn_host import numbers as n
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.tflite_import import load_tflite

RANDOM_NETWORKS = 60
RECORDS = 600
SCRATCH = 1 << 17
Array = np.ndarray


def inputs(size: int, seed: int) -> bytes:
    """Inputs back to back: the extremes, both of them mixed, and random codes."""
    random = np.random.default_rng(seed)
    mixed = random.choice(np.array([-128, 127], np.int8), size)
    codes = random.integers(-128, 128, (2, size)).astype(np.int8)
    return b"".join((bytes([128]) * size, bytes([127]) * size, mixed.tobytes(), codes.tobytes()))


# ---- Single records, with dimensions and numbers that no model has ---------------------------------------------------


def record(fields: dict[str, Any], arena: bytes, constants: list[Array]) -> bytes:
    """The file tests/device/forward.py reads: a program, its arena, FROZEN with the constants as operands 2, 3, ..."""
    frozen, operands = b"", list(fields["places"])
    for constant in constants:
        operands.append(n.BUF_FROZEN << 28 | len(frozen))
        frozen += constant.tobytes() + bytes(-constant.nbytes % 4)
    operands += [n.OPERAND_NONE] * (n.OPERANDS - len(operands))
    sizes = (0, len(arena), len(frozen), 0, 0, SCRATCH, 0)
    head = struct.pack("<16s7IIIHBB8s", b"record", *sizes, n.BUF_ARENA << 28, 1, 1, n.KIND_FORWARD, 0, bytes(8))
    kernel = (*fields.get("kernel", (0, 0)), *fields.get("stride", (0, 0)), *fields.get("pad", (0, 0)))
    packed = struct.pack(
        "<4B2H6I6H6B4b2BHhI",
        *(fields["op"], n.MODE_APPLY, fields.get("flags", 0), fields.get("rounding", 0), 0, 0),
        *operands,
        *(*fields["input"], *fields["output"], *kernel),
        *(*fields["zeros"], *fields["bounds"], fields.get("dtype", 0), fields.get("fraction", 0), 0, 0),
        fields.get("extra", 0),
    )
    return head + packed + arena + frozen


def borders(random: np.random.Generator) -> dict[str, Any]:
    """Zero points and a clamp, anywhere."""
    low, high = sorted(int(v) for v in random.integers(-128, 128, 2))
    bounds = (-128, 127) if random.random() < 0.7 else (low, high)
    return {"zeros": tuple(int(v) for v in random.integers(-128, 128, 2)), "bounds": bounds}


def codes(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """int8 numbers; sometimes all of them large and of one sign, which makes the largest sums."""
    lowest = int(random.choice([-128, 90]))
    return random.integers(lowest, 128, shape).astype(np.int8)


def scales(random: np.random.Generator, fields: dict[str, Any], channels: int, roundings: list[int]) -> list[Array]:
    """Multipliers and shifts of a layer, with its rounding and flags; a difference of 1 in a sum is mostly seen."""
    fields["rounding"] = int(random.choice(roundings))
    fields["flags"] = int(random.choice([0, n.FLAG_ONE_SCALE]))
    entries = 1 if fields["flags"] else channels
    upper = random.integers(1 << 30, 1 << 31, entries)
    lower = random.integers(0, 1 << 16, entries if fields["rounding"] == n.ROUND_AWAY else 0)
    shift = random.choice([0, 0, 0, -1, -3, 1, 11], entries).astype(np.int8)
    return [np.concatenate((upper, lower)).astype(np.int32), shift]


def balanced(random: np.random.Generator, sums: Array) -> Array:
    """Biases that bring one position's sums [positions, channels] near 0, where codes do not saturate; some wrap."""
    chosen = sums[random.integers(0, len(sums), sums.shape[1]), np.arange(sums.shape[1])]
    balance = random.integers(-60, 60, len(chosen)) - chosen
    return np.where(random.random(len(chosen)) < 0.1, np.sign(chosen) * (2**31 - 1), balance).astype(np.int32)


def dense_record(random: np.random.Generator) -> bytes:
    """DENSE with either kind of weights."""
    k, outputs = int(random.choice([1, 5, 60, 700, 1500])), int(random.integers(1, 40))
    fields = {"op": n.OP_DENSE, "input": (0, 0, k), "output": (0, 0, outputs)} | borders(random)
    x, weights = codes(random, (k,)), codes(random, (outputs, k))
    used = weights.astype(np.int64)
    fields["dtype"] = n.DTYPE_INT8
    if random.random() < 0.6:
        fields["dtype"], fields["fraction"] = n.DTYPE_INT16, int(random.integers(2, 8))
        weights = random.integers(-32768, 32768, (outputs, k)).astype(np.int16)
        used = (weights.astype(np.int64) + (1 << fields["fraction"] >> 1)) >> fields["fraction"]
    of_sums = scales(random, fields, outputs, [n.ROUND_SINGLE, n.ROUND_AWAY])
    bias = balanced(random, (used @ (x.astype(np.int64) - fields["zeros"][0]))[None])
    fields["places"] = (n.BUF_ARENA << 28, n.BUF_ARENA << 28 | k)
    return record(fields, x.tobytes() + bytes(outputs), [weights, bias, *of_sums])


def window_fields(random: np.random.Generator, kind: int) -> dict[str, Any]:
    """Dimensions of CONV or DEPTHWISE: small ones, long sums in one place, or what may work in place."""
    inside = (int(v) for v in random.integers(1, 10, 3))
    kernel, stride = (tuple(int(v) for v in random.integers(1, 5, 2)) for _ in range(2))
    pad = tuple(int(random.integers(0, k)) for k in kernel)
    h, w, c = inside
    style = int(random.integers(0, 3))
    if style == 0:
        outside = [
            int(random.integers(1, (size - 1 + p) // s + 2)) for size, p, s in zip((h, w), pad, stride, strict=True)
        ]
    elif style == 1:
        h, w = (1, 1) if kind == n.OP_CONV else (int(v) for v in random.integers(30, 50, 2))
        c = int(random.choice([3, 520, 1100, 3000])) if kind == n.OP_CONV else int(random.integers(1, 4))
        kernel, stride, pad, outside = (h, w), (1, 1), (0, 0), [1, 1]
    else:
        kernel, pad, stride = ((1, 1), (0, 0), (1, 1)) if kind == n.OP_CONV else (kernel, pad, (1, 1))
        outside = [h, w]
    channels = int(random.integers(1, 50)) if kind == n.OP_CONV else c * int(random.integers(1, 4))
    if style == 2:
        channels = int(random.integers(1, c + 1)) if kind == n.OP_CONV else c
    fields = {"op": kind, "input": (h, w, c), "output": (*outside, channels), "in_place": style == 2}
    return fields | {"kernel": kernel, "stride": stride, "pad": pad} | borders(random)


def patches(x: Array, fields: dict[str, Any]) -> Array:
    """[positions, kernel_h, kernel_w, in_c]: what lies under the kernel."""
    (kh, kw), (sh, sw), (top, left) = fields["kernel"], fields["stride"], fields["pad"]
    out_h, out_w, _ = fields["output"]
    room = ((top, out_h * sh + kh), (left, out_w * sw + kw), (0, 0))
    image = np.pad(x.astype(np.int64), room, constant_values=fields["zeros"][0])
    return np.stack([image[i * sh :, j * sw :][:kh, :kw] for i in range(out_h) for j in range(out_w)])


def window_record(random: np.random.Generator, kind: int) -> bytes:
    """CONV or DEPTHWISE."""
    fields = window_fields(random, kind)
    x, channels = codes(random, fields["input"]), fields["output"][2]
    under = patches(x, fields)
    weights = codes(random, (channels, *fields["kernel"], x.shape[2] if kind == n.OP_CONV else 1))
    of_sums = scales(random, fields, channels, [n.ROUND_SINGLE, n.ROUND_DOUBLE, n.ROUND_AWAY])
    if kind == n.OP_CONV:
        rows = weights.reshape(channels, -1).astype(np.int64)
        sums = under.reshape(len(under), -1) @ rows.T
        weights = (np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4))) + 128).astype(np.uint8)
        fields |= {"dtype": n.DTYPE_UINT8, "extra": weights.shape[1] | channels << 16}
    else:
        repeated = np.repeat(under, channels // x.shape[2], axis=3)
        sums = np.einsum("pijc,cij->pc", repeated, weights[..., 0].astype(np.int64))
        rows = fields["output"][0]
        fields |= {"dtype": n.DTYPE_INT8, "extra": rows + rows % 2, "rounding": n.ROUND_DOUBLE}
        of_sums[0] = of_sums[0][: len(of_sums[1])]
    fields["flags"] |= n.FLAG_FULL_RANGE
    at = 0 if fields.pop("in_place") and random.random() < 0.7 else x.nbytes
    fields["places"] = (n.BUF_ARENA << 28, n.BUF_ARENA << 28 | at)
    arena = x.tobytes() + bytes(sums.size)
    return record(fields, arena, [weights, balanced(random, sums), *of_sums])


def elementwise_record(random: np.random.Generator) -> bytes:
    """ADD or MUL with scales of any size, y over a, over b, or apart."""
    kind = int(random.choice([n.OP_ADD, n.OP_MUL]))
    shape = tuple(int(v) for v in random.integers(1, 9, 3))
    a, size = codes(random, shape), int(np.prod(shape))
    fields = {"op": kind, "input": shape, "output": shape, "rounding": n.ROUND_DOUBLE} | borders(random)
    fields["extra"] = int(random.choice([1, shape[2], size]))
    b, (of_a, of_b, of_y) = codes(random, (fields["extra"],)), random.integers(1 << 30, 1 << 31, 3)
    parameters = [int(random.integers(-128, 128)), of_a, int(random.integers(-4, 1))]
    if kind == n.OP_ADD:
        parameters += [of_b, int(random.integers(-4, 1)), of_y, int(random.integers(-21, -16))]
    else:
        parameters[2] = int(random.integers(-9, 0))
    at = int(random.choice([0, size] + [size + size] * (fields["extra"] == size)))
    fields["places"] = tuple(n.BUF_ARENA << 28 | place for place in (0, at, size + size))
    arena = a.tobytes() + bytes(size) + b.tobytes()
    if at == size + size:
        fields["places"] = tuple(n.BUF_ARENA << 28 | place for place in (0, size, size))
        arena = a.tobytes() + b.tobytes()
    return record(fields, arena, [np.array(parameters, np.int32)])


def pool_record(random: np.random.Generator) -> bytes:
    """AVERAGE_POOL or MAX_POOL."""
    fields = window_fields(random, n.OP_DEPTHWISE)
    h, w, c = fields["input"]
    fields["op"], fields["output"] = int(random.choice([n.OP_AVERAGE_POOL, n.OP_MAX_POOL])), (*fields["output"][:2], c)
    fields["places"] = (n.BUF_ARENA << 28, n.BUF_ARENA << 28 | h * w * c)
    return record(fields, codes(random, (h, w, c)).tobytes() + bytes(int(np.prod(fields["output"]))), [])


def softmax_record(random: np.random.Generator) -> bytes:
    """SOFTMAX with any falling table, and MEAN of many cells."""
    if random.random() < 0.5:
        shape = (int(random.integers(1, 30)), int(random.integers(1, 60)), int(random.integers(1, 5)))
        fields = {"op": n.OP_MEAN, "input": shape, "output": (1, 1, shape[2]), "rounding": n.ROUND_DOUBLE}
        shift = -int(np.prod(shape[:2])).bit_length()
        constants = [np.array([random.integers(1 << 30, 1 << 31), shift], np.int32)]
    else:
        shape = (int(random.integers(1, 3)), int(random.integers(1, 4)), int(random.choice([1, 2, 12, 300, 900])))
        fields = {"op": n.OP_SOFTMAX, "input": shape, "output": shape, "extra": int(random.integers(1, 257))}
        steps = np.exp(-np.arange(fields["extra"]) * random.choice([1e-9, 0.05, 0.3]))
        constants = [np.minimum(np.rint(steps * 2**31), 2**31 - 1).astype(np.int32)]
    x = codes(random, shape)
    fields |= borders(random) | {"places": (n.BUF_ARENA << 28, n.BUF_ARENA << 28 | x.nbytes)}
    return record(fields, x.tobytes() + bytes(x.nbytes), constants)


def random_record(seed: int) -> bytes:
    """A record file."""
    random = np.random.default_rng(seed)
    kinds = [
        dense_record,
        lambda r: window_record(r, n.OP_CONV),
        lambda r: window_record(r, n.OP_DEPTHWISE),
        elementwise_record,
        pool_record,
        softmax_record,
    ]
    return kinds[seed % len(kinds)](random)


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    """Record files, and the C core's line for each."""
    folder = tmp_path_factory.mktemp("records")
    made = {}
    for seed in range(RECORDS):
        path = folder / f"record{seed}.rec"
        path.write_bytes(random_record(seed))
        made[path] = forward.run_record(str(folder), path.stem, ulab_kernels.run)
    return made


def test_records_numpy(records: dict[Path, str]) -> None:
    """Single records with numpy in ulab's place."""
    assert all(line.startswith("1 ") for line in records.values())
    for path, line in records.items():
        assert forward.run_record(str(path.parent), path.stem, ulab_executor.run) == line, path.stem


def test_records_real_ulab(records: dict[Path, str]) -> None:
    """Single records on interpreters with ulab."""
    folder = next(iter(records)).parent
    code = f"import forward; forward.records('.', {[path.stem for path in records]})"
    for interpreter in interpreters():
        printed = micropython(interpreter, folder, [FIRMWARE, HERE / "device"], code)
        assert dict(zip(records, printed, strict=True)) == records, interpreter


# ---- Models ----------------------------------------------------------------------------------------------------------


def interpreters() -> list[Path]:
    """Interpreters with ulab, given by ULEARN_MICROPYTHON_ULAB (several with : between them)."""
    named = os.environ.get("ULEARN_MICROPYTHON_ULAB")
    if not named:
        pytest.skip("ULEARN_MICROPYTHON_ULAB names no interpreter with ulab")
    return [Path(name) for name in named.split(":")]


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Loading a plan collects garbage; here it need not go through all that a test session has imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plans of all models, and inputs for them."""
    folder = tmp_path_factory.mktemp("forward")
    models = dict(tflite_models.operator_models())
    models |= {f"random{seed}": tflite_models.random_model(seed) for seed in range(RANDOM_NETWORKS)}
    for seed, (name, data) in enumerate(models.items()):
        (folder / f"{name}.tflite").write_bytes(data)
        network = load_tflite(folder / f"{name}.tflite")
        (folder / f"{name}.ulm").write_bytes(compile_plan(network, Options("none")).data)
        size = int(np.prod(network.input.shape))
        (folder / f"{name}.x").write_bytes(inputs(size, seed))
    return folder


@pytest.fixture(scope="session")
def wanted(plans: Path) -> dict[str, list[str]]:
    """The C core's lines by model."""
    assert ulearn.executor == "native"
    return {path.stem: forward.run(str(plans), path.stem) for path in sorted(plans.glob("*.ulm"))}


def test_outputs_differ(wanted: dict[str, list[str]]) -> None:
    """Most models answer every random input with another output: equal lines mean something."""
    assert all(len(lines) == 5 for lines in wanted.values())
    assert sum(len(set(lines[2:])) == 3 for lines in wanted.values()) > 0.8 * len(wanted)


def test_numpy(plans: Path, wanted: dict[str, list[str]]) -> None:
    """CPython with numpy in ulab's place."""
    for stem, lines in wanted.items():
        assert forward.run(str(plans), stem, ulab_executor.run) == lines, stem


def test_streamed(plans: Path, wanted: dict[str, list[str]]) -> None:
    """Frozen weights that are read from the file, record by record."""
    for stem in list(wanted)[:: len(wanted) // 40]:
        assert forward.run(str(plans), stem, ulab_executor.run, "stream") == wanted[stem], stem


def test_real_ulab(plans: Path, wanted: dict[str, list[str]]) -> None:
    """Interpreters with ulab."""
    lines = [line for stem, outputs in wanted.items() for line in (f"plan {stem}", *outputs)]
    code = f"import forward; forward.main('.', {list(wanted)})"
    for interpreter in interpreters():
        printed = micropython(interpreter, plans, [FIRMWARE, HERE / "device"], code)
        assert printed == ["executor ulab", *lines], interpreter
    stem = "random0"
    code = f"import forward; print(forward.run('.', '{stem}', frozen='stream'))"
    for interpreter in interpreters():
        assert micropython(interpreter, plans, [FIRMWARE, HERE / "device"], code) == [str(wanted[stem])], interpreter
