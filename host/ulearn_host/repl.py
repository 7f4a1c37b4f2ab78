"""A board's raw REPL on a port that stays open, with a limit on every wait.

mpremote closes the port after each command and waits for as long as a board takes. Where many ports are asked at once,
or bytes go to and fro with a program that runs on the board, that does not do; for files, it does (deploy.py).
"""

from __future__ import annotations

import contextlib
import os
import time
from types import TracebackType
from typing import Self

import serial

from ulearn_host.link import BoardError, LinkError, open_port

_BANNER = b"raw REPL; CTRL-B to exit\r\n>"
_AGAIN_S = 1.0
_QUIET_S = 0.1
_CHUNK_BYTES = 256  # without flow control, as many as an ESP32's console holds
_CHUNK_S = 0.01


class RawRepl:
    """A session with the raw REPL; entering it interrupts the program that runs on the board.

    Attributes:
        port: its name.
        interrupted: whether a program was running.
    """

    def __init__(self, port: serial.Serial, timeout_s: float) -> None:
        """Take over an open port; `open` is the usual way. timeout_s: the most that one answer may take."""
        self.port = str(port.port)
        self.timeout_s = timeout_s
        self.interrupted = False
        self._serial = port
        self._kept = b""  # read, but not yet asked for

    @classmethod
    def open(cls, port: str, timeout_s: float = 10.0, baudrate: int = 115200) -> Self:
        """Open a port and enter the raw REPL on it. Raises LinkError when it cannot be opened or nobody answers."""
        repl = cls(open_port(port, baudrate), timeout_s)
        try:
            repl.enter()
        except BaseException:
            repl.close()
            raise
        return repl

    def enter(self) -> None:
        """Interrupt what runs and enter the raw REPL. Raises LinkError when nobody answers in time."""
        until = time.monotonic() + self.timeout_s
        heard = b""
        tries = 0
        while (left := until - time.monotonic()) > 0:
            tries += 1
            self.write(b"\r\x03\x03")
            heard += self._quiet(min(_QUIET_S, left))
            self.write(b"\r\x01")
            again = min(until, time.monotonic() + _AGAIN_S)
            while (left := again - time.monotonic()) > 0 and _BANNER not in heard:
                heard += self.read(left)
            if _BANNER in heard:
                self.interrupted = b"KeyboardInterrupt" in heard
                if tries > 1:
                    self._quiet(_QUIET_S)  # every try is answered once
                return
        raise LinkError(f"{self.port}: no MicroPython prompt answers within {self.timeout_s:g} s")

    def soft_reset(self) -> None:
        """Begin anew with an empty heap; main.py is not run, boot.py is."""
        self.write(b"\x04")
        self._until(b"soft reboot\r\n", self.timeout_s)
        self._until(_BANNER, self.timeout_s)

    def run(self, code: str, timeout_s: float | None = None) -> str:
        """Execute code and return what it prints. Raises BoardError with the last line of the board's traceback."""
        self.begin(code)
        return self.finish(timeout_s)

    def begin(self, code: str) -> None:
        """Start code; `read` and `write` then speak to it, `finish` waits for its end."""
        data = code.encode()
        self.write(b"\x05A\x01")
        answer = self._exactly(2)
        if answer == b"R\x01":
            self._paste(data)
            return
        if answer != b"R\x00":  # older firmware took it for code
            self._until(_BANNER, self.timeout_s)
        for at in range(0, len(data), _CHUNK_BYTES):
            self.write(data[at : at + _CHUNK_BYTES])
            time.sleep(_CHUNK_S)
        self.write(b"\x04")
        self._until(b"OK", self.timeout_s)

    def finish(self, timeout_s: float | None = None) -> str:
        """Wait for the end of what `begin` started, and return what it printed."""
        wait_s = self.timeout_s if timeout_s is None else timeout_s
        printed = self._until(b"\x04", wait_s)
        fault = self._until(b"\x04", wait_s).decode(errors="replace").strip()
        self._until(b">", wait_s)
        if fault:
            raise BoardError(f"{self.port}: {fault.splitlines()[-1].strip()}")
        return printed.decode(errors="replace")

    def _paste(self, data: bytes) -> None:
        # Raw paste: the board says how much it takes.
        window = int.from_bytes(self._exactly(2), "little")
        room = window
        while data:
            while not room or self._kept or self._serial.in_waiting:
                sign = self._exactly(1)
                if sign != b"\x01":
                    self.write(b"\x04")
                    raise LinkError(f"{self.port}: the board broke off while it was sent a program")
                room += window
            self.write(data[:room])
            data, room = data[room:], room - min(room, len(data))
        self.write(b"\x04")
        self._until(b"\x04", self.timeout_s)

    # Bytes.

    def write(self, data: bytes) -> None:
        """Send bytes as they are."""
        try:
            self._serial.write(data)
        except serial.SerialTimeoutException as fault:
            raise LinkError(f"{self.port}: the board takes no bytes any more") from fault
        except (OSError, TypeError) as fault:  # TypeError: the port was closed under it
            raise self._gone(fault) from fault

    def read(self, timeout_s: float) -> bytes:
        """What is there; if nothing is, what comes first within the time."""
        if self._kept:
            kept, self._kept = self._kept, b""
            return kept
        try:
            self._serial.timeout = max(timeout_s, 0)
            return bytes(self._serial.read(min(self._serial.in_waiting or 1, 4096)))
        except (OSError, TypeError) as fault:
            raise self._gone(fault) from fault

    def _quiet(self, timeout_s: float) -> bytes:
        # All that comes until nothing has come for so long, or for ten times as long in all.
        heard = b""
        until = time.monotonic() + 10 * timeout_s
        while time.monotonic() < until and (piece := self.read(timeout_s)):
            heard += piece
        return heard

    def _until(self, ending: bytes, timeout_s: float) -> bytes:
        text = b""
        until = time.monotonic() + timeout_s
        while ending not in text:
            left = until - time.monotonic()
            piece = self.read(left) if left > 0 else b""
            if not piece and left <= 0:
                last = text.decode(errors="replace").strip()[-80:]
                said = f"; its last words: {last}" if last else ""
                raise LinkError(f"{self.port}: the board did not answer for {timeout_s:g} s{said}")
            text += piece
        text, _, self._kept = text.partition(ending)
        return text

    def _exactly(self, size: int) -> bytes:
        data = b""
        until = time.monotonic() + self.timeout_s
        while len(data) < size:
            left = until - time.monotonic()
            if left <= 0:
                raise LinkError(f"{self.port}: the board did not answer for {self.timeout_s:g} s")
            data += self.read(left)
        data, self._kept = data[:size], data[size:]
        return data

    def _gone(self, fault: Exception) -> LinkError:
        self._serial.close()
        number = getattr(fault, "errno", None)
        return LinkError(f"{self.port}: the port is gone: {os.strerror(number) if number else fault}")

    def close(self) -> None:
        """Leave the raw REPL for the friendly one, and close the port."""
        if self._serial.is_open:
            with contextlib.suppress(LinkError):
                self.write(b"\r\x02")
            self._serial.close()

    def __enter__(self) -> Self:
        """Return the session itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the raw REPL, close the port."""
        self.close()
