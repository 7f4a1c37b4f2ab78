# An executor whose steps add up: a batch's samples all see the weights that it began with. What each step changes goes
# into a copy of the trainable blob, which becomes the weights when the batch is full.
from .compat import const

_BUF_TRAIN = const(3)
_BUF_STATE = const(4)
_S_FLAGS = const(30)
_STATE_NOTHING_TO_LEARN = const(1)
_PROGRAM_BYTES = const(64)
_RECORD_BYTES = const(64)
_OP_UPDATE_WEIGHT = const(6)
_OP_UPDATE_BIAS = const(7)
_OP_UPDATE_CONV = const(34)
_OP_UPDATE_DEPTHWISE = const(35)


class _Slices:
    def __getitem__(self, s):
        return s


_ALL = _Slices()[:]  # made once: a slice in a step would be allocated at every one


class Batched:
    def __init__(self, model, size):
        if not 0 < size <= 65535:
            raise ValueError("batch of %s samples, expected 1 to 65535" % size)
        self.model, self.inner, self.size = model, model.executor, size
        self.weights, self.sums = model.train_blob, bytearray(model.train_blob)
        self.taken = 0

    def run(self, program, table, first, count, index=-1):
        # As the executor's own: records between updates in one call, updates with the copy in the weights' place.
        if program is self.model.forward:
            return self.inner.run(program, table, first, count, index)
        if self.taken == 0:
            self.sums[_ALL] = self.weights  # they may have been restored or averaged since
        end, code, i = first + count, 0, first
        try:
            while i < end and code >= 0:
                update = _is_update(program, i)
                table[_BUF_TRAIN] = self.sums if update else self.weights
                start = i
                while i < end and _is_update(program, i) == update:
                    i += 1
                if update and table[_BUF_STATE][_S_FLAGS] & _STATE_NOTHING_TO_LEARN:
                    continue
                code = self.inner.run(program, table, start, i - start, index)
        finally:
            table[_BUF_TRAIN] = self.weights
        if code < 0:
            return code
        self.taken += 1
        if self.taken == self.size:
            self.end()
        return count

    def end(self):
        # What the batch has added up becomes the weights; at an epoch's end, whatever there is.
        if self.taken:
            self.weights[_ALL] = self.sums
            self.taken = 0


def _is_update(program, i):
    op = program[_PROGRAM_BYTES + _RECORD_BYTES * i]
    return _OP_UPDATE_WEIGHT <= op <= _OP_UPDATE_BIAS or _OP_UPDATE_CONV <= op <= _OP_UPDATE_DEPTHWISE
