"""The application: an open index behind HTTP, as any ASGI server runs it."""

from __future__ import annotations

import importlib.util
import logging
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from ultrarag.retrieve import LiveIndex
from ultrarag.service import console
from ultrarag.service.endpoint import answer
from ultrarag.service.faults import Fault, body_of
from ultrarag.service.guard import Guard
from ultrarag.service.settings import Settings
from ultrarag.service.state import Service
from ultrarag.service.table import ENDPOINTS

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder

logger = logging.getLogger("ultrarag.service")


def create_app(live: LiveIndex, settings: Settings | None = None, reranker: Encoder | None = None) -> Starlette:
    """Make an ASGI application of an open index; when it stops, the index is closed.

    Args:
        settings: default: loopback, no token. Who mounts the application elsewhere says so in them.
        reranker: a cross-encoder for the rerank endpoints; default: the index's own encoder compares.

    Raises:
        UsageError: for settings that would not be safe.
    """
    chosen = settings or Settings(str(live.path))
    chosen.check()
    service = Service(live, chosen, reranker)
    tools = _tools(service)
    routes: list[Any] = [endpoint.route() for endpoint in ENDPOINTS]
    routes += console.routes()
    if tools is not None:
        routes += tools.routes
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, service)],
        exception_handlers={HTTPException: _unrouted},
        lifespan=_lifespan(service, tools),
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


def _tools(service: Service) -> Any:
    """MCP over HTTP, where the extra is installed."""
    if importlib.util.find_spec("mcp") is None:
        return None
    from ultrarag.service.tools import Mounted

    return Mounted(service)


def _lifespan(service: Service, tools: Any) -> Any:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            _stop_early(service)
            if tools is not None:
                await stack.enter_async_context(tools.running())
            await service.writes.run(service.jobs.recover, service.settings.resume)
            if service.habit is not None:
                service.habit.start()
            try:
                yield
            finally:
                service.close()
                service.live.close()

    return lifespan


def _stop_early(service: Service) -> None:
    """Say to new requests, and to streams, that the service stops when it is told to, before the server waits."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        before = signal.getsignal(number)

        def stop(number: int, frame: Any, before: Any = before) -> None:
            service.stop()
            if callable(before):
                before(number, frame)

        signal.signal(number, stop)


async def _unrouted(request: Request, error: Exception) -> Response:
    """What has no route, or not for this method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        fault = Fault(404, "there is no such endpoint; GET / lists them, GET /openapi.json describes them")
    else:
        fault = Fault(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    return answer(body_of(fault, "own"), fault.status, fault.headers)
