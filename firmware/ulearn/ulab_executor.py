# The executor for firmware that has ulab and lacks the kernels; under CPython numpy stands in for ulab. It answers with
# the same bits as the C core. ul_format.h defines the arithmetic of each record; comments here only say how floats,
# which is what ulab calculates in, come to give exact integers.
import struct

try:
    from ulab import numpy as np

    name = "ulab"
except ImportError:
    import numpy as np

    name = "numpy"

from .compat import const

_PROGRAM_BYTES = const(64)
_P_SIZES = const(16)
_P_RECORDS = const(52)
_BUF_INPUT = const(0)
_BUF_FROZEN = const(6)
_BUF_STATE = const(4)
_BUF_SCRATCH = const(5)
_BUF_TARGET = const(2)
_BUFFERS = const(7)
_S_RNG = const(0)
_S_STEP = const(4)
_S_LR_MANT = const(8)
_S_SATURATED = const(12)
_S_CLIPPED = const(16)
_S_SKIPPED = const(20)
_S_LOSS = const(24)
_S_SKIP_BELOW = const(28)
_S_FLAGS = const(30)
_S_N_GATES = const(34)
_S_GATES = const(38)
_STATE_NOTHING_TO_LEARN = const(1)
_GAIN_SAMPLES = const(16)
_RECORD_BYTES = const(64)
_DTYPE_INT16 = const(2)
_FLAG_BITS = const(1)
_FLAG_GATE_DEEPER = const(2)
_FLAG_ONE_SCALE = const(8)
_FLAG_NARROW_OUT = const(16)
_FLAG_NARROW_IN = const(32)
_ROUND_AWAY = const(3)
_OP_DENSE = const(1)
_OP_RELU = const(2)
_OP_SOFTMAX_CE = const(3)
_OP_MSE = const(4)
_OP_DENSE_BACK = const(5)
_OP_UPDATE_WEIGHT = const(6)
_OP_UPDATE_BIAS = const(7)
_OP_HINGE = const(8)
_OP_CONV = const(16)  # the first of the operators of imported networks
_OP_CONV_TRAINED = const(27)  # the first of those that come with training
_OP_CONV_BACK = const(32)  # the first of their backward records
_OP_RELU_BACK = const(41)
_FLAG_AGAIN = const(64)
_R_OUT_H = const(38)
_GRADIENT_HEADER = const(4)
_MANTISSA_MAX = const(2047)
_NARROW_MAX = const(127)
_BIAS_MAX = const(1073741823)
_E_BUFFER = const(-1)
_E_RECORD = const(-3)
_E_RANGE = const(-4)
_E_LABEL = const(-5)
_E_DATA = const(-6)

_BLOCK = const(256)  # weights that are converted at a time: 512 bytes, easy to find in a fragmented heap
_LOW = const(4096)  # a long sum is kept as high * 4096 + low
_ELEMENTS = const(512)  # of a gradient that are passed on at a time, a multiple of 8

# Integers up to here are exact in ulab's floats. float() is called when this is imported, on the board, because a
# cross-compiler may calculate with other floats.
EXACT = 1 << (53 if float(16777217) > 16777216.0 else 24)
ROOM = EXACT - _LOW  # what a dot may reach that is then added to the low part of a sum


