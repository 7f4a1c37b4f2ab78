import math
import struct
from array import array

from .compat import const

_BUF_INPUT = const(0)
_BUF_TARGET = const(2)
_P_RECORDS = const(52)
_S_RNG = const(0)
_S_STEP = const(4)
_S_LR_MANT = const(8)
_S_SATURATED = const(12)  # where the rate ends
_LEAST_EXPONENT = const(-64)  # of a rate that moves nothing any more
_S_LOSS = const(24)
_S_N_GATES = const(34)
_S_SKIP_BELOW = const(28)
_S_FIT_START = const(40)
_S_FIT_EPOCHS = const(44)

_CODES = (bytes, bytearray, memoryview)  # made once: a tuple in a call would be allocated at every step


class Trainer:
    # Trains a model's trainable tensors in place, one sample a step, in integers.
    statistics = best = watch = batch = None  # of the class: what is not asked for takes no room in a trainer

    def __init__(self, model, learning_rate=None, seed=None, skip=None, class_weights=None, statistics=0, batch=1):
        # What is not given stays as STATE has it: from the plan, which suits its scheme, or from a checkpoint.
        # `skip`: leave a step's backward pass out when no probability is off by more than this; 0 trains on all.
        # `class_weights`: what the rate is multiplied by, class by class, or "balanced".
        # `statistics`: how many steps, the last ones, trainer.statistics tells of.
        # `batch`: so many samples see the same weights, and what they change is added up; takes a copy of the trainable
        # weights. The rate is each sample's.
        programs = model.trainings
        if not programs:
            raise ValueError("%s: the plan has no training program; prepare it with a scheme" % model.name)
        if model.streamed:
            model.streamed.open()  # no step allocates, the first one included
        self.model = model
        self.seed = 1 if seed is None else seed  # of the order of samples
        if seed is not None:
            struct.pack_into("<I", model.state, _S_RNG, (seed & 0xFFFFFFFF) or 1)
        if skip is not None:
            struct.pack_into("<H", model.state, _S_SKIP_BELOW, min(int(skip * 65536), 65535))
        if learning_rate is not None:
            self.set_rate(*rate(learning_rate))
        model.executor = model.streamed or model
        if batch != 1:
            from .batch import Batched

            self.batch = model.executor = Batched(model, batch)
        if class_weights is not None or statistics:
            from .statistics import Statistics, Watch

            if statistics:
                self.statistics = Statistics(statistics, model.loss_scale)
            self.watch = Watch(model, class_weights, self.statistics)
        # Each program, its number of records, and what executes it, by sample and by index: a watch has both faces.
        faces = self.watch or model, self.watch or model.executor
        self.programs = tuple([(p, struct.unpack_from("<H", p, _P_RECORDS)[0]) + faces for p in programs])

    def set_rate(self, mantissa, exponent):
        # learning rate = mantissa * 2^exponent
        struct.pack_into("<Hh", self.model.state, _S_LR_MANT, mantissa, exponent)

    def step(self, x, target, program=0):
        # One step of stochastic gradient descent. Returns the sample's loss before it, in the plan's integer units.
        # `program`: which of the plan's training programs.
        model = self.model
        table = model.table
        if model.labelled:
            if not 0 <= target < model.classes:
                raise ValueError("label %d, expected 0 to %d" % (target, model.classes - 1))
            model.label[0] = target
            table[_BUF_TARGET] = model.label
        else:
            table[_BUF_TARGET] = target if _is_codes(target, model.target_bytes) else model.quantise_target(target)
        training, records, executor, _ = self.programs[program]
        executor.execute(training, records, x)
        # Four bytes one by one: any larger read would allocate.
        s = model.state
        return s[_S_LOSS] | s[_S_LOSS + 1] << 8 | s[_S_LOSS + 2] << 16 | s[_S_LOSS + 3] << 24

    def fit(self, samples, epochs=4, progress=None, resume=False, halve_every=1, held_out=None, patience=2, keep=None):
        # `samples`: ulearn.Samples, or a pair (inputs, targets). progress(steps done, steps in all) is called after
        # every step. Returns the mean loss of the last epoch, in real units.
        # `resume`: go on with the fit that STATE tells of, after its last step, with a trainer that was given neither
        # rate nor seed. Epochs and the order's seed are in STATE; all else must be as it was.
        # `halve_every`: the rate halves after so many epochs; 0: it stays.
        # `held_out`: samples to evaluate on after each epoch; the fit ends when that got no better for `patience`
        # epochs. The best weights are kept in the file `keep` and restored at the end; without one a resumed fit
        # counts its patience anew.
        model = self.model
        state = model.state
        count = len(samples) if hasattr(samples, "inputs") else len(samples[0])
        if not count:
            raise ValueError("there is no sample to train on")
        if not resume:
            if not 0 < epochs <= 65535:
                raise ValueError("%d epochs, expected 1 to 65535" % epochs)
            step = struct.unpack_from("<I", state, _S_STEP)[0]
            struct.pack_into("<IHH", state, _S_FIT_START, step, epochs, self.seed & 0xFFFF)
        done, epochs, seed = progress_of(state)
        if not epochs:
            raise ValueError("%s: there is no fit to resume: none was begun, or it came to its end" % model.name)
        if done > epochs * count:
            raise ValueError("%d steps were taken, expected at most %d epochs of %d samples" % (done, epochs, count))
        if self.watch is not None:
            self.watch.weigh(samples)
        held = None
        if held_out is not None:
            from .statistics import HeldOut

            held = HeldOut(self, held_out, patience, keep, count if resume else 0)
        order = array("H", range(count))
        for epoch in range(epochs):
            shuffle(order, seed + epoch)
            first = max(done - epoch * count, 0)
            if first > count:
                continue
            begun = first  # 0: its rate has yet to be halved
            if self.batch and first % count:
                first -= first % self.batch.size  # a batch that was cut is begun anew
                start = struct.unpack_from("<I", state, _S_FIT_START)[0]
                struct.pack_into("<I", state, _S_STEP, start + epoch * count + first & 0xFFFFFFFF)
            loss = 0
            before = state[_S_LR_MANT:_S_SATURATED]
            try:
                # Before an epoch, not after the last one: so a checkpoint at the border is of the epoch that has ended.
                if epoch and not begun:
                    self._halve(epoch, halve_every)
                for i in range(first, count):
                    loss += self._sample(samples, order[i], (epoch + i) % len(self.programs))
                    if self.batch and i + 1 == count:
                        self.batch.end()
                    if progress:
                        progress(epoch * count + i + 1, epochs * count)
            except BaseException:
                if progress_of(state)[0] == epoch * count:
                    state[_S_LR_MANT:_S_SATURATED] = before  # stopped within its first step, which will halve it again
                raise
            if held is not None and held.ends(epoch):
                break
        if held is not None:
            held.restore()
        self._halve(progress_of(state)[0] // count, halve_every)
        struct.pack_into("<H", state, _S_FIT_EPOCHS, 0)
        return loss * model.loss_scale / (count - first) if first < count else self.loss

    def evaluate(self, samples):
        # The share of samples whose class is told right; for a regression the mean squared error, in real units.
        from .statistics import evaluate

        return evaluate(self.model, samples)

    def _halve(self, epoch, every):
        if every and not epoch % every:
            mantissa, exponent = struct.unpack_from("<Hh", self.model.state, _S_LR_MANT)
            self.set_rate(mantissa, max(exponent - 1, _LEAST_EXPONENT))

    def _sample(self, samples, index, program):
        if not hasattr(samples, "inputs"):
            return self.step(samples[0][index], samples[1][index], program)
        # Straight from the sample store, by its index: not even a slice is allocated.
        model = self.model
        table = model.table
        table[_BUF_INPUT] = samples.inputs
        table[_BUF_TARGET] = samples.targets
        training, records, _, executor = self.programs[program]
        code = executor.run(training, table, 0, records, index)
        if code < 0:
            model.fail(code)
        s = model.state
        return s[_S_LOSS] | s[_S_LOSS + 1] << 8 | s[_S_LOSS + 2] << 16 | s[_S_LOSS + 3] << 24

    @property
    def gates(self):
        # A view of one byte a trainable tensor, from the last layer to the first, weights before biases: 0 switches it
        # off, and the backward pass ends behind the last one that is on. Empty where the plan has none.
        state = self.model.state
        count, _, at = struct.unpack_from("<HHH", state, _S_N_GATES)
        return memoryview(state)[at : at + count]

    def counters(self):
        return self.model.counters()

    @property
    def loss(self):
        return struct.unpack_from("<i", self.model.state, _S_LOSS)[0] * self.model.loss_scale


def progress_of(state):
    # Of the fit in hand: steps done, epochs in all (0: there is none), seed of the order.
    start, epochs, seed = struct.unpack_from("<IHH", state, _S_FIT_START)
    return (struct.unpack_from("<I", state, _S_STEP)[0] - start) & 0xFFFFFFFF, epochs, seed


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
