# Smaller updates than the dense one, all of whole numbers: an int8 value q stands for q * 2^shift, and every tensor has
# a shift of its own. Payloads, of the tensors that the update is about:
#
#   INT8      shifts (a byte a tensor), then every value
#   RANDOM_K  job, round (u32 each), shifts, values. Their places are a function of job and round, the same on all
#             boards: block by block of a permutation, so that n / k rounds send every place once.
#   TOP_K     shifts, values, gaps. The largest magnitudes, each measured against the largest of its tensor: a board
#             does not hold the tensors' scales.
#   SPARSE    gaps and exact values in turn: what a host says to boards when little has changed
#
# A gap is the number of places left out since the last one, in groups of 7 bits, the low ones first; an exact value is
# in such groups too, its sign in the lowest bit.
import struct
from binascii import crc32

from .compat import const
from .update import HEADER_BYTES, INT32, Differences, seal, tensors, width

INT8 = const(2)
RANDOM_K = const(3)
TOP_K = const(4)
SPARSE = const(5)
_Q_MAX = const(127)
_WEIGHT_SHIFT = const(9)  # of 32767, the largest difference of a weight
_BIAS_SHIFT = const(24)  # larger ones would not be sums of 63 bits any more, see aggregate.SAMPLES_MAX
_PLACES_BYTES = const(8)
_GROUPS = const(5)  # of 7 bits, at most


def make(model, num_samples, table, encoding, kept, job, round, left=None, keep=None):
    # The update as bytes. `kept`: how many values a sparse one holds at most. `left`: opens what earlier rounds left
    # out, for every reading anew; `keep` is called once with an iterator of the pieces of what is left out now.
    encoder = _Encoder(model, table, encoding, kept, job, round, left)
    pieces = encoder.pieces()
    if keep:
        keep(pieces)
    else:
        for _ in pieces:
            pass
    return encoder.sealed(num_samples)


class _Encoder:
    def __init__(self, model, table, encoding, kept, job, round, left):
        self.model, self.table, self.encoding, self.left = model, table, encoding, left
        sizes = [(dtype, count) for dtype, count, _ in tensors(table)]
        count = sum([size[1] for size in sizes])
        self.chosen = chosen(job, round, kept, count) if encoding == RANDOM_K else None
        self.shifts = bytearray(len(sizes))
        self._find_shifts(sizes)
        self.least, self.ties = -1, 0  # of TOP_K: above which magnitude all is sent, and how many that are equal to it
        values = min(kept, count) if encoding == RANDOM_K else count
        if encoding == TOP_K:
            values = self._find_least(kept)
        head = struct.pack("<II", job, round) if encoding == RANDOM_K else b""
        head += self.shifts
        self.out = bytearray(HEADER_BYTES) + head + bytearray(values)
        self.at, self.gaps, self.saturated = HEADER_BYTES + len(head), bytearray(), 0
        self.values = values

    def _differences(self):
        return Differences(self.model, self.table, self.left and self.left())

    def _find_shifts(self, sizes):
        tops = [0] * len(sizes)
        differences = self._differences()
        values, selected, place = differences.values, self.chosen, 0
        for tensor, _, k in differences.blocks():
            top = tops[tensor]
            for j in range(k):
                if selected is None or selected[place + j >> 3] >> (place + j & 7) & 1:
                    d = values[j]
                    if d > top:
                        top = d
                    elif -d > top:
                        top = -d
            tops[tensor] = top
            place += k
        for tensor in range(len(sizes)):
            self.shifts[tensor] = shift_of(tops[tensor], sizes[tensor][0])

    def _find_least(self, kept):
        # How many of each magnitude there are tells the least that is sent. Zeros never are.
        counts = [0] * (_Q_MAX + 1)
        differences = self._differences()
        values = differences.values
        for tensor, _, k in differences.blocks():
            shift = self.shifts[tensor]
            half = 1 << shift >> 1
            for j in range(k):
                d = values[j]
                counts[min((d if d >= 0 else -d) + half >> shift, _Q_MAX)] += 1
        found, least = 0, _Q_MAX + 1
        while least > 1 and found + counts[least - 1] <= kept:
            least -= 1
            found += counts[least]
        # `least` and above are sent whole; of the next magnitude the first ones, as far as there is room.
        self.least = least - 1
        self.ties = kept - found if least > 1 else 0
        return found + self.ties

    def pieces(self):
        # Encodes all of it; yields what is left out, block by block, as a dense payload has it.
        encoding, selected, out, at = self.encoding, self.chosen, self.out, self.at
        least, ties, place, last = self.least, self.ties, 0, -1
        differences = self._differences()
        values = differences.values
        room = bytearray(4 * len(values))
        for tensor, dtype, k in differences.blocks():
            shift = self.shifts[tensor]
            half = 1 << shift >> 1
            size = width(dtype)
            code = "<i" if size == 4 else "<h"
            for j in range(k):
                d = values[j]
                q = min((d if d >= 0 else -d) + half >> shift, _Q_MAX)
                if encoding == TOP_K:
                    send = q > least
                    if q == least and ties:
                        ties -= 1
                        send = True
                else:
                    send = selected is None or selected[place >> 3] >> (place & 7) & 1
                if send:
                    if d < 0:
                        q = -q
                    out[at] = q & 255
                    at += 1
                    if encoding == TOP_K:
                        put_groups(self.gaps, place - last - 1)
                        last = place
                    # The rounding can go a step beyond what fits; what is left is cut like every difference.
                    d -= q << shift
                struct.pack_into(code, room, j * size, d)
                place += 1
            yield memoryview(room)[: k * size]
        self.saturated = differences.saturated

    def sealed(self, num_samples):
        out = self.out
        out.extend(self.gaps)
        out.extend(bytes(4))
        return seal(out, self.model, self.encoding, num_samples, self.values, self.saturated, self.table)


