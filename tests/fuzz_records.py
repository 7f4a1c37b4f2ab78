"""Plans of one training record each, at the limits of what a verifier may accept: for tests/test_fuzz.py.

A record is made to fit: its windows, dimensions, flags and parameters from ordinary to the ends of their ranges, every
operand's size worked out from ul_format.h, and every buffer exactly as long as it takes. Then, mostly, something is
bent: a field, an operand, a buffer's size. Weights, gradients, zero points and exponents are as large as they get, so
that sums which may overflow do.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field

from ulearn_host import numbers as n
from ulearn_host.compiler import seal
from ulearn_host.records import RECORD

OPERATIONS = (
    *(n.OP_DENSE, n.OP_DENSE_BACK, n.OP_UPDATE_WEIGHT, n.OP_UPDATE_BIAS),
    *range(n.OP_CONV_TRAINED, n.OP_MASK + 1),
    *range(n.OP_CONV_BACK, n.OP_RELU_BACK + 1),
)
NAMES = {value: name for name, value in vars(n).items() if name.startswith("OP_")}
DEPTHWISE = (n.OP_DEPTHWISE_TRAINED, n.OP_DEPTHWISE_BACK, n.OP_UPDATE_DEPTHWISE)
FLAT = (n.OP_DENSE, n.OP_DENSE_BACK, n.OP_UPDATE_WEIGHT, n.OP_UPDATE_BIAS)
UPDATES = (n.OP_UPDATE_WEIGHT, n.OP_UPDATE_BIAS, n.OP_UPDATE_CONV, n.OP_UPDATE_DEPTHWISE)
BACK = (n.OP_DENSE_BACK, n.OP_CONV_BACK, n.OP_DEPTHWISE_BACK)
POOLS = (n.OP_AVERAGE_BACK, n.OP_MAX_BACK)
GAINS, GATES = 2, 4
STATE_BYTES = n.STATE_BYTES + GAINS * n.GAIN_BYTES + GATES
MOST_BYTES = 1 << 20  # of an operand, mostly
DIMENSIONS = ("in_h", "in_w", "in_c", "out_h", "out_w", "out_c")
WINDOW = ("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_top", "pad_left")
FIELDS = (
    *("op", "mode", "flags", "rounding", "gate", "gain"),
    *(f"operand {i}" for i in range(n.OPERANDS)),
    *DIMENSIONS,
    *WINDOW,
    *("zero_in", "zero_out", "act_min", "act_max", "w_dtype", "fraction", "scale_mant", "scale_exp", "extra"),
)
# (lowest, highest) value by struct code.
RANGES = {"B": (0, 255), "b": (-128, 127), "H": (0, 65535), "h": (-32768, 32767), "I": (0, 2**32 - 1)}
CODES = "BBBBHHIIIIIIHHHHHHBBBBBBbbbbBBHhI"


@dataclass
class Use:
    """An operand: bytes of an element, how many, what it is: x, gradient, weights, table, written."""

    index: int
    size: int
    count: int
    kind: str
    head: int = 0  # bytes before the elements

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.head + self.size * self.count


@dataclass
class Attack:
    """A plan; fill: what ARENA holds at first; inputs: what INPUT is filled with, call by call."""

    seed: int
    op: int
    data: bytes
    fill: int
    inputs: tuple[int, ...]
    fields: dict[str, int] = field(default_factory=dict)
    sizes: tuple[int, ...] = ()

    def __repr__(self) -> str:
        shown = {k: v for k, v in self.fields.items() if v and v != n.OPERAND_NONE}
        return f"attack {self.seed}, {NAMES[self.op]}, sizes {self.sizes}, fill {self.fill:#x}: {shown}"


def _dimension(rng: random.Random, large: bool = False) -> int:
    if large:
        return rng.choice((255, 256, 4096, 32767, 32768, 65534, 65535))
    return rng.choice((1, 1, 2, 3, 4, 5, 7, 8, 9, 13, 16))


def _axis(rng: random.Random, large: bool) -> tuple[int, int, int, int, int]:
    """in, out, kernel, stride, pad of one dimension, as a verifier demands or nearly so."""
    kernel = rng.choice((1, 1, 2, 3, 3, 5, 7, 254, 255) if rng.random() < 0.3 else (1, 2, 3))
    stride = rng.choice((1, 1, 2, 3, 4, 254, 255) if rng.random() < 0.3 else (1, 1, 2, 3))
    pad = rng.choice((0, 0, kernel - 1, kernel // 2, rng.randrange(kernel)))
    if large:
        size = _dimension(rng, True)
        most = (size - 1 + pad) // stride + 1
        return size, min(65535, rng.choice((1, 2, 3, most))), kernel, stride, pad
    out = _dimension(rng)
    least = max(1, (out - 1) * stride - pad + 1)
    size = min(65535, least + rng.choice((0, 0, 1, kernel - 1, kernel, stride - 1, stride)))
    return size, out, kernel, stride, pad


class _Maker:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.f = dict.fromkeys(FIELDS, 0)
        self.op = self.f["op"] = rng.choice(OPERATIONS)
        self.uses: list[Use] = []
        self.scratch = 0
        self.wide = self.extreme = False
        self._shape()
        if rng.random() < 0.12:
            self._stretch()
        self._parameters()
        self._operands()

    def _shape(self) -> None:
        rng, f, op = self.rng, self.f, self.op
        large = rng.randrange(8) if rng.random() < 0.15 else 9  # which dimension is large, if any
        windowed = op in (n.OP_CONV_TRAINED, n.OP_CONV_BACK, n.OP_UPDATE_CONV, *DEPTHWISE, *POOLS)
        k = f["in_c"] = _dimension(rng, large == 2)
        f["out_c"] = _dimension(rng, large == 5)
        if op in FLAT:
            if op == n.OP_UPDATE_BIAS:
                f["in_c"] = rng.choice((0, 0, 1, 5))
                f["out_h"], f["out_w"] = _dimension(rng, large == 3), _dimension(rng, large == 4)
            return
        if windowed:
            for side, place in (("h", 0), ("w", 1)):
                size, out, kernel, stride, pad = _axis(rng, large == place)
                f["in_" + side], f["out_" + side] = size, out
                f["kernel_" + side], f["stride_" + side] = kernel, stride
                f["pad_top" if side == "h" else "pad_left"] = pad
            if rng.random() < 0.15:  # what may be done in place
                f["kernel_h"] = f["kernel_w"] = f["stride_h"] = f["stride_w"] = 1
                f["pad_top"] = f["pad_left"] = 0
                f["out_h"], f["out_w"] = f["in_h"], f["in_w"]
            if rng.random() < 0.005:  # rows that hardly fit, of which strides are taken
                self.wide = True
                f |= {"in_h": 1, "in_w": 65535, "out_h": 1, "out_w": 1, "out_c": 1, "kernel_h": 255, "kernel_w": 1}
                f |= {"stride_h": 255, "stride_w": rng.choice((1, 255)), "pad_top": rng.choice((0, 254)), "pad_left": 0}
                k = f["in_c"] = rng.choice((1, 129, 255))
            if op in POOLS:
                f["out_c"] = k
            elif op in DEPTHWISE:
                f["out_c"] = k * (rng.choice((1, 1, 2, 3, 8)) if k < 8192 else 1)
            return
        f["in_h"], f["in_w"] = _dimension(rng, large == 0), _dimension(rng, large == 1)
        if op == n.OP_CROP:
            f["pad_top"], f["pad_left"], f["extra"] = (rng.choice((0, 0, 1, 3, 255)) for _ in range(3))
            f["out_h"] = min(65535, f["in_h"] + f["pad_top"] + rng.choice((0, 0, 1)))
            f["out_w"] = min(65535, f["in_w"] + f["pad_left"] + rng.choice((0, 0, 1)))
            f["out_c"] = min(65535, k + f["extra"] + rng.choice((0, 0, 1)))
        else:
            f["out_h"], f["out_w"], f["out_c"] = f["in_h"], f["in_w"], k

    def _stretch(self) -> None:
        """Where sums are as large as an accumulator holds."""
        rng, f, op = self.rng, self.f, self.op
        largest = 128 if rng.random() < 0.6 else 1 << rng.randrange(7, 16)
        self.extreme = True
        f |= dict.fromkeys(DIMENSIONS, 1)
        if op in BACK:
            f["out_c"] = 2**31 // (n.MANTISSA_MAX * largest)
        elif op in (n.OP_UPDATE_CONV, n.OP_UPDATE_DEPTHWISE):
            f["in_h"] = f["out_h"] = 34
            f["in_w"] = f["out_w"] = 2**31 // (255 * n.MANTISSA_MAX * 34)
        elif op == n.OP_UPDATE_BIAS:
            f |= {"in_h": 0, "in_w": 0, "in_c": 0, "out_h": 512, "out_w": 2**31 // (n.MANTISSA_MAX * 512)}
        elif op in (n.OP_DENSE, n.OP_CONV_TRAINED):
            f["in_c"] = 2**31 // (2 * 255 * largest)
        elif op == n.OP_DEPTHWISE_TRAINED:
            f["in_h"] = 128
        elif op == n.OP_AVERAGE_BACK:
            f |= {"in_h": 255, "in_w": 5}
        elif op == n.OP_MAX_BACK:
            f |= {"in_h": 255, "in_w": 255}
        if op in (n.OP_DEPTHWISE_TRAINED, *POOLS):
            f |= {"kernel_h": f["in_h"], "kernel_w": f["in_w"], "stride_h": f["in_h"], "stride_w": f["in_w"]}
            f |= {"pad_top": 0, "pad_left": 0}
        elif op not in FLAT and f["kernel_h"]:
            f |= {name: int(not name.startswith("pad")) for name in WINDOW}
        if op in FLAT and op != n.OP_UPDATE_BIAS:
            f |= {"in_h": 0, "in_w": 0, "out_h": 0, "out_w": 0}

    @property
    def taps(self) -> int:
        """Weights of a row."""
        f = self.f
        area = f["kernel_h"] * f["kernel_w"] if self.op not in FLAT else 1
        return area if self.op in DEPTHWISE else area * f["in_c"]

    def _parameters(self) -> None:
        rng, f, op = self.rng, self.f, self.op
        f["zero_in"], f["zero_out"] = rng.choice((-128, 127, 0)), rng.choice((-128, 127, 0))
        f["act_min"], f["act_max"] = rng.choice(((-128, 127), (-128, -128), (127, 127), (0, 127)))
        f["w_dtype"] = f["fraction"] = 0
        f["rounding"] = n.ROUND_NONE
        f["scale_exp"] = rng.choice((0, -20, 20, -32768, 32767))
        f["flags"] = 0
        outputs = f["out_c"]
        if op in BACK:
            either = op == n.OP_DEPTHWISE_BACK or self.extreme
            choices = (0, outputs) if either else (0, outputs, 1, outputs // 2)
            f["extra"] = rng.choice(choices)
            f["gain"] = n.STATE_BYTES + n.GAIN_BYTES * rng.randrange(GAINS)
        weighted = op in (n.OP_DENSE, n.OP_CONV_TRAINED, n.OP_DEPTHWISE_TRAINED) or (
            op in UPDATES and op != n.OP_UPDATE_BIAS
        )
        if weighted or (op in BACK and f["extra"]):
            f["w_dtype"] = rng.choice((n.DTYPE_INT8, n.DTYPE_INT16))
            f["fraction"] = rng.randrange(8) if f["w_dtype"] == n.DTYPE_INT16 else 0
        if op in (n.OP_DENSE, n.OP_CONV_TRAINED, n.OP_DEPTHWISE_TRAINED):
            f["fraction"] += n.FINER * rng.randint(0, f["fraction"])
        if op in (n.OP_DENSE, n.OP_CONV_TRAINED, n.OP_DEPTHWISE_TRAINED):
            f["rounding"] = {
                n.OP_DENSE: rng.choice((n.ROUND_SINGLE, n.ROUND_AWAY)),
                n.OP_CONV_TRAINED: rng.choice((n.ROUND_SINGLE, n.ROUND_DOUBLE, n.ROUND_AWAY)),
                n.OP_DEPTHWISE_TRAINED: n.ROUND_DOUBLE,
            }[op]
            f["flags"] |= rng.choice((0, n.FLAG_ONE_SCALE))
        if op == n.OP_CONV_TRAINED:
            f["extra"] = rng.choice((self.taps, self.taps, 1, max(1, self.taps - 1), rng.randint(1, self.taps)))
            f["scale_mant"] = min(65535, outputs + rng.choice((0, 0, 1, 7)))
            self.scratch = 16 * (f["extra"] + (outputs if f["extra"] < self.taps else 0))
        if op in UPDATES:
            f["scale_mant"] = rng.choice((1024, 2047, 1500))
            whole = f["in_c"] + outputs if op == n.OP_UPDATE_BIAS else outputs
            if op != n.OP_UPDATE_DEPTHWISE:
                whole = min(65535, whole + rng.choice((0, 0, 1, 5)))
            f["extra"] = whole
        if op == n.OP_UPDATE_CONV:
            out_h = f["out_h"]
            band = rng.choice((out_h, out_h, 1, max(1, out_h - 1), rng.randint(1, out_h)))
            f["extra"] |= band << 16
            self.scratch = 16 * band * f["out_w"] + (16 * self.taps if band < out_h else 0)
        elif op == n.OP_CONV_BACK:
            self.scratch = 16 * (outputs + f["in_c"])
        elif op == n.OP_DEPTHWISE_BACK:
            high = (f["out_h"] - 1) * f["stride_h"] + f["kernel_h"]
            wide = (f["out_w"] - 1) * f["stride_w"] + f["kernel_w"]
            pitch = wide if f["stride_h"] == f["stride_w"] == 1 else f["out_w"]
            self.scratch = 4 * high * wide + 4 * ((f["out_h"] - 1) * pitch + f["out_w"])
        elif op == n.OP_DENSE_BACK:
            self.scratch = 2 * outputs
        elif op == n.OP_AVERAGE_BACK:
            f["extra"], f["scale_mant"] = rng.choice((0, 8, 16, 20, 30)), rng.choice((0, 1, 10, 30))
        elif op == n.OP_MAX_BACK:
            f["scale_mant"] = rng.choice((0, 1, 30))
        elif op == n.OP_SCALE_BACK:
            f["extra"] = rng.choice((1, f["in_c"], f["in_c"] * f["in_w"], f["in_h"] * f["in_w"] * f["in_c"]))
        elif op == n.OP_RELU_BACK:
            f["flags"] |= rng.choice((0, n.FLAG_BITS))
        if op >= n.OP_CONV_BACK or op in BACK or op in UPDATES:
            wide_in = n.FLAG_NARROW_IN if op not in UPDATES else 0
            alike = rng.choice((0, n.FLAG_NARROW_OUT | wide_in))
            free = op in (*BACK, *POOLS) and rng.random() < 0.5
            f["flags"] |= rng.choice((n.FLAG_NARROW_OUT, n.FLAG_NARROW_IN)) if free else alike
            if op == n.OP_CROP and rng.random() < 0.3:
                f["flags"] = n.FLAG_NARROW_OUT
            if rng.random() < 0.3:
                f["gate"] = STATE_BYTES - 1 - rng.randrange(GATES)
                f["flags"] |= rng.choice((0, n.FLAG_GATE_DEEPER))

    def _operands(self) -> None:
        f, op = self.f, self.op
        x = max(1, f["in_h"]) * max(1, f["in_w"]) * f["in_c"] if op not in FLAT else f["in_c"]
        places = max(1, f["out_h"]) * max(1, f["out_w"]) if op not in FLAT or op == n.OP_UPDATE_BIAS else 1
        outputs, taps = f["out_c"], self.taps
        wide = 2 if f["w_dtype"] == n.DTYPE_INT16 else 1
        of_in = 1 if f["flags"] & n.FLAG_NARROW_IN else 2
        of_out = 1 if f["flags"] & n.FLAG_NARROW_OUT else 2

        def use(*entry: object) -> None:
            self.uses.append(Use(*entry))  # type: ignore[arg-type]

        if op in (n.OP_DENSE, n.OP_CONV_TRAINED, n.OP_DEPTHWISE_TRAINED):
            scales = 1 if f["flags"] & n.FLAG_ONE_SCALE else outputs
            use(0, 1, x, "x")
            use(1, 1, places * (f["scale_mant"] if op == n.OP_CONV_TRAINED else outputs), "arena")
            use(2, wide, outputs * taps, "weights")
            use(3, 4, outputs, "biases")
            use(4, 4, scales * (2 if f["rounding"] == n.ROUND_AWAY else 1), "table")
            use(5, 1, scales, "table")
            return
        if op == n.OP_MASK:
            use(0, 1, x, "x")
            use(1, 1, (x + 7) // 8, "arena")
            return
        channels = f["extra"] & 0xFFFF if op in UPDATES else outputs
        use(0, of_out, places * channels, "arena", n.GRADIENT_HEADER)
        if op in UPDATES:
            if op == n.OP_UPDATE_BIAS:
                use(2, 4, outputs, "weights")
            else:
                use(1, 1, x, "x")
                use(2, wide, outputs * taps, "weights")
            use(3, 2, outputs, "table")
            return
        use(1, of_in, x, "arena", n.GRADIENT_HEADER)
        if op in BACK:
            trained = f["extra"]
            row = taps if op in DEPTHWISE else (taps + 3) // 4 * 4
            if trained < outputs:
                use(2, 1, (outputs - trained) * row, "frozen")
            use(3, 2, outputs, "table")
            if trained:
                use(5, wide, trained * taps, "weights")
        elif op == n.OP_MAX_BACK:
            use(4, 1, x, "x")
        elif op == n.OP_SCALE_BACK:
            use(2, 2, f["extra"], "table")
        elif op == n.OP_SUM:
            use(4, of_out, places * outputs, "arena", n.GRADIENT_HEADER)
        elif op == n.OP_RELU_BACK:
            use(4, 1, (x + 7) // 8 if f["flags"] & n.FLAG_BITS else x, "x")


def _blob(rng: random.Random, size: int) -> bytes:
    pattern = rng.choice((b"\x00\x80", b"\xff\x7f", b"\x80", b"\x7f", b"\xff", b"\x00", b"\x00\x80\xff\x7f"))
    return rng.randbytes(size) if rng.random() < 0.2 else (pattern * (size // len(pattern) + 1))[:size]


def _place(rng: random.Random, m: _Maker) -> tuple[list[int], list[tuple[int, ...]]]:
    """Offsets of all operands, each buffer without a spare byte; sizes by buffer, and the trainable tensors."""
    f, ends, tensors = m.f, [0] * n.BUFFERS, []
    for use in rng.sample(m.uses, len(m.uses)):
        buffer = n.BUF_ARENA
        dtype, fraction = f["w_dtype"], f["fraction"] % n.FINER
        if use.kind == "weights" or (use.kind == "biases" and rng.random() < 0.5):
            buffer = n.BUF_TRAIN
            if use.size == 4:
                dtype, fraction = n.DTYPE_INT32, 0
        elif use.kind == "frozen":
            buffer = n.BUF_FROZEN
        elif use.kind in ("table", "biases"):
            buffer = n.BUF_FROZEN if m.extreme else rng.choice((n.BUF_FROZEN, n.BUF_FROZEN, n.BUF_ARENA))
        elif use.kind == "x" and rng.random() < 0.5 and not ends[n.BUF_INPUT] and not m.wide:
            buffer = n.BUF_INPUT
        align = 2 if use.head else 4 if buffer in (n.BUF_TRAIN, n.BUF_FROZEN) else use.size
        at = -(-ends[buffer] // align) * align
        ends[buffer] = at + use.bytes
        f[f"operand {use.index}"] = buffer << 28 | at
        if buffer == n.BUF_TRAIN:
            tensors.append((dtype, fraction, use.count, at))
    return ends, tensors


def _bend(rng: random.Random, m: _Maker, ends: list[int]) -> None:
    """Change a little of it."""
    f = m.f
    kind = rng.random()
    if kind < 0.35 or (m.extreme and rng.random() < 0.8):
        return
    if kind < 0.65:
        for _ in range(rng.choice((1, 1, 2))):
            name, code = rng.choice(list(zip(FIELDS, CODES, strict=True))[1:])
            low, high = RANGES[code]
            old = f[name]
            new = rng.choice(
                (low, high, high - 1, old + 1, old - 1, old * 2, old // 2, 1, 2, 255, rng.randint(low, high))
            )
            f[name] = max(low, min(high, new))
    elif kind < 0.8:
        use = rng.choice(m.uses)
        name = f"operand {use.index}"
        f[name] = (f[name] + rng.choice((-4, -2, -1, 1, 2, 4))) % 2**32
    else:
        buffer = rng.choice((n.BUF_ARENA, n.BUF_ARENA, n.BUF_SCRATCH, n.BUF_FROZEN, n.BUF_TRAIN))
        ends[buffer] = max(0, ends[buffer] - rng.choice((1, 2, 4, 16)))


def _in_place(rng: random.Random, m: _Maker) -> None:
    """Now and then the output begins where an input of it does."""
    others = [use.index for use in m.uses if use.index in (0, 4) and use.kind in ("arena", "x")]
    if any(use.index == 1 and use.kind == "arena" for use in m.uses) and rng.random() < 0.25:
        m.f["operand 1"] = m.f[f"operand {rng.choice(others)}"]


def random_attack(seed: int) -> Attack:
    """The plan of a seed."""
    rng = random.Random(seed)
    while True:
        m = _Maker(rng)
        most = n.PRODUCTS_MAX >> 6 if m.wide or rng.random() < 0.02 else MOST_BYTES
        if sum(use.bytes for use in m.uses) + m.scratch <= most and _work(m) <= 40 * most:
            break
    f = m.f
    for i in range(n.OPERANDS):
        f[f"operand {i}"] = n.OPERAND_NONE
    ends, tensors = _place(rng, m)
    ends[n.BUF_SCRATCH] = m.scratch
    blobs = {buffer: bytearray(rng.randbytes(ends[buffer])) for buffer in (n.BUF_FROZEN, n.BUF_TRAIN)}
    for use in m.uses:
        buffer, at = f[f"operand {use.index}"] >> 28, f[f"operand {use.index}"] & 0x0FFFFFFF
        if buffer in blobs:
            largest = m.extreme and use.kind == "table" and rng.random() < 0.8
            ends_only = b"\xff" if largest else rng.choice((b"\x00", b"\x80", b"\x7f", b"\xff"))
            blobs[buffer][at : at + use.bytes] = ends_only * use.bytes if m.extreme else _blob(rng, use.bytes)
    shape = _factors(ends[n.BUF_INPUT] or 1)
    _in_place(rng, m)
    _bend(rng, m, ends)
    ends[n.BUF_ARENA] = max(ends[n.BUF_ARENA], 2)
    ends[n.BUF_STATE], ends[n.BUF_TARGET] = STATE_BYTES, 2
    ends[n.BUF_INPUT] = shape[0] * shape[1] * shape[2]
    record = RECORD.pack(*(f[name] for name in FIELDS))
    frozen, train = (bytes(blobs[buffer][: ends[buffer]]) for buffer in (n.BUF_FROZEN, n.BUF_TRAIN))
    rate = rng.choice(((0, 0), (1024, -10), (2047, 32767), (2047, -32768), (1500, -20), (2047, 0)))
    state = struct.pack("<IIHh", 1 + rng.getrandbits(31), 0, *rate) + bytes(20)
    seen = (16, 255) if m.extreme else (0, 15, 16, 255)
    gains = b"".join(struct.pack("<bB", rng.choice((-128, -128, 0, 5, 127)), rng.choice(seen)) for _ in range(GAINS))
    at = n.STATE_BYTES + len(gains)
    state += struct.pack("<4H8x", GAINS, GATES, 0, at) + gains + rng.choice((b"\1\1\1\1", b"\0\0\0\1"))
    io = struct.pack("<4Hfi4HfiHHf", *shape, 0, 0.1, 0, 1, 1, 2, 0, 0.1, 0, n.LOSS_SOFTMAX_CE, 0, 1.0)
    entries = b"".join(
        struct.pack("<HBBHHHH4HIII", i, dtype, fraction, n.TENSOR_SHARED, o, o, 0, o, *rest, offset, 0, 0)
        for i, (dtype, fraction, count, offset) in enumerate(sorted(tensors, key=lambda t: t[3]))
        for o, *rest in [(*_factors(count), 1)]
    )
    # A forward program that copies one number.
    small = dict.fromkeys(FIELDS, 0) | {f"operand {i}": n.OPERAND_NONE for i in range(n.OPERANDS)}
    small |= {
        "op": n.OP_RELU,
        "in_c": 1,
        "act_min": -128,
        "act_max": 127,
        "operand 0": 0,
        "operand 1": n.BUF_ARENA << 28,
    }
    forward = [0] * n.BUFFERS
    forward[n.BUF_INPUT], forward[n.BUF_ARENA] = ends[n.BUF_INPUT], 2
    forward[n.BUF_FROZEN], forward[n.BUF_TRAIN] = len(frozen), len(train)
    programs = [
        _program(b"forward", forward, n.KIND_FORWARD, RECORD.pack(*(small[name] for name in FIELDS))),
        _program(b"train", ends, n.KIND_TRAIN, record),
    ]
    parts = [(n.SECTION_IO, io), (n.SECTION_TENSORS, entries), *((n.SECTION_PROGRAM, p) for p in programs)]
    parts += [(n.SECTION_FROZEN, frozen), (n.SECTION_TRAIN, train), (n.SECTION_STATE, state)]
    data = seal(bytes(n.ID_BYTES), [_section(kind, value) for kind, value in parts])
    fill = rng.choice((0x7F, 0x80) if m.extreme else (0x7F, 0x80, 0xA5, 0x00, 0x01, 0xFF))
    inputs = tuple(rng.choice((0x80, 0x7F, 0x00)) for _ in range(2))
    return Attack(seed, m.op, data, fill, inputs, dict(f), tuple(ends))


def _work(m: _Maker) -> int:
    f = m.f
    places = max(1, f["out_h"]) * max(1, f["out_w"])
    cells = max(1, f["in_h"]) * max(1, f["in_w"])
    area = max(1, f["kernel_h"]) * max(1, f["kernel_w"])
    return (
        max(places, cells if m.op in (*BACK, *POOLS) else 0)
        * f["out_c"]
        * (m.taps + 3)
        * (area if m.op == n.OP_MAX_BACK else 1)
    )


def _factors(count: int) -> tuple[int, int, int]:
    """Three dimensions of 16 bits with that product, or as near above as may be."""
    for a in range(1, 65536):
        if count % a == 0 and count // a <= 65535:
            return a, count // a, 1
        if a > 300 and count % a == 0:
            b = next((b for b in range(2, 65536) if count // a % b == 0 and count // a // b <= 65535), 0)
            if b:
                return a, b, count // a // b
    return 1, 1, 65535


def _program(name: bytes, sizes: list[int], kind: int, records: bytes) -> bytes:
    output = n.BUF_ARENA << 28
    head = struct.pack("<16s7IIIHBB8x", name, *sizes, output, 2, len(records) // n.RECORD_BYTES, kind, 0)
    return head + records


def _section(kind: int, value: bytes) -> bytes:
    return struct.pack("<HHI", kind, n.SECTION_REQUIRED, len(value)) + value + bytes(-len(value) % 8)
