# An update: the difference between the trained weights and the base that was last applied, as integers. Encodings that
# are smaller than the dense one are in encodings.py, which is imported when one is met.
import struct
from array import array
from binascii import crc32

from .compat import const

MAGIC = b"uLUP"
VERSION = const(1)
# magic, version, encoding, bytes in all, model id, base id, samples, values, saturated, modulus bits of weights, of
# biases, tensors that it is about (so many of the first; 0: all)
HEADER = "<4sHHI16s16sIIIHHI"
HEADER_BYTES = const(64)
DENSE = const(1)  # every difference in canonical order: int16 for weights, int32 for biases
TENSOR_BYTES = const(32)
INT32 = const(3)
_LAST_ENCODING = const(5)
_DTYPE_INT8 = const(1)
_DTYPE_INT16 = const(2)
_T_SHAPE = const(12)
_BIAS_MAX = const(1073741823)
_WEIGHT_DIFFERENCE = const(32767)
_BIAS_DIFFERENCE = const(2147483647)
_BLOCK = const(64)  # values that are read at once
_CODES = {_DTYPE_INT8: "b", _DTYPE_INT16: "h", INT32: "i"}
_NUMBER = {_DTYPE_INT8: "<b", _DTYPE_INT16: "<h", INT32: "<i"}
_LIMIT = {_DTYPE_INT8: 127, _DTYPE_INT16: 32767, INT32: _BIAS_MAX}


def tensors(table):
    # (dtype, number of values, offset in TRAIN) of every trainable tensor, in canonical order.
    for at in range(0, len(table), TENSOR_BYTES):
        o, h, w, i, offset = struct.unpack_from("<4HI", table, at + _T_SHAPE)
        yield table[at + 2], o * h * w * i, offset


def payload_bytes(table):
    # Of a dense update.
    return sum([count * width(dtype) for dtype, count, _ in tensors(table)])


def width(dtype):
    # Bytes of a difference.
    return 4 if dtype == INT32 else 2


class Differences:
    # Trained weights minus base, plus what `left` (a file of integers as in a dense payload, or None) has of earlier
    # rounds. Read once, block by block: weights, update and base need not fit in memory together.
    def __init__(self, model, table, left=None):
        self.model, self.table, self.left = model, table, left
        self.values = array("i", bytes(4 * _BLOCK))
        self.saturated = 0

    def blocks(self):
        # Yields (tensor, dtype, count): the next `count` differences of that tensor are the first of `values`.
        from .checkpoint import Base

        blob, base = memoryview(self.model.train_blob), Base(self.model)
        self.saturated = number = 0
        try:
            for dtype, count, offset in tensors(self.table):
                unit = 1 << (dtype - 1)
                while count:
                    k = min(count, _BLOCK)
                    before = bytearray(k * unit)
                    base.into(offset, before)
                    self._fill(dtype, k, bytes(blob[offset : offset + k * unit]), before)
                    yield number, dtype, k
                    count -= k
                    offset += k * unit
                number += 1
        finally:
            base.close()
            if self.left:
                self.left.close()

    def _fill(self, dtype, k, weights, before):
        code, values = _CODES[dtype], self.values
        weights, before = array(code, weights), array(code, before)
        left = None
        if self.left:
            left = array("i" if dtype == INT32 else "h", self.left.read(k * width(dtype)))
        limit = _BIAS_DIFFERENCE if dtype == INT32 else _WEIGHT_DIFFERENCE
        for j in range(k):
            d = weights[j] - before[j]
            if left:
                d += left[j]
            if not -limit <= d <= limit:
                self.saturated += 1
                d = limit if d > 0 else -limit
            values[j] = d


def make(model, num_samples, table=None):
    # The update as bytes; num_samples is its weight in an average. `table`: of the first tensors alone.
    table = table or model.tensors
    out = bytearray(HEADER_BYTES + payload_bytes(table) + 4)
    at = HEADER_BYTES
    differences = Differences(model, table)
    for _, dtype, k in differences.blocks():
        part = bytes(array("i" if dtype == INT32 else "h", differences.values[:k]))
        out[at : at + len(part)] = part
        at += len(part)
    return seal(out, model, DENSE, num_samples, sum([t[1] for t in tensors(table)]), differences.saturated, table)


