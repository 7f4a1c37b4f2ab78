import struct
from array import array

from ._executor import run as best_run
from .compat import addressof, collect, const, forget
from .plan import read

_SECTION_IO = const(1)
_SECTION_TENSORS = const(2)
_SECTION_CUTS = const(4)
_SECTION_FROZEN = const(5)
_SECTION_TRAIN = const(6)
_SECTION_STATE = const(7)
_SECTION_META = const(9)
_BUF_INPUT = const(0)
_BUF_ARENA = const(1)
_BUF_FROZEN = const(2)
_BUF_SCRATCH = const(5)
_LOSS_SOFTMAX_CE = const(1)
_P_SIZES = const(16)
_P_OUTPUT = const(44)
_P_RECORDS = const(52)
_P_KIND = const(54)
_KIND_TRAIN = const(2)
_CUT_BYTES = const(48)
_E_BUFFER = const(-1)

_SEQUENCES = (list, tuple)  # made once: a tuple in a call would be allocated at every step

_FAULTS = {
    -1: "a buffer is missing or has the wrong size",
    -2: "a buffer does not start at a multiple of 4",
    -3: "the executor does not know one of the plan's operations; update ulab_kernels",
    -4: "records outside the program were asked for",
    -5: "the label is not below the number of classes",
    -6: "a table of the plan makes this step impossible",
}


def load(source, run=None, frozen="auto"):
    # `source`: the path of a plan or the plan's bytes; raises ValueError that names the file and the fault.
    # `frozen`: where the frozen weights lie: "ram"; "stream": in the file, read record by record, to infer only;
    # "auto": in place where `source` is a buffer or a file of a ROMFS, else in RAM, else streamed.
    if frozen not in ("auto", "ram", "stream"):
        raise ValueError("frozen '%s', expected auto, ram or stream" % frozen)
    collect()
    # The frozen weights stay in the file until all else is proved: by then the verifier's code is gone again.
    model = Model(read(source, leave=(_SECTION_FROZEN,)), run or best_run, frozen)
    if isinstance(source, str):
        model.path = source
        from .safefile import candidates, exists

        if any(exists(place) for place in candidates(source + ".base")):
            from .checkpoint import adopt_base

            adopt_base(model)
    return model


