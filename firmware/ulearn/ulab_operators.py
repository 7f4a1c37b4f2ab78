# The operators of imported networks for ulab_executor.py, which imports this when a plan has one of them. ul_format.h
# defines the arithmetic; comments here only say how floats come to give exact integers.
import struct

from .compat import const
from .ulab_executor import EXACT, away, codes, int32, np, scales, single

_R_IN_H = const(32)
_ROUND_SINGLE = const(1)
_ROUND_DOUBLE = const(2)
_ROUND_AWAY = const(3)
_OP_CONV = const(16)
_OP_DEPTHWISE = const(17)
_OP_AVERAGE_POOL = const(18)
_OP_MAX_POOL = const(19)
_OP_MEAN = const(20)
_OP_ADD = const(21)
_OP_MUL = const(22)
_OP_PAD = const(23)
_OP_COPY = const(24)
_OP_TABLE = const(25)
_OP_SOFTMAX = const(26)

_CHANNELS = const(32)  # sums of a convolution that exist at a time
_CELLS = const(256)  # of an image that a mean adds at a time


# Integers.


def _divide_by_power(h, right):
    mask = (1 << right) - 1
    return (h >> right) + ((h & mask) > (mask >> 1) + (h < 0))


def _saturated(v):
    return max(-0x80000000, min(0x7FFFFFFF, v))


def double(acc, multiplier, shift, lower=0):
    shift = max(-31, min(30, shift))
    if shift > 0:
        acc = int32(acc << shift)
    h = min(0x7FFFFFFF, (acc * multiplier + (1 << 30)) >> 31)
    return _divide_by_power(h, -shift) if shift < 0 else h


ROUNDINGS = {_ROUND_SINGLE: single, _ROUND_DOUBLE: double, _ROUND_AWAY: away}


def _int8(byte):
    return (byte ^ 128) - 128


# Images.


