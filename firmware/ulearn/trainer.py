import struct

from .compat import const

_BUF_INPUT = const(0)
_BUF_TARGET = const(2)
_P_RECORDS = const(52)
_S_RNG = const(0)
_S_LR_MANT = const(8)
_S_LOSS = const(24)
_S_N_GATES = const(34)
_S_SKIP_BELOW = const(28)

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
            from .faults import refuse

            refuse("program", model.name)
        if model.streamed:
            model.streamed.open()  # no step allocates, the first one included
        self.model = model
        self.seed = 1 if seed is None else seed  # of the order of samples
        if seed is not None:
            struct.pack_into("<I", model.state, _S_RNG, (seed & 0xFFFFFFFF) or 1)
        if skip is not None:
            struct.pack_into("<H", model.state, _S_SKIP_BELOW, min(int(skip * 65536), 65535))
        if learning_rate is not None:
            from .rates import rate

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
                from .faults import refuse

                refuse("label", target, model.classes - 1)
            model.label[0] = target
            table[_BUF_TARGET] = model.label
        else:
            table[_BUF_TARGET] = target if _is_codes(target, model.target_bytes) else model.quantise_target(target)
        training, records, executor, _ = self.programs[program]
        executor.execute(training, records, x)
        return self._loss()

    def step_of(self, samples, index, program=0):
        # The same with one of many samples, as fit takes them.
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
        return self._loss()

    def _loss(self):
        # Four bytes one by one: any larger read would allocate.
        s = self.model.state
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
        from .fitting import fit

        return fit(self, samples, epochs, progress, resume, halve_every, held_out, patience, keep)

    def evaluate(self, samples):
        # The share of samples whose class is told right; for a regression the mean squared error, in real units.
        from .evaluation import evaluate

        return evaluate(self.model, samples)

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


def _is_codes(target, size):
    return isinstance(target, _CODES) and len(target) == size