def seal(out, model, encoding, num_samples, values, saturated, table):
    # Header and checksum around a payload that is in its place.
    about = len(table) // TENSOR_BYTES if len(table) < len(model.tensors) else 0
    struct.pack_into(
        HEADER,
        out,
        0,
        MAGIC,
        VERSION,
        encoding,
        len(out),
        model.model_id,
        model.base_id,
        num_samples,
        values,
        saturated,
        16,
        32,
        about,
    )
    struct.pack_into("<I", out, len(out) - 4, crc32(memoryview(out)[:-4]) & 0xFFFFFFFF)
    return out


def parse(data, table):
    # Checks an update against a table of trainable tensors; returns model id, base id, number of samples, saturated.
    if len(data) < HEADER_BYTES + 4:
        raise ValueError("update: cut short: %d bytes" % len(data))
    magic, version, encoding, size, model_id, base, samples, values, saturated, bits, wide, about = struct.unpack_from(
        HEADER, data, 0
    )
    if magic != MAGIC:
        raise ValueError("update: it does not begin with 'uLUP'")
    if version != VERSION:
        raise ValueError("update: version %d, expected %d" % (version, VERSION))
    if not DENSE <= encoding <= _LAST_ENCODING or (bits, wide) != (16, 32):
        raise ValueError("update: encoding %d with %d and %d bits is not supported yet" % (encoding, bits, wide))
    if size != len(data):
        raise ValueError("update: %d bytes long, its header says %d" % (len(data), size))
    if struct.unpack_from("<I", data, size - 4)[0] != crc32(memoryview(data)[: size - 4]) & 0xFFFFFFFF:
        raise ValueError("update: damaged: its checksum does not match")
    if about and about * TENSOR_BYTES >= len(table):
        raise ValueError("update: of %d tensors, expected fewer than %d" % (about, len(table) // TENSOR_BYTES))
    table = covered(data, table)
    payload = memoryview(data)[HEADER_BYTES : size - 4]
    if encoding != DENSE:
        from .encodings import check

        check(encoding, payload, values, table)
    elif len(payload) != payload_bytes(table) or values != sum([t[1] for t in tensors(table)]):
        raise ValueError(
            "update: %d values in %d bytes, expected %d bytes" % (values, len(payload), payload_bytes(table))
        )
    return bytes(model_id), bytes(base), samples, saturated


def covered(data, table):
    # The part of a table that an update is about.
    about = struct.unpack_from("<I", data, HEADER_BYTES - 4)[0]
    return table[: about * TENSOR_BYTES] if about else table


def apply(model, data):
    # Base + difference becomes the new base and the weights; checked whole before anything changes.
    from .checkpoint import base_chunks, commit_base, identity

    model_id, base, _, _ = parse(data, model.tensors)
    if model_id != model.model_id:
        raise ValueError("update: made for another model than %s" % model.name)
    if base != model.base_id:
        raise ValueError("update: counted from another base than the one %s has" % model.name)
    fresh = bytearray(len(model.train_blob))
    at = 0
    for chunk in base_chunks(model):
        fresh[at : at + len(chunk)] = chunk
        at += len(chunk)
    add(fresh, data, model.tensors)
    commit_base(model, (fresh,), identity(model.model_id, fresh))


def add(blob, data, table):
    # Adds an update's differences to a trainable blob, saturating as training does. The update was checked.
    table, encoding = covered(data, table), struct.unpack_from("<H", data, 6)[0]
    if encoding != DENSE:
        from .encodings import changes
    else:
        changes = _all
    each = changes(data, table)
    place, change = next(each, (-1, 0))
    begin = 0
    for dtype, count, offset in tensors(table):
        number, limit = _NUMBER[dtype], _LIMIT[dtype]
        while begin <= place < begin + count:
            i = offset + ((place - begin) << (dtype - 1))
            v = struct.unpack_from(number, blob, i)[0] + change
            struct.pack_into(number, blob, i, min(max(v, -limit), limit))
            place, change = next(each, (-1, 0))
        begin += count


def _all(data, table):
    # (place, difference) of a dense update, as encodings.changes has them of the others.
    at, place = HEADER_BYTES, 0
    for dtype, count, _ in tensors(table):
        number, size = "<i" if dtype == INT32 else "<h", width(dtype)
        for _ in range(count):
            yield place, struct.unpack_from(number, data, at)[0]
            at += size
            place += 1
