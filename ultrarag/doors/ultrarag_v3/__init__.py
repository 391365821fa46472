"""UltraRAG v3: MCP servers with the tools of its retriever and reranker, answered by a live index that is served.

Calls of its pipelines come in over stdio, requests to `ultrarag serve` go out; a swap behind it changes no pipeline.
Both packages are imported as `ultrarag`: its checkout gets folders that start these servers in our environment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.doors.ultrarag_v3.command import add_arguments, run
    from ultrarag.doors.ultrarag_v3.folders import write_servers
    from ultrarag.doors.ultrarag_v3.serving import create_server
else:
    __getattr__, __dir__, __all__ = exports(__name__)
