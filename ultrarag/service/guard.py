"""Guard: what every request passes before it is read: its host, its origin, its token, its rate and its size."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ultrarag.service.console import admit, is_page
from ultrarag.service.endpoint import answer
from ultrarag.service.faults import Fault, body_of, fault_of
from ultrarag.service.settings import is_loopback

if TYPE_CHECKING:
    from ultrarag.service.state import Service

#: What was answered, never what was asked: texts are the users'.
access = logging.getLogger("ultrarag.access")
logger = logging.getLogger("ultrarag.service")

#: Clients whose rate is remembered; of more, those that asked longest ago are forgotten.
_CLIENTS = 10_000
#: What a browser is told of every answer.
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}


class Guard:
    """Middleware around the whole service."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        limits = service.settings.limits
        self._rates = Rates(limits.rate) if limits.rate else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it; log and count what was answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = _Answer(scope, send, self._service)
        with self._service.metrics.active.track_inprogress():
            try:
                self._check(scope, Headers(scope=scope))
                await self._app(scope, self._counted(receive), seen.send)
            except Exception as error:
                if seen.status:  # half an answer is out
                    raise
                fault = fault_of(error, self._service.stopping)
                if fault.status == 500:
                    logger.exception("request %s failed", seen.id)
                elif not isinstance(scope.get("ultrarag.route"), str):
                    self._service.metrics.refused.labels(str(fault.status)).inc()
                body = body_of(fault, scope.get("ultrarag.shape", "own"))
                await answer(body, fault.status, fault.headers)(scope, receive, seen.send)
            finally:
                seen.end()

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raise a Fault for a request that may not be read."""
        if self._service.stopping:
            raise Fault(503, "the service is stopping; ask again", headers={"Retry-After": "5", "Connection": "close"})
        self._check_host(headers)
        if is_page(scope["path"], headers):
            admit(scope["path"], headers, self._service.settings)
        elif not (scope["path"] == "/health" or self._service.settings.token is None):
            self._check_token(headers)
        if self._rates is not None and scope["path"] != "/health":
            self._rates.take(_client(scope, headers))
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._service.settings.limits.body:
            raise self._too_large()

    def _check_host(self, headers: Headers) -> None:
        """Refuse names that are not ours: a stranger's page reaches loopback by a name of its own (DNS rebinding).

        And refuse what a page from elsewhere sends, which the browser says in Origin.
        """
        host = headers.get("host", "")
        if not self._ours(host):
            raise Fault(
                421,
                f"'{host[:100]}' is no name of this service: ask 127.0.0.1 or localhost, or start it with "
                "--allowed_hosts NAME",
            )
        origin = headers.get("origin")
        if origin is not None and not self._own_origin(origin, host):
            raise Fault(403, "a page from elsewhere may not ask this service")

    def _ours(self, host: str) -> bool:
        settings = self._service.settings
        name = _name_of(host)
        if name in settings.allowed_hosts:
            return True
        if settings.on_loopback:
            return is_loopback(name)
        return not settings.allowed_hosts or is_loopback(name)

    def _own_origin(self, origin: str, host: str) -> bool:
        try:
            return urlsplit(origin).netloc.lower() == host.lower()
        except ValueError:
            return False

    def _check_token(self, headers: Headers) -> None:
        wanted = self._service.settings.token or ""
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            given = headers.get("api-key", "")
        if not hmac.compare_digest(given.strip().encode(), wanted.encode()):
            message = "send the service's token as 'Authorization: Bearer TOKEN'" if not given else "the token is wrong"
            raise Fault(401, message, headers={"WWW-Authenticate": 'Bearer realm="ultrarag"'})

    def _counted(self, receive: Receive) -> Receive:
        """Stop reading a body that is too large, whatever its header said."""
        most, held = self._service.settings.limits.body, 0

        async def counted() -> Message:
            nonlocal held
            message = await receive()
            if message["type"] == "http.request":
                held += len(message.get("body", b""))
                if held > most:
                    raise self._too_large()
            return message

        return counted

    def _too_large(self) -> Fault:
        most = self._service.settings.limits.body
        return Fault(
            413, f"a body holds at most {most:,} bytes: send several requests", headers={"Connection": "close"}
        )


class Rates:
    """Requests a second of each client: a bucket that fills steadily, and holds two seconds' worth."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, max(1.0, 2 * rate), clock
        #: client -> (what is left, when that was)
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> None:
        """Count a request; Fault 429 says when the next one may come."""
        now = self._clock()
        left, since = self._left.pop(client, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._rate)
        allowed = left >= 1
        self._left[client] = (left - 1 if allowed else left, now)
        if len(self._left) > _CLIENTS:
            self._left.popitem(last=False)
        if not allowed:
            wait = max(1, round((1 - left) / self._rate))
            raise Fault(429, f"more than {self._rate:g} requests a second", headers={"Retry-After": str(wait)})


class _Answer:
    """What is sent back, as far as a log and counters may know it."""

    def __init__(self, scope: Scope, send: Send, service: Service) -> None:
        self._scope, self._send, self._service = scope, send, service
        self.id, self.status, self.bytes, self._began = uuid.uuid4().hex[:16], 0, 0, time.perf_counter()
        self._streams = False

    async def send(self, message: Message) -> None:
        """Pass a part of the answer on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.id
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            self._streams = headers.get("content-type", "").startswith("text/event-stream")
        elif message["type"] == "http.response.body":
            self.bytes += len(message.get("body", b""))
        await self._send(message)

    def end(self) -> None:
        """Log and count it. The path is the endpoint's own: a real one may hold a passage's id."""
        seconds = time.perf_counter() - self._began
        unnamed = "/mcp" if self._scope["path"] == "/mcp" else "-"
        route, method, status = self._scope.get("ultrarag.route", unnamed), _method(self._scope), self.status or 499
        self._service.metrics.requests.labels(method, route, str(status)).inc()
        if not self._streams:
            self._service.metrics.seconds.labels(route).observe(seconds)
        client = (self._scope.get("client") or ("-",))[0]
        access.info(
            "%s %s %s %d %d bytes %.1f ms %s", client, method, route, status, self.bytes, 1000 * seconds, self.id
        )


def _method(scope: Scope) -> str:
    """A method that exists: any other one would be a label of its own."""
    method = str(scope["method"])
    return method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else "OTHER"


def _client(scope: Scope, headers: Headers) -> str:
    """Whose requests are counted together: those of an address, with one token."""
    address: Any = scope.get("client") or ("-",)
    return f"{address[0]} {hashlib.sha256(headers.get('authorization', '').encode()).hexdigest()[:16]}"


def _name_of(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host.partition("]")[0].strip("[").lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()
