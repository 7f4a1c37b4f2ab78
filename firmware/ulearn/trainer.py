import math
import struct
from array import array

from .compat import const

_BUF_INPUT = const(0)
_BUF_TARGET = const(6)
_P_RECORDS = const(52)
_S_RNG = const(0)
_S_LR_MANT = const(8)
_LEAST_EXPONENT = const(-64)  # of a rate that moves nothing any more
_S_LOSS = const(24)
_S_SKIP_BELOW = const(28)
_LOSS_SOFTMAX_CE = const(1)

_CODES = (bytes, bytearray, memoryview)  # made once: a tuple in a call would be allocated at every step


class Trainer:
    # Trains a model's trainable tensors in place, one sample a step, in integers.
    def __init__(self, model, learning_rate=None, seed=None, skip=None):
        # What is not given stays as STATE has it: from the plan, which suits its scheme, or from a checkpoint.
        # `skip`: leave a step's backward pass out when no probability is off by more than this; 0 trains on all.
        if model.windows:
            raise ValueError("%s: its weights are streamed from the file; load it with frozen='ram'" % model.name)
        if model.training is None:
            raise ValueError("%s: the plan has no training program; prepare it with a scheme" % model.name)
        self.model = model
        self.seed = 1 if seed is None else seed  # of the order of samples
        self.records = struct.unpack_from("<H", model.training, _P_RECORDS)[0]
        if seed is not None:
            struct.pack_into("<I", model.state, _S_RNG, (seed & 0xFFFFFFFF) or 1)
        if skip is not None:
            struct.pack_into("<H", model.state, _S_SKIP_BELOW, min(int(skip * 65536), 65535))
        if learning_rate is not None:
            self.set_rate(*rate(learning_rate))

    def set_rate(self, mantissa, exponent):
        # learning rate = mantissa * 2^exponent
        struct.pack_into("<Hh", self.model.state, _S_LR_MANT, mantissa, exponent)

    def step(self, x, target):
        # One step of stochastic gradient descent. Returns the sample's loss before it, in the plan's integer units.
        model = self.model
        table = model.table
        if model.loss_kind == _LOSS_SOFTMAX_CE:
            if not 0 <= target < model.classes:
                raise ValueError("label %d, expected 0 to %d" % (target, model.classes - 1))
            model.label[0] = target
            table[_BUF_TARGET] = model.label
        else:
            table[_BUF_TARGET] = target if _is_codes(target, model.target_bytes) else model.quantise_target(target)
        model.execute(model.training, self.records, x)
        # Four bytes one by one: any larger read would allocate.
        s = model.state
        return s[_S_LOSS] | s[_S_LOSS + 1] << 8 | s[_S_LOSS + 2] << 16 | s[_S_LOSS + 3] << 24

    def fit(self, samples, epochs=4, progress=None):
        # `samples`: ulearn.Samples, or a pair (inputs, targets). The rate halves after every epoch. Returns the mean
        # loss of the last epoch, in real units. progress(steps done, steps in all) is called after every step.
        count = len(samples) if hasattr(samples, "inputs") else len(samples[0])
        if not count:
            raise ValueError("there is no sample to train on")
        order = array("H", range(count))
        loss = 0
        for epoch in range(epochs):
            shuffle(order, self.seed + epoch)
            loss = 0
            for i in range(count):
                loss += self._sample(samples, order[i])
                if progress:
                    progress(epoch * count + i + 1, epochs * count)
            mantissa, exponent = struct.unpack_from("<Hh", self.model.state, _S_LR_MANT)
            self.set_rate(mantissa, max(exponent - 1, _LEAST_EXPONENT))
        return loss * self.model.loss_scale / count

    def _sample(self, samples, index):
        if not hasattr(samples, "inputs"):
            return self.step(samples[0][index], samples[1][index])
        # Straight from the sample store, by its index: not even a slice is allocated.
        model = self.model
        table = model.table
        table[_BUF_INPUT] = samples.inputs
        table[_BUF_TARGET] = samples.targets
        code = model.run(model.training, table, 0, self.records, index)
        if code < 0:
            model.fail(code)
        s = model.state
        return s[_S_LOSS] | s[_S_LOSS + 1] << 8 | s[_S_LOSS + 2] << 16 | s[_S_LOSS + 3] << 24

    def counters(self):
        return self.model.counters()

    @property
    def loss(self):
        return struct.unpack_from("<i", self.model.state, _S_LOSS)[0] * self.model.loss_scale


def rate(learning_rate):
    # A learning rate as the 11-bit mantissa and exponent that STATE holds.
    if learning_rate == 0:
        return 0, 0
    if not 1e-9 < learning_rate < 1e6:
        raise ValueError("learning rate %s, expected 0 or a number from 1e-9 to 1e6" % learning_rate)
    fraction, exponent = math.frexp(learning_rate)
    mantissa = int(fraction * 2048 + 0.5)
    if mantissa == 2048:
        return 1024, exponent - 10
    return mantissa, exponent - 11


def shuffle(order, seed):
    # Fisher-Yates with a 16-bit xorshift (7, 9, 8): small integers only, the same order on every board.
    x = (seed * 40503 + 1) & 0xFFFF or 1
    for i in range(len(order) - 1, 0, -1):
        x = (x ^ x << 7) & 0xFFFF
        x ^= x >> 9
        x = (x ^ x << 8) & 0xFFFF
        j = x * (i + 1) >> 16
        t = order[i]
        order[i] = order[j]
        order[j] = t


def _is_codes(target, size):
    return isinstance(target, _CODES) and len(target) == size
