"""The first page, who gets in, and what every page has."""

from __future__ import annotations

import re
import time
from types import SimpleNamespace

import pytest

from tests.service.console.conftest import TOKEN, Browser
from ultrarag.service.console import access
from ultrarag.service.console.page import shown_bytes, shown_seconds, shown_share, shown_wait
from ultrarag.service.console.table import PAGES

#: Pages that are there without more, with a search; downloads have no page.
SCREENS = ["/", *(page.path for page in PAGES if page.method == "GET" and not {"{", "."} & set(page.path))]
SCREENS.append("/console/search?q=vector")


def test_now_shows_what_is_live(browser: Browser) -> None:
    page = browser.get("/")
    live = browser.client.app.state.service.live
    for part in ("<dt>Passages</dt><dd>5</dd>", live.fingerprint[:12], "No search was remembered yet.", "numpy, fp32"):
        assert part in page
    assert not (live.path / "feedback.sqlite3").exists()
    hits = live.search("vector", heads=["dense"], log=True)
    live.feedback(hits.query_id, "milvus", "relevant")
    part = browser.get("/", headers={"HX-Request": "true"})
    assert "<html" not in part
    assert "<dt>Relevant</dt><dd>1</dd>" in part


def test_now_shows_the_load_of_the_last_minute(browser: Browser) -> None:
    page = browser.get("/")
    assert "<dt>A second</dt><dd>0.0</dd>" in page
    assert "<dt>Median wait</dt><dd>–</dd>" in page
    browser.get("/console/search", params={"q": "vector", "weight_dense": "1"})
    assert browser.client.app.state.service.load.last_minute()["searches_per_second"] > 0
    assert re.search(r"<dt>99th percentile</dt><dd>[\d.]+ m?s</dd>", browser.get("/"))


def test_since_a_swap_the_generations_are_compared_and_one_click_rolls_back(
    browser: Browser, minilm_encoder, monkeypatch, quick_builds
) -> None:
    live = browser.client.app.state.service.live
    assert "Since the swap" not in browser.get("/")
    votes = [live.search(f"vector {number}", heads=["dense"], log=True) for number in range(20)]
    for hits in votes:
        live.feedback(hits.query_id, hits[0].id, "cite")
    live.swap(live.build(minilm_encoder))
    for number in range(20):
        live.search(f"vector {number}", heads=["dense"], log=True)
    page = browser.get("/")
    for part in (
        "Generation 2 is worse than generation 1: a hit cited.",
        '<th scope="row">A hit cited</th><td class="num">100.0 % of 20</td><td class="num">0.0 % of 20</td>',
        "not known yet",
        "Roll back to generation 1",
    ):
        assert part in page
    part = browser.get("/?part=watch", headers={"HX-Request": "true"})
    assert "<html" not in part
    assert "Since the swap" in part
    assert "Searches of the last minute" not in part
    fields = dict(re.findall(r'name="(\w+)" value="(\w+)"', part))
    browser.send("/console/rollback", 403, **{**fields, "form_token": "x"})
    assert live.status()["live"]["id"] == 2
    browser.send("/console/rollback", **fields)
    assert live.status()["live"]["id"] == 1
    assert "Roll back to generation 2" in browser.get("/")


def test_other_clients_still_get_the_list_of_endpoints(browser: Browser) -> None:
    response = browser.client.get("/", headers={"Accept": "*/*"})
    assert response.headers["content-type"].startswith("text/plain")
    assert "/v1/search" in response.text


