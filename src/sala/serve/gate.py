"""What stands before the routes: request ids, keys, limits on bodies, a line of log for each request."""

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from sala.serve.metrics import Metrics
from sala.serve.problem import Problem, problem_response
from sala.serve.settings import Settings

log = logging.getLogger("sala.serve")
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
# for whoever looks whether the server lives, and for the page, which asks for a key itself
OPEN_PATHS = frozenset({"/", "/health", "/page.css", "/page.js"})


class Gate:
    """An ASGI application around another."""

    def __init__(self, app: App, settings: Settings, metrics: Metrics):
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        status = 0

        async def answer(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        said: bytes | None = None
        try:
            self._check_key(scope["path"], headers)
            said = await self._body(headers, receive)
            await self.app(scope, _replay(said, receive), answer)
        except Problem as problem:
            await problem_response(problem)(scope, receive, answer)  # type: ignore[arg-type]
        finally:
            self._note(scope, request_id, status, time.monotonic() - started, said)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if not self.settings.api_keys or path in OPEN_PATHS:
            return
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        fits = [secrets.compare_digest(key, each.encode()) for each in self.settings.api_keys]
        if kind.lower() != b"bearer" or not any(fits):
            raise Problem(
                401, "the API key is missing or wrong; expected 'Authorization: Bearer KEY'", code="invalid_api_key"
            )

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """Return the whole body, which has to come within size and time."""
        most = self.settings.max_body_bytes
        too_large = Problem(413, f"the body is larger than {most:,} bytes; expected at most that")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            raise Problem(400, "the header Content-Length is no number; expected one")
        if len(length) > 18 or int(length) > most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.settings.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Problem(400, "the body did not come whole; expected all of it")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError as error:
            raise Problem(
                408, f"the body did not come within {self.settings.body_s:g} s; expected it sooner"
            ) from error

    def _note(self, scope: Scope, request_id: str, status: int, took_s: float, body: bytes | None) -> None:
        route = getattr(scope.get("route"), "path", "none")
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.duration.observe(took_s)
        line = {"id": request_id, "method": scope["method"], "path": scope["path"][:200], "status": status}
        line |= {"seconds": round(took_s, 4), **scope.get("state", {}).get("note", {})}
        if self.settings.log_prompts and body is not None:
            line["body"] = body.decode("utf-8", "replace")
        log.info("%s", json.dumps(line))


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return what gives an application a body that was read already, and after it what comes of the connection."""
    given = False

    async def replay() -> dict[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
