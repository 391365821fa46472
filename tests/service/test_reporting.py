"""Feedback through the service: reported, counted, forgotten, learned from by itself."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import pytest

from tests.service.conftest import created
from tests.service.running import Running
from tests.service.test_searching import fault
from ultrarag.errors import IndexStateError
from ultrarag.retrieve.feedback import TrainingRows
from ultrarag.service.habit import Habit
from ultrarag.service.jobs import Job
from ultrarag.service.jobs import Jobs as RealJobs


def asked(served: Running, **more) -> dict:
    return served.post("/v1/search", {"query": "what is milvus?", "k": 2, "log": True, **more}).json()


def test_what_is_reported_is_kept_and_counted(served: Running) -> None:
    before = served.get("/v1/feedback").json()["log"]
    found = asked(served, client="ann")
    body = {"query_id": found["query_id"], "action": "click", "passage_id": found["hits"][0]["id"], "event_id": "e"}
    for _ in range(2):
        assert served.post("/v1/feedback", body).json() == {"kept": True}
    after = served.get("/v1/feedback").json()
    assert after["log"]["searches"] == before["searches"] + 1
    assert after["log"]["events"]["click"] == before["events"]["click"] + 1
    assert after["schedule"] is None
    assert 'ultrarag_feedback_total{action="click"}' in served.get("/metrics").text
    assert served.client.delete("/v1/feedback", params={"client": "ann"}).json() == {"deleted": 1}
    assert served.get("/v1/feedback").json()["log"]["searches"] == before["searches"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"query_id": "gone", "action": "click", "passage_id": "milvus"}, "'gone' is not in the feedback log"),
        ({"query_id": "x", "action": "clik", "passage_id": "milvus"}, "'action': Input should be 'click'"),
        ({"query_id": "x", "action": "click"}, "takes the id of a passage"),
        ({"action": "answer_up"}, "'query_id': Field required"),
    ],
)
def test_what_cannot_be_is_refused(served: Running, body, words) -> None:
    status, message = fault(served.post("/v1/feedback", body))
    assert (status, words in message) == (400, True), message


def test_a_search_that_nobody_wants_kept_is_not(served: Running) -> None:
    before = served.get("/v1/feedback").json()["log"]["searches"]
    found = asked(served, log=False)
    assert served.get("/v1/feedback").json()["log"]["searches"] == before
    body = {"query_id": found["query_id"], "action": "answer_up"}
    assert fault(served.post("/v1/feedback", body))[0] == 400


def test_to_forget_needs_somebody_or_a_time(served: Running) -> None:
    assert fault(served.client.delete("/v1/feedback"))[0] == 400
    assert served.client.delete("/v1/feedback", params={"before": 0}).json() == {"deleted": 0}


class Jobs:
    """Stands in for the jobs of a service."""

    def __init__(self) -> None:
        self.running, self.asked, self.started = None, [], threading.Event()

    def start(self, request, files) -> Job:
        self.asked.append(request)
        self.started.set()
        return Job("j1", "running", 0.0, request)


def enough() -> TrainingRows:
    made = TrainingRows([{"id": f"feedback-{n}"} for n in range(200)], {}, {str(n): {"p": 1} for n in range(100)})
    made.report["rows with a positive below rank 1"] = 50
    return made


def test_a_service_learns_by_itself_when_there_is_enough(served: Running) -> None:
    jobs = Jobs()
    habit = Habit(served.live, jobs, "daily", {"weights": {"dense": 1}}, look=0.01)
    assert not habit.look()  # there is too little
    habit.schedule.rows = enough
    habit.start()
    assert jobs.started.wait(20)
    habit.close()
    (request,) = jobs.asked  # once a day
    assert (request["train_data"], request["effort"]) == ("feedback", "auto")
    habit.ended(Job("other", "refused", 0.0, {}))
    assert habit.schedule.state()["factor"] == 1
    restarted = Habit(served.live, jobs, "daily", None)
    restarted.ended(Job("j1", "refused", 0.0, {}))  # gone on with after a restart
    assert restarted.schedule.state()["factor"] == 2
    restarted.ended(Job("j1", "done", 0.0, {}))  # somebody let it past the gate
    assert len(restarted.schedule.state()["learned"]) == 200


def test_nothing_begins_beside_a_job(served: Running) -> None:
    jobs = Jobs()
    jobs.running = Job("j0", "running", 0.0, {})
    habit = Habit(served.live, jobs, "weekly", None)
    habit.schedule.rows = enough
    habit.schedule.log.note("schedule", {"begun": None, "rows": 0, "factor": 1})
    assert not habit.look()
    assert jobs.asked == []
    habit.close()


def test_a_damaged_log_stops_no_search_of_the_service(index) -> None:
    (index.path / "feedback.sqlite3").write_bytes(b"garbage" * 1000)
    running = Running(index, weights={"dense": 1.0})
    try:
        assert not running.service.remembers
        assert running.get("/", headers={"Accept": "text/html"}).status_code == 200
        assert "Milvus" in running.get("/console/search", params={"q": "milvus"}).text
        assert fault(running.post("/v1/search", {"query": "x", "log": True}))[0] == 409
    finally:
        running.stop()


def test_workers_share_a_log(tmp_path, minilm_encoder) -> None:
    """What one has shown, another is told of; each has an index of its own here, as it has a mirror."""
    first = Running(created(tmp_path / "kb", minilm_encoder), weights={"dense": 1.0})
    second = Running(
        created(tmp_path / "kb.worker-2", minilm_encoder), weights={"dense": 1.0}, feedback_dir=str(tmp_path / "kb")
    )
    try:
        found = asked(first)
        body = {"query_id": found["query_id"], "action": "click", "passage_id": found["hits"][0]["id"]}
        assert second.post("/v1/feedback", body).json() == {"kept": True}
        assert first.get("/v1/feedback").json() == second.get("/v1/feedback").json()
        assert not (tmp_path / "kb.worker-2" / "feedback.sqlite3").exists()
    finally:
        first.stop()
        second.stop()


def test_two_workers_do_not_begin_at_once(tmp_path, minilm_encoder, monkeypatch) -> None:
    with created(tmp_path / "kb", minilm_encoder) as live:
        release, begun = threading.Event(), []
        monkeypatch.setattr(live, "refresh", lambda **_: release.wait(60))
        workers = [RealJobs(live, tmp_path / "jobs") for _ in range(4)]
        for worker in workers:  # both have looked before either begins
            looked = worker._refuse_second
            monkeypatch.setattr(worker, "_refuse_second", lambda looked=looked: (looked(), time.sleep(0.1)))

        def begin(worker: RealJobs) -> None:
            with suppress(IndexStateError):
                begun.append(worker.start({}, {}))

        threads = [threading.Thread(target=begin, args=[worker]) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        release.set()
        for worker in workers:
            worker.close()
        assert len(begun) == 1
