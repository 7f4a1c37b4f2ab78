# What trains convolutions and passes gradients through imported operators, for ulab_executor.py, which imports this
# when a plan has such a record. ul_format.h defines the arithmetic; comments here only say how floats come to give
# exact integers.
import struct

from .compat import const
from .ulab_executor import (
    ROOM,
    Writer,
    add_exact,
    begin_update,
    bitlen,
    channel_scales,
    channel_step,
    codes,
    gain_shift,
    halves,
    integers,
    is_learning,
    largest,
    mixed_rows,
    move_int8,
    move_int16,
    np,
    rounded,
    scaled,
    scales,
)
from .ulab_operators import ROUNDINGS, Window, pool_row

_DTYPE_INT16 = const(2)
_OP_CONV_TRAINED = const(27)
_OP_DEPTHWISE_TRAINED = const(28)
_OP_MASK = const(29)
_OP_CONV_BACK = const(32)
_OP_DEPTHWISE_BACK = const(33)
_OP_UPDATE_CONV = const(34)
_OP_UPDATE_DEPTHWISE = const(35)
_OP_AVERAGE_BACK = const(36)
_OP_MAX_BACK = const(37)
_OP_SCALE_BACK = const(38)
_OP_CROP = const(39)
_OP_SUM = const(40)
_LOW = const(4096)

_BLOCK = const(1024)  # weights or sums that are converted at a time
_ELEMENTS = const(512)  # of what goes element by element, a multiple of 8


def _zeros(rows, columns):
    # Exact sums, high and low.
    return np.zeros((rows, columns)), np.zeros((rows, columns))


# The forward pass.