class Window:
    # An operator's dimensions, its input at operand x, and where its kernel lies on it.
    def __init__(self, r, x=0):
        fields = struct.unpack_from("<6H6B", r.program, r.at + _R_IN_H)
        self.in_h, self.in_w, self.in_c, self.out_h, self.out_w, self.out_c = fields[:6]
        self.kernel_h, self.kernel_w, self.stride_h, self.stride_w, self.pad_top, self.pad_left = fields[6:]
        self.taps = self.kernel_h * self.kernel_w
        self.size = self.in_h * self.in_w * self.in_c
        if x is not None:
            self.x = r.int8(x, self.size)
        self.row = self.out_w * self.out_c  # numbers in a row of the output

    def line(self, i):
        # Row i of the input, [in_w][in_c], as a view.
        size = self.in_w * self.in_c
        return self.x[i * size : (i + 1) * size].reshape((self.in_w, self.in_c))

    def rows(self, oi):
        # The rows of the input under the kernel of output row oi, whether inside or not.
        first = oi * self.stride_h - self.pad_top
        return range(first, first + self.kernel_h)

    def columns(self, line, kj):
        # (first, end, cells): on which cells of a line tap kj of the outputs [first, end) lies; the others' is outside.
        j = kj - self.pad_left
        first = min(self.out_w, max(0, -(j // self.stride_w)))
        end = max(first, min(self.out_w, (self.in_w - 1 - j) // self.stride_w + 1))
        if first == end:
            return 0, 0, None
        return first, end, line[j + first * self.stride_w : j + (end - 1) * self.stride_w + 1 : self.stride_w]

    def gather(self, patch, oi, oj, border):
        # What lies under the kernel of one output, into `patch`.
        i, j = oi * self.stride_h - self.pad_top, oj * self.stride_w - self.pad_left
        left, right = max(0, -j), min(self.kernel_w, self.in_w - j)
        top, bottom = max(0, -i), min(self.kernel_h, self.in_h - i)
        if (bottom - top) * (right - left) < self.taps:
            patch[: self.taps * self.in_c] = border
        size = (right - left) * self.in_c
        for ki in range(top, bottom):
            to = (ki * self.kernel_w + left) * self.in_c
            start = ((i + ki) * self.in_w + j + left) * self.in_c
            patch[to : to + size] = self.x[start : start + size]


class _Images(Window):
    # Of the forward pass: with the output.
    def __init__(self, r):
        super().__init__(r)
        self.y = r.int8(1, self.out_h * self.row)


def _conv_sums(r, n, weights, patch, ones):
    # The sums of some channels' weights, w + 128 as stored, take 128 * sum(x) too much. Products stay within
    # 255 * 128, which says how many a dot may add; the sum of 2^16 inputs is exact as it is.
    step = EXACT // (255 * 128)
    much = 128 * int(np.dot(patch, ones))
    sums = [bias - much for bias in struct.unpack_from("<%di" % len(weights), r.bytes(3, 4 * r.n), 4 * n)]
    for start in range(0, len(patch), step):
        dots = np.dot(weights[:, start : start + step], patch[start : start + step]).tolist()
        sums = [a + int(b) for a, b in zip(sums, dots)]
    return sums


def _conv(r):
    # y may lie over x: a position's inputs are gathered before its outputs are written.
    w = Window(r)
    channels = r.scale_mant or r.n
    outputs = r.int8(1, (w.out_h * w.out_w - 1) * channels + r.n)
    row = (w.taps * w.in_c + 3) // 4 * 4
    weights = np.frombuffer(r.bytes(2, r.n * row), dtype=np.uint8).reshape((r.n, row))
    patch, ones = np.zeros(row), np.ones(row)
    for at in range(w.out_h * w.out_w):
        w.gather(patch, at // w.out_w, at % w.out_w, float(r.zero_in))
        y = outputs[at * channels : at * channels + r.n]
        for n in range(0, r.n, _CHANNELS):
            sums = _conv_sums(r, n, weights[n : n + _CHANNELS], patch, ones)
            y[n : n + _CHANNELS] = codes(r, sums, scales(r, n, len(sums)), ROUNDINGS[r.rounding])
    return 0


def _depthwise_sums(w, lines, weights, border):
    # A row of outputs of every w.repeat-th channel, from that of the first weights on, as arrays [out_w][in_c] to be
    # added. Products stay within 128 * 128, which says how many an array may add.
    step = EXACT // (128 * 128)
    parts = []
    for k in range(w.taps):
        if k % step == 0:
            parts.append(np.zeros((w.out_w, w.in_c)))
        acc, line = parts[-1], lines[k // w.kernel_w]
        weight = weights[k :: w.taps * w.repeat] * 1.0
        first, end, cells = w.columns(line, k % w.kernel_w) if line is not None else (0, 0, None)
        if cells is not None:
            acc[first:end] = acc[first:end] + cells * weight
        if first > 0:
            acc[:first] = acc[:first] + weight * border
        if end < w.out_w:
            acc[end:] = acc[end:] + weight * border
    return parts


def _depthwise_row(r, w, lines, y):
    weights, bias = r.int8(2, r.n * w.taps), r.bytes(3, 4 * r.n)
    for q in range(w.repeat):
        parts = _depthwise_sums(w, lines, weights[q * w.taps :], float(r.zero_in))
        for n in range(q, r.n, w.repeat):
            sums = [struct.unpack_from("<i", bias, 4 * n)[0]] * w.out_w
            for part in parts:
                sums = [a + int(b) for a, b in zip(sums, part[:, n // w.repeat].tolist())]
            y[n :: r.n] = codes(r, sums, scales(r, n, 1) * w.out_w, ROUNDINGS[r.rounding])


def _depthwise(r):
    w = _Images(r)
    w.repeat = r.n // w.in_c
    in_place = r.operands[0] == r.operands[1]
    lines = {}
    for oi in range(w.out_h):
        # y may lie over x: row oi of it is written when row oi of x, if ever under a kernel, has been copied.
        for i in w.rows(oi):
            if 0 <= i < w.in_h and i not in lines:
                lines[i] = w.line(i).copy() if in_place else w.line(i)
        _depthwise_row(r, w, [lines.get(i) for i in w.rows(oi)], w.y[oi * w.row : (oi + 1) * w.row])
        for i in w.rows(oi)[: w.stride_h]:
            lines.pop(i, None)
    return 0


def pool_row(w, oi, most):
    # Sums (or maxima) under the kernel of a row of outputs, [out_w][in_c]: at most 255 * 255 cells, exact as they are.
    acc = np.zeros((w.out_w, w.in_c)) - (128.0 if most else 0.0)
    for i in w.rows(oi):
        if 0 <= i < w.in_h:
            line = w.line(i)
            for kj in range(w.kernel_w):
                first, end, cells = w.columns(line, kj)
                if cells is not None:
                    before = acc[first:end]
                    acc[first:end] = np.maximum(before, cells) if most else before + cells
    return acc


def _max_pool(r):
    w = _Images(r)
    for oi in range(w.out_h):
        y = w.y[oi * w.row : (oi + 1) * w.row].reshape((w.out_w, w.in_c))
        y[:] = np.clip(pool_row(w, oi, True), float(r.act_min), float(r.act_max))
    return 0


def _average_pool(r):
    w = _Images(r)
    for oi in range(w.out_h):
        sums = pool_row(w, oi, False)
        height = sum([0 <= i < w.in_h for i in w.rows(oi)])
        for oj in range(w.out_w):
            j = oj * w.stride_w - w.pad_left
            n = height * (min(w.in_w, j + w.kernel_w) - max(0, j))
            means = []
            for s in sums[oj].tolist():
                v = (2 * abs(int(s)) + n) // (2 * n)
                means.append(max(r.act_min, min(r.act_max, -v if s < 0 else v)))
            at = oi * w.row + oj * w.in_c
            w.y[at : at + w.in_c] = np.array(means, dtype=np.int8)
    return 0


def _mean(r):
    w = _Images(r)
    cells = w.in_h * w.in_w
    x = w.x.reshape((cells, w.in_c))
    sums = [-r.zero_in * cells] * w.in_c
    ones = np.ones(min(cells, _CELLS))
    for start in range(0, cells, _CELLS):
        some = x[start : start + _CELLS]
        sums = [a + int(b) for a, b in zip(sums, np.dot(ones[: len(some)], some).tolist())]
    multiplier, shift = struct.unpack_from("<2i", r.bytes(2, 8), 0)
    w.y[:] = codes(r, sums, [(multiplier, shift, 0)] * w.in_c, double)
    return 0


def _elementwise(r, zero_b, work):
    # y = the code of work(a, b): each element of y is written after the elements in its place have been read.
    size = Window(r, None).size
    a, y, b = r.bytes(0, size), r.bytes(1, size), r.bytes(2, r.extra)
    low, high = r.act_min - r.zero_out, r.act_max - r.zero_out
    zero_b = max(-128, min(127, zero_b))
    j = 0
    for i in range(size):
        v = work(_int8(a[i]) - r.zero_in, _int8(b[j]) - zero_b)
        y[i] = max(low, min(high, v)) + r.zero_out & 255
        j = j + 1 if j + 1 < r.extra else 0
    return 0


def _add(r):
    zero_b, *p = struct.unpack_from("<7i", r.bytes(3, 28), 0)

    def add(a, b):
        return double(int32(double(a << 20, p[0], p[1]) + double(b << 20, p[2], p[3])), p[4], p[5])

    return _elementwise(r, zero_b, add)


def _mul(r):
    zero_b, multiplier, shift = struct.unpack_from("<3i", r.bytes(3, 12), 0)
    rounding = ROUNDINGS[r.rounding]
    return _elementwise(r, zero_b, lambda a, b: rounding(a * b, multiplier, shift, 0))


def _pad(r):
    w = _Images(r)
    w.y[:] = r.zero_in
    for i in range(w.in_h):
        at = (w.pad_top + i) * w.row
        line = w.y[at : at + w.row].reshape((w.out_w, w.out_c))
        line[w.pad_left : w.pad_left + w.in_w, r.extra : r.extra + w.in_c] = w.line(i)
    return 0


def _copy(r):
    w = _Images(r)
    size = w.in_w * w.in_c
    for i in range(w.in_h):
        w.y[i * w.row + r.extra : i * w.row + r.extra + size] = w.x[i * size : (i + 1) * size]
    return 0


def _table(r):
    size = Window(r, None).size
    x, y, table = r.bytes(0, size), r.bytes(1, size), r.bytes(2, 256)
    for i in range(size):
        y[i] = table[x[i] ^ 128]
    return 0


def _reciprocal(half):
    r = 1515870810 + double(half, -1010580540, 0)
    for _ in range(3):
        r += _saturated(4 * double(r, (1 << 29) - double(half, r, 0), 0))
    return _saturated(2 * r)


def _softmax_row(x, table):
    top = max(x)
    powers = [struct.unpack_from("<i", table, 4 * (top - q))[0] if 4 * (top - q) < len(table) else None for q in x]
    total = sum([_divide_by_power(e, 12) for e in powers if e is not None]) & 0xFFFFFFFF
    zeros = 32
    while total >> (32 - zeros):
        zeros -= 1
    if total == 0 or zeros < 4:
        return [-128] * len(x)
    inverse = _reciprocal((total << zeros) >> 1)
    y = []
    for e in powers:
        v = 0 if e is None else _divide_by_power(double(inverse, e, 0), 35 - zeros)
        y.append(max(0, min(255, v)) - 128)
    return y


def _softmax(r):
    w = _Images(r)
    table = r.bytes(2, 4 * r.extra)
    for at in range(0, len(w.x), w.in_c):
        row = w.x[at : at + w.in_c].tolist()
        w.y[at : at + w.in_c] = np.array(_softmax_row(row, table), dtype=np.int8)
    return 0


RECORDS = {
    _OP_CONV: _conv,
    _OP_DEPTHWISE: _depthwise,
    _OP_AVERAGE_POOL: _average_pool,
    _OP_MAX_POOL: _max_pool,
    _OP_MEAN: _mean,
    _OP_ADD: _add,
    _OP_MUL: _mul,
    _OP_PAD: _pad,
    _OP_COPY: _copy,
    _OP_TABLE: _table,
    _OP_SOFTMAX: _softmax,
}
