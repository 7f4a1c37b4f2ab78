# What a model is asked for now and then: what its plan says of itself, and activations at a cut.
import json
import struct

from .compat import const

_CUT_BYTES = const(48)


def meta(model):
    offset, size = model.meta_place or (0, 0)
    if not size or not model.path:
        return {}
    with open(model.name, "rb") as f:
        f.seek(offset)
        return json.loads(f.read(size))


def features(model, x, cut):
    record, operand, size = _find(model, cut)
    model.execute(model.forward, record, x)
    at = operand & 0x0FFFFFFF
    return memoryview(model.table[operand >> 28])[at : at + size]


def _find(model, name):
    # Of a cut: the records before it, and where its activations lie.
    for at in range(0, len(model.cuts), _CUT_BYTES):
        label, _, record, operand, size = struct.unpack_from("<16sHHII", model.cuts, at)
        if label.rstrip(b"\0") == name.encode():
            return record, operand, size
    from .faults import refuse

    refuse("cut", model.name, name)
