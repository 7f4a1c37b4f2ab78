"""A page that shows a fleet while it learns: what status() of the federation says, and nothing that changes anything.

It needs nothing from outside, holds no secret and takes no input: GET / is the page, GET /status.json what it draws.
Without a token it is for this computer alone: `listen` refuses any other address, and a request that names the host by
anything but an IP address or "localhost" is refused, since that is how another site's script would get in (DNS
rebinding). With one, `address` has it once; a cookie that is made of it takes its place.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aiohttp import web

from ulearn_host import display
from ulearn_host.errors import UserError

Status = Callable[[], Mapping[str, Any]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PAGE = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FRESH_S = 0.5  # status() is asked no more often, however many look on
MOST_POINTS = 120  # of a board's line; more than a chart can show
MOST_ROUNDS = 2000
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Snapshot:
    """A status as it goes out, and a tag that is the same while it is."""

    made: float
    body: bytes
    tag: str


def site(status: Status, token: str | None = None) -> web.Application:
    """The page as an application, to be run by itself or mounted with add_subapp.

    status is called on the event loop's thread, twice a second at most while somebody looks on; what it raises as
    UserError is told to the page. token: what a browser must show once as ?token=, or a program as a Bearer token.
    """
    app = web.Application(middlewares=[_guard(token)])
    latest: list[Snapshot] = []

    async def show_status(request: web.Request) -> web.StreamResponse:
        if not latest or time.monotonic() - latest[0].made >= FRESH_S:
            try:
                latest[:] = [snapshot(status())]
            except UserError as fault:
                return web.json_response({"error": str(fault)}, status=503)
        now = latest[0]
        if request.headers.get("If-None-Match") == now.tag:
            return web.Response(status=304, headers={"ETag": now.tag})
        answer = web.Response(body=now.body, content_type="application/json", headers={"ETag": now.tag})
        answer.enable_compression()
        return answer

    app.router.add_get("/status.json", show_status)
    for file in sorted(PAGE.iterdir()):
        if file.suffix in TYPES:
            app.router.add_get("/" if file.name == "index.html" else f"/{file.name}", _file(file))
    return app


def snapshot(status: Mapping[str, Any]) -> Snapshot:
    """What of a status goes out: long lines thinned to what a chart can show."""
    boards = [{**board, "accuracy": thinned(board["accuracy"])} for board in status["boards"]]
    job = {**status["job"], "plan": Path(status["job"]["plan"]).name}  # where it lies is nobody's business
    shown = {
        **status,
        "job": _visible(job),
        "boards": [_visible(board) for board in boards],
        "history": [_visible(row) for row in status["history"][-MOST_ROUNDS:]],
        "refused": [_visible(row) for row in status["refused"]],
    }
    body = json.dumps(shown, separators=(",", ":"), allow_nan=False).encode()
    return Snapshot(time.monotonic(), body, f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def _visible(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same with texts that only show."""
    return {key: display.visible(value) if isinstance(value, str) else value for key, value in row.items()}


def thinned(points: list[Any], most: int = MOST_POINTS) -> list[Any]:
    """At most `most` of the points, evenly taken, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _file(path: Path) -> Handler:
    """A file of the page, read once."""
    body = path.read_bytes()

    async def show(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, content_type=TYPES[path.suffix], charset="utf-8")

    return show


def _guard(token: str | None) -> Any:
    """Who may look, and the headers of every answer."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            answer = _stopped(request, token) or await handler(request)
        except web.HTTPException as fault:
            answer = web.Response(text=f"{fault.status}: {fault.reason}\n", status=fault.status)
        answer.headers.update(HEADERS)
        return answer

    return guard


def _stopped(request: web.Request, token: str | None) -> web.StreamResponse | None:
    """An answer in the page's place; None for a request that may go on."""
    if token is None:
        if _named(request.headers.get("Host", "")):
            return None
        return web.Response(text="403: open this page by the address that ulearn has printed\n", status=403)
    name, value = cookie(token)
    given = request.query.get("token")
    if given is not None and _same(given, token):
        there = web.Response(status=303, headers={"Location": request.path})
        there.set_cookie(name, value, httponly=True, samesite="Strict", secure=request.secure, path="/")
        return there
    bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
    if _same(request.cookies.get(name, ""), value) or _same(bearer, token):
        return None
    return web.Response(text="401: open this page by the address that ulearn has printed\n", status=401)


def cookie(token: str) -> tuple[str, str]:
    """Name and value of what stands for a token in a browser: they do not tell it."""
    made = hmac.new(token.encode(), b"ulearn page", hashlib.sha256).hexdigest()
    return f"ulearn-{made[:8]}", made[8:]


def _same(given: str, wanted: str) -> bool:
    """Compared in a time that tells nothing."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode())


def _named(host: str) -> bool:
    """Whether a Host header names an IP address or this computer, which no other site's name can be made to be."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return name == "localhost"
    return True


def address(host: str, port: int, token: str | None) -> str:
    """The page's address, with the token if there is one."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + (f"?token={quote(token, safe='')}" if token else "")


@asynccontextmanager
async def listen(
    status: Status, host: str = "127.0.0.1", port: int = 0, token: str | None = None
) -> AsyncIterator[str]:
    """Serve the page on a port of its own, 0 a free one, while the block runs; the value is its address.

    Raises UserError for another address than this computer's without a token, or a port that cannot be had.
    """
    if token is None and host not in ("127.0.0.1", "::1", "localhost"):
        raise UserError(f"{host}: anybody there could look at the fleet; give a token, or serve on 127.0.0.1")
    runner = web.AppRunner(site(status, token), access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as fault:
            raise UserError(f"{host}:{port}: {fault.strerror or fault}; give another port for the page") from None
        yield address(host, runner.addresses[0][1], token)
    finally:
        await runner.cleanup()


@contextmanager
def in_thread(status: Status, host: str = "127.0.0.1", port: int = 0, token: str | None = None) -> Iterator[str]:
    """The same for a program without an event loop: the page has a thread, and status is called on it.

    A federation is called from one thread: give this `Latest.get`, and put its status there from the other.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="ulearn page", daemon=True)
    thread.start()
    serving = listen(status, host, port, token)
    try:
        url = asyncio.run_coroutine_threadsafe(serving.__aenter__(), loop).result()
        try:
            yield url
        finally:
            asyncio.run_coroutine_threadsafe(serving.__aexit__(None, None, None), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Latest:
    """The last status that one thread has put, for another to get."""

    def __init__(self, status: Mapping[str, Any]) -> None:
        """Begin with a status."""
        self._status = status

    def put(self, status: Mapping[str, Any]) -> None:
        """Replace it by a newer one."""
        self._status = status

    def get(self) -> Mapping[str, Any]:
        """The newest."""
        return self._status
