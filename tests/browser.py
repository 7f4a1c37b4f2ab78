"""A headless browser for tests: Debian's Chromium, spoken to over a pair of pipes by its DevTools protocol."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PACKAGE = "chromium-headless-shell"


def find() -> str | None:
    """The browser's path, or None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One page of the browser. faults: what it complained about: exceptions, refused resources, console errors;
    asked: the addresses of everything it fetched."""

    def __init__(self, process: subprocess.Popen[bytes], into: int, out: int) -> None:
        """Open an empty page over the pipes of a started browser."""
        self._process, self._into, self._out = process, into, out
        self._rest, self._number, self._session = b"", 0, None
        self.faults: list[str] = []
        self.asked: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol, and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(60)
            if answer is None:
                raise TimeoutError(f"the browser does not answer {method}")
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _next(self, seconds: float) -> dict[str, Any] | None:
        """The next message, noted if it is an event; None after so long without one."""
        end = time.monotonic() + seconds
        while b"\0" not in self._rest:
            if not select.select([self._out], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            data = os.read(self._out, 1 << 20)
            if not data:
                raise EOFError(f"the browser has ended with {self._process.wait()}")
            self._rest += data
        one, self._rest = self._rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(one)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.faults.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.faults.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.faults.append(str([argument.get("value") for argument in params["args"]]))
        elif method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])

    def open(self, url: str) -> None:
        """Go to an address, and wait until the page has loaded."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def value(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']['exception'].get('description')}")
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 15) -> Any:
        """The value of an expression once it is true. Raises TimeoutError with what the page looks like."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = self.value(script)
            if value:
                return value
            self._next(0.05)
        text = self.value("document.body.innerText")
        raise TimeoutError(f"not within {seconds} s: {script}; the page says: {text}; faults: {self.faults}")

    def size(self, width: int, height: int, dark: bool = False) -> None:
        """Another window, and which colours its owner prefers."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path, whole: bool = True) -> None:
        """The page as PNG: the whole one, or what the window shows of it."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def key(self, name: str) -> None:
        """A key pressed and let go."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name)


@contextmanager
def started(program: str) -> Iterator[Tab]:
    """A browser with nothing remembered and nothing kept."""
    # Descriptors 3 and 4 are the browser's ends; above 9, so that putting them there overwrites neither.
    commands, into = os.pipe()
    out, answers = os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]
    os.close(commands)
    os.close(answers)
    with TemporaryDirectory(prefix="ulearn-browser-", ignore_cleanup_errors=True) as folder:
        options = ["--headless", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        options += ["--disable-dev-shm-usage"]
        options += [f"--user-data-dir={folder}", "--disable-background-networking", "--disable-component-update"]
        if os.geteuid() == 0:  # Chromium's sandbox refuses root
            options.append("--no-sandbox")
        pipes = f'exec "$0" "$@" 3<&{ends[0]} 4>&{ends[1]}'
        process = subprocess.Popen(
            ["bash", "-c", pipes, program, *options, "about:blank"], pass_fds=ends, stderr=subprocess.DEVNULL
        )
        for end in ends:
            os.close(end)
        try:
            yield Tab(process, into, out)
        finally:
            os.close(into)
            os.close(out)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
