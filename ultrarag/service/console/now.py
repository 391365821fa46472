"""Now: what is live, how much it holds, and what is being done; and the way in and out."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from ultrarag.service.console import access
from ultrarag.service.console.page import Ask, Page
from ultrarag.service.faults import Fault
from ultrarag.service.state import Service


async def now(ask: Ask) -> Response:
    """The page; asked by htmx, the part of it that changes: `watch`, or what is live."""
    service = ask.service
    pending = {pool.name: pool.pending for pool in (service.searches, service.writes)}
    found = {**await service.writes.run(_state, service), "pending": pending}
    part = "watch_part.html" if ask.text("part") == "watch" else "now_part.html"
    return ask.show(part if ask.request.headers.get("hx-request") else "now.html", **found)


def _state(service: Service) -> dict[str, Any]:
    status, job = service.live.status(), next(iter(service.jobs.all()), None)
    return {
        "index": status,
        "live": status["live"],
        "job": job,
        "load": service.load.last_minute(),
        "watch": service.watching.look(status),
        "counts": feedback_counts(service),
        "reranker": service.reranker.fingerprint if service.reranker else None,
        "started": service.started,
    }


def feedback_counts(service: Service) -> dict[str, Any] | None:
    """What is in the feedback log; None where nothing was ever remembered, for looking makes no file."""
    if not service.live.has_feedback or not service.remembers:
        return None
    return service.live.feedback_log.counts()


async def login(ask: Ask) -> Response:
    """The form to sign in."""
    return ask.show("login.html") if ask.service.settings.token else ask.go("/")


async def sign_in(ask: Ask) -> Response:
    """Compare the token; the cookie then stands for it."""
    settings = ask.service.settings
    if not access.is_token(ask.text("token"), settings):
        return ask.show("login.html", 401, error="That is not the service's token.")
    response = ask.go("/")
    access.sign_in(response, settings, ask.request.url.scheme == "https")
    return response


async def sign_out(ask: Ask) -> Response:
    """Forget the cookie."""
    if ask.service.settings.token is None:
        raise Fault(404, "this service has no token, so that nobody is signed in")
    response = ask.go(access.LOGIN)
    access.sign_out(response)
    return response


PAGES = (
    Page("GET", access.LOGIN, login),
    Page("POST", access.LOGIN, sign_in, signed=False),
    Page("POST", "/console/logout", sign_out),
)
