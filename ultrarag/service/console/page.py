"""Page: one address of the console; its form is checked before it runs, and its faults are pages too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import jinja2
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from ultrarag import __version__
from ultrarag.errors import UltraragError
from ultrarag.service.console import access
from ultrarag.service.faults import Fault, fault_of

if TYPE_CHECKING:
    from ultrarag.service.state import Service

HERE = Path(__file__).parent
#: Nothing from elsewhere, no script and no style within a page: a passage's text cannot become either.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
#: A browser tells a form's origin (Origin) only under a policy that lets it tell ourselves where it comes from.
HEADERS = {"Content-Security-Policy": POLICY, "Referrer-Policy": "same-origin", "X-Frame-Options": "DENY"}
#: Fields of a form at most.
MOST_FIELDS = 500


@dataclass
class Ask:
    """One request of a browser, read and checked."""

    service: Service
    request: Request
    #: who judges, a cookie
    reviewer: str
    #: what was sent: of a POST its body, of a GET what stands behind the question mark
    form: dict[str, list[str]] = field(default_factory=dict)

    def text(self, name: str, default: str = "") -> str:
        """A field of the form, without spaces around it."""
        return self.form.get(name, [default])[-1].strip()

    def number(self, name: str, default: int, least: int, most: int) -> int:
        """A field with a whole number.

        Raises:
            Fault: 400, it is none, or out of bounds.
        """
        text = self.text(name) or str(default)
        if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
            raise Fault(400, f"{name} is '{text[:50]}'; it must be a whole number from {least} to {most}")
        return int(text)

    def show(self, template: str, status: int = 200, **values: Any) -> Response:
        """Make a page of a template."""
        settings = self.service.settings
        common = {
            "here": self.request.url.path,
            "version": __version__,
            "form_token": access.form_token(settings, self.reviewer),
            "has_token": settings.token is not None,
            "error": None,
            "notice": None,
        }
        return HTMLResponse(templates().get_template(template).render({**common, **values}), status)

    def go(self, address: str) -> Response:
        """Send the browser to a page, after a form that changed something."""
        return RedirectResponse(address, 303)


@dataclass(frozen=True)
class Page:
    """One method of one path."""

    method: str
    path: str
    run: Callable[[Ask], Awaitable[Response]]
    #: whether its form needs our token; signing in does not, for there is no page to take it from before
    signed: bool = True

    def route(self) -> Route:
        """What Starlette calls."""
        return Route(
            self.path.removeprefix("/console"),
            self.answered,
            methods=[self.method],
            name=f"{self.method} {self.path} page",
        )

    async def answered(self, request: Request) -> Response:
        """Read a request, check its form, and answer with a page."""
        service: Service = request.app.state.service
        request.scope["ultrarag.route"] = self.path  # for the guard's log
        secure = request.url.scheme == "https"
        known = access.reviewer(request.headers)
        ask = Ask(service, request, known or access.new_reviewer())
        try:
            ask.form = await _form(request, service)
            if self.method == "POST":
                given = ask.text("form_token")
                if self.signed:
                    access.check_form(request.headers, given, service.settings, known)
                elif request.headers.get("origin") is None:
                    raise Fault(403, "the browser did not say which page sent this form (Origin)")
            response = await self.run(ask)
        except (UltraragError, ValidationError) as error:
            fault = fault_of(error, service.stopping)
            template = "error_part.html" if request.headers.get("hx-request") else "error.html"
            response = ask.show(template, fault.status, error=str(fault), title=reason(fault.status))
            response.headers.update(fault.headers)
        if not known:
            access.keep_reviewer(response, ask.reviewer, secure)
        for name, value in HEADERS.items():
            response.headers[name] = value
        return response


def reason(status: int) -> str:
    """The words of a status."""
    return HTTPStatus(status).phrase.capitalize()


async def _form(request: Request, service: Service) -> dict[str, list[str]]:
    if request.method != "POST":
        return _fields(request.url.query)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise Fault(415, f"the form's Content-Type is '{kind[:100]}'; it must be application/x-www-form-urlencoded")
    try:
        async with asyncio.timeout(service.settings.limits.body_seconds):
            body = await request.body()
    except TimeoutError:
        raise Fault(408, "the form did not arrive in time") from None
    except ClientDisconnect:
        raise Fault(400, "the browser went away before its form was read") from None
    return _fields(body.decode("utf-8", "replace"))


def _fields(text: str) -> dict[str, list[str]]:
    try:
        return parse_qs(text, keep_blank_values=True, max_num_fields=MOST_FIELDS, errors="replace")
    except ValueError as error:
        raise Fault(400, f"the form cannot be read: {error}") from error


@lru_cache(maxsize=1)
def templates() -> jinja2.Environment:
    """The templates: every value is escaped, and a missing one is an error."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "bytes": shown_bytes,
        "time": shown_time,
        "number": shown_number,
        "clock": shown_clock,
        "seconds": shown_seconds,
        "wait": shown_wait,
        "share": shown_share,
    }
    return found


def shown_bytes(count: int) -> str:
    """1536 -> 1.5 KiB."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def shown_time(seconds: float | None) -> str:
    """Seconds since 1970, in UTC."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds)) + " UTC"


def shown_clock(seconds: float) -> str:
    """Seconds since 1970, as the time of day in UTC."""
    return time.strftime("%H:%M:%S", time.gmtime(seconds))


def shown_seconds(seconds: float | None) -> str:
    """75 -> 1 min 15 s."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest if not hours else 0, "s")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "0 s"


def shown_wait(seconds: float | None) -> str:
    """0.0123 -> 12 ms; a dash where nobody waited."""
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def shown_share(found: Sequence[int]) -> str:
    """(3, 40) -> 7.5 % of 40; a dash of none."""
    count, of = found
    return f"{100 * count / of:.1f} % of {of:,}" if of else "–"


def shown_number(value: float) -> str:
    """12345 -> 12,345; 0.12345 -> 0.1235."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
