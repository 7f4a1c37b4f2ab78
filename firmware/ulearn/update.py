# An update: the difference between the trained weights and the base that was last applied, as integers.
import struct
from binascii import crc32

from .compat import const

MAGIC = b"uLUP"
VERSION = const(1)
# magic, version, encoding, bytes in all, model id, base id, samples, values, saturated, modulus bits of weights, of
# biases, zero
HEADER = "<4sHHI16s16sIIIHHI"
HEADER_BYTES = const(64)
DENSE = const(1)  # every difference in canonical order: int16 for weights, int32 for biases
_TENSOR_BYTES = const(32)
_DTYPE_INT8 = const(1)
_DTYPE_INT16 = const(2)
_DTYPE_INT32 = const(3)
_T_SHAPE = const(12)
_BIAS_MAX = const(1073741823)
_NUMBER = {_DTYPE_INT8: "<b", _DTYPE_INT16: "<h", _DTYPE_INT32: "<i"}
_LIMIT = {_DTYPE_INT8: 127, _DTYPE_INT16: 32767, _DTYPE_INT32: _BIAS_MAX}


def tensors(table):
    # (dtype, number of values, offset in TRAIN) of every trainable tensor, in canonical order.
    for at in range(0, len(table), _TENSOR_BYTES):
        o, h, w, i, offset = struct.unpack_from("<4HI", table, at + _T_SHAPE)
        yield table[at + 2], o * h * w * i, offset


def payload_bytes(table):
    size = 0
    for dtype, count, _ in tensors(table):
        size += count * (4 if dtype == _DTYPE_INT32 else 2)
    return size


def make(model, num_samples):
    # The update as bytes; num_samples is its weight in an average.
    from .checkpoint import base_chunks

    size = HEADER_BYTES + payload_bytes(model.tensors) + 4
    out = bytearray(size)
    at, values, saturated = HEADER_BYTES, 0, 0
    # The base is read piece by piece: weights, update and base need not fit at once.
    pieces, base, start, end = base_chunks(model), b"", 0, 0
    for dtype, count, offset in tensors(model.tensors):
        number = _NUMBER[dtype]
        unit = 1 << (dtype - 1)
        wide = dtype == _DTYPE_INT32
        for i in range(offset, offset + count * unit, unit):
            while i >= end:
                base, start = next(pieces), end
                end += len(base)
            d = struct.unpack_from(number, model.train_blob, i)[0] - struct.unpack_from(number, base, i - start)[0]
            if not wide and not -32767 <= d <= 32767:
                saturated += 1
                d = 32767 if d > 0 else -32767
            struct.pack_into("<i" if wide else "<h", out, at, d)
            at += 4 if wide else 2
        values += count
    struct.pack_into(
        HEADER,
        out,
        0,
        MAGIC,
        VERSION,
        DENSE,
        size,
        model.model_id,
        model.base_id,
        num_samples,
        values,
        saturated,
        16,
        32,
        0,
    )
    struct.pack_into("<I", out, size - 4, crc32(memoryview(out)[: size - 4]) & 0xFFFFFFFF)
    return out


def parse(data, table):
    # Checks an update against a table of trainable tensors; returns model id, base id, number of samples, saturated.
    if len(data) < HEADER_BYTES + 4:
        raise ValueError("update: cut short: %d bytes" % len(data))
    magic, version, encoding, size, model_id, base, samples, values, saturated, bits, wide, zero = struct.unpack_from(
        HEADER, data, 0
    )
    if magic != MAGIC:
        raise ValueError("update: it does not begin with 'uLUP'")
    if version != VERSION:
        raise ValueError("update: version %d, expected %d" % (version, VERSION))
    if encoding != DENSE or (bits, wide, zero) != (16, 32, 0):
        raise ValueError("update: encoding %d with %d and %d bits is not supported yet" % (encoding, bits, wide))
    if size != len(data):
        raise ValueError("update: %d bytes long, its header says %d" % (len(data), size))
    if struct.unpack_from("<I", data, size - 4)[0] != crc32(memoryview(data)[: size - 4]) & 0xFFFFFFFF:
        raise ValueError("update: damaged: its checksum does not match")
    wanted = payload_bytes(table)
    if size != HEADER_BYTES + wanted + 4 or values != sum(t[1] for t in tensors(table)):
        raise ValueError("update: %d values in %d bytes, expected %d bytes" % (values, size - HEADER_BYTES - 4, wanted))
    return bytes(model_id), bytes(base), samples, saturated


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
    # Adds an update's differences to a trainable blob, saturating as training does.
    at = HEADER_BYTES
    for dtype, count, offset in tensors(table):
        number, limit = _NUMBER[dtype], _LIMIT[dtype]
        unit = 1 << (dtype - 1)
        wide = dtype == _DTYPE_INT32
        for i in range(offset, offset + count * unit, unit):
            v = struct.unpack_from(number, blob, i)[0] + struct.unpack_from("<i" if wide else "<h", data, at)[0]
            struct.pack_into(number, blob, i, min(max(v, -limit), limit))
            at += 4 if wide else 2
