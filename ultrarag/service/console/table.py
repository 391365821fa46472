"""The table of all pages, and the files that they bring along."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from ultrarag.service.console import compare, gate, labels, lineage, now, refresh, search
from ultrarag.service.console.page import HEADERS, HERE, Page
from ultrarag.service.faults import Fault

_HOME = Page("GET", "/", now.now)
PAGES: tuple[Page, ...] = (
    *now.PAGES,
    *search.PAGES,
    *compare.PAGES,
    *lineage.PAGES,
    *refresh.PAGES,
    *gate.PAGES,
    *labels.PAGES,
)
#: File -> its type; nothing else is sent.
STATIC = {
    "console.css": "text/css",
    "console.js": "text/javascript",
    "htmx.min.js": "text/javascript",
    "LICENSE.htmx": "text/plain",
}


async def home(request: Request) -> Response:
    """The first page, for a browser that asks for /."""
    return await _HOME.answered(request)


async def static(request: Request) -> Response:
    """A file of the console's own."""
    request.scope["ultrarag.route"] = "/console/static/{name}"
    name = request.path_params["name"]
    if name not in STATIC:
        raise Fault(404, "the console has no such file")
    kept = {"Cache-Control": "max-age=3600", **HEADERS}  # pages name the version with it
    return Response((HERE / "static" / name).read_bytes(), 200, kept, STATIC[name])


def routes() -> list[Mount]:
    """What Starlette calls, beside / itself."""
    return [Mount("/console", routes=[*(page.route() for page in PAGES), Route("/static/{name}", static)])]
