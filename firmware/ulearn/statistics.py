# What a trainer is asked for now and then: class weights, statistics of its steps. Imported only then.
import struct
from array import array

from .compat import const
from .rates import rate

_BUF_TARGET = const(2)
_S_LR_MANT = const(8)
_S_SATURATED = const(12)
_S_CLIPPED = const(16)
_S_SKIPPED = const(20)
_S_LOSS = const(24)
_SMALL = const(0x3FFFFFFF)  # the largest integer that a 32-bit board does not box


class Watch:
    # Executes a trainer's programs in the model's place: each step at its class's own rate, and noted. Nothing is
    # allocated in a step.
    def __init__(self, model, class_weights, statistics):
        self.model = model
        self.statistics = statistics
        self.balanced = class_weights == "balanced"
        self.weights = None
        if class_weights is None:
            return
        if not model.labelled:
            raise ValueError("%s: class weights need labels, and it is trained on vectors" % model.name)
        # Until a fit has counted the classes, balanced ones weigh the same.
        weights = (1,) * model.classes if self.balanced else class_weights
        if isinstance(weights, str) or len(weights) != model.classes:
            raise ValueError("class_weights is %r, expected %d numbers or 'balanced'" % (weights, model.classes))
        self.weights = bytearray(4 * model.classes)  # mantissa and exponent each, as STATE has a rate
        self.rates = bytearray(4 * model.classes)  # their products with the base rate
        self.base = bytearray(4)
        for i in range(model.classes):
            if weights[i] and not 1e-6 <= weights[i] <= 1e6:
                raise ValueError("class weight %s, expected 0 or a number from 1e-6 to 1e6" % weights[i])
            struct.pack_into("<Hh", self.weights, 4 * i, *rate(weights[i]))
        self._renew()

    def weigh(self, samples):
        # Balanced weights, as scikit-learn has them: samples / (classes there are * samples of the class). In integers,
        # so that every board has the same.
        if not self.balanced:
            return
        counts = [0] * self.model.classes
        stored = hasattr(samples, "inputs")
        total = len(samples) if stored else len(samples[0])
        for i in range(total):
            label = samples.target(i) if stored else int(samples[1][i])
            if not 0 <= label < len(counts):
                raise ValueError("label %d, expected 0 to %d" % (label, len(counts) - 1))
            counts[label] += 1
        present = len(counts) - counts.count(0)
        for i in range(len(counts)):
            struct.pack_into("<Hh", self.weights, 4 * i, *_ratio(total, present * counts[i]))
        self._renew()

    def _renew(self):
        # The classes' rates: the two mantissas' product rounded to 11 bits, as the kernels round. No number is boxed.
        s, base = self.model.state, self.base
        weights, rates = self.weights, self.rates
        for i in range(4):
            base[i] = s[_S_LR_MANT + i]
        for at in range(0, len(rates), 4):
            m = (base[0] | base[1] << 8) * (weights[at] | weights[at + 1] << 8)
            e = base[2] + weights[at + 2] + (base[3] + weights[at + 3] << 8)
            if m >= 1 << 21:
                m = m + 1024 >> 11
                e += 11
            else:
                m = m + 512 >> 10
                e += 10
            if m == 2048:
                m = 1024
                e += 1
            rates[at] = m & 255
            rates[at + 1] = m >> 8
            rates[at + 2] = e & 255
            rates[at + 3] = e >> 8 & 255

    def execute(self, program, records, x):
        self._step(program, records, x, -1)

    def run(self, program, table, first, records, index):
        return self._step(program, records, None, index)

    def _step(self, program, records, x, index):
        # index < 0: x is the sample; else the table holds arrays of samples.
        code = 0
        model = self.model
        table, s = model.table, model.state
        weights, statistics = self.weights, self.statistics
        if statistics is not None:
            statistics.begin(s)
        if weights is not None:
            base = self.base
            for i in range(4):
                if base[i] != s[_S_LR_MANT + i]:
                    self._renew()
                    break
            t = table[_BUF_TARGET]
            at = 4 * (t[0] if index < 0 else t[2 * index] | t[2 * index + 1] << 8)
            if at < len(weights):  # else the kernels refuse the label
                for i in range(4):
                    s[_S_LR_MANT + i] = self.rates[at + i]
        try:
            if index < 0:
                model.execute(program, records, x)
            else:
                code = model.executor.run(program, table, 0, records, index)
        finally:
            if weights is not None:
                for i in range(4):
                    s[_S_LR_MANT + i] = base[i]
        if statistics is not None and code >= 0:
            statistics.end(s)
        return code


class Statistics:
    # The last steps of a trainer, 13 bytes each; lists are in the order of the steps.
    def __init__(self, size, scale):
        if not 0 < size <= 65535:
            raise ValueError("statistics of %s steps, expected 1 to 65535" % size)
        self._scale = scale
        self._loss, self._saturated, self._clipped = [array("i", bytes(4 * size)) for _ in range(3)]
        self._skipped = array("B", bytes(size))
        self._was_saturated = self._was_clipped = self._was_skipped = 0
        self.clear()

    def clear(self):
        self._count = self._next = 0

    def __len__(self):
        return self._count

    def begin(self, s):
        # A step is about to begin. Of the counters 24 bits will do: what counts is how far they move.
        self._was_saturated = _low(s, _S_SATURATED)
        self._was_clipped = _low(s, _S_CLIPPED)
        self._was_skipped = s[_S_SKIPPED]

    def end(self, s):
        i = self._next
        high = s[_S_LOSS + 3]
        self._loss[i] = _low(s, _S_LOSS) | high << 24 if high < 64 else _SMALL
        self._saturated[i] = _low(s, _S_SATURATED) - self._was_saturated & 0xFFFFFF
        self._clipped[i] = _low(s, _S_CLIPPED) - self._was_clipped & 0xFFFFFF
        self._skipped[i] = s[_S_SKIPPED] != self._was_skipped
        self._next = (i + 1) % len(self._loss)
        self._count = min(self._count + 1, len(self._loss))

    def _listed(self, values):
        first = self._next - self._count
        return [values[(first + i) % len(values)] for i in range(self._count)]

    def losses(self):
        # In real units.
        return [loss * self._scale for loss in self._listed(self._loss)]

    def saturated(self):
        # Gradient mantissas that were cut off.
        return self._listed(self._saturated)

    def clipped(self):
        # Weights and biases at the end of their range.
        return self._listed(self._clipped)

    def skipped(self):
        # Whether the backward pass was left out.
        return [bool(v) for v in self._listed(self._skipped)]

    def summary(self):
        # Mean loss, share of steps skipped, and how many mantissas and weights in all.
        n = self._count or 1
        return {
            "steps": self._count,
            "loss": sum(self.losses()) / n,
            "skipped": sum(self.skipped()) / n,
            "saturated": sum(self.saturated()),
            "clipped": sum(self.clipped()),
        }


def _low(s, at):
    return s[at] | s[at + 1] << 8 | s[at + 2] << 16


def _ratio(n, d):
    # n / d as rate() has it, by integers alone; 0 where d is.
    if not d:
        return 0, 0
    exponent = 0
    while n >= d << 11:
        d <<= 1
        exponent += 1
    while n < d << 10:
        n <<= 1
        exponent -= 1
    mantissa = (2 * n // d + 1) >> 1
    return (1024, exponent + 1) if mantissa == 2048 else (mantissa, exponent)
