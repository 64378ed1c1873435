"""Security middleware, before every request: which Host, which web page, which key, how large a body.

A local server is reachable from any web page that its user opens. Two checks keep those pages out. The Host header
must name this server, so that a page whose own name was re-pointed at 127.0.0.1 (DNS rebinding) gets nothing. And a
request that carries an Origin must come from this server's own page or from an allowed one: without that, CORS hides
the answer but still lets the request in.
"""

from __future__ import annotations

import hmac
import re
import socket
from hashlib import sha256
from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minicpm_serve.api.errors import AUTHENTICATION, PERMISSION, ApiError
from minicpm_serve.settings import ServerSettings, is_loopback, is_origin

OPEN_PATHS = frozenset({"/", "/health", "/favicon.ico"})
OPEN_FOLDER = "/static/"
"""What needs no key: the page and whether the server is up. All else does, so a new route starts closed."""

SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
PREFLIGHT_SECONDS = "600"
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/?#@\[\]]+)(:[0-9]*)?")


class SecurityMiddleware:
    """ASGI middleware; :class:`ServerSettings` says what it lets through."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._hosts = _host_names(settings)
        self._key_digests = [sha256(key.encode()).digest() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            origin = self._check_origin(headers)
        except ApiError as refusal:
            await refusal.response()(scope, receive, send)
            return
        send = _with_headers(send, self._answer_headers(origin))
        if scope["method"] == "OPTIONS" and origin and "access-control-request-method" in headers:
            await self._preflight(headers)(scope, receive, send)
            return
        try:
            self._check_key(scope["path"], headers)
            self._check_length(headers)
        except ApiError as refusal:
            await refusal.response()(scope, receive, send)
            return
        await self._app(scope, self._capped(receive), send)

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "")
        name = _without_port(host)
        if name in self._hosts or self._is_own_address(name):
            return
        raise ApiError(
            403,
            f"this server does not answer to the name {(name or host)[:100]!r}; "
            "start it with --allow-host NAME to let it",
            kind=PERMISSION,
            code="host_not_allowed",
        )

    def _is_own_address(self, name: str) -> bool:
        # Rebinding needs a name to re-point, so a numeric address in Host is safe. On loopback only loopback's count.
        try:
            address = ip_address(name.strip("[]"))
        except ValueError:
            return False
        return address.is_loopback or not is_loopback(self._settings.host)

    def _check_origin(self, headers: Headers) -> str | None:
        """The origin to open CORS for, or None where the request needs none. Raises for pages of other sites."""
        origin = headers.get("origin")
        if origin is None or _same_site(origin, headers.get("host", "")):
            return None
        if origin in self._settings.allowed_origins or "*" in self._settings.allowed_origins:
            return origin
        raise ApiError(403, _why_not(origin[:100]), kind=PERMISSION, code="origin_not_allowed")

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._key_digests or path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = sha256(given.strip().encode()).digest()
        # Every key is compared, and by digest: the time taken tells neither which key was near nor how long keys are.
        matches = [hmac.compare_digest(digest, known) for known in self._key_digests]
        if scheme.lower() == "bearer" and any(matches):
            return
        message = (
            "this API key is not known here" if given else "an API key is needed: Authorization: Bearer KEY"
        )
        raise ApiError(
            401, message, kind=AUTHENTICATION, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
        )

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            raise ApiError(400, "the Content-Length header is not a number")
        # A number of thousands of digits cannot be parsed, and need not be.
        if len(length) > 18 or int(length) > self._settings.max_body_bytes:
            raise self._too_large()

    def _capped(self, receive: Receive) -> Receive:
        """Counts what really arrives: a chunked body announces no length."""
        num_bytes = 0

        async def receive_capped() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._settings.max_body_bytes:
                raise self._too_large()
            return message

        return receive_capped

    def _too_large(self) -> ApiError:
        limit = self._settings.max_body_bytes
        # The rest of the body stays unread, so this connection cannot be used again.
        headers = {"Connection": "close"}
        return ApiError(
            413, f"the request is larger than {limit:,} bytes", code="request_too_large", headers=headers
        )

    def _answer_headers(self, origin: str | None) -> dict[str, str]:
        if origin is None:
            return SAFE_HEADERS
        exposed = {"access-control-expose-headers": "retry-after", "vary": "Origin"}
        return {**SAFE_HEADERS, "access-control-allow-origin": origin, **exposed}

    def _preflight(self, headers: Headers) -> Response:
        allowed = {
            "access-control-allow-methods": "GET, POST",
            # The official client adds a dozen x-stainless-* headers; a key guards the API, not a list of headers.
            "access-control-allow-headers": headers.get("access-control-request-headers", "authorization"),
            "access-control-max-age": PREFLIGHT_SECONDS,
        }
        if headers.get("access-control-request-private-network") == "true":
            allowed["access-control-allow-private-network"] = "true"
        return Response(status_code=204, headers=allowed)


def _host_names(settings: ServerSettings) -> frozenset[str]:
    names = {"localhost", settings.host, *map(_without_port, settings.allowed_hosts)}
    if not is_loopback(settings.host):
        own = socket.gethostname()
        names |= {own, f"{own}.local"}
    return frozenset(name.lower() for name in names if name)


def _without_port(host: str) -> str:
    """``localhost:8080`` → ``localhost``, ``[::1]:8080`` → ``[::1]``; empty for what is no host and port."""
    found = _HOST.fullmatch(host.lower())
    return found[1] if found else ""


def _why_not(origin: str) -> str:
    if origin == "null":
        return (
            "pages opened from a file may not use this server, since any other page can send the same Origin, null; "
            "start it with --api-key-file FILE --allow-origin null to let whoever has the key"
        )
    if not is_origin(origin):
        return f"the Origin header {origin!r} is not an origin, as https://app.example is"
    return f"pages of {origin} may not use this server; start it with --allow-origin {origin} to let them"


def _same_site(origin: str, host: str) -> bool:
    return origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())


def _with_headers(send: Send, added: dict[str, str]) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in added.items():
                headers.setdefault(name, value)
        await send(message)

    return send_with_headers
