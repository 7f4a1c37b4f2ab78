# One connection to the host: TCP, TLS over it, HTTP/1.1 requests with a reply each. Sockets never block, so that every
# wait has an end and the caller is called in between. For MicroPython: CPython's sockets say "not yet" otherwise.
import select
import socket
import time

from .compat import collect, const

_SLICE_MS = const(200)  # between two calls of `idle`
_AGAIN = (11, 115, 119)  # EAGAIN, EINPROGRESS of Linux and lwIP, EINPROGRESS of ESP-IDF
_TIMED_OUT = const(110)
_BUFFER_BYTES = const(1024)
_TEXT_BYTES = const(160)


class Refused(Exception):
    # The host answered with an HTTP status that is not 200: status, its words.
    pass


class Wire:
    # `certificate`: the host's, DER; None for plain text. `name`: the one in it. `idle`: called a few times a second
    # while nothing comes. `silence_ms`: how long the host may take or send not a byte. Requests and the heads of
    # replies pass through one buffer.
    def __init__(self, host, port, certificate, name, idle, silence_ms):
        self.host, self.port, self.name, self.idle, self.silence_ms = host, port, name, idle, silence_ms
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._context = certificate and _context(certificate)
        self._socket = self._raw = self._poller = None
        self._start = self._end = 0  # of what was received and not yet read, or is to be sent
        self._left = 0  # bytes of the reply that are still to come
        self._last = False  # the host closes the connection after this reply
        self.served = False  # a reply came on this connection
        self._deadline = 0

    @property
    def open(self):
        return self._socket is not None

    def connect(self):
        # Raises OSError. Whether the certificate is the host's shows at the first request.
        self.close()
        collect()  # TLS takes its buffers in one piece
        address = socket.getaddrinfo(self.host, self.port, 0, socket.SOCK_STREAM)[0][-1]
        self._raw = self._socket = raw = socket.socket()
        self._poller = poller = select.poll()
        raw.setblocking(False)
        poller.register(raw, select.POLLOUT)
        try:
            raw.connect(address)
        except OSError as e:
            if e.errno not in _AGAIN:
                raise
            self._until(self.silence_ms)
            while not self._wait(select.POLLOUT):
                pass
        if self._context:
            poller.unregister(raw)
            self._socket = self._context.wrap_socket(raw, do_handshake_on_connect=False, server_hostname=self.name)
            poller.register(self._socket, select.POLLOUT)

    def close(self):
        for s in (self._socket, self._raw):
            if s is not None:
                try:
                    s.close()
                except OSError:
                    pass
        self._socket = self._raw = self._poller = None
        self._start = self._end = self._left = 0
        self._last = self.served = False

    def post(self, path, size):
        # Begins a request with a body of `size` bytes, for which `put` is called next.
        text = "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n" % (path, self.name, size)
        self._start = self._end = 0
        self.put(text.encode())

    def put(self, data):
        view, at = memoryview(data), 0
        while at < len(view):
            n = min(len(view) - at, _BUFFER_BYTES - self._end)
            self._buffer[self._end : self._end + n] = view[at : at + n]
            self._end += n
            at += n
            if self._end == _BUFFER_BYTES:
                self.flush()

    def flush(self):
        self._until(self.silence_ms)
        while self._start < self._end:
            n = self._socket.write(self._buffer[self._start : self._end])
            if n:
                self._start += n
                self._until(self.silence_ms)
            else:
                self._wait(select.POLLOUT)
        self._start = self._end = 0

    def reply(self, wait_ms):
        # Waits for a reply's head; returns how many bytes of body follow. Raises Refused for a status that is not 200.
        # `wait_ms`: how long the host may take to think, beyond the silence.
        body = self._head(wait_ms)
        try:
            lines = str(self._buffer[:body], "utf-8").lower().split("\r\n")
            status = int(lines[0].split(" ")[1])
            self._left = [int(line[15:]) for line in lines if line.startswith("content-length:")][0]
        except (ValueError, IndexError):
            raise OSError("what the host answers is no HTTP, or does not say how long it is")
        self._start = body
        self.served = True
        self._last = "connection: close" in lines
        if status == 200:
            return self._left
        text = bytearray(min(self._left, _TEXT_BYTES))
        self.read(memoryview(text))
        self.end()
        raise Refused(status, "".join([chr(c) if 32 <= c < 127 else "?" for c in text]))

    def read(self, view):
        # Fills the view with the reply's body.
        size = len(view)
        if size > self._left:
            raise OSError("the host's reply is too short")
        self._left -= size
        at = min(self._end - self._start, size)
        view[:at] = self._buffer[self._start : self._start + at]
        self._start += at
        while at < size:
            at += self._receive(view[at:size], 0)

    def end(self):
        # After a reply: where no other can follow on this connection, it is closed.
        if self._last or self._left:
            self.close()

    def _head(self, wait_ms):
        # Receives until an empty line ends the head; returns where the body begins.
        buffer, seen = self._buffer, 3
        self._start = self._end = 0
        while True:
            if self._end == _BUFFER_BYTES:
                raise OSError("the head of the host's reply is too long")
            self._end += self._receive(buffer[self._end :], wait_ms)
            for i in range(seen, self._end):
                if buffer[i] == 10 and buffer[i - 2] == 10:
                    return i + 1
            seen = max(seen, self._end)

    def _receive(self, view, wait_ms):
        # At least one byte; returns how many.
        self._until(self.silence_ms + wait_ms)
        while True:
            n = self._socket.readinto(view)
            if n:
                return n
            if n == 0:
                raise OSError("the host closed the connection")
            self._wait(select.POLLIN)

    def _until(self, limit_ms):
        self._deadline = time.ticks_add(time.ticks_ms(), limit_ms)

    def _wait(self, events):
        # Until the socket is ready, which is True, or a slice of time has passed.
        left = time.ticks_diff(self._deadline, time.ticks_ms())
        if left <= 0:
            raise OSError(_TIMED_OUT)
        self._poller.modify(self._socket, events)
        for _ in self._poller.ipoll(min(left, _SLICE_MS)):
            return True
        self.idle()
        return False


def _context(certificate):
    import tls

    context = tls.SSLContext(tls.PROTOCOL_TLS_CLIENT)
    context.verify_mode = tls.CERT_REQUIRED
    context.load_verify_locations(certificate)
    return context
