"""Refreshes as jobs: watched, refused, cut off and taken up again; swaps and rollbacks."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.finetune.test_run import ROWS
from tests.retrieve.conftest import checkpoint, other, tiny  # noqa: F401  fixtures
from tests.retrieve.servers import free_port, wait_for
from tests.service.running import Running
from tests.service.test_command import started
from ultrarag.errors import GateError, StoppedError
from ultrarag.retrieve.live import LiveIndex
from ultrarag.service.jobs import Job, Jobs

TEXTS = sorted({text for row in ROWS for text in (*row["pos"], *row["neg"])})
IDS = {text: f"p{number}" for number, text in enumerate(TEXTS)}
GATE = {
    "queries": {f"q{number}": row["query"] for number, row in enumerate(ROWS)},
    "qrels": {f"q{number}": {IDS[row["pos"][0]]: 1} for number, row in enumerate(ROWS)},
}
ARGUMENTS = {"max_steps": 2, "per_device_train_batch_size": 4, "train_group_size": 2, "learning_rate": 1e-3, "seed": 1}


def filled(path: Path, encoder) -> LiveIndex:
    live = LiveIndex.create(path, encoder, backend="numpy")
    live.add({"id": id, "text": text} for text, id in IDS.items())
    return live


@pytest.fixture
def learner(tmp_path: Path, tiny) -> Iterator[Running]:  # noqa: F811
    data = tmp_path / "data"
    data.mkdir()
    (data / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    running = Running(filled(tmp_path / "kb", tiny), data_dir=str(data), weights={"dense": 1.0})
    yield running
    running.stop()


def ended(running: Running, id: str) -> dict[str, Any]:
    deadline = time.monotonic() + 240
    while (job := running.get(f"/v1/jobs/{id}").json())["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return job


def streamed(running: Running, path: str, **options: Any) -> list[dict[str, Any]]:
    return streamed_by(running.client, path, **options)


def streamed_by(client: httpx2.Client, path: str, **options: Any) -> list[dict[str, Any]]:
    with client.stream("GET", path, **options) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        return [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line.startswith("data: ")]


class Refresh:
    """Stands in for `LiveIndex.refresh`: waits until it is let go, or told to stop."""

    def __init__(self, live: LiveIndex, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        self.go, self.stop, self.error = threading.Event(), threading.Event(), error
        monkeypatch.setattr(live, "refresh", self.refresh)
        monkeypatch.setattr(live, "cancel_refresh", lambda: bool(self.stop.set() or True))

    def refresh(self, on_progress, isolate, **asked: Any) -> Any:
        assert isolate
        self.asked.append(asked)
        on_progress({"stage": "finetune", "step": 1, "total": 2, "seconds_left": 3.5, "cancelled": False})
        while not self.go.wait(0.01):
            if self.stop.is_set():
                raise StoppedError("stopped, and all that was done is kept")
        if self.error:
            raise self.error
        return type("Report", (), {"to_dict": lambda self: {"outcome": "swapped"}})()


@pytest.mark.usefixtures("quick_builds")
def test_a_refresh_runs_beside_searches_and_swaps(learner: Running) -> None:
    body = {"rows": ROWS, "gate": GATE, "force": True, "reason": "a test", "arguments": ARGUMENTS}
    asked = learner.post("/v1/refresh", {**body, "search": {"heads": ["dense"]}})
    assert asked.status_code == 202, asked.text
    id = asked.json()["id"]
    assert asked.headers["Location"] == f"/v1/jobs/{id}"
    assert learner.post("/v1/refresh", body).status_code == 409
    assert learner.get("/v1/status").json()["service"]["job"] == id
    seen = set()
    while learner.get(f"/v1/jobs/{id}").json()["state"] == "running":
        seen.add(learner.post("/v1/search", {"query": ROWS[0]["query"]}).json()["generation"])
        time.sleep(0.05)
    job = ended(learner, id)
    assert job["state"] == "done", job["error"]
    assert job["report"]["outcome"] == "swapped"
    assert job["request"]["reason"] == "a test"
    events = streamed(learner, f"/v1/jobs/{id}/events")
    assert [event["event"] for event in events][:: len(events) - 1] == ["started", "done"]
    assert learner.post("/v1/search", {"query": "x"}).json()["generation"] == 2
    assert seen <= {1, 2}
    back = learner.post("/v1/rollback").json()
    assert (back["old"]["id"], back["new"]["id"]) == (2, 1)
    assert learner.post("/v1/search", {"query": "x"}).json()["generation"] == 1
    assert learner.client.delete(f"/v1/jobs/{id}").json() == {"removed": id}
    assert learner.get("/v1/jobs").json() == {"jobs": []}


def test_a_job_is_watched_and_cancelled_and_goes_on(learner: Running, monkeypatch) -> None:
    fake = Refresh(learner.live, monkeypatch)
    body = {"train_data": ["rows.jsonl"], "gate": False, "arguments": {"learning_rate": 1e-4}}
    id = learner.post("/v1/refresh", body).json()["id"]
    events: list[dict[str, Any]] = []
    watcher = threading.Thread(target=lambda: events.extend(streamed(learner, f"/v1/jobs/{id}/events")))
    watcher.start()
    deadline = time.monotonic() + 60
    while learner.get(f"/v1/jobs/{id}").json()["progress"].get("stage") != "finetune":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert learner.post(f"/v1/jobs/{id}/cancel").status_code == 202
    assert ended(learner, id)["state"] == "cancelled"
    watcher.join(60)
    assert [event["event"] for event in events] == ["started", "progress", "cancelled"]
    assert events[1]["seconds_left"] == 3.5
    assert learner.post(f"/v1/jobs/{id}/cancel").status_code == 409
    fake.stop.clear()
    fake.go.set()
    assert learner.post(f"/v1/jobs/{id}/resume").status_code == 202
    assert ended(learner, id)["state"] == "done"
    assert fake.asked[0] == fake.asked[1]
    assert fake.asked[0]["train_data"] == [str(Path(learner.service.settings.data_dir or "") / "rows.jsonl")]
    assert learner.post(f"/v1/jobs/{id}/resume").status_code == 409
    last = streamed(learner, f"/v1/jobs/{id}/events", headers={"Last-Event-ID": "3"})
    assert [event["event"] for event in last if event["event"] != "progress"] == ["started", "done"]


def test_the_gates_refusal_is_a_jobs_end(learner: Running, monkeypatch) -> None:
    fake = Refresh(learner.live, monkeypatch, GateError("nDCG@10 0.9 -> 0.1"))
    fake.go.set()
    id = learner.post("/v1/refresh", {"rows": ROWS}).json()["id"]
    assert (ended(learner, id)["state"], ended(learner, id)["error"]) == ("refused", "nDCG@10 0.9 -> 0.1")
    assert 'ultrarag_jobs_total{kind="refresh",state="refused"} 1.0' in learner.get("/metrics").text


def test_a_stopped_service_leaves_a_job_that_goes_on(tmp_path, tiny, monkeypatch) -> None:  # noqa: F811
    running = Running(filled(tmp_path / "kb", tiny))
    Refresh(running.live, monkeypatch)
    id = running.post("/v1/refresh", {"rows": ROWS}).json()["id"]
    running.stop()
    live = LiveIndex.open(tmp_path / "kb", tiny)
    fake = Refresh(live, monkeypatch)
    fake.go.set()
    again = Running(live, resume=True)
    try:
        assert ended(again, id)["state"] == "done"
        assert Path(fake.asked[0]["train_data"]).read_text(encoding="utf-8").count("\n") == len(ROWS)
    finally:
        again.stop()


def test_a_job_ends_while_the_requests_of_a_stopping_service_go_on(learner: Running, monkeypatch) -> None:
    """A signal says so; waiting for the requests first, a stop took as long as both."""
    Refresh(learner.live, monkeypatch)
    id = learner.post("/v1/refresh", {"rows": ROWS}).json()["id"]
    jobs = learner.service.jobs
    try:
        jobs.stop()
        wait_for(lambda: jobs.get(id).state == "interrupted", 20)
    finally:
        jobs._closing = False  # for the tests that share it


def test_jobs_report_where_the_service_says(tmp_path, tiny, monkeypatch) -> None:  # noqa: F811
    with filled(tmp_path / "kb", tiny) as live:
        fake = Refresh(live, monkeypatch)
        fake.go.set()
        jobs = Jobs(live, tmp_path / "jobs", report_to=("tensorboard",))
        job = jobs.start({"train_data": ["rows.jsonl"]}, {})
        jobs.close()
        assert fake.asked[0]["report_to"] == ["tensorboard"]
        assert jobs.get(job.id).request["report_to"] == ["tensorboard"]  # and so it does when it goes on


def test_a_job_of_a_process_that_was_killed_is_interrupted(tmp_path, tiny) -> None:  # noqa: F811
    with filled(tmp_path / "kb", tiny) as live:
        jobs = Jobs(live, tmp_path / "jobs")
        folder = tmp_path / "jobs" / "20260101-000000-abc"
        folder.mkdir(parents=True)
        job = Job("20260101-000000-abc", "running", 1.0, {"train_data": {"file": "train.jsonl"}})
        (folder / "job.json").write_text(json.dumps(vars(job)))
        assert jobs.get(job.id).state == "interrupted"
        (folder / "events.jsonl").write_bytes(
            b'{"event": "started"}\n{"event": "progr{"event": "x"}\n{"event": "done"}\n'
        )
        assert [event["id"] for event in jobs.events(job.id)] == [1, 3]
        (tmp_path / "jobs" / "half").mkdir()
        (tmp_path / "jobs" / "newer").mkdir()
        (tmp_path / "jobs" / "newer" / "job.json").write_text('{"id": "newer", "colour": 1}')
        assert [found.id for found in jobs.all()] == [job.id]
        jobs.recover(resume=False)
        assert json.loads((folder / "job.json").read_text())["state"] == "interrupted"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "give one of rows, train_data and feedback"),
        ({"rows": ROWS, "train_data": ["rows.jsonl"]}, "give one of rows, train_data and feedback"),
        ({"train_data": ["../kb/passages.sqlite"]}, "is not in the folder"),
        ({"train_data": ["/etc/passwd"]}, "is not in the folder"),
        ({"train_data": ["none.jsonl"]}, "is not in the folder"),
        ({"train_data": ["a\0b"]}, "is no path"),
        ({"rows": ROWS, "eval_data": "../.."}, "is not in the folder"),
        ({"rows": ROWS, "force": True}, "force needs a reason"),
        ({"rows": ROWS, "arguments": {"model_name_or_path": "x"}}, "'model_name_or_path' cannot be given here"),
        ({"rows": ROWS, "arguments": {"learning_rat": 1}}, "did you mean 'learning_rate'?"),
        ({"rows": ROWS, "search": {"head": ["dense"]}}, "did you mean 'heads'?"),
    ],
)
def test_what_a_refresh_may_not_be_asked(learner: Running, body, words) -> None:
    response = learner.post("/v1/refresh", body)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
    assert learner.get("/v1/jobs").json() == {"jobs": []}


@pytest.mark.usefixtures("quick_builds")
def test_swaps_pass_the_gate_and_are_rolled_back(learner: Running, checkpoint) -> None:  # noqa: F811
    learner.live.build(checkpoint)
    wrong = {"queries": {"q": "x"}, "qrels": {"q": {"nowhere": 1}}}
    assert learner.post("/v1/swap", {"gate": wrong}).status_code == 400
    for option in ("note", "gate", "force", "generation", "metric"):
        assert learner.post("/v1/swap", {"search": {option: "x"}}).status_code == 400
    assert learner.post("/v1/swap", {"gate": GATE, "metric": "goodness"}).status_code == 400
    flip = learner.post("/v1/swap", {"gate": GATE, "search": {"heads": ["dense"]}, "force": True})
    assert flip.status_code == 200, flip.text
    assert (flip.json()["old"]["id"], flip.json()["new"]["id"]) == (1, 2)
    old = flip.json()["old"]["fingerprint"]
    assert learner.post("/v1/embeddings", {"input": "x", "model": old}).status_code == 409
    assert learner.post("/v1/rollback").json()["new"]["id"] == 1
    assert learner.post("/v1/embeddings", {"input": "x", "model": old}).status_code == 200


@pytest.mark.long
@pytest.mark.parametrize("stage", ["finetune", "build"])
def test_a_refresh_of_a_killed_service_goes_on_after_a_restart(tmp_path, tiny, stage) -> None:  # noqa: F811
    filled(tmp_path / "kb", tiny).close()
    port = free_port()
    program = started([str(tmp_path / "kb")], port)
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        added = client.post("/v1/passages", json={"passages": [{"id": "kept", "text": "an answered write"}]})
        assert added.json()["added"] == 1
        body = {"rows": ROWS, "gate": False, "arguments": {**ARGUMENTS, "max_steps": 40}}
        id = client.post("/v1/refresh", json=body).json()["id"]
        deadline = time.monotonic() + 240
        while client.get(f"/v1/jobs/{id}").json()["progress"].get("stage") != stage:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        program.kill()
        program.communicate()
    again = started([str(tmp_path / "kb"), "--resume"], port)
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        deadline = time.monotonic() + 300
        while (job := client.get(f"/v1/jobs/{id}").json())["state"] == "running":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert job["state"] == "done", job["error"]
        assert client.get("/v1/status").json()["index"]["live"]["id"] == 2
        assert client.get("/v1/passages/kept").status_code == 200
        told = [event["event"] for event in streamed_by(client, f"/v1/jobs/{id}/events")]
        assert (told.count("started"), told[-1]) == (2, "done")
    again.send_signal(signal.SIGTERM)
    again.communicate()