def _conv_trained_row(r, w, oi, weights):
    # A row of outputs before their biases, [out_w][N]. Products stay within 255 * top.
    high, low = _zeros(w.out_w, r.n)
    step = max(1, min(ROOM // (255 * r.used_max()), _BLOCK))
    for k, (first, end, cells) in _taps(w, oi):
        cells = cells * 1.0 - float(r.zero_in)
        for c in range(0, w.in_c, step):
            d = min(c + step, w.in_c)
            rows = max(1, _BLOCK // (d - c))
            for n in range(0, r.n, rows):
                m = min(n + rows, r.n)
                some = r.used(weights[n:m, k * w.in_c + c : k * w.in_c + d])
                add_exact(high[first:end, n:m], low[first:end, n:m], np.dot(cells[:, c:d], some.transpose()))
    return high, low


def _taps(w, oi):
    # The taps that meet the image somewhere in row oi of the output: number, and where, as Window.columns says.
    for ki, i in enumerate(w.rows(oi)):
        if 0 <= i < w.in_h:
            line = w.line(i)
            for kj in range(w.kernel_w):
                place = w.columns(line, kj)
                if place[2] is not None:
                    yield ki * w.kernel_w + kj, place


def _conv_trained(r):
    w = Window(r)
    channels, weights = r.scale_mant, r.weights(2, r.n, w.taps * w.in_c)
    y = r.int8(1, w.out_h * w.out_w * channels)
    bias, of_sums = struct.unpack_from("<%di" % r.n, r.bytes(3, 4 * r.n), 0), scales(r, 0, r.n)
    for oi in range(w.out_h):
        high, low = _conv_trained_row(r, w, oi, weights)
        for oj in range(w.out_w):
            sums = [a + b for a, b in zip(r.coarse(integers(high[oj], low[oj])), bias)]
            end = (oi * w.out_w + oj + 1) * channels
            y[end - r.n : end] = codes(r, sums, of_sums, ROUNDINGS[r.rounding])
    return 0


def _depthwise_trained(r):
    w = Window(r)
    repeat = r.n // w.in_c
    flat = r.weights(2, r.n, w.taps).reshape((r.n * w.taps,))
    y = r.int8(1, w.out_h * w.row)
    bias = struct.unpack_from("<%di" % r.n, r.bytes(3, 4 * r.n), 0)
    for oi in range(w.out_h):
        row = y[oi * w.row : (oi + 1) * w.row]
        for q in range(repeat):
            high, low = _zeros(w.out_w, w.in_c)
            for k, (first, end, cells) in _taps(w, oi):
                # Products stay within 255 * 32768.
                weight = r.used(flat[q * w.taps + k :: w.taps * repeat]) * 1.0
                add_exact(high[first:end], low[first:end], (cells * 1.0 - float(r.zero_in)) * weight)
            for n in range(q, r.n, repeat):
                sums = [a + bias[n] for a in r.coarse(integers(high[:, n // repeat], low[:, n // repeat]))]
                row[n :: r.n] = codes(r, sums, scales(r, n, 1) * w.out_w, ROUNDINGS[r.rounding])
    return 0


def _mask(r):
    size = Window(r, None).size
    x, bits = r.int8(0, size), np.frombuffer(r.bytes(1, (size + 7) // 8), dtype=np.uint8)
    for start in range(0, size, _ELEMENTS):
        some = x[start : start + _ELEMENTS]
        bytes_here = (len(some) + 7) // 8
        passes = np.zeros(8 * bytes_here)
        passes[: len(some)] = (some != r.act_min) * 1.0
        passes = passes.reshape((bytes_here, 8))
        bits[start // 8 : start // 8 + bytes_here] = np.dot(
            passes, np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0])
        )
    return 0


# The gradient at a layer's input.


def _lines(w, load, give):
    # (i, high, low) of each row of the input: what the rows of the output under whose kernels it lies give to it. load
    # gets a row of the output, once, and before any row of the input is left that may be written in its place.
    rows = {}
    for i in range(w.in_h):
        high, low = _zeros(w.in_w, w.in_c)
        for ki in range(w.kernel_h):
            at = i + w.pad_top - ki
            oi = at // w.stride_h
            if at % w.stride_h or not 0 <= oi < w.out_h:
                continue
            if oi not in rows:
                rows[oi] = load(oi)
            for kj in range(w.kernel_w):
                first, end, to_high = w.columns(high, kj)
                if to_high is not None:
                    give(rows[oi], ki * w.kernel_w + kj, first, end, to_high, w.columns(low, kj)[2])
        yield i, high, low
        for oi in list(rows):
            if oi * w.stride_h - w.pad_top + w.kernel_h <= i + 1:
                rows.pop(oi)


def _write_lines(r, w, load, give, s, exponent):
    writer = Writer(r)
    row = w.in_w * w.in_c
    for i, high, low in _lines(w, load, give):
        writer.put(i * row, rounded(high, low, s).reshape((row,)))
    return writer.end(exponent)


def _mantissa_row(r, w, oi, channels):
    # [out_w][channels]
    row = w.out_w * channels
    return r.mantissas(0, oi * row, row).reshape((w.out_w, channels))


def _layer_back(r, w, give):
    exponent, of_channels = r.header(0)[0], channel_scales(r)

    def load(oi):
        return scaled(_mantissa_row(r, w, oi, r.n), of_channels)

    w.most = max([int(np.max(abs(load(oi)))) for oi in range(w.out_h)])
    if w.most == 0:
        writer = Writer(r)
        for i in range(w.in_h):
            writer.put(i * w.in_w * w.in_c, np.zeros(w.in_w * w.in_c))
        return writer.end(0)
    most = 0
    if is_learning(r):
        most = max([largest(high, low) for _, high, low in _lines(w, load, give)])
    s = gain_shift(r, bitlen(w.most), most)
    return _write_lines(r, w, load, give, s, exponent + r.scale_exp + s)


def _conv_back(r):
    w = Window(r, None)
    parts = mixed_rows(r, w.taps * w.in_c)

    def give(g, tap, first, end, high, low):
        k = tap * w.in_c
        for start, stop, top, weights in parts:
            for part, unit, most in halves(g[first:end, start:stop], w.most, top):
                step = max(1, min(ROOM // (most * top), _BLOCK // w.in_c))
                for n in range(0, stop - start, step):
                    m = min(n + step, stop - start)
                    add_exact(high, low, np.dot(part[:, n:m], weights(n, m, k, k + w.in_c)), unit)

    return _layer_back(r, w, give)


def _depthwise_back(r):
    w = Window(r, None)
    repeat = r.n // w.in_c
    if r.extra:
        flat, top = r.weights(5, r.n, w.taps).reshape((r.n * w.taps,)), r.used_max()
    else:
        flat, top = r.int8(2, r.n * w.taps), 128

    def give(g, tap, first, end, high, low):
        for q in range(repeat):
            weight = flat[q * w.taps + tap :: w.taps * repeat]
            weight = (r.used(weight) if r.extra else weight) * 1.0
            for part, unit, _ in halves(g[first:end, q::repeat], w.most, top):
                add_exact(high, low, part * weight, unit)

    return _layer_back(r, w, give)


# Updates.


def _steps(high, low, m, s):
    # rshift((high * _LOW + low) * m, s) as floats, exactly wherever the answer is within 2^16: beyond, any weight
    # saturates. The product is q2 * 2^24 + q1 * 2^12 + q0 with 0 <= q1, q0 < 2^12.
    if s > 44:
        return np.zeros(len(high))  # 2^31 * 2^11 is less than the half of a unit
    factor, unit = float(m), 1.0 / _LOW
    q2 = np.floor(high * unit)
    q1 = (high - q2 * float(_LOW)) * factor
    q0 = low * factor
    carry = np.floor(q0 * unit)
    q0 = q0 - carry * float(_LOW)
    q1 = q1 + carry
    carry = np.floor(q1 * unit)
    q1 = q1 - carry * float(_LOW)
    q2 = q2 * factor + carry
    if s > 24:
        return np.floor((q2 + float(1 << (s - 25))) * (1.0 / (1 << (s - 24))))
    if s > 12:
        return q2 * float(1 << (24 - s)) + np.floor((q1 + float(1 << (s - 13))) * (1.0 / (1 << (s - 12))))
    q2 = q2 * 16777216.0 + q1 * float(_LOW)
    if s > 0:
        return q2 * (1.0 / (1 << s)) + np.floor((q0 + float(1 << (s - 1))) * (1.0 / (1 << s)))
    return (q2 + q0) * float(1 << min(-s, 30))


def _move(r, weights, n, high, low, exponent):
    # Row n of the weights, by its sums.
    m, s = channel_step(r, exponent, n)
    if r.w_dtype == _DTYPE_INT16:
        move_int16(r, weights, n, _steps(high, low, m, s))
    else:
        move_int8(r, weights, n, integers(high, low), m, s)


def _update_conv(r):
    w = Window(r, 1)
    taps, channels, exponent = w.taps * w.in_c, r.extra & 0xFFFF, r.header(0)[0]
    weights = r.weights(2, r.n, taps)
    rows = max(1, _BLOCK // taps)
    begin_update(r)
    for n in range(0, r.n, rows):
        count = min(rows, r.n - n)
        high, low, used = _row_sums(r, w, channels, channels - r.n + n, count)
        for j in range(count):
            if used[j]:
                _move(r, weights, n + j, high[j], low[j], exponent)
    return 0


def _row_sums(r, w, channels, first_channel, count):
    # The sums of some rows of weights, and which of the rows' channels have a mantissa.
    high, low = _zeros(count, w.taps * w.in_c)
    used, ones = np.zeros(count), np.ones(w.out_w)
    step = ROOM // (255 * r.top(0))  # positions
    row = w.out_w * channels
    for oi in range(w.out_h):
        m = r.stored(0, oi * row, row).reshape((w.out_w, channels))[:, first_channel : first_channel + count]
        m = r.cut(0, m)
        some = np.dot(ones, abs(m))
        if not np.max(some):
            continue
        used = used + some
        for k, (first, end, cells) in _taps(w, oi):
            cells = cells * 1.0 - float(r.zero_in)
            k *= w.in_c
            to_high, to_low = high[:, k : k + w.in_c], low[:, k : k + w.in_c]
            for j in range(first, end, step):
                stop = min(j + step, end)
                add_exact(to_high, to_low, np.dot(m[j:stop].transpose(), cells[j - first : stop - first]))
    return high, low, used.tolist()


def _update_depthwise(r):
    w = Window(r, 1)
    repeat, exponent = r.n // w.in_c, r.header(0)[0]
    weights = r.weights(2, r.n, w.taps)
    high, low = _zeros(w.taps * repeat, w.in_c)
    used, ones = np.zeros(r.n), np.ones(w.out_w)
    step = ROOM // (255 * r.top(0))  # positions
    begin_update(r)
    for oi in range(w.out_h):
        m = _mantissa_row(r, w, oi, r.n)
        used = used + np.dot(ones, abs(m))
        for k, (first, end, cells) in _taps(w, oi):
            cells = cells * 1.0 - float(r.zero_in)
            for q in range(repeat):
                products = m[first:end, q::repeat] * cells
                at = k * repeat + q
                for j in range(0, end - first, step):
                    some = products[j : j + step]
                    add_exact(high[at], low[at], np.dot(ones[: len(some)], some))
    for n, some in enumerate(used.tolist()):
        if some:
            q, c = n % repeat, n // repeat
            _move(r, weights, n, high[q::repeat, c], low[q::repeat, c], exponent)
    return 0


# Pooling.


def _average_back(r):
    w = Window(r, None)

    def load(oi):
        # Shares have up to 31 bits; with its upper ones a mantissa has a product below 2^19.
        height = sum([0 <= i < w.in_h for i in w.rows(oi)])
        upper, lower = [], []
        for oj in range(w.out_w):
            j = oj * w.stride_w - w.pad_left
            n = height * (min(w.in_w, j + w.kernel_w) - max(0, j))
            share = ((1 << r.extra) + n // 2) // n
            upper.append(float(share >> 12))
            lower.append(float(share & 4095))
        m = _mantissa_row(r, w, oi, r.n)
        column = (w.out_w, 1)
        return m * np.array(upper).reshape(column), m * np.array(lower).reshape(column)

    def give(parts, tap, first, end, high, low):
        add_exact(high, low, parts[1][first:end])
        high[:] = high + parts[0][first:end]

    return _write_lines(r, w, load, give, r.scale_mant, r.header(0)[0] - r.extra + r.scale_mant)


def _max_back(r):
    w = Window(r, 4)

    def load(oi):
        # The mantissas, and the tap of each one's first largest input.
        top = pool_row(w, oi, True)
        winner = np.zeros((w.out_w, w.in_c))
        for k, (first, end, cells) in reversed(list(_taps(w, oi))):
            before = winner[first:end]
            winner[first:end] = before + (cells * 1.0 == top[first:end]) * (float(k) - before)
        return _mantissa_row(r, w, oi, r.n), winner

    def give(parts, tap, first, end, high, low):
        add_exact(high, low, parts[0][first:end] * (parts[1][first:end] == float(tap)))

    return _write_lines(r, w, load, give, r.scale_mant, r.header(0)[0] + r.scale_mant)


# Element by element.


def _scale_back(r):
    size, period = Window(r, None).size, r.extra
    writer = Writer(r)
    table = np.frombuffer(r.bytes(2, 2 * period), dtype=np.int16)
    if period < _ELEMENTS:
        # Whole periods up to some number of elements.
        times = max(1, min(_ELEMENTS, size) // period)
        repeated = np.zeros((times, period))
        repeated[:] = table * 1.0
        period *= times
        table = repeated.reshape((period,))
    for start in range(0, size, period):
        for at in range(start, min(start + period, size), _ELEMENTS):
            end = min(at + _ELEMENTS, start + period, size)
            # A factor's upper and its lower 8 bits: both products have less than 20.
            factor = table[at - start : end - start] * 1.0
            upper = np.floor(factor * (1.0 / 256))
            m = r.mantissas(0, at, end - at)
            lower = np.floor(m * (factor - upper * 256.0) * (1.0 / 256))
            writer.put(at, np.floor((m * upper + lower + 4.0) * (1.0 / 8)))
    return writer.end(r.header(0)[0] + r.scale_exp + 11)


def _crop(r):
    w = Window(r, None)
    writer = Writer(r)
    row = w.in_w * w.in_c
    for i in range(w.in_h):
        at = ((i + w.pad_top) * w.out_w + w.pad_left) * w.out_c + r.extra
        if w.in_c == w.out_c:
            line = r.mantissas(0, at, row)
        else:
            line = np.zeros(row)
            for j in range(w.in_w):
                line[j * w.in_c : (j + 1) * w.in_c] = r.mantissas(0, at + j * w.out_c, w.in_c)
        writer.put(i * row, line)
    return writer.end(r.header(0)[0])


def _shifted(m, s):
    # rshift of mantissas: s is -9 at the least, and from 12 on nothing is left of them.
    if s > 11:
        return m * 0.0
    if s > 0:
        return np.floor((m + float(1 << (s - 1))) * (1.0 / (1 << s)))
    return m * float(1 << -s)


def _sum(r):
    size = Window(r, None).size
    (exponent, max_a), (exponent_b, max_b) = r.header(0), r.header(4)
    down_a, down_b = 0, 0
    if max_a and max_b:
        e = max(exponent + bitlen(max_a), exponent_b + bitlen(max_b)) + 1 - bitlen(r.top(1))
        down_a, down_b = max(-15, min(62, e - exponent)), max(-15, min(62, e - exponent_b))
        exponent = e
    elif not max_a:
        exponent = exponent_b
    writer = Writer(r)
    for start in range(0, size, _ELEMENTS):
        count = min(_ELEMENTS, size - start)
        if max_a == 0:
            values = r.mantissas(4, start, count)
        else:
            values = _shifted(r.mantissas(0, start, count), down_a)
            if max_b:
                values = values + _shifted(r.mantissas(4, start, count), down_b)
        writer.put(start, values)
    return writer.end(exponent)


RECORDS = {
    _OP_CONV_TRAINED: _conv_trained,
    _OP_DEPTHWISE_TRAINED: _depthwise_trained,
    _OP_MASK: _mask,
    _OP_CONV_BACK: _conv_back,
    _OP_DEPTHWISE_BACK: _depthwise_back,
    _OP_UPDATE_CONV: _update_conv,
    _OP_UPDATE_DEPTHWISE: _update_depthwise,
    _OP_AVERAGE_BACK: _average_back,
    _OP_MAX_BACK: _max_back,
    _OP_SCALE_BACK: _scale_back,
    _OP_CROP: _crop,
    _OP_SUM: _sum,
}
