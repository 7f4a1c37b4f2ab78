# The board's half of the protocol: answers a host's requests on the line the REPL uses.
#
#   import ulearn.agent
#   ulearn.agent.serve()         # until the host says STOP, or Ctrl-C while no host talks
#
#   agent = ulearn.Agent(model)  # or inside a loop of your own, prints welcome
#   while True:
#       ...
#       agent.poll()
#
# Every request has one reply with the same sequence number. A request that comes again gets its reply again and is
# not carried out twice; one that comes too early (the one before was lost) gets a NAK with the number that is due.
# So the board keeps replies: the last four small ones, and one large one. The host never leaves more unanswered.
import gc
import select
import struct
import sys
import time
from binascii import crc32

from .compat import const
from .frames import Decoder, encode

# Requests 0x2_ have small replies, requests 0x3_ large ones. A reply is its request's number with the top bit set.
_LOAD = const(0x20)
_DATA_RESET = const(0x21)
_DATA_ADD = const(0x22)
_SCORE = const(0x23)
_TRAIN = const(0x24)
_UPDATE_PUT = const(0x25)
_UPDATE_COMMIT = const(0x26)
_CHECKPOINT = const(0x27)
_RESTORE = const(0x28)
_STOP = const(0x29)
_RESET = const(0x2A)
_FILE = const(0x2B)
_FILE_COMMIT = const(0x2C)
_TASK = const(0x2D)
_FACTS = const(0x2E)
_HELLO = const(0x30)  # no control character: a HELLO may reach a REPL
_INFO = const(0x31)
_PREDICT = const(0x32)
_OUTPUT = const(0x33)
_UPDATE_GET = const(0x34)
_BLOB_GET = const(0x35)
_ANSWER_GET = const(0x36)
_LARGE = const(0x10)
_REPLY = const(0x80)
_ERROR = const(0x60)
_PROGRESS = const(0x61)
_NAK = const(0x62)

_PROTOCOL = const(1)
_WINDOW = const(4)  # requests that may be unanswered; a power of two
_SMALL_BYTES = const(176)  # payload of a small reply, an error sentence included
_BUFFER_BYTES = const(2048)
_MIN_BUFFER_BYTES = const(512)
_PAYLOAD_OFFSET = const(12)
_FRAME_BYTES = const(16)
_BLOCK_BYTES = const(64)  # read at once; a board's read blocks until all are there
_SILENCE_MS = const(150)  # in the middle of a frame: the rest was lost
_IDLE_MS = const(10000)  # between frames: Ctrl-C works again
_PROGRESS_MS = const(100)
_TICKS_MASK = const(0x3FFFFFFF)
_UPDATE_SLACK_BYTES = const(1024)  # header and coding of an update, beyond twice the weights

_ticks_ms = getattr(time, "ticks_ms", None) or (lambda: int(time.monotonic() * 1000))
_default = None


class _Abandoned(Exception):
    # A new host has come while an old host's request was being carried out.
    pass