@pytest.mark.parametrize("path", SCREENS)
def test_every_page_allows_nothing_from_elsewhere_and_no_script_in_it(browser: Browser, path: str) -> None:
    response = browser.client.get(path)
    assert response.status_code == 200
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    assert response.headers["X-Frame-Options"] == "DENY"
    assert response.headers["Cache-Control"] == "no-store"
    page = response.text
    assert re.findall(r"<script(?! src=\"/console/static/)", page) == []
    assert re.findall(r"\son\w+=|\sstyle=|javascript:|https?://", page) == []
    assert page.count("<h1>") == 1
    assert 'lang="en"' in page
    ids = set(re.findall(r'\sid="([^"]+)"', page))
    named = set(re.findall(r'(?:for|aria-labelledby|aria-describedby)="([^"]+)"', page))
    assert named <= ids
    fields = re.findall(r"<(?:input|select|textarea)\b[^>]*>", page)
    for field in fields:
        if 'type="hidden"' not in field and "aria-label" not in field:
            found = re.search(r'\sid="([^"]+)"', field)
            assert found, field
            assert f'for="{found.group(1)}"' in page, field
    cookie = response.headers.get("set-cookie", "")
    assert not cookie or {"HttpOnly", "SameSite=strict"} <= set(cookie.split("; "))


def test_files_are_its_own_and_no_others(browser: Browser) -> None:
    for name in ("htmx.min.js", "console.css", "console.js", "LICENSE.htmx"):
        assert browser.get(f"/console/static/{name}")
    for name in ("table.py", "..%2Fpage.py", "%2e%2e/page.py", "nothing"):
        assert browser.client.get(f"/console/static/{name}").status_code == 404


def test_nobody_gets_in_without_the_token(guarded: Browser) -> None:
    client = guarded.client
    for path in ("/", *(page.path for page in PAGES if page.path != access.LOGIN)):
        response = client.get(path, follow_redirects=False)
        assert (response.status_code, response.headers["location"]) == (303, "/console/login"), path
    again = client.get("/", headers={"HX-Request": "true"})
    assert (again.status_code, again.headers["HX-Redirect"]) == (401, "/console/login")
    assert client.get("/v1/status").status_code == 401
    assert 'type="password"' in guarded.get("/")
    assert "not the service&#39;s token" in guarded.send("/console/login", 401, token="wrong")
    assert "did not say which page" in guarded.send("/console/login", 403, origin=None, token=TOKEN)
    assert client.get("/", follow_redirects=False).status_code == 303


def test_the_cookie_stands_for_the_token_and_ends(guarded: Browser, monkeypatch) -> None:
    client = guarded.client
    response = client.post(
        "/console/login", data={"token": TOKEN}, headers={"Origin": "http://127.0.0.1:8080"}, follow_redirects=False
    )
    assert response.status_code == 303
    cookie = response.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert TOKEN not in cookie
    assert "<h1>Now</h1>" in guarded.get("/")
    assert client.get("/v1/status").status_code == 401  # the API is not asked by cookie
    session = client.cookies[access.SESSION]
    until, _, mac = session.partition(".")
    for forged in (f"{int(until) + 1}.{mac}", until, f"{until}.", "x.y", f"²{until}.{mac}", ""):
        response = client.get("/", headers={"Cookie": f"{access.SESSION}={forged}".encode()}, follow_redirects=False)
        assert response.status_code == 303, forged
    later = time.time() + access.SESSION_SECONDS + 1
    monkeypatch.setattr(access, "time", SimpleNamespace(time=lambda: later))
    assert client.get("/", follow_redirects=False).status_code == 303
    monkeypatch.undo()
    found = re.search(r'name="form_token" value="(\w+)"', guarded.get("/"))
    assert found
    assert "Sign in" in guarded.send("/console/logout", form_token=found.group(1))
    assert client.get("/", follow_redirects=False).status_code == 303


def test_numbers_are_shown_for_people() -> None:
    assert [shown_bytes(n) for n in (12, 1536, 5 << 30)] == ["12 B", "1.5 KiB", "5.0 GiB"]
    assert [shown_seconds(n) for n in (None, 0, 75, 7260)] == ["", "0 s", "1 min 15 s", "2 h 1 min"]
    assert [shown_wait(n) for n in (None, 0.0123, 0.0004, 1.26)] == ["–", "12 ms", "0 ms", "1.3 s"]
    assert [shown_share(n) for n in ((0, 0), (3, 40), (1000, 4000))] == ["–", "7.5 % of 40", "25.0 % of 4,000"]
