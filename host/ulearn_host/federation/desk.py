"""Where a gateway is asked from: a socket on its own host, readable by its owner alone.

The process that asks is short-lived (Flower starts one for each message) while the gateway and its boards stay. One
request, one answer, raw bytes in the frames of multiprocessing.connection; nothing is unpickled.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from types import TracebackType

from ulearn_host.errors import UserError
from ulearn_host.federation.gateway import Gateway
from ulearn_host.federation.upward import Answer, Ask

REQUEST_LARGEST = 1 << 28
_LOOK_S = 0.05
_CLOSING_S = 2.0


class Desk:
    """Answers asks for a gateway until it is closed. A round that takes hours is waited for; whoever hangs up is
    forgotten, and may ask again."""

    def __init__(
        self, gateway: Gateway, path: Path, call: Callable[[Callable[[], bytes | None]], bytes | None]
    ) -> None:
        """call: carries a function out in the one thread that may use the gateway, and returns what it returned.

        Raises UserError where no socket can be made at `path`.
        """
        self.gateway, self.path, self._call = gateway, path, call
        path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            self._listener = Listener(str(path), "AF_UNIX")
        except OSError as fault:
            raise UserError(f"{path}: {fault}; expected a short path in a folder of yours") from None
        finally:
            os.umask(before)
        self._open = True
        self._serving: set[threading.Thread] = set()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Desk:
        """Closed at the end of a with statement."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """No more asks; who is just being answered gets it."""
        self._open = False
        self._listener.close()
        for thread in list(self._serving):
            thread.join(_CLOSING_S)

    def _accept(self) -> None:
        while self._open:
            try:
                connection = self._listener.accept()
            except OSError:
                continue  # who came has gone, or the desk was closed
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._serving.add(thread)
            thread.start()

    def _serve(self, connection: Connection) -> None:
        with connection, suppress(OSError, EOFError):  # it hung up
            self._one(connection)
        self._serving.discard(threading.current_thread())

    def _one(self, connection: Connection) -> None:
        """One request."""
        try:
            asked = Ask.unpack(connection.recv_bytes(REQUEST_LARGEST))
        except UserError as fault:
            connection.send_bytes(self._refusal(0, fault))
            return
        try:
            answer = self._call(lambda: self._begin(asked))
            while answer is None and self._open and not connection.poll(_LOOK_S):
                answer = self._call(lambda: self._answer(asked))
        except UserError as fault:
            answer = self._refusal(asked.round, fault)
        if answer is not None:
            connection.send_bytes(answer)

    def _refusal(self, turn: int, fault: UserError) -> bytes:
        return Answer(0, turn, self.gateway.name, b"", [], 0, None, reason=str(fault)).pack()

    def _begin(self, asked: Ask) -> bytes | None:
        self.gateway.ask(asked, self.gateway.clock())
        return self._answer(asked)

    def _answer(self, asked: Ask) -> bytes | None:
        answer = self.gateway.answer(asked)
        return None if answer is None else answer.pack()
