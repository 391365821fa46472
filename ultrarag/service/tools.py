"""Tools: the index for language models, over MCP: search, feedback, get and status."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import wraps
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import Field

from ultrarag import __version__
from ultrarag.errors import UltraragError
from ultrarag.service import passages, searching
from ultrarag.service.faults import Fault, fault_of
from ultrarag.service.state import Service

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
INSTRUCTIONS = (
    "A knowledge base of passages. Call `search` with a question in natural language; cite the ids of the passages "
    "you use. `get` gives a passage whole by its id. `status` says what the knowledge base is."
)
#: Hits that a model is given, where it does not say how many.
K = 5


def readable(tool: Callable[_Parameters, Awaitable[_Result]]) -> Callable[_Parameters, Awaitable[_Result]]:
    """A tool whose errors the model can read, and mend its call by; the SDK masks all but ToolError."""

    @wraps(tool)
    async def wrapped(*args: _Parameters.args, **options: _Parameters.kwargs) -> _Result:
        try:
            return await tool(*args, **options)
        except UltraragError as error:
            raise ToolError(str(fault_of(error))) from error

    return wrapped


def create_tools(service: Service) -> MCPServer[Any]:
    """The MCP server of a service; `run_stdio_async` and `streamable_http_app` are its doors."""
    with _logging_kept():
        server: MCPServer[Any] = MCPServer("ultrarag", instructions=INSTRUCTIONS, version=__version__)

    @server.tool(description="Search the knowledge base; returns the best passages with their ids and scores.")
    @readable
    async def search(
        query: Annotated[str, Field(description="the question, in natural language")],
        k: Annotated[int, Field(description="how many passages", ge=1)] = K,
        filter: Annotated[
            dict[str, Any] | None,
            Field(description='metadata condition: {"lang": "en"}, {"year": {"gte": 2020}}, {"or": [...]}'),
        ] = None,
    ) -> dict[str, Any]:
        remembers = await service.writes.run(lambda: service.remembers)
        found = await service.search([query], {"k": k, "filter": filter, "log": remembers})
        return searching.shown(found[0])

    @server.tool(description="Say which passages of a search you used (cite), and whether they answer the question.")
    @readable
    async def feedback(
        query_id: Annotated[str, Field(description="as `search` gave it")],
        action: Annotated[
            Literal["cite", "relevant", "not_relevant", "answer_up", "answer_down"],
            Field(description="cite: the answer uses the passage; answer_up, answer_down: about the whole answer"),
        ],
        id: Annotated[str | None, Field(description="of the passage; none for answer_up and answer_down")] = None,
    ) -> dict[str, bool]:
        await service.writes.run(service.live.feedback, query_id, id, action)
        service.metrics.feedback.labels(action).inc()
        return {"kept": True}

    @server.tool(description="Read one passage whole, by its id.")
    @readable
    async def get(id: Annotated[str, Field(description="as `search` gave it")]) -> dict[str, Any]:
        found = await service.writes.run(service.live.get, id)
        if found is None:
            raise Fault(404, f"there is no passage {id!r}; take an id that `search` gave")
        return passages.shown(found)

    @server.tool(description="What the knowledge base is: how many passages, which model answers.")
    @readable
    async def status() -> dict[str, Any]:
        found = await service.writes.run(service.live.status)
        live = found["live"] or {}
        names = ("id", "fingerprint", "heads")
        return {"passages": found["passages"], "live": {name: live.get(name) for name in names}}

    return server


@contextmanager
def _logging_kept() -> Iterator[None]:
    """Leave the root logger as it is: the SDK gives it a handler that shows tools' errors, which may quote a query."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


class Mounted:
    """The tools over streamable HTTP at /mcp, behind the service's own guard."""

    def __init__(self, service: Service) -> None:
        self._server = create_tools(service)
        own = TransportSecuritySettings(enable_dns_rebinding_protection=False)  # the guard has looked already
        app = self._server.streamable_http_app(
            stateless_http=True,  # so that any worker, and any machine behind a balancer, may answer
            transport_security=own,
            max_request_body_size=service.settings.limits.body,
        )
        self.routes = list(app.routes)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve while the application does."""
        async with self._server.session_manager.run():
            yield