class Agent:
    """Answers a host with `model` and the samples it was sent. `serve()` stays until STOP, `poll()` returns at once
    and `stopped` says whether a STOP has come.

    `buffer_bytes` bounds what the host may send; half of it is the largest frame. `credit` is how many bytes may
    arrive while the board is busy: less than that where the hardware holds less (an ESP32's console holds 260).
    """

    def __init__(self, model=None, stream_in=None, stream_out=None, buffer_bytes=_BUFFER_BYTES, credit=None):
        if not _MIN_BUFFER_BYTES <= buffer_bytes <= 65535:
            raise ValueError("buffer of %d bytes, expected %d to 65535" % (buffer_bytes, _MIN_BUFFER_BYTES))
        self.model = model
        self.samples = self.held_out = None
        self.buffer_bytes = buffer_bytes
        self.credit = credit or (256 if sys.platform.startswith("esp") else buffer_bytes)
        self.max_payload = buffer_bytes // 2 - _FRAME_BYTES
        self._in = _raw(stream_in or sys.stdin)
        self._out = _raw(stream_out or sys.stdout)
        poller = select.poll()
        poller.register(stream_in or sys.stdin, select.POLLIN)
        self._events = getattr(poller, "ipoll", poller.poll)  # ipoll allocates nothing
        # CPython's raw streams return what is there; MicroPython's block until the buffer is full.
        self._blocks = sys.implementation.name == "micropython"
        self._decoder = Decoder(buffer_bytes)
        self._decoder.max_payload = self.max_payload
        self._replies = [memoryview(bytearray(_SMALL_BYTES + _FRAME_BYTES)) for _ in range(_WINDOW)]
        self._replies.append(memoryview(bytearray(buffer_bytes // 2)))
        self._note = memoryview(bytearray(_FRAME_BYTES + 8))
        self._done = [None] * (_WINDOW + 1)  # (sequence, bytes of the frame) of each kept reply
        self._session = 0  # none
        self._due = 0  # the next sequence number
        self._sequence = 0
        self._held = False
        self._broken = 0
        self._heard = self._told = _ticks_ms()
        self._interruptible = True
        self.stopped = False
        self._update = self._answer = self._incoming = self._file = None
        self._held_out = False  # where samples that come belong
        self._received = 0

    def serve(self):
        """Answer requests until the host says STOP, the line is closed, or Ctrl-C comes while no host talks."""
        self.stopped = False
        try:
            while not self.stopped:
                if self._frame(True):
                    self._handle()
        except (EOFError, OSError):
            pass  # the line is gone; what a request does wrong never gets here
        finally:
            self._session = 0
            self._allow_interrupt(True)

    def poll(self):
        """Take in what has arrived and answer one request, if one is complete; True if so. Does not wait."""
        if not self._frame(False):
            return False
        self._handle()
        return True

    def close(self):
        """End the session and let Ctrl-C through, after a loop of `poll()`."""
        self._session = 0
        self._allow_interrupt(True)

    # From bytes to requests.

    def _frame(self, wait):
        # The next frame in the decoder, or False; without `wait` only what has arrived counts.
        decoder = self._decoder
        if self._held:
            self._held = False
            return True
        while not decoder.next():
            if decoder.broken != self._broken:
                self._broken = decoder.broken
                self._nak()
            partial = decoder.partial()
            if self._ready((_SILENCE_MS if partial else _IDLE_MS) if wait else 0):
                self._read(decoder, wait)
                continue
            silent = (_ticks_ms() - self._heard) & _TICKS_MASK
            if partial and silent >= _SILENCE_MS:
                decoder.resync()
                self._nak()
            elif silent >= _IDLE_MS:
                self._allow_interrupt(True)
            if not wait:
                return False
        return True

    def _ready(self, timeout_ms):
        for _ in self._events(timeout_ms):
            return True
        return False

    def _read(self, decoder, wait):
        space = decoder.space()
        if self._blocks:
            # All that a frame still needs may be waited for, in blocks so small that a lost rest is noticed; byte by
            # byte where waiting is forbidden.
            space = space[: min(decoder.missing(), _BLOCK_BYTES) if wait else 1]
        n = self._in.readinto(space)
        if not n:
            raise EOFError("the line is closed")
        decoder.filled(n)
        self._heard = _ticks_ms()

    def _handle(self):
        decoder = self._decoder
        kind, session, sequence = decoder.kind, decoder.session, decoder.sequence
        if kind == _HELLO and session:
            self._hello(session)
            return
        if session != self._session or not session or kind >= _ERROR:
            return  # of an older host, or our own echo
        self._allow_interrupt(False)
        behind = (self._due - sequence) & 0xFFFF
        if behind == 0:
            self._execute(kind, sequence, decoder.payload)
        elif behind < 0x8000:
            for i in (sequence & (_WINDOW - 1), _WINDOW):
                if self._done[i] and self._done[i][0] == sequence:
                    self._send(self._replies[i], self._done[i][1])
        else:
            self._nak()

    def _execute(self, kind, sequence, payload):
        self._due = (sequence + 1) & 0xFFFF
        self._sequence = sequence
        self._told = _ticks_ms()
        index = _WINDOW if kind & _LARGE else sequence & (_WINDOW - 1)
        frame = self._replies[index]
        self._done[index] = None
        try:
            handler = _HANDLERS.get(kind)
            if not handler:
                raise ValueError("request 0x%02x is unknown to this board's ulearn; deploy it anew" % kind)
            length = handler(self, payload, frame[_PAYLOAD_OFFSET:])
            reply = kind | _REPLY
        except _Abandoned:
            return
        except Exception as e:  # the host is told, and the board goes on serving
            text = _sentence(e)[:_SMALL_BYTES]
            length = len(text)
            frame[_PAYLOAD_OFFSET : _PAYLOAD_OFFSET + length] = text
            reply = _ERROR
        size = encode(frame, reply, self._session, sequence, length)
        self._done[index] = (sequence, size)
        self._send(frame, size)
        self._heard = _ticks_ms()  # long work is no silence
        if kind == _STOP:
            self.close()

    def _send(self, frame, size):
        view = frame[:size]
        while len(view):
            n = self._out.write(view)
            if not n:
                return  # nobody takes it; the host will ask again
            view = view[n:]

    def _nak(self):
        if self._session:
            self._send(self._note, encode(self._note, _NAK, self._session, self._due, 0))

    def _tell(self, done, total):
        # A sign of life during long work; True when it was time for one.
        now = _ticks_ms()
        if (now - self._told) & _TICKS_MASK < _PROGRESS_MS:
            return False
        self._told = now
        struct.pack_into("<II", self._note, _PAYLOAD_OFFSET, done, total)
        self._send(self._note, encode(self._note, _PROGRESS, self._session, self._sequence, 8))
        return True

    def _training(self, done, total):
        # Between two steps: the line is emptied, and a new host ends the training of one that is gone.
        if not self._tell(done, total):
            return
        while self._frame(False):
            # Anything else is the request in hand once more, or will come again.
            if self._decoder.kind == _HELLO and self._decoder.session != self._session:
                self._held = True
                raise _Abandoned

    def _allow_interrupt(self, on):
        # A Ctrl-C among a session's bytes is data.
        if on != self._interruptible:
            self._interruptible = on
            try:
                from micropython import kbd_intr
            except ImportError:
                return
            kbd_intr(3 if on else -1)

    # Requests. Each handler writes its reply into `out` and returns the reply's length.

    def _hello(self, session):
        fresh = session != self._session
        if fresh:
            self._session = session
            self._due = 1
            for i in range(_WINDOW):
                self._done[i] = None
            self._update = self._answer = self._incoming = None
            self._drop_file()
        self._done[_WINDOW] = None
        self._allow_interrupt(False)
        gc.collect()
        frame = self._replies[_WINDOW]
        out = frame[_PAYLOAD_OFFSET:]
        system = sys.implementation
        struct.pack_into(
            "<BBBBHHHHII",
            out,
            0,
            _PROTOCOL,
            fresh,
            _WINDOW,
            0,
            self.credit,
            self.max_payload,
            _IDLE_MS // 1000,
            getattr(system, "_mpy", 0) & 0xFFFF,
            *_memory(),
        )
        n = self._describe(out, 20)
        version = "%s %s" % (system.name, ".".join(str(v) for v in system.version[:3]))
        try:
            from .which import find

            name = find()
        except (ImportError, ValueError, MemoryError):  # ulearn is on its way to this board, in files; or it is full
            name = ""
        for text in (version, getattr(system, "_machine", sys.platform), name):
            text = text.encode()[:48]
            out[n] = len(text)
            out[n + 1 : n + 1 + len(text)] = text
            n += 1 + len(text)
        self._send(frame, encode(frame, _HELLO | _REPLY, session, 0, n))

    def _describe(self, out, at):
        m = self.model
        if m is None:
            out[at : at + 54] = bytes(54)
        else:
            struct.pack_into(
                "<BBHIIII",
                out,
                at,
                1,
                m.loss_kind,
                m.classes,
                m.input_bytes,
                m.target_bytes,
                len(m.train_blob),
                len(m.state),
            )
            out[at + 20 : at + 36] = m.model_id
            out[at + 36 : at + 52] = m.base_id
            struct.pack_into("<H", out, at + 52, m.training is not None)
        return at + 54

    def _load(self, payload, out):
        # A plan that is refused leaves the loaded one; an empty path unloads, where there is no room for two.
        path = _text(payload)
        if path:
            from .model import load

            gc.collect()
            model = _file(load, path)
            model.base_id  # what may fail, fails before anything changes
        else:
            model = None
        if self.model is not None:
            self.model.close()
        self.model = model
        self.samples = self.held_out = self._update = self._answer = self._incoming = None
        gc.collect()
        return self._describe(out, 0)

    def _info(self, payload, out):
        steps, loss, saturated, clipped, skipped = self.model.counters() if self.model else (0, 0, 0, 0, 0)
        gc.collect()
        struct.pack_into("<IiIIIIIHH", out, 0, steps, loss, saturated, clipped, skipped, *_memory(), *self._data())
        return self._describe(out, 32)

    def _data_reset(self, payload, out):
        # Of the samples to learn from; with another byte, not 0, of those held out.
        self._held_out = len(payload) == 3 and payload[2] != 0
        capacity = _fields("<H", payload[:2] if len(payload) == 3 else payload)[0]
        self._keep(None)  # there may not be room for both
        gc.collect()
        if capacity:
            from .samples import Samples

            self._keep(Samples(self._loaded(), capacity))
        struct.pack_into("<HH", out, 0, *_counts(self._coming()))
        return 4

    def _data_add(self, payload, out):
        samples = self._coming()
        if samples is None:
            raise ValueError("there is no room for samples; reset the data with a capacity first")
        for _, target in self._labelled(payload):
            self._check(target)
        for x, target in self._labelled(payload):
            samples.add(x, target)
        struct.pack_into("<HH", out, 0, *_counts(samples))
        return 4

    def _predict(self, payload, out):
        m = self._loaded()
        if not m.labelled:
            raise ValueError("%s has no classes to predict; ask for its output" % m.name)
        n = self._room(payload, m.input_bytes, 2)
        for i in range(n):
            struct.pack_into("<H", out, 2 * i, m.predict(payload[i * m.input_bytes : (i + 1) * m.input_bytes]))
            self._tell(i, n)
        return 2 * n

    def _output(self, payload, out):
        m = self._loaded()
        size = m.classes
        n = self._room(payload, m.input_bytes, size)
        for i in range(n):
            out[i * size : (i + 1) * size] = m.output(payload[i * m.input_bytes : (i + 1) * m.input_bytes])
            self._tell(i, n)
        return size * n

    def _score(self, payload, out):
        # Labelled samples: how many, how many right; for vectors the sum of squared differences.
        m = self._loaded()
        n = right = loss = 0
        for _, target in self._labelled(payload):
            self._check(target)
        for x, target in self._labelled(payload):
            if m.labelled:
                right += m.predict(x) == target
            else:
                y = m.output(x)
                for i in range(m.target_bytes):
                    d = (y[i] ^ 128) - (target[i] ^ 128)
                    loss += d * d
            n += 1
            self._tell(n, 0)
        struct.pack_into("<HHI", out, 0, n, right, loss)
        return 8

    def _train(self, payload, out):
        epochs, mantissa, exponent, seed, skip = _fields("<HHhIH", payload)
        if mantissa and not 1024 <= mantissa <= 2047 or not -64 <= exponent <= 16:
            raise ValueError("learning rate %d * 2^%d, expected a mantissa of 1024 to 2047" % (mantissa, exponent))
        model = self._loaded()
        if not epochs or not self._data()[0]:
            raise ValueError("%d epochs over %d samples is no training" % (epochs, self._data()[0]))
        from .trainer import Trainer

        trainer = Trainer(model, 0, seed, skip / 65536)
        trainer.set_rate(mantissa, exponent)
        self._update = None
        trainer.fit(self.samples, epochs, self._training)
        struct.pack_into("<IiIII", out, 0, *self.model.counters())
        return 20

    def _update_get(self, payload, out):
        offset, length, samples = _fields("<IHI", payload)
        if offset == 0:
            self._update = None
            gc.collect()
            self._update = self._loaded().update(samples or self._data()[0])
        elif self._update is None:
            raise ValueError("there is no update to go on with; ask for its start first")
        return _chunk(self._update, offset, length, out)

    def _update_put(self, payload, out):
        if len(payload) < 8:
            raise ValueError("a piece of an update has %d bytes, expected more than 8" % len(payload))
        offset, total = struct.unpack_from("<II", payload)
        piece = payload[8:]
        if offset == 0:
            limit = 2 * len(self._loaded().train_blob) + _UPDATE_SLACK_BYTES
            if total > limit:
                raise ValueError("update of %d bytes, expected at most %d" % (total, limit))
            self._incoming = self._update = self._answer = None
            gc.collect()
            self._incoming = bytearray(total)
            self._received = 0
        if self._incoming is None or offset != self._received or offset + len(piece) > len(self._incoming):
            raise ValueError("a piece of an update at %d, expected it at %d" % (offset, self._received))
        self._incoming[offset : offset + len(piece)] = piece
        self._received += len(piece)
        return 0

    def _update_commit(self, payload, out):
        # An update, or the base's whole blob where its id comes with it.
        total, checksum = _fields("<II", payload[:8])
        base_id = payload[8:]
        data = self._incoming
        self._incoming = None
        if data is None or self._received != total or len(data) != total:
            raise ValueError("%d bytes of the update are here, expected %d" % (self._received if data else 0, total))
        if crc32(data) != checksum:
            raise ValueError("the update was damaged on its way: its checksum does not match")
        self._update = self._answer = None
        if base_id:
            from .task import replace

            replace(self._loaded(), data, bytes(base_id))
        else:
            self._loaded().apply(data)
        out[:16] = self.model.base_id
        return 16

    def _blob_get(self, payload, out):
        which, offset, length = _fields("<BIH", payload)
        if which > 1:
            raise ValueError("blob %d, expected 0 for weights or 1 for state" % which)
        model = self._loaded()
        return _chunk(model.state if which else model.train_blob, offset, length, out)

    def _checkpoint(self, payload, out):
        _file(self._loaded().save, _text(payload))
        return 0

    def _restore(self, payload, out):
        _file(self._loaded().restore, _text(payload))
        self._update = None
        return 0

    def _reset(self, payload, out):
        # Weights to the base, STATE to the plan's first: what is trained next depends on base, data and seed alone.
        self._loaded().reset()
        self._update = None
        return 0

    def _carry_out(self, payload, out):
        # What a fleet's host asks of its members, on any line; the answer is fetched in pieces.
        from .task import carry_out, parse

        task = parse(payload)
        self._update = self._answer = None
        gc.collect()
        self._answer = carry_out(self._loaded(), self.samples, task, self.held_out, self._training)
        struct.pack_into("<I", out, 0, len(self._answer))
        return 4

    def _facts(self, payload, out):
        from .task import facts

        step_us, link = _fields("<II", payload)
        self._update = self._answer = None
        self._answer = facts(self._loaded(), self.samples, self.held_out, step_us, link)
        struct.pack_into("<I", out, 0, len(self._answer))
        return 4

    def _answer_get(self, payload, out):
        offset, length = _fields("<IH", payload)
        if self._answer is None:
            raise ValueError("there is no answer to fetch; give the task again")
        return _chunk(self._answer, offset, length, out)

    def _take_file(self, payload, out):
        from .files import take

        self._file = take(self._file, payload)
        return 0

    def _drop_file(self):
        if self._file:
            self._file.close()
        self._file = None

    def _commit_file(self, payload, out):
        if self._file is None or len(payload) != 32:
            raise ValueError("there is no file to commit, or its checksum has %d bytes, expected 32" % len(payload))
        incoming, self._file = self._file, None
        incoming.commit(payload, self._replies[_WINDOW][_PAYLOAD_OFFSET:])
        self._done[_WINDOW] = None  # that reply's room was used
        return 0

    def _stop_serving(self, payload, out):
        self.stopped = True
        return 0

    # What handlers share.

    def _loaded(self):
        if self.model is None:
            raise ValueError("no model is loaded")
        return self.model

    def _data(self):
        return _counts(self.samples)

    def _coming(self):
        return self.held_out if self._held_out else self.samples

    def _keep(self, samples):
        if self._held_out:
            self.held_out = samples
        else:
            self.samples = samples

    def _check(self, target):
        if self.model.labelled and target >= self.model.classes:
            raise ValueError("label %d, expected 0 to %d" % (target, self.model.classes - 1))

    def _room(self, payload, size, reply_size):
        # How many inputs the payload holds.
        n = len(payload) // size
        if not n or n * size != len(payload):
            raise ValueError("inputs have %d bytes, expected a multiple of %d" % (len(payload), size))
        if n * reply_size > self.max_payload:
            raise ValueError("the answers take %d bytes, expected at most %d" % (n * reply_size, self.max_payload))
        return n

    def _labelled(self, payload):
        # (x, target) of every sample in the payload, as views.
        m = self._loaded()
        t = m.target_bytes
        size = t + m.input_bytes
        if not len(payload) or len(payload) % size:
            raise ValueError("samples have %d bytes, expected a multiple of %d" % (len(payload), size))
        for at in range(0, len(payload), size):
            target = payload[at : at + t]
            if m.labelled:
                target = target[0] | target[1] << 8
            yield payload[at + t : at + size], target


_HANDLERS = {
    _LOAD: Agent._load,
    _DATA_RESET: Agent._data_reset,
    _DATA_ADD: Agent._data_add,
    _SCORE: Agent._score,
    _TRAIN: Agent._train,
    _UPDATE_PUT: Agent._update_put,
    _UPDATE_COMMIT: Agent._update_commit,
    _CHECKPOINT: Agent._checkpoint,
    _RESTORE: Agent._restore,
    _STOP: Agent._stop_serving,
    _RESET: Agent._reset,
    _FILE: Agent._take_file,
    _FILE_COMMIT: Agent._commit_file,
    _TASK: Agent._carry_out,
    _FACTS: Agent._facts,
    _ANSWER_GET: Agent._answer_get,
    _INFO: Agent._info,
    _PREDICT: Agent._predict,
    _OUTPUT: Agent._output,
    _UPDATE_GET: Agent._update_get,
    _BLOB_GET: Agent._blob_get,
}


def serve(buffer_bytes=_BUFFER_BYTES):
    """Serve with the module's own agent, which keeps its model and data from one call to the next."""
    global _default
    if _default is None or _default.buffer_bytes < buffer_bytes:
        agent = Agent(buffer_bytes=buffer_bytes)
        if _default:
            agent.model, agent.samples = _default.model, _default.samples
        _default = agent
    _default.serve()


def poll():
    """Call this often in a loop of your own; the module's own agent answers what has arrived."""
    global _default
    if _default is None:
        _default = Agent()
    return _default.poll()


def _raw(stream):
    # Below text and buffering: bytes, as they are.
    stream = getattr(stream, "buffer", stream)
    return getattr(stream, "raw", stream)


def _counts(samples):
    return (0, 0) if samples is None else (len(samples), samples.capacity)


def _memory():
    # CPython's gc does not count bytes.
    return (gc.mem_free(), gc.mem_alloc()) if hasattr(gc, "mem_free") else (0, 0)


def _fields(layout, payload):
    if len(payload) != struct.calcsize(layout):
        raise ValueError("the request has %d bytes, expected %d" % (len(payload), struct.calcsize(layout)))
    return struct.unpack(layout, payload)


def _text(payload):
    return str(bytes(payload), "utf-8")


def _file(do, path):
    # MicroPython's OSError does not say which file.
    try:
        return do(path)
    except OSError as e:
        raise ValueError("%s: %s" % (path, e))


def _chunk(data, offset, length, out):
    # The size of the whole, then a piece of it.
    if offset > len(data):
        raise ValueError("a piece at %d of %d bytes was asked for" % (offset, len(data)))
    length = min(length, len(data) - offset, len(out) - 8)
    struct.pack_into("<I", out, 0, len(data))
    out[4 : 4 + length] = memoryview(data)[offset : offset + length]
    return 4 + length


def _sentence(error):
    text = str(error)
    if not isinstance(error, ValueError):
        text = type(error).__name__ + (": " + text if text else "")
    return text.encode()
