"""Searching and judging."""

from __future__ import annotations

import re

import pytest

from tests.service.console.conftest import Browser


def ids(page: str) -> list[str]:
    return re.findall(r'name="passage_id" value="([^"]*)"', page)


def test_hits_have_the_scores_of_each_head(browser: Browser) -> None:
    page = browser.get("/console/search?q=vector+database&k=3&weight_dense=1&weight_bm25=0.5")
    live = browser.client.app.state.service.live
    wanted = live.search("vector database", k=3, weights={"dense": 1, "bm25": 0.5})
    assert ids(page) == [hit.id for hit in wanted]
    assert f"dense {wanted[0].scores['dense']:.4f}" in page
    assert f"bm25 {wanted[0].scores['bm25']:.4f}" in page
    filtered = browser.get("/console/search", params={"q": "Apfel", "filter": '{"lang": "de"}'})
    assert ids(filtered) == ["apfel"]
    assert "Nothing was found" in browser.get("/console/search", params={"q": "x", "filter": '{"lang": "fr"}'})


def test_a_passage_is_text_whatever_it_holds(browser: Browser) -> None:
    page = browser.get("/console/search?q=%3Cscript%3Ealert(1)%3C/script%3E+vector")
    assert "evil" in ids(page)
    assert "<script>alert" not in page
    assert "<b>bold" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; vector &amp; &#39;quotes&#39;" in page


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"filter": "{lang"}, "the filter is no JSON"),
        ({"filter": '{"lang": {"like": 1}}'}, "like"),
        ({"k": "0"}, "whole number from 1 to 100"),
        ({"k": "²"}, "whole number"),
        ({"weight_dense": "nan"}, "the weight of dense is"),
        ({"weight_dense": "-1"}, "at least 0"),
    ],
)
def test_what_cannot_be_searched_is_said(browser: Browser, asked: dict[str, str], said: str) -> None:
    page = browser.get("/console/search", 400, params={"q": "vector", **asked})
    assert 'role="alert"' in page
    assert said in page


def test_a_vote_is_kept_under_the_reviewer(browser: Browser) -> None:
    page = browser.get("/console/search?q=vector")
    query_id = re.findall(r'name="query_id" value="(\w+)"', page)[0]
    page = browser.send("/console/judge", query_id=query_id, passage_id="milvus", action="relevant", address="q=vector")
    assert 'href="/console/search?q=vector#hit-1"' in page
    log = browser.client.app.state.service.live.feedback_log
    kept = log.get(query_id)
    assert [(action, id) for action, id, *_ in kept.events] == [("relevant", "milvus")]
    assert kept.events[0][2] == kept.client != ""
    fields = {"query_id": query_id, "passage_id": "milvus"}
    assert "no vote" in browser.send("/console/judge", 400, **fields, action="click")
    assert "not in the feedback log" in browser.send(
        "/console/judge", 400, **fields | {"query_id": "0" * 32}, action="unsure"
    )


def test_a_form_from_elsewhere_is_refused(browser: Browser) -> None:
    page = browser.get("/console/search?q=vector")
    query_id = re.findall(r'name="query_id" value="(\w+)"', page)[0]
    fields = {"query_id": query_id, "passage_id": "milvus", "action": "relevant"}
    assert "Origin" in browser.send("/console/judge", 403, origin=None, **fields)
    browser.send("/console/judge", 403, origin="http://evil.example", **fields)
    browser.send("/console/judge", 403, origin="null", **fields)
    for token in ("", "0" * 64, "é"):
        assert "not one of this console" in browser.send("/console/judge", 403, **fields, form_token=token)
    other = browser.client.cookies
    kept = dict(other)
    other.clear()
    browser.send("/console/judge", 403, **fields, form_token="0" * 64)
    other.update(kept)
    assert browser.client.app.state.service.live.feedback_log.get(query_id).events == []
    json = browser.client.post("/console/judge", json=fields, headers={"Origin": "http://127.0.0.1:8080"})
    assert json.status_code == 415


def test_what_a_strangers_page_made_the_browser_ask_is_not_remembered(browser: Browser) -> None:
    page = browser.get("/console/search?q=vector", headers={"Sec-Fetch-Site": "cross-site"})
    assert "was not remembered" in page
    assert not (browser.client.app.state.service.live.path / "feedback.sqlite3").exists()