def shift_of(top, dtype):
    # The least with which a magnitude, halves rounded up, fits in 7 bits.
    shift, most = 0, _most(dtype)
    while shift < most and top + (1 << shift >> 1) >> shift > _Q_MAX:
        shift += 1
    return shift


def _most(dtype):
    return _BIAS_SHIFT if dtype == INT32 else _WEIGHT_SHIFT


def chosen(job, round, kept, count):
    # Which places a round sends, as bits. The permutation walks through the numbers of as many bits as `count` has, by
    # steps that can each be undone, until it is below `count`.
    mask = bytearray(count + 7 >> 3)
    bits = 2
    while 1 << bits < count:
        bits += 1
    low, half = (1 << bits) - 1, bits + 1 >> 1
    seed = crc32(struct.pack("<I", job)) & 0xFFFFFFFF
    key = seed & low
    # Odd and below 2^10, so that products stay small integers on a board.
    factors = [seed >> shift & 1023 | 513 for shift in (0, 10, 20)]
    kept = min(kept, count)
    start = (round - 1) * kept % count if count else 0
    for i in range(kept):
        x = start + i
        if x >= count:
            x -= count
        while True:
            x ^= key
            for factor in factors:
                x = x * factor & low
                x ^= x >> half
            if x < count:
                break
        mask[x >> 3] |= 1 << (x & 7)
    return mask


def put_groups(out, value):
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)


def _groups(data, at):
    # A number in groups of 7 bits, and where the next one begins.
    value = shift = 0
    while True:
        if at >= len(data) or shift >= 7 * _GROUPS:
            raise ValueError("update: a number is cut short or has more than %d groups" % _GROUPS)
        group = data[at]
        at += 1
        value |= (group & 127) << shift
        shift += 7
        if group < 128:
            if not group and shift > 7:
                raise ValueError("update: a number has more groups than it needs")
            return value, at


# ---- Reading ---------------------------------------------------------------------------------------------------------


