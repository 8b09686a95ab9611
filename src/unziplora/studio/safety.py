"""Protection of the studio's server: who may ask, what may be sent, and which files are served."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Container, Iterator, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from unziplora.errors import UnziploraError, UserError
from unziplora.images.files import open_upright

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

UPLOAD_LIMIT = 1 << 30
"""Largest upload in bytes. The LoRA files of both kinds at rank 128 have less."""

EVENT_LIMIT = 1 << 24
"""Largest body in bytes of requests that contain no files."""

SERVED = (".png", ".safetensors")
"""Endings of the files in the runs folder that are served."""

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine alone, as browsers send them."""

_EVENTS = "/gradio_api/queue/data"
_FILES, _UPLOAD = ("/gradio_api/file=", "/gradio_api/file/"), "/gradio_api/upload"
_CLOSED = ("/gradio_api/proxy=", "/gradio_api/stream", "/monitoring", "/gradio_api/runs", "/gradio_api/run-history")

_DECIDING = {"content-length", "content-type", "host", "origin", "sec-fetch-mode", "sec-fetch-site"}
"""Headers of a request that are looked at here."""

_HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
"""Headers of every answer. The page can load nothing from another host, and no other page can embed it."""


class Guard:
    """ASGI middleware around the whole server.

    Refuses requests of other origins and under other host names (DNS rebinding), bodies without or above a size, files
    that are neither the studio's own nor results of runs, uploads that are neither images nor safetensors, and events
    that the page does not know.
    """

    def __init__(
        self, app: App, runs: Path, cache: Path, port: int, events: Container[int], any_host: bool = False
    ) -> None:
        """Wrap an application.

        Args:
            runs: the runs folder.
            cache: the studio's own files, all of which are served.
            events: numbers of the events that the page knows.
            any_host: answer under any host name, for a server that is protected by a password.
        """
        self.app, self.runs, self.cache, self.events = app, runs.resolve(), cache.resolve(), events
        bare = LOOPBACK if port == 80 else ()  # browsers leave this number out
        self.hosts = None if any_host else {*bare, *(f"{name}:{port}" for name in LOOPBACK)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal:
            await _answer(send, *refusal)
        elif scope["path"].rstrip("/") == _UPLOAD:
            await self._upload(scope, receive, send)
        elif scope["path"] == _EVENTS:
            await self._events(scope, receive, send)
        elif scope["method"] == "POST" and not _has_files(_headers(scope)):
            await self._action(scope, receive, send)
        else:
            await self.app(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Return the status and the reason of a refusal; None if the request may pass."""
        if scope["type"] != "http":
            return 403, "only HTTP is spoken here"
        if repeated := _repeated(scope):
            return 400, f"{repeated} is sent twice"
        headers = _headers(scope)
        host, path = headers.get("host", ""), scope["path"]
        if self.hosts is not None and host not in self.hosts:
            return 403, "open the studio under the address that it printed"
        if not _is_same_origin(headers, host, path):
            return 403, "requests of other pages are refused"
        if scope["method"] not in ("GET", "HEAD"):
            length = headers.get("content-length", "")
            if not length.isdecimal():
                return 411, "a request needs its length"
            limit = UPLOAD_LIMIT if _has_files(headers) else EVENT_LIMIT
            if int(length) > limit:
                return 413, f"too large: at most {limit >> 20} MiB"
        if path.startswith(_CLOSED):
            return 404, "not here"
        prefix = next((prefix for prefix in _FILES if path.startswith(prefix)), None)
        if prefix and not self._serves(unquote(path[len(prefix) :])):
            return 403, "this file is not served"
        return None

    def _serves(self, name: str) -> bool:
        """Return True for the studio's own files and for results of runs; links lead to where they point."""
        try:
            path = Path(name).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            return False
        if path.is_relative_to(self.cache):
            return True
        inside = path.is_relative_to(self.runs) and path.suffix.lower() in SERVED
        return inside and not any(part.startswith(".") for part in path.relative_to(self.runs).parts)

    async def _action(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if all files that it names are the studio's own or results of runs, and its event is known.

        Gradio checks few of these names. It opens what they lead to, on this machine or another one, and copies it into
        its cache, from where it is served.
        """
        body, more = bytearray(), True
        while more:
            message = await receive()
            body.extend(message.get("body", b""))
            more = message.get("more_body", False)
        value = _json(body)
        if not all(map(self._serves, _named_files(value))):
            await _answer(send, 403, "this file is not an upload")
            return
        if not self._knows_event(value):
            from starlette.responses import JSONResponse

            outdated = {"detail": "this page is older than the studio: load it again"}  # as Gradio's page reads it
            await JSONResponse(outdated, 409)(scope, receive, _with_headers(send))
            return
        messages = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def again() -> Message:
            return next(messages, None) or await receive()

        await self.app(scope, again, _with_headers(send))

    def _knows_event(self, request: Any) -> bool:
        """Return False for an event of a page that was loaded before the studio changed; Gradio fails at it."""
        number = request.get("fn_index") if isinstance(request, dict) else None
        return not isinstance(number, int) or number in self.events

    async def _events(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application send its events to a page, and end the answer if it does not know the page.

        A page that was open before a restart of the server asks for the events of its old session. Gradio answers that
        there is none, and then raises an error, which would be a traceback in the server's log.
        """
        from fastapi import HTTPException

        try:
            await self.app(scope, receive, _with_headers(send))
        except RuntimeError as error:
            if not isinstance(error.__cause__, HTTPException):
                raise
            await send({"type": "http.response.body", "body": b""})

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application store an upload, and pass its answer on if the files are what they should be."""
        import anyio.to_thread

        started: list[Message] = []
        body = bytearray()

        async def hold(message: Message) -> None:
            if message["type"] == "http.response.start":
                started.append(message)
            else:
                body.extend(message.get("body", b""))

        await self.app(scope, receive, hold)
        if started and started[0]["status"] == 200:
            try:
                await anyio.to_thread.run_sync(self._check_uploads, bytes(body))
            except UnziploraError as error:
                await _answer(send, 400, str(error))
                return
        for message in started:
            await _with_headers(send)(message)
        await send({"type": "http.response.body", "body": bytes(body)})

    def _check_uploads(self, answer: bytes) -> None:
        """Check the files that an upload's answer lists; all are deleted if one is refused."""
        paths = [Path(path) for path in json.loads(answer)]
        try:
            for path in paths:
                if not path.resolve().is_relative_to(self.cache):
                    raise UserError("the file was stored in the wrong place")
                check_file(path)
        except UnziploraError as error:
            for path in paths:
                path.unlink(missing_ok=True)
            names = str(error)
            for path in paths:
                names = names.replace(str(path), path.name)
            raise UserError(names) from None


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _repeated(scope: Scope) -> str:
    """Return a header that decides about the request and is there twice; other programs may read another of the two."""
    names = [name.decode("latin-1") for name, _ in scope["headers"]]
    return next((name for name in sorted(_DECIDING) if names.count(name) > 1), "")


def _has_files(headers: dict[str, str]) -> bool:
    """Return True for a form with files. Gradio reads the names of other files from JSON only."""
    return headers.get("content-type", "").lower().startswith("multipart/form-data")


def _json(body: bytes | bytearray) -> Any:
    """Return the value of a JSON text, None for another text."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _named_files(request: Any) -> Iterator[str]:
    """Yield the paths of all files that a JSON value names, as Gradio writes them."""
    open_values = [request]
    while open_values:
        value = open_values.pop()
        if isinstance(value, dict):
            if isinstance(path := value.get("path"), str):
                yield path
            open_values.extend(value.values())
        elif isinstance(value, list):
            open_values.extend(value)


def is_local(host: str) -> bool:
    """Return True for an address that only this machine can reach."""
    return host in (*LOOPBACK, "::1")


def check_file(path: Path) -> None:
    """Refuse a file that is neither an image nor, by the header that its name promises, a safetensors file.

    Raises:
        UserError: it is something else, damaged, or has too many pixels.
        MachineError: it cannot be read.
    """
    if path.suffix.lower() == ".safetensors":
        from unziplora.formats.safetensors import read_header

        read_header(path)
    else:
        open_upright(path, 256)


def _is_same_origin(headers: dict[str, str], host: str, path: str) -> bool:
    """Return True for requests of the studio's own page, of programs that are no browsers, and for opening the page."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    if origin is not None:
        return urlsplit(origin).netloc == host
    opens_page = path == "/" and headers.get("sec-fetch-mode") == "navigate"
    return site in ("none", "same-origin") or opens_page


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *own]}
        await send(message)

    return sending


async def _answer(send: Send, status: int, text: str) -> None:
    body = text.encode("utf-8", "replace")
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await _with_headers(send)({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
