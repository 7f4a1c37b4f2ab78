# A last layer of a board's own (Arivazhagan et al. 2019): the fleet shares the rest, and agrees on a base in which the
# last layer stays as it began. The board's is kept beside it and takes its place in the weights, never in the base.
import struct

from .compat import const
from .feedback import find, forget, keep, reader
from .update import TENSOR_BYTES, tensors

_KIND = "own"
_BUF_TRAIN = const(3)
_P_RECORDS = const(52)
_PROGRAM_BYTES = const(64)
_RECORD_BYTES = const(64)
_R_OPERANDS = const(8)
_LAST_ROUND = const(0xFFFFFFFF)
_LAYERS = (1, 16, 17, 27, 28)  # dense, conv, depthwise; the latter two with trained weights


def shared(table, forward):
    # The part of a table that is not of the last layer of a forward program. ValueError where nothing or all is.
    first = _first(forward)
    count = 0
    for _, _, offset in tensors(table):
        count += offset < first
    if not count or count * TENSOR_BYTES == len(table):
        raise ValueError(
            "a last layer of each board's own: the plan trains %s" % ("all but it" if count else "nothing else")
        )
    return table[: count * TENSOR_BYTES]


def _first(forward):
    # Where in TRAIN the last layer begins. Where some of its rows are frozen, two records beside each other have the
    # same input and output; two layers could only if both work in place.
    last, first = None, 1 << 28
    for i in range(struct.unpack_from("<H", forward, _P_RECORDS)[0] - 1, -1, -1):
        at = _PROGRAM_BYTES + _RECORD_BYTES * i
        operands = struct.unpack_from("<6I", forward, at + _R_OPERANDS)
        layer = forward[at] in _LAYERS
        if last and not (layer and operands[:2] == last and last[0] != last[1]):
            break
        if layer:
            last = operands[:2]
            for operand in operands:
                if operand >> 28 == _BUF_TRAIN:
                    first = min(first, operand & 0x0FFFFFFF)
    return first


def begin(model):
    # Where the last layer begins in the trainable blob; at its end where that trains nothing of it.
    return min(_first(model.forward), len(model.train_blob))


def put_on(model, job=None, last=_LAST_ROUND):
    # The newest one up to a round takes the base's place in the weights; without one the base's stays.
    at = begin(model)
    size = len(model.train_blob) - at
    slot = find(model, _KIND, size, job, 0, last)
    if job is None:
        model.own = slot >= 0
    if slot < 0:
        return
    f = reader(model, _KIND, slot)
    try:
        data = f.read(size)
    finally:
        f.close()
    model.train_blob[at:] = data


def save(model, job, round):
    # What this round has made of it. The one that the round began with stays, for another attempt.
    at = begin(model)
    size = len(model.train_blob) - at
    before = find(model, _KIND, size, job, 0, round - 1)
    keep(model, _KIND, 1 if before == 0 else 0, size, job, round, (memoryview(model.train_blob)[at:],))
    if before < 0:
        forget(model, _KIND, (1,))  # of an earlier job
    model.own = True


def drop(model):
    forget(model, _KIND)
    model.own = False
