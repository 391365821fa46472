"""Access: who may see the console's pages, and that a form which is sent is one of ours."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from functools import lru_cache
from http.cookies import CookieError, SimpleCookie
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import Response

from ultrarag.service.faults import Fault
from ultrarag.service.settings import Settings

#: The console lies at / and below this.
BELOW = "/console/"
LOGIN = "/console/login"
#: What a browser gets before it has signed in; of /console/static/ all is.
_OPEN = (LOGIN, "/console/static/")
#: Cookie of who has signed in, and of who judges: the second one tells two people's votes apart.
SESSION, REVIEWER = "ultrarag_session", "ultrarag_reviewer"
#: Seconds after which one signs in again, and for which a browser is the same reviewer.
SESSION_SECONDS, REVIEWER_SECONDS = 12 * 3600, 365 * 86_400
#: In the folder of the service's work: what forms are signed with where there is no token.
KEY_FILE = "console.key"


def is_page(path: str, headers: Headers) -> bool:
    """Whether a request is for the console: / is, for a browser; other clients get the list of endpoints there."""
    return path.startswith(BELOW) or (path == "/" and "text/html" in headers.get("accept", ""))


def admit(path: str, headers: Headers, settings: Settings) -> None:
    """Let a request for a page pass; Fault 303 sends who has not signed in to the form for it."""
    if settings.token is None or path.startswith(_OPEN) or _signed_in(headers, settings):
        return
    if headers.get("hx-request"):
        raise Fault(401, "sign in again", headers={"HX-Redirect": LOGIN})
    raise Fault(303, "sign in first", headers={"Location": LOGIN})


def _signed_in(headers: Headers, settings: Settings) -> bool:
    until, _, mac = cookie(headers, SESSION).partition(".")
    if not (until.isascii() and until.isdigit() and len(until) < 16):
        return False
    return _same(mac, _sign(settings, f"session {until}")) and int(until) > time.time()


def sign_in(response: Response, settings: Settings, secure: bool) -> None:
    """Give a browser the cookie of who knows the token; the token itself is not in it."""
    until = str(int(time.time()) + SESSION_SECONDS)
    _set(response, SESSION, f"{until}.{_sign(settings, f'session {until}')}", SESSION_SECONDS, secure)


def sign_out(response: Response) -> None:
    """Take the cookie back."""
    response.delete_cookie(SESSION, path="/", httponly=True, samesite="strict")


def is_token(given: str, settings: Settings) -> bool:
    """Whether somebody knows the service's token."""
    return settings.token is not None and _same(given.strip(), settings.token)


def reviewer(headers: Headers) -> str:
    """Who a browser is among those that judge; "" for one that has no such cookie yet."""
    found = cookie(headers, REVIEWER)
    return found if len(found) == 32 and found.isascii() and found.isalnum() else ""


def new_reviewer() -> str:
    """The cookie of a browser that has none."""
    return secrets.token_hex(16)


def keep_reviewer(response: Response, who: str, secure: bool) -> None:
    """Remember who a browser is."""
    _set(response, REVIEWER, who, REVIEWER_SECONDS, secure)


def form_token(settings: Settings, who: str) -> str:
    """What a form of ours carries, for one browser; a stranger's page can neither read nor guess it."""
    return _sign(settings, f"form {who}")


def check_form(headers: Headers, given: str, settings: Settings, who: str) -> None:
    """Raise Fault 403 for a form that may have been sent from a stranger's page.

    The guard has compared Origin with our own name already; here it must be there.
    """
    if headers.get("origin") is None:
        raise Fault(403, "the browser did not say which page sent this form (Origin)")
    if not who or not _same(given, form_token(settings, who)):
        raise Fault(403, "this form is not one of this console's, or too old: open the page again")


def cookie(headers: Headers, name: str) -> str:
    """A cookie of a request; "" where there is none."""
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


def _set(response: Response, name: str, value: str, seconds: int, secure: bool) -> None:
    response.set_cookie(name, value, max_age=seconds, path="/", httponly=True, samesite="strict", secure=secure)


def _sign(settings: Settings, text: str) -> str:
    key = settings.token.encode() if settings.token else _kept_key(settings.work / KEY_FILE)
    return hmac.new(key, f"ultrarag console {text}".encode(), hashlib.sha256).hexdigest()


def _same(left: str, right: str) -> bool:
    return hmac.compare_digest(left.encode("utf-8", "surrogateescape"), right.encode())


@lru_cache(maxsize=16)
def _kept_key(path: Path) -> bytes:
    """A key that all workers of a service share, made by the first of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))
    try:
        os.link(draft, path)  # whole, or not at all; of two workers one is first
    except FileExistsError:
        pass
    finally:
        draft.unlink()
    return path.read_bytes()
