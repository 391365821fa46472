"""The table of all endpoints: what the application routes, and what the document describes."""

from __future__ import annotations

from typing import Any

from starlette.responses import PlainTextResponse, Response

from ultrarag import __version__
from ultrarag.service import embedding, learning, passages, pipelines, reporting, reranking, searching, tei
from ultrarag.service.console import home, is_page
from ultrarag.service.endpoint import Call, Endpoint
from ultrarag.service.openapi import document


async def index(call: Call) -> Response:
    if is_page("/", call.request.headers):
        return await home(call.request)
    lines = [f"{endpoint.method:<7}{endpoint.path}  {endpoint.summary}" for endpoint in ENDPOINTS]
    more = ["MCP     /mcp  Tools for language models, where the extra mcp is installed"]
    return PlainTextResponse("\n".join([f"ultrarag {__version__}", "", *lines, *more, ""]))


async def described(call: Call) -> dict[str, Any]:
    return document(ENDPOINTS)


#: For a browser the console is in the place of the list at /.
ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("GET", "/", index, "The endpoints, as text", "service", answer=str, media="text/plain", errors=()),
    Endpoint("GET", "/openapi.json", described, "This document", "service", answer=dict, errors=()),
    *searching.ENDPOINTS,
    *passages.ENDPOINTS,
    *learning.ENDPOINTS,
    *reporting.ENDPOINTS,
    *embedding.ENDPOINTS,
    *reranking.ENDPOINTS,
    *tei.ENDPOINTS,
    *pipelines.ENDPOINTS,
)
