# An executor whose frozen weights stay in the file: before each record its part of FROZEN is read into one window.
from .compat import const

_BUF_STATE = const(4)
_BUF_FROZEN = const(6)
_S_FLAGS = const(30)
_STATE_NOTHING_TO_LEARN = const(1)
_PROGRAM_BYTES = const(64)
_RECORD_BYTES = const(64)
_OP_DENSE_BACK = const(5)
_OP_UPDATE_BIAS = const(7)
_OP_CONV_BACK = const(32)
_R_FLAGS = const(2)
_FLAG_AGAIN = const(64)


class Streamed:
    def __init__(self, run, path, offset, programs, windows):
        # `offset`: of FROZEN in the file. `windows`: for each program from, to, from, to, ... by record.
        self.inner, self.path, self.offset = run, path, offset
        self.programs, self.windows = programs, windows
        sizes = [w[i + 1] - w[i] for w in windows for i in range(0, len(w), 2)]
        self.window = memoryview(bytearray(max(sizes)))
        self.file = None

    def run(self, program, table, first, count, index=-1, base=None):
        # As the executor's own. The file stays open, so that a step allocates nothing.
        self.open()
        i = 0
        while self.programs[i] is not program:
            i += 1
        windows, state = self.windows[i], table[_BUF_STATE]
        table[_BUF_FROZEN] = self.window
        for i in range(first, first + count):
            op = program[_PROGRAM_BYTES + _RECORD_BYTES * i]
            backward = op >= _OP_CONV_BACK or _OP_DENSE_BACK <= op <= _OP_UPDATE_BIAS
            backward = backward or program[_PROGRAM_BYTES + _RECORD_BYTES * i + _R_FLAGS] & _FLAG_AGAIN
            if backward and state[_S_FLAGS] & _STATE_NOTHING_TO_LEARN:
                continue
            start = windows[2 * i]
            self._read(start, windows[2 * i + 1] - start)
            code = self.inner(program, table, i, 1, index, start)
            if code < 0:
                return code
        return count

    def open(self):
        if self.file is None:
            self.file = open(self.path, "rb")

    def _read(self, start, size):
        if size > 0:
            self.file.seek(self.offset + start)
            if _readinto(self.file, self.window, size) != size:
                raise ValueError("%s: cut short while it was in use" % self.path)

    def close(self):
        # Before the file is replaced.
        if self.file is not None:
            self.file.close()
            self.file = None


try:
    memoryview.cast  # noqa: B018  # what only CPython has

    def _readinto(file, window, size):
        return file.readinto(window[:size])

except AttributeError:

    def _readinto(file, window, size):
        return file.readinto(window, size)  # no slice, so nothing is allocated
