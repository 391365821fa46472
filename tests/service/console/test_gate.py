"""What the gate measured, and the way past it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.service.console.conftest import Browser, browsers
from tests.service.console.test_refresh import until
from ultrarag.errors import GateError
from ultrarag.retrieve import LiveIndex, RefreshReport

ROWS = {"query": "q", "pos": ["p"]}


def report(generation: int, output: Path, forced: bool) -> RefreshReport:
    change = {"difference": -0.25, "low": -0.4, "high": -0.1, "p_value": 0.001, "queries": 30}
    return RefreshReport(
        outcome="swapped" if forced else "refused",
        refused=None if forced else "generation 2 is significantly worse <b>",
        forced=forced,
        checkpoint=str(output),
        index="kb",
        old_generation=1,
        generation=generation,
        passages=5,
        metrics={"before": {"nDCG@10": 0.75}, "after": {"nDCG@10": 0.5}},
        verdict={"metric": "nDCG@10", "old": 0.75, "new": 0.5, "change": change, "notes": []},
        measured_on="30 queries on the index",
        gained={"q<1>": 0.1, "q2": 0.3},
        lost={f"lost {number}": -number / 100 for number in range(1, 31)},
        seconds={"swap": 1.0},
        lineage={},
        steps=3,
        loss=0.5,
        notes=[],
        ladder=[],
        request={},
        html="",
        queries={"q2": "what is <i>milvus</i>?", "lost 30": "how large?"},
    )


@pytest.fixture
def refused(index: LiveIndex, tmp_path: Path, minilm_encoder, monkeypatch, quick_builds) -> Iterator[Browser]:
    """The gate has refused a generation, which is ready."""
    built = index.build(minilm_encoder)

    def refresh(self: LiveIndex, **asked: Any) -> RefreshReport:
        made = report(built.id, Path(asked["output_dir"]), asked["force"])
        Path(asked["output_dir"]).mkdir(exist_ok=True)
        (Path(asked["output_dir"]) / "refresh.json").write_text(json.dumps(asdict(made)))
        if not asked["force"]:
            raise GateError(str(made.refused))
        self.swap(built)
        return made

    monkeypatch.setattr(LiveIndex, "refresh", refresh)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(json.dumps(ROWS))
    for browser in browsers(index, data_dir=str(folder)):
        browser.send("/console/refresh", source="file", train_data="rows.jsonl")
        until(browser, "/console/refresh", "refused")
        yield browser


def test_before_any_refresh_it_says_what_to_do(browser: Browser) -> None:
    assert "No refresh was judged yet" in browser.get("/console/gate")
    assert "has no verdict" in browser.get("/console/gate?job=x", 404)


def test_the_verdict_its_interval_and_its_queries(refused: Browser) -> None:
    page = refused.get("/console/gate")
    for part in ("0.7500", "0.5000", "-0.4000 to -0.1000", "2 queries gained", "30 queries lost", "q&lt;1&gt;"):
        assert part in page
    assert "significantly worse &lt;b&gt;" in page
    assert page.index("lost 30") < page.index("lost 29")
    assert "The 25 largest changes are shown." in page
    assert page.index("q2") < page.index("q&lt;1&gt;")
    assert "<td>what is &lt;i&gt;milvus&lt;/i&gt;? <code>q2</code></td>" in page
    assert "<td>how large? <code>lost 30</code></td>" in page


def test_it_is_forced_with_a_reason_that_is_kept(refused: Browser) -> None:
    service = refused.client.app.state.service
    job = service.jobs.all()[0]
    assert "Force generation 2" in refused.get("/console/gate")
    assert "give the reason" in refused.send("/console/force", 400, job=job.id, reason="because")
    refused.send("/console/force", 403, job=job.id, reason="the queries are wrong", form_token="x")
    assert service.live.status()["live"]["id"] == 1
    refused.send("/console/force", job=job.id, reason="the queries are wrong <i>")
    until(refused, f"/console/refresh/{job.id}", "swapped, generation 1 → 2")
    assert service.live.status()["live"]["id"] == 2
    page = refused.get("/console/gate")
    assert "Forced because: the queries are wrong &lt;i&gt;" in page
    assert "Force generation" not in page
    assert service.jobs.get(job.id).request["reason"] == "the queries are wrong <i>"
    assert "only one that the gate refused" in refused.send(
        "/console/force", 409, job=job.id, reason="once more, please"
    )
