import struct

from .compat import const

_BUF_INPUT = const(0)
_BUF_FROZEN = const(6)
_E_BUFFER = const(-1)

_SEQUENCES = (list, tuple)  # made once: a tuple in a call would be allocated at every step


def load(source, run=None, frozen="auto"):
    # `source`: the path of a plan or the plan's bytes; raises ValueError that names the file and the fault.
    # `frozen`: where the frozen weights lie: "ram"; "stream": in the file, read record by record;
    # "auto": in place where `source` is a buffer or a file of a ROMFS, else in RAM where samples have room beside, else
    # streamed.
    # A name that is no file here may be one of the ROMFS; what is saved with it lies here all the same.
    from .loading import load_into

    model = Model()
    load_into(model, source, run, frozen)
    return model


class Model:
    # A plan in memory, ready to run: every buffer was made by the loader, once.
    own = False  # whether a last layer of its own takes the base's place, see personal.py
    kept = None  # of a plan that is no file: what a board keeps between rounds, see feedback.py

    @property
    def base_id(self):
        # Which weights this model's update is counted from: 16 bytes.
        if self._base_id is None:
            from .checkpoint import base_id

            self._base_id = base_id(self)
        return self._base_id

    @property
    def meta(self):
        # Labels, names, provenance: read from the plan when asked for, never held.
        from .reading import meta

        return meta(self)

    def output(self, x):
        # The network's raw int8 output for one input, as a view that the next call overwrites.
        self.execute(self.forward, self.records, x)
        return self.result

    def predict(self, x):
        # The most likely class of one input; for a regression the outputs in real units.
        y = self.output(x)
        if not self.labelled:
            return [((q ^ 128) - 128 - self.output_zero) * self.output_scale for q in y]
        best = 0
        for i in range(1, self.classes):
            # bytes of int8: flipping the sign bit puts them in order
            if y[i] ^ 128 > y[best] ^ 128:
                best = i
        return best

    def features(self, x, cut="features"):
        # The activations at a named cut, as a view that the next call overwrites.
        from .reading import features

        return features(self, x, cut)

    def execute(self, program, count, x):
        # int8 codes (any dense buffer of input_bytes single bytes) run in place; anything else is quantised first.
        table = self.table
        if len(x) == self.input_bytes and not isinstance(x, _SEQUENCES):
            table[_BUF_INPUT] = x
            code = self.executor.run(program, table, 0, count)
            if code >= 0:
                return
            if code != _E_BUFFER:
                self.fail(code)
        table[_BUF_INPUT] = self.quantise(x)
        code = self.executor.run(program, table, 0, count)
        if code < 0:
            self.fail(code)

    def fail(self, code):
        from .faults import EXECUTOR, refuse

        refuse("executor", self.name, EXECUTOR[code])

    def quantise(self, x):
        # Real numbers to int8 codes of the input, into one buffer that is reused.
        if self.quantised is None:
            self.quantised = bytearray(self.input_bytes)
        _quantise(x, self.quantised, self.input_scale, self.input_zero, "input")
        return self.quantised

    def quantise_target(self, target):
        out = bytearray(self.target_bytes)
        _quantise(target, out, self.output_scale, self.output_zero, "target")
        return out

    def close(self):
        # Lets go of the plan's file where its weights are streamed.
        if self.streamed:
            self.streamed.close()

    def counters(self):
        # Steps, loss of the last one, gradient mantissas cut off, weights at the end of their range, steps skipped.
        fields = struct.unpack_from("<IIHhIIIi", self.state, 0)
        return fields[1], fields[7], fields[4], fields[5], fields[6]

    def reset(self):
        # Back to the base and the plan's first state.
        from .checkpoint import load_base

        load_base(self)
        self.state[:] = self.first_state

    def save(self, path):
        from .checkpoint import save

        save(self, path)

    def restore(self, path):
        from .checkpoint import restore

        restore(self, path)

    def update(self, num_samples):
        from .update import make

        return make(self, num_samples)

    def apply(self, update):
        from .update import apply

        apply(self, update)


def _quantise(x, out, scale, zero, what):
    if hasattr(x, "flatten"):
        x = x.flatten()
    if len(x) != len(out):
        from .faults import refuse

        refuse("numbers", what, len(x), len(out))
    for i in range(len(out)):
        v = x[i] / scale
        q = int(v + 0.5 if v >= 0 else v - 0.5) + zero
        out[i] = (-128 if q < -128 else 127 if q > 127 else q) & 255