class _Record:
    # A record's fields, and its operands as views of the buffers.
    def __init__(self, program, at, buffers, base):
        fields = struct.unpack_from("<BxBB2H6I4xH4xH6x4b2BHhI", program, at)
        self.op, self.flags, self.rounding, self.gate, self.gain = fields[:5]
        self.operands = fields[5:11]
        self.k, self.n, self.zero_in, self.zero_out, self.act_min, self.act_max = fields[11:17]
        self.w_dtype, fraction, self.scale_mant, self.scale_exp, self.extra = fields[17:]
        # Bits that a forward pass keeps till its sums are made, and bits that weights lose before.
        self.finer = fraction >> 4
        self.fraction = (fraction & 15) - self.finer
        self.program, self.at = program, at
        self.buffers, self.base = buffers, base
        self.state = buffers[_BUF_STATE]

    def bytes(self, index, size):
        operand = self.operands[index]
        offset = operand & 0x0FFFFFFF
        if operand >> 28 == _BUF_FROZEN:
            offset -= self.base
        return self.buffers[operand >> 28][offset : offset + size]

    def int8(self, index, count):
        return np.frombuffer(self.bytes(index, count), dtype=np.int8)

    def centred(self, index):
        # The layer's input without its zero point, as floats.
        return self.int8(index, self.k) * 1.0 - float(self.zero_in)

    def weights(self, index, rows, taps):
        # Trained weights as they are stored.
        if self.w_dtype == _DTYPE_INT16:
            flat = np.frombuffer(self.bytes(index, 2 * rows * taps), dtype=np.int16)
        else:
            flat = self.int8(index, rows * taps)
        return flat.reshape((rows, taps))

    def used(self, weights):
        # Some rows of the weights as the layer uses them, still int16: every step of this fits.
        f = self.fraction
        if self.w_dtype != _DTYPE_INT16 or f == 0:
            return weights
        return np.right_shift(weights, f) + np.bitwise_and(np.right_shift(weights, f - 1), 1)

    def coarse(self, sums):
        # Forward sums without the bits that were kept for them.
        finer = self.finer
        return [(s + (1 << finer >> 1)) >> finer for s in sums] if finer else sums

    def used_max(self):
        if self.w_dtype != _DTYPE_INT16:
            return 128
        return 32768 >> self.fraction

    def is_narrow(self, index):
        return self.flags & (_FLAG_NARROW_IN if index == 1 else _FLAG_NARROW_OUT)

    def top(self, index):
        # The largest mantissa of a gradient.
        return _NARROW_MAX if self.is_narrow(index) else _MANTISSA_MAX

    def header(self, index):
        # Exponent and largest mantissa of a gradient, as they were written.
        return struct.unpack_from("<hH", self.bytes(index, _GRADIENT_HEADER), 0)

    def stored(self, index, start, count):
        # Some mantissas of a gradient, as a view.
        size, dtype = (1, np.int8) if self.is_narrow(index) else (2, np.int16)
        data = self.bytes(index, _GRADIENT_HEADER + size * (start + count))
        return np.frombuffer(data[_GRADIENT_HEADER + size * start :], dtype=dtype)

    def cut(self, index, stored):
        # Mantissas as floats, cut to what a record can have written.
        top = float(self.top(index))
        return np.clip(stored * 1.0, -top, top)

    def mantissas(self, index, start, count):
        return self.cut(index, self.stored(index, start, count))

    def store_gradient(self, exponent, mantissas, largest):
        # Of a loss: a list that needs no cutting, and is wide.
        struct.pack_into("<hH", self.bytes(1, _GRADIENT_HEADER), 0, exponent, largest)
        self.stored(1, 0, len(mantissas))[:] = np.array(mantissas, dtype=np.int16)

    def count(self, counter, more):
        value = struct.unpack_from("<I", self.state, counter)[0] + more
        struct.pack_into("<I", self.state, counter, value & 0xFFFFFFFF)

    def is_backward(self):
        again = self.flags & _FLAG_AGAIN
        return again or self.op >= _OP_CONV_BACK or self.op in (_OP_DENSE_BACK, _OP_UPDATE_WEIGHT, _OP_UPDATE_BIAS)

    def is_on(self):
        # Whether a backward record runs: the loss found something to learn, and its gates are open.
        state, gate = self.state, self.gate
        if struct.unpack_from("<H", state, _S_FLAGS)[0] & _STATE_NOTHING_TO_LEARN:
            return False
        if gate == 0:
            return True
        if not self.flags & _FLAG_GATE_DEEPER:
            return state[gate] != 0
        gates_end = struct.unpack_from("<H", state, _S_GATES)[0] + struct.unpack_from("<H", state, _S_N_GATES)[0]
        return any(state[gate : min(gates_end, len(state))])


