"""A refresh that is started, watched and cancelled in the console; the learning itself is tested elsewhere."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service.console.conftest import Browser, browsers
from ultrarag.errors import StoppedError
from ultrarag.retrieve import LiveIndex


class Learning:
    """In the place of `LiveIndex.refresh`: goes a step, and waits to be cancelled."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.stop = threading.Event()

    def refresh(self, **asked: Any) -> None:
        self.asked = asked
        for step, loss in ((2, 1.5), (9, 0.9), (1, 2.0), (3, 0.7)):  # a first run, and the one that goes on
            told = {"step": step, "total": 10, "loss": loss, "loss_step": step, "seconds_left": 75.0}
            asked["on_progress"]({"stage": f"finetune {step}", **told})
        asked["on_progress"]({"stage": "finetune", **told})
        assert self.stop.wait(30)
        raise StoppedError("it was cancelled")

    def cancel(self) -> bool:
        self.stop.set()
        return True


@pytest.fixture
def learning(monkeypatch) -> Learning:
    found = Learning()
    monkeypatch.setattr(LiveIndex, "refresh", lambda self, **asked: found.refresh(**asked))
    monkeypatch.setattr(LiveIndex, "cancel_refresh", lambda self: found.cancel())
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(json.dumps({"query": "q", "pos": ["p"]}) + "\n")
    (tmp_path / "secret.jsonl").write_text("{}")
    return folder


@pytest.fixture
def learner(index: LiveIndex, data: Path, learning: Learning) -> Iterator[Browser]:
    yield from browsers(index, data_dir=str(data))


def until(browser: Browser, path: str, words: str) -> str:
    deadline = time.monotonic() + 30
    while words not in (page := browser.get(path)):
        assert time.monotonic() < deadline, page
        time.sleep(0.05)
    return page


def test_it_is_started_watched_cancelled_and_taken_up_again(learner: Browser, learning: Learning, data: Path) -> None:
    page = learner.get("/console/refresh")
    assert 'value="rows.jsonl"' in page
    fields = {"source": "file", "train_data": "rows.jsonl", "max_steps": "5", "learning_rate": "3e-5", "effort": "full"}
    page = learner.send("/console/refresh", **fields)
    jobs = learner.client.app.state.service.jobs
    job = jobs.all()[0]
    address = f"/console/refresh/{job.id}"
    page = until(learner, address, "step 3 of 10, 1 min 15 s left")
    assert f'data-events="{address}/events?after=' in page
    assert learning.asked["train_data"] == [str(data / "rows.jsonl")]
    assert (learning.asked["max_steps"], learning.asked["gate"]) == (5, False)
    assert "is running" in learner.send("/console/refresh", 409, **fields)
    assert "running" in learner.get("/")
    part = learner.get(address, headers={"HX-Request": "true"})
    assert "<html" not in part
    assert "loss by step: from 2 to 0.7 over 2 points" in part
    assert "1.5000" in part  # of the run before, in the table alone
    learner.send(f"{address}/cancel", 403, form_token="x")
    learner.send(f"{address}/cancel")
    page = until(learner, address, "Go on with it")
    assert "data-events" not in page
    told = learner.client.get(f"{address}/events").text
    assert told.index("event: started") < told.index("event: progress") < told.index("event: cancelled")
    learning.stop.clear()
    learner.send(f"{address}/resume")
    until(learner, address, "step 3 of 10")
    learner.send(f"{address}/cancel")
    until(learner, address, "Go on with it")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "choose what to learn from"),
        ({"source": "file"}, "name the file"),
        ({"source": "file", "train_data": "../secret.jsonl"}, "not in the folder"),
        ({"source": "file", "train_data": "/etc/passwd"}, "not in the folder"),
        ({"source": "feedback", "eval_data": "../secret.jsonl"}, "not in the folder"),
        ({"source": "feedback", "effort": "all"}, "no effort"),
        ({"source": "feedback", "max_steps": "x"}, "whole number"),
    ],
)
def test_what_cannot_be_started_is_said(learner: Browser, fields: dict[str, str], said: str) -> None:
    assert said in learner.send("/console/refresh", 400, **fields)
    assert learner.client.app.state.service.jobs.all() == []


def test_a_dry_run_says_what_it_would_do_and_starts_nothing(learner: Browser, data: Path) -> None:
    fields = {"source": "file", "train_data": "rows.jsonl", "max_steps": "5", "effort": "full"}
    page = learner.send("/console/refresh", dry_run="1", **fields)
    assert "Nothing stands against it." in page
    for name, told in (("Rows", "1"), ("Steps", "about 5"), ("Seen before", "none of the rows, as far as is known")):
        assert f'<th scope="row">{name}</th><td>{told}</td>' in page
    assert '<input type="hidden" name="train_data" value="rows.jsonl">' in page
    assert 'name="dry_run"' not in page
    live = learner.client.app.state.service.live
    for number in range(40):
        hits = live.search(f"vector {number}", heads=["dense"], log=True)
        live.feedback(hits.query_id, "milvus", "relevant")
    held_out = len(live.training_rows().qrels)
    page = learner.send("/console/refresh", dry_run="1", source="feedback", gate="1")
    assert f"<td>{held_out} queries on the index</td>" in page
    assert "by query: 100.0% of" in page  # all have the same answer
    assert learner.client.app.state.service.jobs.all() == []


def test_without_a_folder_no_file_is_read(browser: Browser) -> None:
    assert "reads no files" in browser.send("/console/refresh", 400, source="file", train_data="rows.jsonl")
    assert browser.get("/console/refresh/nothing", 404)


def test_feedback_is_counted_by_the_rules(learner: Browser, learning: Learning) -> None:
    live = learner.client.app.state.service.live
    for number in range(10):
        hits = live.search(f"vector {number}", heads=["dense"], log=True)
        live.feedback(hits.query_id, "milvus", "relevant")
    rows = live.training_rows()
    page = learner.get("/console/refresh")
    assert f"{len(rows.rows)} by vote" in page
    assert f'<th scope="row">Rows</th><td>{len(rows.rows)}</td>' in page
    assert "A schedule would wait: too little to learn from yet" in page
    learner.send("/console/refresh", source="feedback", gate="1")
    job = learner.client.app.state.service.jobs.all()[0]
    until(learner, f"/console/refresh/{job.id}", "step 3 of 10")
    assert (learning.asked["train_data"], learning.asked["gate"]) == ("feedback", True)
    learning.cancel()
