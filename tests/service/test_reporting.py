"""Feedback through the service: reported, counted, forgotten, learned from by itself."""

from __future__ import annotations

import threading

import pytest

from tests.service.running import Running
from tests.service.test_searching import fault
from ultrarag.retrieve.feedback import TrainingRows
from ultrarag.service.habit import Habit
from ultrarag.service.jobs import Job


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
    made = TrainingRows([{}] * 200, {}, {str(n): {"p": 1} for n in range(100)})
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
    habit.ended(Job("j1", "refused", 0.0, {}))
    assert habit.schedule.state()["factor"] == 2


def test_nothing_begins_beside_a_job(served: Running) -> None:
    jobs = Jobs()
    jobs.running = Job("j0", "running", 0.0, {})
    habit = Habit(served.live, jobs, "weekly", None)
    habit.schedule.rows = enough
    habit.schedule.log.note("schedule", {"begun": None, "rows": 0, "factor": 1})
    assert not habit.look()
    assert jobs.asked == []
    habit.close()