class Writer:
    # gradient_in as it comes to be: what exceeds its range is cut off and counted.
    def __init__(self, r):
        self.r, self.most, self.over = r, 0, 0

    def put(self, start, values):
        top = self.r.top(1)
        most = int(np.max(abs(values)))
        if most > top:
            limit = float(top)
            self.over += int(np.sum(abs(values) > limit))
            values = np.clip(values, -limit, limit)
            most = top
        self.most = max(self.most, most)
        self.r.stored(1, start, len(values))[:] = values

    def end(self, exponent):
        exponent = max(-8192, min(8192, exponent))
        struct.pack_into("<hH", self.r.bytes(1, _GRADIENT_HEADER), 0, exponent, self.most)
        self.r.count(_S_SATURATED, self.over)
        return 0


# Integers.


def bitlen(v):
    n = 0
    while v:
        v >>= 1
        n += 1
    return n


def _rshift(p, s):
    if s > 62:
        return 0
    # 31 places saturate everything but 0 as well as thousands do.
    v = (p + (1 << (s - 1))) >> s if s > 0 else p << min(-s, 31)
    return max(-(1 << 30), min(1 << 30, v))


def int32(v):
    return ((v + 0x80000000) & 0xFFFFFFFF) - 0x80000000


def single(acc, multiplier, shift, _):
    s = 31 - max(-31, min(30, shift))
    return (acc * multiplier + (1 << (s - 1))) >> s


def away(acc, upper, shift, lower):
    size = min(abs(acc), 0x7FFFFFFF)
    s = 31 - max(-31, min(30, shift))
    v = (size * upper + (size * (lower & 0xFFFF) >> 16) + (1 << (s - 1))) >> s
    return -v if acc < 0 else v


def scales(r, n, count):
    # (multiplier, shift, lower part of the multiplier) of the channels [n, n + count).
    entries, repeat = r.n, 1
    if r.flags & _FLAG_ONE_SCALE:
        entries, repeat, n, count = 1, count, 0, 1
    numbers = "<%di" % count
    upper = lower = struct.unpack_from(numbers, r.bytes(4, 4 * entries), 4 * n)
    if r.rounding == _ROUND_AWAY:
        lower = struct.unpack_from(numbers, r.bytes(4, 8 * entries), 4 * (entries + n))
    return list(zip(upper, r.int8(5, entries)[n : n + count].tolist(), lower)) * repeat


def codes(r, sums, scales, rounding):
    # The int8 codes of sums, each with a scale of its own. What rounds to more than 32 bits is clamped as it is.
    low, high = r.act_min - r.zero_out, r.act_max - r.zero_out
    out = []
    for acc, (multiplier, shift, lower) in zip(sums, scales):
        v = rounding(int32(acc), multiplier, shift, lower)
        out.append(max(low, min(high, v)) + r.zero_out)
    return np.array(out, dtype=np.int8)


def _mul11(a, b):
    p = a * b
    if p == 0:
        return 0, 0
    s = 11 if p >= 1 << 21 else 10
    p = (p + (1 << (s - 1))) >> s
    return (1024, s + 1) if p == 2048 else (p, s)


def _log2q10(v):
    n = bitlen(v) - 1
    x = v >> (n - 15) if n > 15 else v << (15 - n)
    for _ in range(10):
        x = (x * x) >> 15
        n <<= 1
        if x >> 16:
            x >>= 1
            n |= 1
    return n


# Exact sums from float dots.