def check(encoding, payload, values, table):
    # Raises ValueError unless a payload is what its encoding says, for these tensors.
    sizes = [(dtype, count) for dtype, count, _ in tensors(table)]
    count = sum([size[1] for size in sizes])
    if encoding == INT8 and values != count or values > count:
        raise ValueError("update: %d values, the tensors have %d" % (values, count))
    if encoding == SPARSE:
        _check_sparse(payload, values, sizes)
        return
    begin = _PLACES_BYTES if encoding == RANDOM_K else 0
    end = begin + len(sizes) + values
    if len(payload) < end or (len(payload) > end and encoding != TOP_K):
        raise ValueError("update: %d values in %d bytes, expected %d bytes" % (values, len(payload), end))
    if encoding == RANDOM_K and not (values and struct.unpack_from("<I", payload, 4)[0]):
        raise ValueError("update: no place of no round")
    for tensor in range(len(sizes)):
        if payload[begin + tensor] > _most(sizes[tensor][0]):
            raise ValueError("update: tensor %d is shifted by %d bits" % (tensor, payload[begin + tensor]))
    for at in range(begin + len(sizes), end):
        if payload[at] == 128:
            raise ValueError("update: a value of -128, expected -127 at the least")
    if encoding == TOP_K:
        place, at = -1, end
        for _ in range(values):
            gap, at = _groups(payload, at)
            place += gap + 1
            if place >= count:
                raise ValueError("update: a value at place %d of %d" % (place, count))
        if at != len(payload):
            raise ValueError("update: %d bytes behind the last gap" % (len(payload) - at))


def _check_sparse(payload, values, sizes):
    at, place, tensor, end = 0, -1, -1, 0
    for _ in range(values):
        gap, at = _groups(payload, at)
        place += gap + 1
        while place >= end:
            tensor += 1
            if tensor == len(sizes):
                raise ValueError("update: a value at place %d of %d" % (place, end))
            end += sizes[tensor][1]
        value, at = _groups(payload, at)
        if not 2 <= value <= (0xFFFFFFFF if sizes[tensor][0] == INT32 else 0xFFFF):
            raise ValueError("update: a difference of %d at place %d" % (_signed(value), place))
    if at != len(payload):
        raise ValueError("update: %d bytes behind the last value" % (len(payload) - at))


def changes(data, table):
    # Yields (place, difference) of an update that was checked, for the tensors that it is about; places ascend.
    encoding = struct.unpack_from("<H", data, 6)[0]
    values = struct.unpack_from("<I", data, 48)[0]
    payload = memoryview(data)[HEADER_BYTES : len(data) - 4]
    if encoding == SPARSE:
        at, place = 0, -1
        for _ in range(values):
            gap, at = _groups(payload, at)
            value, at = _groups(payload, at)
            place += gap + 1
            yield place, _signed(value)
        return
    at = 0
    if encoding == RANDOM_K:
        job, round = struct.unpack_from("<II", payload, 0)
        at = _PLACES_BYTES
    ends, end = [], 0
    for _, count, _ in tensors(table):
        end += count
        ends.append(end)
    shifts = payload[at : at + len(ends)]
    at += len(ends)
    if encoding == TOP_K:
        places = _behind(payload, at + values, values)
    elif encoding == RANDOM_K:
        places = _set(chosen(job, round, values, end), end)
    else:
        places = range(end)
    tensor = 0
    for place in places:
        while place >= ends[tensor]:
            tensor += 1
        q = payload[at]
        at += 1
        yield place, (q - 256 if q > 127 else q) << shifts[tensor]


def _behind(payload, at, values):
    place = -1
    for _ in range(values):
        gap, at = _groups(payload, at)
        place += gap + 1
        yield place


def _set(mask, count):
    for place in range(count):
        if mask[place >> 3] >> (place & 7) & 1:
            yield place


def _signed(value):
    return -(value >> 1) if value & 1 else value >> 1
