"""Two generations side by side."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from tests.service.console.conftest import Browser
from ultrarag.retrieve import LiveIndex
from ultrarag.service.console.compare import pair, sign_test


@pytest.fixture
def two(browser: Browser, minilm_encoder, quick_builds) -> LiveIndex:
    """The same encoder twice: what it finds is the same."""
    live = browser.client.app.state.service.live
    live.swap(live.build(minilm_encoder))
    return live


def hits(*ids: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(id=id) for id in ids]


def test_moved_new_and_gone_are_marked() -> None:
    made = pair("q", hits("a", "b", "c", "d"), hits("c", "b", "a", "e"))
    assert [(s.hit.id, s.mark, s.places) for s in made.right] == [
        ("c", "up", 2),
        ("b", "same", 0),
        ("a", "down", 2),
        ("e", "new", 0),
    ]
    assert [s.mark for s in made.left] == ["same", "same", "same", "gone"]
    assert made.changed
    blind = pair("q", hits("a", "b"), hits("b", "c"), blind=True)
    assert [s.mark for s in blind.left + blind.right] == ["only", "same", "same", "only"]
    assert not pair("q", hits("a"), hits("a")).changed


def test_one_generation_is_no_comparison(browser: Browser) -> None:
    assert "one generation only" in browser.get("/console/compare?q=vector")
    assert "no generation" in browser.get("/console/compare?q=vector&left=7", 404)


def test_both_sides_are_shown(browser: Browser, two: LiveIndex) -> None:
    page = browser.get("/console/compare", params={"q": "vector\nApfel\n\nvector", "k": "2"})
    assert "0 of 2 queries changed" in page
    assert page.count("<h3>Generation 1</h3>") == page.count("<h3>Generation 2</h3>") == 2
    assert "<script>alert" not in page
    only = browser.get("/console/compare", params={"q": "vector", "only": "1"})
    assert "1 without a change not shown" in only
    assert "<h3>Generation" not in only
    assert "at most 50" in browser.get("/console/compare", 400, params={"q": "\n".join(map(str, range(51)))})
    assert not (two.path / "feedback.sqlite3").exists()


def test_blind_says_afterwards_which_was_which(browser: Browser, two: LiveIndex) -> None:
    queries = [f"vector {number}" for number in range(12)]
    page = browser.get("/console/compare", params={"q": "\n".join(queries), "blind": "1"})
    assert "<h3>Generation" not in page
    assert page.count("<h3>A</h3>") == 12
    fields = {f"better_{number}": "a" for number in range(11)} | {"better_11": "same", "left": "1", "right": "2"}
    assert "no query was answered" in browser.send("/console/prefer", 400, q="vector", left="1", right="2")
    page = browser.send("/console/prefer", q="\n".join(queries), **fields)
    left, same, right = map(int, re.findall(r'<td class="num">(\d+)</td>', page)[:3])
    assert (left + right, same) == (11, 1)
    assert 0 < left < 11  # the sides change from query to query
    kept = json.loads((two.path / "service" / "preferences.jsonl").read_text())
    assert (kept["left"], kept["right"], kept["same"]) == (left, right, same)
    assert "vector" not in str(kept)
    browser.send("/console/prefer", 403, q="vector", form_token="0" * 64, **fields)


def test_chance_is_the_sign_tests() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(0, 5) == pytest.approx(2 / 32)
    assert sign_test(3, 7) == pytest.approx(0.34375)
