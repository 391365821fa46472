"""The queue of what is worth a look, and the files that follow from it."""

from __future__ import annotations

import json
import re

from tests.service.console.conftest import Browser
from ultrarag.retrieve.feedback import LoggedQuery
from ultrarag.service.console import disagreements
from ultrarag.service.console.labels import queue


def logged(text: str, *events: tuple[str, str, str], key: int = 1, id: str = "1") -> LoggedQuery:
    return LoggedQuery(id, 0.0, key, text, "f", 1, {}, [], "", [(*event, 0.0) for event in events])


def test_the_queue_is_what_is_not_settled_the_most_urgent_first() -> None:
    found = queue(
        [
            logged("a", ("click", "clicked", "x"), ("click", "clicked", "y"), ("click", "once", "x")),
            logged("a", ("cite", "cited", ""), ("unsure", "doubted", "x"), ("relevant", "settled", "x"), id="2"),
            logged("a", ("relevant", "argued", "x"), ("not_relevant", "argued", "y"), ("click", "settled", "z")),
            logged("a", ("not_relevant", "changed", "x"), ("relevant", "changed", "x"), ("answer_down", "", "x")),
            logged("", ("click", "hashed", "x"), key=2),
        ]
    )
    assert [(reason, item.passage_id) for reason, item in found] == [
        ("disagreement", "argued"),
        ("unsure", "doubted"),
        ("cited", "cited"),
        ("clicked", "clicked"),
        ("clicked", "once"),
    ]


def test_an_answer_that_was_voted_down_brings_what_it_was_made_of() -> None:
    hits = [(f"hit {number}", 1.0) for number in range(5)]
    uncited = logged("a", ("answer_down", "", "x"))
    cited = logged("b", ("cite", "c", "x"), ("answer_down", "", "x"), key=2)
    uncited.hits.extend(hits)
    cited.hits.extend([*hits, ("c", 0.5)])
    found = queue([uncited, cited, logged("a", ("relevant", "hit 1", "x"))])
    assert sorted((reason, item.query, item.passage_id) for reason, item in found) == [
        ("down", "a", "hit 0"),
        ("down", "a", "hit 2"),
        ("down", "b", "c"),
    ]


def test_generations_that_disagree_are_judged_where_they_do(
    browser: Browser, m3_encoder, monkeypatch, quick_builds
) -> None:
    monkeypatch.setattr(disagreements, "TOP", 2)
    live, address = browser.client.app.state.service.live, "/console/labels?why=generations"
    queries = ["vector databases", "a fruit that is red", "deep water", "<b>search</b>"]
    asked = {query: live.search(query, heads=["dense"], log=True) for query in queries}
    assert "Nothing waits" in browser.get(address)  # there is one generation
    built = live.build(m3_encoder)
    with live.searcher(built) as other:
        apart = {
            (asked[query].query_id, id)
            for query in queries
            for id in {hit.id for hit in asked[query][:2]}
            ^ {hit.id for hit in other.search(query, k=2, heads=["dense"])}
        }
    page = browser.get(address)
    hit = r'name="query_id" value="(\w+)">\s*<input type="hidden" name="passage_id" value="([^"]+)"'
    shown = re.findall(hit, page)
    assert set(shown) == apart != set()
    assert f"of generation {built.id}, not among the first" in page
    assert "<b>search" not in page
    query_id, passage_id = shown[0]
    fields = {"query_id": query_id, "passage_id": passage_id, "action": "relevant", "back": "/console/labels"}
    browser.send("/console/judge", **fields)
    assert set(re.findall(hit, browser.get(address))) & apart == apart - {shown[0]}


def test_hits_are_judged_and_leave_the_queue(browser: Browser) -> None:
    assert "Nothing waits" in browser.get("/console/labels")
    assert "nothing to export" in browser.get("/console/labels/rows.jsonl", 409)
    live = browser.client.app.state.service.live
    hits = live.search("<i>vector</i>", heads=["dense"], log=True)
    live.feedback(hits.query_id, "evil", "click")
    live.feedback(hits.query_id, "milvus", "unsure", client="ann")
    page = browser.get("/console/labels")
    assert "1 to 2 of 2" in page
    assert re.search(r"1 vote · last by [0-9a-f]{6}, 20\d\d-", page)
    assert "<i>vector" not in page
    assert "<script>alert" not in page
    assert re.findall(r'name="passage_id" value="(\w+)"', page) == ["milvus", "evil"]
    assert re.findall(r'name="passage_id" value="(\w+)"', browser.get("/console/labels?why=clicked")) == ["evil"]
    assert "no reason" in browser.get("/console/labels?why=x", 400)
    fields = {"query_id": hits.query_id, "passage_id": "evil", "action": "not_relevant", "back": "/console/labels"}
    assert 'href="/console/labels?' in browser.send("/console/judge", **fields)
    fields["back"] = "https://elsewhere.example/"
    assert 'href="/console/search?' in browser.send("/console/judge", **fields)
    assert "1 to 1 of 1" in browser.get("/console/labels")
    live.delete(["milvus"])
    assert "is not in the index any more" in browser.get("/console/labels")


def test_rows_and_qrels_are_those_of_the_rules(browser: Browser) -> None:
    live = browser.client.app.state.service.live
    for number in range(40):
        hits = live.search(f"vector {number}", heads=["dense"], log=True)
        live.feedback(hits.query_id, "milvus", "relevant")
        live.feedback(hits.query_id, "apfel", "not_relevant")
    made = live.training_rows()
    response = browser.client.get("/console/labels/rows.jsonl")
    assert [json.loads(line) for line in response.text.splitlines()] == made.rows
    assert response.headers["Content-Disposition"] == 'attachment; filename="rows.jsonl"'
    head, *lines = browser.get("/console/labels/qrels.tsv").splitlines()
    assert head == "query-id\tcorpus-id\tscore"
    wanted = {(q, id, str(score)) for q, judged in made.qrels.items() for id, score in judged.items()}
    assert {tuple(line.split("\t")) for line in lines} == wanted != set()
    asked = [json.loads(line) for line in browser.get("/console/labels/queries.jsonl").splitlines()]
    assert {line["_id"]: line["text"] for line in asked} == {id: made.queries[id] for id in made.qrels}
