"""The ulab executor on imported networks and their training: what it writes is what the C core does, bit for bit."""

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

import branches
import cases
import forward
import tflite_models
import ulab_arrays
import ulearn
from conftest import HERE
from test_bits import FIRMWARE, listing, micropython
from ulearn import ulab_executor
from ulearn_host import numbers as n
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.tflite_import import load_tflite

RANDOM_NETWORKS = 60
RECORDS = 600
BRANCHED = 12
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
    sizes = (0, len(arena), 0, 0, 0, SCRATCH, len(frozen))
    head = struct.pack("<16s7IIIHBB8s", b"record", *sizes, n.BUF_ARENA << 28, 1, 1, n.KIND_FORWARD, 0, bytes(8))
    kernel = (*fields.get("kernel", (0, 0)), *fields.get("stride", (0, 0)), *fields.get("pad", (0, 0)))
    packed = struct.pack(
        "<4B2H6I6H6B4b2BHhI",
        *(fields["op"], n.MODE_APPLY, fields.get("flags", 0), fields.get("rounding", 0), 0, 0),
        *operands,
        *(*fields["input"], *fields["output"], *kernel),
        *(*fields["zeros"], *fields["bounds"], fields.get("dtype", 0), fields.get("fraction", 0)),
        *(fields.get("mant", 0), 0, fields.get("extra", 0)),
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
    if at and kind == n.OP_CONV and random.random() < 0.4:
        fields["mant"] = channels + int(random.integers(0, 5))  # the channels behind are another record's
    fields["places"] = (n.BUF_ARENA << 28, n.BUF_ARENA << 28 | at)
    arena = x.tobytes() + bytes(max(channels, fields.get("mant", 0)) * len(sums))
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
        fields["rounding"] = int(random.choice([n.ROUND_SINGLE, n.ROUND_DOUBLE]))
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


# ---- Records of training, by themselves ------------------------------------------------------------------------------


class Memory:
    """What the buffers of one training record hold, and the record's fields."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        self.buffers = dict.fromkeys((n.BUF_ARENA, n.BUF_FROZEN, n.BUF_TRAIN, n.BUF_TARGET), b"")
        self.operands = [n.OPERAND_NONE] * n.OPERANDS
        self.flags = 0
        # Now and then a whole tensor of the largest numbers: the largest sums.
        self.extreme = random.random() < 0.25

    def put(self, index: int, buffer: int, data: Array | bytes) -> None:
        """An operand and what lies there."""
        packed = data if isinstance(data, bytes) else data.tobytes()
        self.operands[index] = buffer << 28 | len(self.buffers[buffer])
        self.buffers[buffer] += packed + bytes(-len(packed) % 4)

    def codes(self, index: int, count: int) -> None:
        """An activation; many of its numbers are alike."""
        values = self.random.integers(-128, 128, count)
        few = self.random.choice(values[:3], count)
        self.put(index, n.BUF_ARENA, np.where(self.random.random(count) < 0.5, few, values).astype(np.int8))

    def gradient(self, index: int, count: int, narrow: bool) -> int:
        """A gradient, returning its exponent; some mantissas lie outside their range, some tensors are all 0."""
        random, limit = self.random, 127 if narrow else 2047
        values = random.integers(-limit - 1, limit + 2 - narrow, count)
        values = np.where(random.random(count) < 0.3, 0, values)
        if self.extreme:
            values = np.full(count, int(random.choice([-limit, limit])))
        elif random.random() < 0.1:
            values = values * 0
        exponent, most = int(random.integers(-25, 5)), min(limit, int(np.max(np.abs(values))))
        head = struct.pack("<hH", exponent, most)
        self.put(index, n.BUF_ARENA, head + values.astype(np.int8 if narrow else np.int16).tobytes())
        if narrow:
            self.flags |= n.FLAG_NARROW_IN if index == 1 else n.FLAG_NARROW_OUT
        return exponent

    def room(self, count: int, narrow: bool) -> None:
        """For the gradient that is written."""
        self.put(1, n.BUF_ARENA, bytes(n.GRADIENT_HEADER + count * (1 if narrow else 2)))
        self.flags |= n.FLAG_NARROW_IN if narrow else 0

    def weights(self, count: int, wide: bool) -> Array:
        """Trained weights."""
        limit, kind = (32767, np.int16) if wide else (127, np.int8)
        if self.extreme:
            return np.full(count, limit, kind)
        return self.random.integers(-limit, limit + 1, count).astype(kind)

    def file(self, op: int, dims: tuple[int, ...], **more: int) -> bytes:
        """The file tests/device/ulab_arrays.py reads. dims: 12 of them, from in_h to pad_left."""
        random, get = self.random, more.get
        rate = int(random.integers(1024, 2048)) if random.random() < 0.95 else 0
        head = (int(random.integers(1, 2**32)), 7, rate, get("lr_exp", 0), 1, 2, 3, 4, 5, 0, 1, 0, 0, 0, 0, 0, 0)
        gain = (int(random.integers(-6, 16)), int(random.choice([0, 5, 16])))
        state = struct.pack("<IIHhIIIiHHHHHHIHHbB2x", *head, *gain)
        arena, frozen, train, target = self.buffers.values()
        sizes = (0, len(arena), len(target), len(train), len(state), SCRATCH, len(frozen))
        start = struct.pack("<16s7IIIHBB8s", b"record", *sizes, n.BUF_ARENA << 28, 1, 1, n.KIND_TRAIN, 0, bytes(8))
        act = int(random.integers(-128, 128)) if "low" not in more else more["low"]
        packed = struct.pack(
            "<4B2H6I6H6B4b2BHhI",
            *(op, n.MODE_APPLY, self.flags | get("flags", 0), get("rounding", 0), 0, n.STATE_BYTES),
            *(*self.operands, *dims, get("zero", 0), get("zero_out", 0), act, 127),
            *(get("dtype", 0), get("fraction", 0), get("mant", 0), get("exp", 0), get("extra", 0)),
        )
        return start + packed + arena + frozen + train + state + target


def walk(random: np.random.Generator) -> tuple[tuple[int, int], tuple[int, int], tuple[int, ...]]:
    """Height and width of an image and of what a kernel makes of it; kernel, strides, padding."""
    h, w = (int(v) for v in random.integers(1, 8, 2))
    if random.random() < 0.2:
        w = int(random.integers(100, 300))
    kernel, stride = (tuple(int(v) for v in random.integers(1, 4, 2)) for _ in range(2))
    if random.random() < 0.3:
        kernel, stride = (1, 1), (1, 1)
    pad = tuple(int(random.integers(0, k)) for k in kernel)
    out = tuple((size - 1 + p) // s + 1 for size, p, s in zip((h, w), pad, stride, strict=True))
    return (h, w), (out[0], out[1]), (*kernel, *stride, *pad)


def fraction_for(products: int, limit: int, fraction: int) -> int:
    """As few fraction bits as the accumulator allows: sums of so many products, each with a number up to limit."""
    while products * limit * (32768 >> fraction) >= 1 << 31:
        fraction += 1
    return fraction


def back_record(random: np.random.Generator) -> bytes:
    """DENSE_BACK, CONV_BACK, DEPTHWISE_BACK: any mixture of frozen and trained rows, now and then in place."""
    m = Memory(random)
    op = int(random.choice([n.OP_DENSE_BACK, n.OP_CONV_BACK, n.OP_DEPTHWISE_BACK]))
    (h, w), (oh, ow), kernel = walk(random)
    k, outputs = int(random.integers(1, 20)), int(random.choice([1, 7, 30, 150]))
    if op == n.OP_DENSE_BACK:
        (h, w), (oh, ow), kernel = (0, 0), (0, 0), (0,) * 6
        k = int(random.choice([1, 30, 600]))
    if op == n.OP_DEPTHWISE_BACK:
        outputs = k * int(random.integers(1, 4))
    places, cells, area = max(1, oh * ow), max(1, h * w), max(1, kernel[0] * kernel[1])
    narrow, narrow_in = random.random() < 0.5, random.random() < 0.5
    exponent = m.gradient(0, places * outputs, narrow)
    alike = op == n.OP_CONV_BACK and kernel[:4] == (1, 1, 1, 1) and k <= outputs
    alike = alike or (op == n.OP_DEPTHWISE_BACK and kernel[2:4] == (1, 1) and k == outputs and (h, w) == (oh, ow))
    m.room(cells * k, narrow_in)
    if alike and narrow == narrow_in:
        m.operands[1] = m.operands[0]
    trained = int(random.choice([0, outputs]))
    if op != n.OP_DEPTHWISE_BACK and random.random() < 0.5:
        trained = int(random.integers(0, outputs + 1))
    wide = bool(random.random() < 0.7)
    taps = area * k if op != n.OP_DEPTHWISE_BACK else area
    frozen = outputs - trained
    if frozen and op == n.OP_DEPTHWISE_BACK:
        m.put(2, n.BUF_FROZEN, m.weights(frozen * taps, wide=False))
    elif frozen:
        row = -(-taps // 4) * 4
        lowest = 255 if m.extreme else 1
        m.put(2, n.BUF_FROZEN, random.integers(lowest, 256, frozen * row).astype(np.uint8))
    m.put(3, n.BUF_FROZEN, random.integers(65535 if m.extreme else 0, 65536, outputs).astype(np.uint16))
    if trained:
        m.put(5, n.BUF_TRAIN, m.weights(trained * taps, wide))
    sums = area * (outputs if op != n.OP_DEPTHWISE_BACK else outputs // k)
    f = fraction_for(sums, 127 if narrow else 2047, int(random.integers(0, 8)))
    more = {"dtype": n.DTYPE_INT16, "fraction": f} if wide else {"dtype": n.DTYPE_INT8}
    dims = (h, w, k, oh, ow, outputs, *kernel)
    return m.file(op, dims, extra=trained, exp=int(random.integers(-20, 20)) - exponent, **more)


def update_record(random: np.random.Generator) -> bytes:
    """UPDATE_WEIGHT, UPDATE_BIAS, UPDATE_CONV, UPDATE_DEPTHWISE."""
    m = Memory(random)
    kinds = [n.OP_UPDATE_WEIGHT, n.OP_UPDATE_BIAS, *[n.OP_UPDATE_CONV, n.OP_UPDATE_DEPTHWISE] * 2]
    op = int(random.choice(kinds))
    (h, w), (oh, ow), kernel = walk(random)
    k, outputs, before = (int(v) for v in random.integers((1, 1, 0), (20, 20, 4)))
    image = op in (n.OP_UPDATE_CONV, n.OP_UPDATE_DEPTHWISE)
    if op == n.OP_UPDATE_WEIGHT:
        oh = ow = 1
    if op == n.OP_UPDATE_DEPTHWISE:
        outputs, before = k * int(random.integers(1, 4)), 0
    narrow, wide = random.random() < 0.5, bool(random.random() < 0.6)
    exponent = m.gradient(0, oh * ow * (before + outputs), narrow)
    taps = (kernel[0] * kernel[1] if image else 1) * (1 if op == n.OP_UPDATE_DEPTHWISE else k)
    if op == n.OP_UPDATE_BIAS:
        k = int(random.integers(0, before + 1))
        limit = int(random.choice([1000, 2**30, 2**31 - 1]))
        m.put(2, n.BUF_TRAIN, random.integers(-limit, limit + 1, outputs).astype(np.int32))
    else:
        m.codes(1, k if not image else h * w * k)
        m.put(2, n.BUF_TRAIN, m.weights(outputs * taps, wide))
    m.put(3, n.BUF_FROZEN, random.integers(0, 8 << 10, outputs).astype(np.uint16))
    s = int(random.integers(10, 45)) if random.random() < 0.8 else int(random.integers(-6, 80))
    more = {"dtype": n.DTYPE_INT16 if wide else n.DTYPE_INT8, "zero": int(random.integers(-128, 128))}
    more |= {"mant": int(random.integers(1024, 2048)), "lr_exp": -17, "exp": 17 - exponent - 24 - s}
    dims = (h, w, k, oh, ow, outputs, *kernel)
    if not image:
        dims = (0, 0, k, *((oh, ow) if op == n.OP_UPDATE_BIAS else (0, 0)), outputs, *(0,) * 6)
    band = int(random.integers(1, oh + 1)) if op == n.OP_UPDATE_CONV else 0
    return m.file(op, dims, extra=before + outputs | band << 16, **more)


def trained_record(random: np.random.Generator) -> bytes:
    """CONV_TRAINED and DEPTHWISE_TRAINED."""
    m = Memory(random)
    op = int(random.choice([n.OP_CONV_TRAINED, n.OP_DEPTHWISE_TRAINED]))
    (h, w), (oh, ow), kernel = walk(random)
    k, outputs, before = (int(v) for v in random.integers((1, 1, 0), (30, 40, 4)))
    if random.random() < 0.1:
        k = 700
    if op == n.OP_DEPTHWISE_TRAINED:
        outputs, before = k * int(random.integers(1, 4)), 0
    area = kernel[0] * kernel[1]
    taps = area * k if op == n.OP_CONV_TRAINED else area
    wide = bool(random.random() < 0.7)
    f = fraction_for(taps, 255, int(random.integers(0, 8)))
    m.codes(0, h * w * k)
    m.put(1, n.BUF_ARENA, bytes(oh * ow * (before + outputs)))
    m.put(2, n.BUF_TRAIN, m.weights(outputs * taps, wide))
    fields: dict[str, Any] = {}
    kinds = [n.ROUND_SINGLE, n.ROUND_DOUBLE, n.ROUND_AWAY] if op == n.OP_CONV_TRAINED else [n.ROUND_DOUBLE]
    multipliers, shifts = scales(random, fields, outputs, kinds)
    shifts = np.maximum(-31, shifts - int(random.integers(0, 20))).astype(np.int8)
    m.put(3, n.BUF_FROZEN, random.integers(-60000, 60001, outputs).astype(np.int32))
    m.put(4, n.BUF_FROZEN, multipliers)
    m.put(5, n.BUF_FROZEN, shifts)
    more = {"dtype": n.DTYPE_INT16, "fraction": f} if wide else {"dtype": n.DTYPE_INT8}
    more |= {"mant": before + outputs, "extra": int(random.integers(1, taps + 1))} if op == n.OP_CONV_TRAINED else {}
    zeros = [int(v) for v in random.integers(-128, 128, 2)]
    more |= {"zero": zeros[0], "zero_out": zeros[1], "low": -128} | fields
    return m.file(op, (h, w, k, oh, ow, outputs, *kernel), **more)


def unpool_record(random: np.random.Generator) -> bytes:
    """AVERAGE_BACK and MAX_BACK."""
    m = Memory(random)
    op = int(random.choice([n.OP_AVERAGE_BACK, n.OP_MAX_BACK]))
    (h, w), (oh, ow), kernel = walk(random)
    c, narrow = int(random.integers(1, 9)), bool(random.random() < 0.5)
    m.gradient(0, oh * ow * c, narrow)
    m.room(h * w * c, bool(random.random() < 0.5))
    m.codes(4, h * w * c)
    more = {"extra": 0, "mant": int(random.integers(0, 5))}
    if op == n.OP_AVERAGE_BACK:
        m.operands[4] = n.OPERAND_NONE
        meet = -(-kernel[0] // kernel[2]) * -(-kernel[1] // kernel[3])
        more["extra"] = int(random.integers(0, 31 - (meet * (127 if narrow else 2047)).bit_length()))
        more["mant"] = min(30, max(0, more["extra"] - int(random.integers(-2, 4))))
    return m.file(op, (h, w, c, oh, ow, c, *kernel), **more)


def passing_record(random: np.random.Generator) -> bytes:
    """MASK and the backward records that go element by element."""
    m = Memory(random)
    op = int(random.choice([n.OP_MASK, n.OP_SCALE_BACK, n.OP_CROP, n.OP_SUM, n.OP_RELU_BACK]))
    h, w, c = (int(v) for v in random.integers(1, (9, 9, 40)))
    size, narrow = h * w * c, bool(random.random() < 0.5)
    low = int(random.integers(-128, 128))
    if op == n.OP_MASK:
        m.codes(0, size)
        low = struct.unpack_from("<b", m.buffers[n.BUF_ARENA])[0]
        m.put(1, n.BUF_ARENA, bytes((size + 7) // 8))
        return m.file(op, (h, w, c, h, w, c, *(0,) * 6), low=low)
    if op == n.OP_CROP:
        top, left, first, *after = (int(v) for v in random.integers(0, 4, 6))
        oh, ow, oc = top + h + after[0], left + w + after[1], first + c + after[2] * (random.random() < 0.5)
        if random.random() < 0.3:
            oc, first = c, 0
        m.gradient(0, oh * ow * oc, narrow)
        m.room(size, narrow and random.random() < 0.5)
        return m.file(op, (h, w, c, oh, ow, oc, 0, 0, 0, 0, top, left), extra=first)
    m.gradient(0, size, narrow)
    m.room(size, narrow)
    more = {"low": low}
    if op == n.OP_SCALE_BACK:
        more |= {"extra": int(random.choice([1, c, w * c, size])), "exp": int(random.integers(-9, 9))}
        limit = int(random.choice([600, 2048, 32768]))
        m.put(2, n.BUF_FROZEN, random.integers(-limit, limit, more["extra"]).astype(np.int16))
    elif op == n.OP_SUM:
        m.gradient(4, size, narrow)
    elif random.random() < 0.5:
        m.flags |= n.FLAG_BITS
        m.put(4, n.BUF_ARENA, random.integers(0, 256, (size + 7) // 8).astype(np.uint8))
    else:
        m.codes(4, size)
        more["low"] = struct.unpack_from("<b", m.buffers[n.BUF_ARENA], m.operands[4] & 0x0FFFFFFF)[0]
    if random.random() < 0.5:
        m.operands[1] = m.operands[4 if op == n.OP_SUM and random.random() < 0.5 else 0]
    return m.file(op, (h, w, c, h, w, c, *(0,) * 6), **more)


def hinge_record(random: np.random.Generator) -> bytes:
    """HINGE, with a label that is no class now and then."""
    m = Memory(random)
    classes = int(random.integers(2, 9))
    m.put(0, n.BUF_ARENA, random.integers(-5, 5, classes).astype(np.int8))
    m.room(classes, narrow=False)
    m.put(3, n.BUF_TARGET, struct.pack("<H", int(random.integers(0, classes + (random.random() < 0.1)))))
    return m.file(n.OP_HINGE, (*(0,) * 5, classes, *(0,) * 6), extra=int(random.integers(1, 12)))


def training_record(seed: int) -> bytes:
    """A record file."""
    random = np.random.default_rng(seed)
    kinds = [back_record, back_record, update_record, update_record, trained_record, unpool_record, passing_record]
    return (*kinds, passing_record, hinge_record)[seed % 9](random)


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    """Record files, and the C core's line for each."""
    folder = tmp_path_factory.mktemp("training")
    made = {}
    for seed in range(RECORDS):
        path = folder / f"record{seed}.rec"
        path.write_bytes(training_record(seed))
        made[path] = ulab_arrays.run_record(str(folder), path.stem, ulab_kernels.run)
    return made


def test_training_records_numpy(training: dict[Path, str]) -> None:
    """Single records of training with numpy in ulab's place."""
    assert sum(line.startswith("1 ") for line in training.values()) > 0.9 * RECORDS
    for path, line in training.items():
        assert ulab_arrays.run_record(str(path.parent), path.stem, ulab_executor.run) == line, path.stem


def test_training_records_real_ulab(training: dict[Path, str]) -> None:
    """Single records of training on interpreters with ulab."""
    folder = next(iter(training)).parent
    code = f"import ulab_arrays; ulab_arrays.records('.', {[path.stem for path in training]})"
    for interpreter in interpreters():
        printed = micropython(interpreter, folder, [FIRMWARE, HERE / "device"], code)
        assert dict(zip(training, printed, strict=True)) == training, interpreter


def test_branches_real_ulab(tmp_path: Path) -> None:
    """A dozen networks with branches (tests/branches.py), trained on interpreters with ulab."""
    chosen = interpreters()
    made = [branches.random_case(seed) for seed in range(BRANCHED)]
    wanted = {cases.write(case, tmp_path): cases.expected(case) for case in made}
    code = f"import steps; steps.main('.', {list(wanted)})"
    for interpreter in chosen:
        lines = micropython(interpreter, tmp_path, [FIRMWARE, HERE / "device"], code)
        assert lines == ["executor ulab", *listing(wanted)], interpreter


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