class Model:
    # A plan in memory, ready to run: every buffer is made here, once.
    def __init__(self, source, run, place="auto"):
        sections = source.section
        self.name = source.name
        self.run = run
        self.path = None
        self.model_id = source.model_id
        self.tensors = sections(_SECTION_TENSORS)
        self.cuts = sections(_SECTION_CUTS)
        self.meta_place = source.offsets.get(_SECTION_META)
        self.base_place = source.offsets.get(_SECTION_TRAIN, (0, 0))[0]
        train, state, io = sections(_SECTION_TRAIN), sections(_SECTION_STATE), sections(_SECTION_IO)
        from .verify import verify

        offset, size = source.offsets.get(_SECTION_FROZEN, (0, 0))
        windows = verify(source, (io, self.tensors, self.cuts, size, train, state))
        del verify
        forget("verify")
        # The largest buffers come first and side by side: whatever is small would lie in their way.
        collect()
        self.arena, scratch = _room(source, _BUF_ARENA), _room(source, _BUF_SCRATCH)
        self.windows = None
        frozen = None
        if source.in_place:
            frozen = sections(_SECTION_FROZEN)
            frozen = bytearray(frozen) if place == "ram" else _aligned(frozen)
        elif place != "stream":
            try:
                frozen = _read_at(source.name, offset, bytearray(size))
            except MemoryError:
                if place == "ram":
                    raise
                collect()
        if frozen is None:
            # One window that is filled anew for each record: (where in the file, view of the window, where in FROZEN).
            frozen = memoryview(bytearray(max([windows[i + 1] - windows[i] for i in range(0, len(windows), 2)])))
            self.windows = [
                (offset + windows[i], frozen[: windows[i + 1] - windows[i]], windows[i])
                for i in range(0, len(windows), 2)
            ]
        self.frozen = "stream" if self.windows else "ram" if isinstance(frozen, bytearray) else "in place"
        # Read into bytearrays of our own, a file's sections are already ours; what is only viewed is copied once.
        self.base = None if isinstance(train, bytearray) else train
        self.train_blob = train if isinstance(train, bytearray) else bytearray(train)
        self.first_state = bytes(state)
        self.state = bytearray(state)
        self.base_path = None
        self._base_id = None
        fields = struct.unpack("<4Hfi4HfiHHf", io)
        self.input_shape, self.input_scale, self.input_zero = _shape(fields[:4]), fields[4], fields[5]
        self.output_shape, self.output_scale, self.output_zero = _shape(fields[6:10]), fields[10], fields[11]
        self.loss_kind, self.loss_scale = fields[12], fields[14]
        self.forward = self.training = None
        for program in source.programs:
            sizes = struct.unpack_from("<7I", program, _P_SIZES)
            self.input_bytes = sizes[_BUF_INPUT]
            program = _aligned(program)
            if program[_P_KIND] == _KIND_TRAIN:
                self.training = program
            else:
                self.forward = program
        self.records = struct.unpack_from("<H", self.forward, _P_RECORDS)[0]
        output, size = struct.unpack_from("<II", self.forward, _P_OUTPUT)
        self.classes = size
        self.target_bytes = 2 if self.loss_kind == _LOSS_SOFTMAX_CE else size
        self.label = array("H", (0,))
        at = output & 0x0FFFFFFF
        self.result = memoryview(self.arena)[at : at + size]
        self.quantised = None
        if self.windows:
            self.training = None  # it would need them all at once
        self.table = [None, self.arena, frozen, self.train_blob, self.state, scratch, self.label]

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
        import json

        offset, size = self.meta_place or (0, 0)
        if not size or not self.path:
            return {}
        with open(self.path, "rb") as f:
            f.seek(offset)
            return json.loads(f.read(size))

    def output(self, x):
        # The network's raw int8 output for one input, as a view that the next call overwrites.
        if self.windows:
            self.stream(self.records, x)
        else:
            self.execute(self.forward, self.records, x)
        return self.result

    def predict(self, x):
        # The most likely class of one input; for a regression the outputs in real units.
        y = self.output(x)
        if self.loss_kind != _LOSS_SOFTMAX_CE:
            return [(_signed(q) - self.output_zero) * self.output_scale for q in y]
        best = 0
        for i in range(1, self.classes):
            # bytes of int8: flipping the sign bit puts them in order
            if y[i] ^ 128 > y[best] ^ 128:
                best = i
        return best

    def features(self, x, cut="features"):
        # The activations at a named cut, as a view that the next call overwrites.
        record, operand, size = self._cut(cut)
        if self.windows:
            self.stream(record, x)
        else:
            self.execute(self.forward, record, x)
        at = operand & 0x0FFFFFFF
        return memoryview(self.table[operand >> 28])[at : at + size]

    def _cut(self, name):
        for at in range(0, len(self.cuts), _CUT_BYTES):
            label, _, record, operand, size = struct.unpack_from("<16sHHII", self.cuts, at)
            if label.rstrip(b"\0") == name.encode():
                return record, operand, size
        raise ValueError("%s: no cut is named '%s'" % (self.name, name))

    def stream(self, count, x):
        # The forward program record by record, each with its own part of FROZEN.
        table, codes = self.table, len(x) == self.input_bytes and not isinstance(x, _SEQUENCES)
        table[_BUF_INPUT] = x if codes else self.quantise(x)
        with open(self.path, "rb") as f:
            for i in range(count):
                place, window, base = self.windows[i]
                f.seek(place)
                if f.readinto(window) != len(window):
                    raise ValueError("%s: cut short while it was in use" % self.path)
                table[_BUF_FROZEN] = window
                code = self.run(self.forward, table, i, 1, -1, base)
                if code == _E_BUFFER and i == 0 and codes:
                    table[_BUF_INPUT] = self.quantise(x)  # wider numbers, as many as codes
                    code = self.run(self.forward, table, i, 1, -1, base)
                if code < 0:
                    self.fail(code)

    def execute(self, program, count, x):
        # int8 codes (any dense buffer of input_bytes single bytes) run in place; anything else is quantised first.
        table = self.table
        if len(x) == self.input_bytes and not isinstance(x, _SEQUENCES):
            table[_BUF_INPUT] = x
            code = self.run(program, table, 0, count)
            if code >= 0:
                return
            if code != _E_BUFFER:
                self.fail(code)
        table[_BUF_INPUT] = self.quantise(x)
        code = self.run(program, table, 0, count)
        if code < 0:
            self.fail(code)

    def fail(self, code):
        raise ValueError("%s: %s" % (self.name, _FAULTS[code]))

    def quantise(self, x):
        # Real numbers to int8 codes of the input, into one buffer that is reused.
        if self.quantised is None:
            self.quantised = bytearray(self.input_bytes)
        _quantise(_flat(x), self.quantised, self.input_scale, self.input_zero, "input")
        return self.quantised

    def quantise_target(self, target):
        out = bytearray(self.target_bytes)
        _quantise(_flat(target), out, self.output_scale, self.output_zero, "target")
        return out

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


def _room(source, buffer):
    # What the programs need of a buffer.
    return bytearray(max([struct.unpack_from("<7I", program, _P_SIZES)[buffer] for program in source.programs]))


def _read_at(path, offset, data):
    with open(path, "rb") as f:
        f.seek(offset)
        if f.readinto(data) != len(data):
            raise ValueError("%s: cut short while it was read" % path)
    return data


def _shape(numbers):
    return tuple(n for n in numbers if n)


def _signed(q):
    return q - 256 if q > 127 else q


def _aligned(data):
    # Numbers of 16 and 32 bits lie in it; a slice of a foreign buffer may start anywhere, and is copied then.
    return data if len(data) and not addressof(data) & 3 else bytearray(data)


def _flat(x):
    return x.flatten() if hasattr(x, "flatten") else x


def _quantise(x, out, scale, zero, what):
    if len(x) != len(out):
        raise ValueError("%s has %d numbers, expected %d" % (what, len(x), len(out)))
    for i in range(len(out)):
        v = x[i] / scale
        q = int(v + 0.5 if v >= 0 else v - 0.5) + zero
        out[i] = (-128 if q < -128 else 127 if q > 127 else q) & 255
