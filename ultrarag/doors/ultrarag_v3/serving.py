"""An MCP server of UltraRAG v3's, over stdio: the tools of a class, and `build`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import anyio

from ultrarag.doors.ultrarag_v3.reranker import Reranker
from ultrarag.doors.ultrarag_v3.retriever import Retriever
from ultrarag.doors.ultrarag_v3.wiring import tools_of, write_server_file
from ultrarag.errors import UltraragError, UsageError
from ultrarag.io import print_error
from ultrarag.packages import install

if TYPE_CHECKING:
    from mcp.server import MCPServer

#: Name of a server -> whose tools it has.
SERVERS: dict[str, Callable[[], object]] = {"retriever": Retriever, "reranker": Reranker}


def create_server(name: str) -> MCPServer[Any]:
    """The server `retriever` or `reranker`; `run_stdio_async` runs it.

    Raises:
        UsageError: the MCP SDK is not installed.
    """
    try:
        from mcp.server import MCPServer
    except ImportError as error:
        raise UsageError(f"the servers for UltraRAG v3 need the extra ultrarag_v3: {install('mcp')}") from error
    tools = tools_of(SERVERS[name]())
    server: MCPServer[Any] = MCPServer(name, log_level="WARNING")

    def build(parameter_file: str) -> None:
        """Write server.yaml beside a parameter.yaml."""
        write_server_file(parameter_file, tools)

    for tool_name, function in {"build": build, **tools}.items():
        server.add_tool(_in_words(function), name=tool_name)
    return server


def _in_words(function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    """A tool that runs in a thread, and whose errors reach the pipeline; the SDK masks all but ToolError."""
    from mcp.server.mcpserver.exceptions import ToolError

    @wraps(function)
    async def wrapped(*args: Any, **options: Any) -> Any:
        try:
            return await anyio.to_thread.run_sync(partial(function, *args, **options))
        except UltraragError as error:
            raise ToolError(str(error)) from error

    return wrapped


def main(words: list[str]) -> int:
    """Run a server over stdin and stdout until they are closed."""
    if len(words) != 1 or words[0] not in SERVERS:
        print_error(f"name one server: {' or '.join(SERVERS)}")
        return 2
    try:
        anyio.run(create_server(words[0]).run_stdio_async)
    except UltraragError as error:
        print_error(str(error))
        return 1
    return 0
