"""What stands before every request: who may ask, how much, and for how long."""

import asyncio
import base64
import binascii
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 1 << 20  # of a request's body
BODY_SECONDS = 10.0  # in which it must have come
ANSWER_SECONDS = 60.0  # in which it must be answered
LOOPBACK = ("127.0.0.1", "::1", "localhost")
ANYWHERE = ("0.0.0.0", "::")
HEADERS = [
    (b"content-security-policy", b"default-src 'none'; script-src 'self'; style-src 'self'; "
     b"img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
     b"frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]  # fmt: skip


class _Refused(Exception):  # noqa: N818 - it is an answer, not an error
    def __init__(self, status: int, detail: str, **headers: str):
        super().__init__(detail)
        self.status, self.headers = status, headers


class Guard:
    """Refuses requests for another host or without the token, too large ones and slow ones."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        token: str | None,
        told: Callable[[str, int, float], None],
    ):
        """Keeps what requests are held to.

        Args:
            app: Who answers them.
            host: Address that is listened on; its name must be in the Host header, so that no page
                of another name (DNS rebinding) can ask. Of one that stands for all, any name may.
            token: What every request must carry, as a bearer token or a password; None: nothing.
            told: Is called with (route, status, seconds) after each request.
        """
        self._app, self._token, self._told = app, token, told
        self._hosts = None if host in ANYWHERE else {host.lower()}
        if host in LOOPBACK:
            self._hosts = set(LOOPBACK)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500
        begun = False

        async def sending(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        try:
            self._check(scope)
            body = await _read(scope, receive)
            answer = self._app(scope, _replayed(body, receive), sending)
            await _within(ANSWER_SECONDS, answer, 503, "the answer takes too long; ask for less")
        except _Refused as refused:
            if begun:  # nothing can be said any more
                raise
            await _refuse(refused, sending)
        except asyncio.CancelledError:  # the server stops, and has waited as long as it does
            if begun:
                raise
            await _refuse(_Refused(503, "the server stops"), sending)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._told(route, status, time.monotonic() - started)

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        hosts = [value.decode("latin-1") for value in headers.get(b"host", [])]
        if len(hosts) != 1 or (self._hosts is not None and _name(hosts[0]) not in self._hosts):
            raise _Refused(421, "this server has another name than the Host header says")
        for origin in headers.get(b"origin", []):
            if urlsplit(origin.decode("latin-1")).netloc.lower() != hosts[0].lower():
                raise _Refused(403, "pages of other servers may not ask")
        given = headers.get(b"authorization", [b""])
        if self._token is not None and not (
            len(given) == 1 and hmac.compare_digest(_secret(given[0]), self._token.encode())
        ):
            challenge = {"www-authenticate": 'Basic realm="ping-llm: any name, token as password"'}
            raise _Refused(401, "the token is absent or wrong", **challenge)


def _name(host: str) -> str:
    """Returns the name in a Host header, without the port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _secret(authorization: bytes) -> bytes:
    """Returns the token of a header: `Bearer TOKEN`, or the password of `Basic`."""
    scheme, _, value = authorization.strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    try:
        decoded = base64.b64decode(value, validate=True)
    except binascii.Error:
        return b""
    return decoded.partition(b":")[2] if scheme.lower() == b"basic" else b""


async def _within(seconds: float, what: Awaitable[Any], status: int, detail: str) -> Any:
    try:
        return await asyncio.wait_for(what, seconds)
    except TimeoutError:
        raise _Refused(status, detail, **{"retry-after": "5"}) from None


async def _read(scope: MutableMapping[str, Any], receive: Receive) -> bytes:
    """Returns the body, if it is small and comes in time."""
    too_large = _Refused(413, f"a request may hold {MOST_BYTES:,} bytes")
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > MOST_BYTES:
            raise too_large

    async def read() -> bytes:
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MOST_BYTES:
                raise too_large
        return bytes(body)

    return await _within(BODY_SECONDS, read(), 408, "the request comes too slowly")


def _replayed(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(refused: _Refused, send: Send) -> None:
    content = json.dumps({"detail": str(refused)}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content))}
    if refused.status in (408, 413):  # what is left of the body is not read
        headers["connection"] = "close"
    pairs = [(k.encode(), v.encode()) for k, v in (headers | refused.headers).items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})
