"""The queue of what is worth a look, and the files that follow from it."""

from __future__ import annotations

import json
import re

from tests.service.console.conftest import Browser
from ultrarag.retrieve.feedback import LoggedQuery
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


def test_hits_are_judged_and_leave_the_queue(browser: Browser) -> None:
    assert "Nothing waits" in browser.get("/console/labels")
    assert "nothing to export" in browser.get("/console/labels/rows.jsonl", 409)
    live = browser.client.app.state.service.live
    hits = live.search("<i>vector</i>", heads=["dense"], log=True)
    live.feedback(hits.query_id, "evil", "click")
    live.feedback(hits.query_id, "milvus", "unsure", client="ann")
    page = browser.get("/console/labels")
    assert "1 to 2 of 2" in page
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
