"""After a swap the service tells how the new generation compares with the old one, and rolls nothing back by itself."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.service.conftest import created
from tests.service.running import Running
from ultrarag.retrieve import LiveIndex
from ultrarag.service import watching
from ultrarag.service.load import Load


def clicked(service: Running, query: str, clicks: bool) -> None:
    found = service.post("/v1/search", {"query": query, "log": True}).json()
    if clicks:
        body = {"query_id": found["query_id"], "passage_id": found["hits"][0]["id"], "action": "click"}
        assert service.post("/v1/feedback", body).status_code == 200


def seen(service: Running) -> Any:
    return service.get("/v1/status").json()["watch"]


@pytest.fixture
def service(tmp_path, minilm_encoder, monkeypatch, quick_builds):
    monkeypatch.setattr(watching, "AGAIN", 0.0)
    running = Running(created(tmp_path / "kb", minilm_encoder), weights={"dense": 1})
    yield running
    running.stop()


def test_a_worse_generation_is_told_and_stays_until_somebody_rolls_back(service, minilm_encoder, caplog):
    for number in range(30):
        clicked(service, f"vector database {number}", True)
    assert seen(service) is None
    service.live.swap(service.live.build(minilm_encoder))
    first = seen(service)
    assert (first["live"], first["previous"], first["worse"]) == (2, 1, [])
    assert first["load"]["old"]["requests"] == 30
    assert first["load"]["new"] == {"requests": 0, "p50_seconds": None, "p99_seconds": None, "errors": 0}
    with caplog.at_level(logging.WARNING, "ultrarag.service"):
        for number in range(30):
            clicked(service, f"vector database {number}", False)
        found = seen(service)
        assert found == {**seen(service), "load": found["load"]}
    assert found["worse"] == ["first hit clicked"]
    assert found["changes"][0] == {**found["changes"][0], "old": [30, 30], "new": [0, 30], "worse": True}
    assert found["load"]["new"]["requests"] == 30
    told = [record.message for record in caplog.records if "worse" in record.message]
    assert told == [
        "generation 2 is worse than generation 1 since the swap: first hit clicked; POST /v1/rollback brings it back"
    ]
    assert "\nultrarag_watch_worse 1.0\n" in service.get("/metrics").text
    assert service.get("/v1/status").json()["index"]["live"]["id"] == 2
    service.post("/v1/rollback")
    back = seen(service)
    assert (back["live"], back["previous"], back["worse"]) == (1, 2, [])
    assert "\nultrarag_watch_worse 0.0\n" in service.get("/metrics").text


def test_every_swap_has_a_warning_of_its_own(caplog, monkeypatch):
    monkeypatch.setattr(watching, "AGAIN", 0.0)

    class Worse:
        def to_dict(self) -> dict[str, Any]:
            return {"live": 0, "previous": 0, "worse": ["first hit clicked"]}

    class Live:
        watch = Worse

    looking = watching.Watching(Live(), Load())
    for live, previous, since in ((2, 1, 1.0), (2, 1, 1.0), (3, 2, 2.0)):
        looking.look({"live": {"id": live}, "previous": {"id": previous}, "live_since": since})
    told = [record.message.partition(" since")[0] for record in caplog.records]
    assert told == ["generation 2 is worse than generation 1", "generation 3 is worse than generation 2"]


def test_a_log_that_cannot_be_read_hides_no_status(service, minilm_encoder, monkeypatch, caplog):
    service.live.swap(service.live.build(minilm_encoder))
    service.post("/v1/search", {"query": "x", "log": True})
    service.live._close_log()
    (service.live.path / "feedback.sqlite3").write_bytes(b"no database" * 1000)
    assert seen(service) is None
    assert "the swap is not watched" in caplog.text


def test_the_load_of_the_last_minute(service, monkeypatch):
    def load() -> dict[str, Any]:
        return service.get("/v1/status").json()["service"]["load"]

    assert load()["searches_per_second"] == 0
    service.post("/v1/search_many", {"queries": ["a", "b", "c"]})
    service.post("/search", {"query_list": ["d"]})
    assert service.post("/v1/search", {"query": "x", "k": 0}).status_code == 400
    assert service.post("/v1/search", {"query": "x", "weights": {"dens": 1}}).status_code == 400
    found = load()
    assert found["searches_per_second"] == pytest.approx(4 / 60, abs=1e-3)
    assert 0 < found["p50_seconds"] <= found["p99_seconds"] < 60
    assert found["errors"] == 0  # what the client did wrong is none of ours

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(LiveIndex, "search_many", fails)
    assert service.post("/v1/search", {"query": "x"}).status_code == 500
    assert load()["errors"] == 1