def _pieces(vector, weight_max):
    # Cuts a vector so that no partial sum of a piece's dot with weights up to weight_max exceeds ROOM.
    limit = ROOM // weight_max
    count = len(vector)
    # ulab's sum of floats goes by way of their mean and is not exact; a dot is, up to a limit far above this one.
    if np.dot(abs(vector), np.ones(count)) <= limit:
        return ((0, count),)
    pieces = []
    start = size = 0
    for i in range(count):
        v = abs(int(vector[i]))
        size += v
        if size > limit:
            pieces.append((start, i))
            start, size = i, v
    pieces.append((start, count))
    return pieces


def halves(g, most, weight_max):
    # (part of g, its unit, the largest of it), so that one product at least fits: g, up to `most` in size, as it is; or
    # (fractions 0 and 1 in float32) its upper and its lower part.
    if most * weight_max <= ROOM:
        return ((g, 1.0, most),)
    upper = np.floor(g * (1.0 / 64))
    return ((upper, 64.0, 64), (g - upper * 64.0, 1.0, 64))


def add_exact(high, low, piece, unit=1.0):
    # high * _LOW + low, in which 0 <= low < _LOW, takes on piece * unit. high and low may be views.
    if unit != 1.0:
        carry = np.floor(piece * (unit / _LOW))
        high[:] = high + carry
        piece = (piece - carry * (_LOW / unit)) * unit
    piece = piece + low
    carry = np.floor(piece * (1.0 / _LOW))
    high[:] = high + carry
    low[:] = piece - carry * float(_LOW)


def integers(high, low):
    return [int(a) * _LOW + int(b) for a, b in zip(high.tolist(), low.tolist())]


def mixed_rows(r, taps):
    # The rows of weights that a gradient passes: first, end, the largest weight in size, and what gets the columns
    # [k, end) of the rows [n, m), counted from the first.
    parts = []
    frozen, row = r.n - r.extra, (taps + 3) // 4 * 4
    if frozen:
        stored = np.frombuffer(r.bytes(2, frozen * row), dtype=np.uint8).reshape((frozen, row))
        parts.append((0, frozen, 128, lambda n, m, k, end: stored[n:m, k:end] * 1.0 - 128.0))
    if r.extra:
        trained = r.weights(5, r.extra, taps)
        parts.append((frozen, r.n, r.used_max(), lambda n, m, k, end: r.used(trained[n:m, k:end])))
    return parts


def _column_sums(r, g, most):
    # sum_n g[n] * w[n][k] for all k, as two arrays (high, low) of exact floats.
    high, low = np.zeros(r.k), np.zeros(r.k)
    rows = max(1, _BLOCK // r.k)
    for first, end, top, weights in mixed_rows(r, r.k):
        for part, unit, _ in halves(g[first:end], most, top):
            for start, stop in _pieces(part, top):
                piece = np.zeros(r.k)
                for n in range(start, stop, rows):
                    m = min(n + rows, stop)
                    piece += np.dot(part[n:m], weights(n, m, 0, r.k))
                add_exact(high, low, piece, unit)
    return high, low


def largest(high, low):
    # max |high * _LOW + low| as an integer: compare the high parts, then the low ones that go with the extremes.
    top, bottom = np.max(high), np.min(high)
    most = int(top) * _LOW + int(np.max(low * (high == top)))
    least = int(bottom) * _LOW + _LOW + int(np.min((low - float(_LOW)) * (high == bottom)))
    return max(most, -least)


def rounded(high, low, s):
    # rshift(high * _LOW + low, s), exactly wherever the answer is within 2^11.
    if s > 12:
        # low cannot carry into what is left, so it drops out.
        return np.floor((high + float(1 << (s - 13))) * (1.0 / (1 << (s - 12))))
    # The sum is inexact only from EXACT on, and the answer then out of reach of every clamp.
    return np.floor((high * float(_LOW) + low + float(1 << s >> 1)) * (1.0 / (1 << s)))


# The records.


def _dense(r):
    x, y, weights, bias = r.centred(0), r.int8(1, r.n), r.weights(2, r.n, r.k), r.bytes(3, 4 * r.n)
    rounding = away if r.rounding == _ROUND_AWAY else single
    pieces = _pieces(x, r.used_max())
    rows = max(1, _BLOCK // r.k)
    for n in range(0, r.n, rows):
        end = min(n + rows, r.n)
        block = r.used(weights[n:end])
        sums = [0] * (end - n)
        for start, stop in pieces:
            dots = np.dot(block[:, start:stop], x[start:stop]).tolist()
            sums = [a + int(b) for a, b in zip(sums, dots)]
        biases = struct.unpack_from("<%di" % (end - n), bias, 4 * n)
        sums = [a + b for a, b in zip(r.coarse(sums), biases)]
        y[n:end] = codes(r, sums, scales(r, n, end - n), rounding)
    return 0


def _relu(r):
    r.int8(1, r.k)[:] = np.clip(r.int8(0, r.k) * 1.0, float(r.act_min), float(r.act_max))
    return 0


def _begin_step(r, loss, nothing_to_learn):
    r.count(_S_STEP, 1)
    struct.pack_into("<i", r.state, _S_LOSS, loss)
    flags = struct.unpack_from("<H", r.state, _S_FLAGS)[0] & ~_STATE_NOTHING_TO_LEARN
    if nothing_to_learn:
        flags |= _STATE_NOTHING_TO_LEARN
        r.count(_S_SKIPPED, 1)
    struct.pack_into("<H", r.state, _S_FLAGS, flags)


def _softmax_ce(r):
    label = struct.unpack_from("<H", r.bytes(3, 2), 0)[0]
    if label >= r.n:
        return _E_LABEL
    logits, table = r.int8(0, r.n).tolist(), r.bytes(2, 2 * r.extra)
    top = max(logits)
    e = [struct.unpack_from("<H", table, 2 * (top - q))[0] if top - q < r.extra else 0 for q in logits]
    total = sum(e)
    if total == 0:
        return _E_DATA
    right = max(1, e[label])
    # |d[n]| from here on; a logit at the end of its range is not pushed on.
    d = [0 if q == -128 else part for q, part in zip(logits, e)]
    d[label] = 0 if logits[label] == 127 else total - e[label]
    missed = max(d)
    skip_below = struct.unpack_from("<H", r.state, _S_SKIP_BELOW)[0]
    loss = ((_log2q10(total) - _log2q10(right)) * 710 + 512) >> 10
    _begin_step(r, loss, missed == 0 or (missed << 16) // total < skip_below)
    bits = 10
    while missed and missed << (bits - 10) < total:
        bits += 1
    mantissas = [min(_MANTISSA_MAX, ((m << (bits + 1)) + total) // (2 * total)) for m in d]
    most = max(mantissas)
    mantissas[label] = -mantissas[label]
    r.store_gradient(-bits if missed else 0, mantissas, most)
    return 0


def _mse(r):
    differences = [a - b for a, b in zip(r.int8(0, r.n).tolist(), r.int8(3, r.n).tolist())]
    most = max(max(differences), -min(differences))
    _begin_step(r, sum([d * d for d in differences]), most == 0)
    shift = 11 - bitlen(most) if most else 0
    r.store_gradient(-shift, [d << shift for d in differences], most << shift)
    return 0


def _hinge(r):
    label = struct.unpack_from("<H", r.bytes(3, 2), 0)[0]
    if label >= r.n:
        return _E_LABEL
    logits = r.int8(0, r.n).tolist()
    right = logits[label]
    logits[label] = -129
    rival = logits.index(max(logits))
    missing = logits[rival] - right + r.extra
    wrong = missing > 0
    _begin_step(r, missing if wrong else 0, not wrong)
    mantissas = [0] * r.n
    if wrong:
        mantissas[rival], mantissas[label] = 1024, -1024
    r.store_gradient(-10 if wrong else 0, mantissas, 1024 if wrong else 0)
    return 0


def channel_scales(r):
    # The channels' weight scales, the upper and the lower 8 bits of each.
    table = np.frombuffer(r.bytes(3, 2 * r.n), dtype=np.uint16) * 1.0
    upper = np.floor(table * (1.0 / 256))
    return upper, table - upper * 256.0


def scaled(mantissas, scales):
    # (mantissa * scale + 32768) >> 16 of each channel: no step has more than 20 bits.
    upper, lower = scales
    lower = np.floor(mantissas * lower * (1.0 / 256))
    return np.floor((mantissas * upper + lower + 128.0) * (1.0 / 256))


def is_learning(r):
    return r.state[r.gain + 1] < _GAIN_SAMPLES


def gain_shift(r, bits, most):
    # The shift by the gain that STATE holds, after it has learnt from this step's largest sum where there is one.
    gain, seen = struct.unpack_from("<bB", r.state, r.gain)
    if most:
        needed = bitlen(most) - bits
        gain = needed if seen == 0 else max(gain, needed)
        struct.pack_into("<bB", r.state, r.gain, gain, seen + 1)
    return max(0, min(30, bits + max(-31, min(31, gain)) + 1 - bitlen(r.top(1))))


def _dense_back(r):
    exponent, writer = r.header(0)[0], Writer(r)
    # In SCRATCH as the C core has it, so that whole tables can be compared.
    g = scaled(r.mantissas(0, 0, r.n), channel_scales(r))
    np.frombuffer(r.buffers[_BUF_SCRATCH][: 2 * r.n], dtype=np.int16)[:] = g
    most = int(np.max(abs(g)))
    if most == 0:
        writer.put(0, np.zeros(r.k))
        return writer.end(0)
    high, low = _column_sums(r, g, most)
    s = gain_shift(r, bitlen(most), largest(high, low) if is_learning(r) else 0)
    writer.put(0, rounded(high, low, s))
    return writer.end(exponent + r.scale_exp + s)


def _relu_back(r):
    size = struct.unpack_from("<3H", r.program, r.at + _R_OUT_H)
    size = size[0] * size[1] * size[2]
    header = r.header(0)
    for start in range(0, size, _ELEMENTS):
        count = min(_ELEMENTS, size - start)
        if r.flags & _FLAG_BITS:
            packed = np.frombuffer(r.bytes(4, (size + 7) // 8)[start // 8 : (start + count + 7) // 8], dtype=np.uint8)
            passes = np.zeros((len(packed), 8))
            rest = packed * 1.0
            for bit in range(8):
                half = np.floor(rest * 0.5)
                passes[:, bit] = rest - half * 2.0
                rest = half
            passes = passes.reshape((8 * len(packed),))[:count]
        else:
            passes = (r.int8(4, size)[start : start + count] != r.act_min) * 1.0
        r.stored(1, start, count)[:] = r.stored(0, start, count) * passes
    struct.pack_into("<hH", r.bytes(1, _GRADIENT_HEADER), 0, header[0], header[1])
    return 0


def channel_step(r, exponent, n):
    # (m, s): what the sums of channel n are multiplied by, and the shift that ends the products.
    lr_mant, lr_exp = struct.unpack_from("<Hh", r.state, _S_LR_MANT)
    rate, i = _mul11(r.scale_mant, lr_mant & 2047)
    t = struct.unpack_from("<H", r.bytes(3, 2 * r.n), 2 * n)[0]
    m, j = _mul11(rate, 1024 + (t & 1023))
    return m, -(exponent + r.scale_exp + lr_exp + i + j + (t >> 10))


def begin_update(r):
    # Stochastic rounding takes the generator on, once.
    if r.w_dtype != _DTYPE_INT16:
        x = struct.unpack_from("<I", r.state, _S_RNG)[0]
        x ^= (x << 13) & 0xFFFFFFFF
        x ^= x >> 17
        x ^= (x << 5) & 0xFFFFFFFF
        struct.pack_into("<I", r.state, _S_RNG, x)


def _steps(x, factor, s, reach):
    # rshift(x * factor, s) as an array, exactly wherever the answer is within 2^16: beyond, any weight saturates.
    if s > 30:
        return np.zeros(len(x))
    if s <= 0:
        return x * (float(factor) * float(1 << min(-s, 30)))
    half, unit = float(1 << (s - 1)), 1.0 / (1 << s)
    if s < 8 or abs(factor) * reach + (1 << (s - 1)) <= EXACT:
        return np.floor((x * float(factor) + half) * unit)
    # |factor| < 2^22: its upper 15 bits and its lower 7 each have an exact product with x.
    lower = np.floor(x * float(factor & 127) * (1.0 / 128))
    return np.floor((x * float(factor >> 7) + lower + half * (1.0 / 128)) * (unit * 128.0))


def move_int16(r, weights, n, steps):
    # Row n of the weights less its steps, which are floats.
    limit = 32767.0
    value = weights[n] * 1.0 - steps
    over = int(np.sum(abs(value) > limit))
    if over:
        r.count(_S_CLIPPED, over)
        value = np.clip(value, -limit, limit)
    weights[n] = value


def move_int8(r, weights, n, sums, m, shift):
    # Row n of the weights less its sums * m / 2^shift. A draw for each weight, of its own number: a loop over integers.
    clipped = 0
    row = weights[n].tolist()
    v = struct.unpack_from("<I", r.state, _S_RNG)[0] + n * len(row) * 2654435769
    s = min(shift, 30)
    extra = min(shift - s, 62)
    for k, acc in enumerate(sums):
        p = acc * m
        if s <= 0:
            step = _rshift(p, s)
        else:
            step = p >> extra
            if step:
                draw = (v + k * 2654435769) & 0xFFFFFFFF
                draw = ((draw ^ draw >> 16) * 0x7FEB352D) & 0xFFFFFFFF
                draw = ((draw ^ draw >> 15) * 0x846CA68B) & 0xFFFFFFFF
                step = (step + ((draw ^ draw >> 16) >> (32 - s))) >> s
        value = row[k] - step
        if not -127 <= value <= 127:
            clipped += 1
            value = 127 if value > 0 else -127
        row[k] = value
    weights[n] = np.array(row, dtype=np.int8)
    r.count(_S_CLIPPED, clipped)


def _update_weight(r):
    exponent, x, weights = r.header(0)[0], r.centred(1), r.weights(2, r.n, r.k)
    inputs = None if r.w_dtype == _DTYPE_INT16 else [int(v) for v in x.tolist()]
    reach = int(np.max(abs(x)))
    begin_update(r)
    for n, mantissa in enumerate(r.mantissas(0, (r.extra & 0xFFFF) - r.n, r.n).tolist()):
        if mantissa == 0.0:
            continue
        m, s = channel_step(r, exponent, n)
        m *= int(mantissa)
        if inputs:
            move_int8(r, weights, n, inputs, m, s)
        # Where every step rounds to 0, only a weight out of range moves.
        elif not 0 < s <= 30 or abs(m) * reach >= 1 << (s - 1) or np.min(weights[n]) < -32767:
            move_int16(r, weights, n, _steps(x, m, s, reach))
    return 0


def _update_bias(r):
    out_h, out_w = struct.unpack_from("<2H", r.program, r.at + _R_OUT_H)
    exponent, channels, places = r.header(0)[0], r.extra & 0xFFFF, out_h * out_w
    sums = [0] * r.n
    rows = max(1, _ELEMENTS // channels)
    ones = np.ones(rows)
    for start in range(0, places, rows):
        count = min(rows, places - start)
        some = r.stored(0, start * channels, count * channels).reshape((count, channels))[:, r.k : r.k + r.n]
        sums = [a + int(b) for a, b in zip(sums, np.dot(ones[:count], r.cut(0, some)).tolist())]
    bias = r.bytes(2, 4 * r.n)
    clipped = 0
    for n, acc in enumerate(sums):
        if acc == 0:
            continue
        m, s = channel_step(r, exponent, n)
        before = max(-_BIAS_MAX, min(_BIAS_MAX, struct.unpack_from("<i", bias, 4 * n)[0]))
        value = before - _rshift(acc * m, s)
        cut = max(-_BIAS_MAX, min(_BIAS_MAX, value))
        clipped += cut != value
        struct.pack_into("<i", bias, 4 * n, cut)
    r.count(_S_CLIPPED, clipped)
    return 0


_RECORDS = {
    _OP_DENSE: _dense,
    _OP_RELU: _relu,
    _OP_SOFTMAX_CE: _softmax_ce,
    _OP_MSE: _mse,
    _OP_DENSE_BACK: _dense_back,
    _OP_UPDATE_WEIGHT: _update_weight,
    _OP_UPDATE_BIAS: _update_bias,
    _OP_HINGE: _hinge,
    _OP_RELU_BACK: _relu_back,
}


def _imported(op):
    # The operators of imported networks are loaded when a plan has one of them, those of their training likewise.
    if op >= _OP_CONV_TRAINED:
        from .ulab_training import RECORDS
    elif op >= _OP_CONV:
        from .ulab_operators import RECORDS
    else:
        return None
    _RECORDS.update(RECORDS)
    return RECORDS.get(op)


def _buffer(item):
    # Any dense buffer as a memoryview of bytes: MicroPython's memoryview has no cast.
    return memoryview(b"") if item is None or len(item) == 0 else memoryview(np.frombuffer(item, dtype=np.uint8))


def _select(buffers, sizes, index):
    # Without an index INPUT and TARGET hold one sample exactly; with one they are arrays of samples, moved to it.
    # ul_index has no long multiply, so it takes 16 bits of index at most.
    for kind in (_BUF_INPUT, _BUF_TARGET):
        size, have = sizes[kind], len(buffers[kind])
        at = max(index, 0) * size
        if size and (index > 0xFFFF or have < at + size or (index < 0 and have != size)):
            return False
        if size:
            buffers[kind] = buffers[kind][at : at + size]
    return True


def run(program, table, first, count, index=-1, base=-1):
    # Runs records [first, first + count): the number of records done, or a negative UL_E_ code, as ul_run answers.
    # With base, FROZEN holds only what these records need of it, from that byte on.
    if len(table) != _BUFFERS:
        raise ValueError("run: the table has %d buffers, expected %d" % (len(table), _BUFFERS))
    program = _buffer(program)
    if len(program) < _PROGRAM_BYTES:
        return _E_BUFFER
    sizes = list(struct.unpack_from("<7I", program, _P_SIZES))
    if base >= 0:
        sizes[_BUF_FROZEN] = 0
    buffers = [_buffer(item) for item in table]
    if not _select(buffers, sizes, index):
        return _E_BUFFER
    records = struct.unpack_from("<H", program, _P_RECORDS)[0]
    if len(program) < _PROGRAM_BYTES + records * _RECORD_BYTES:
        return _E_BUFFER
    if first < 0 or count < 0 or first + count > records:
        return _E_RANGE
    if any(len(data) < size for data, size in zip(buffers, sizes)):
        return _E_BUFFER
    for i in range(first, first + count):
        r = _Record(program, _PROGRAM_BYTES + i * _RECORD_BYTES, buffers, max(base, 0))
        if r.is_backward() and not r.is_on():
            continue
        work = _RECORDS.get(r.op) or _imported(r.op)
        code = work(r) if work else _E_RECORD
        if code < 0:
            return code
    return count
