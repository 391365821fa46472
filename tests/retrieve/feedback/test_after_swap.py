"""After a swap: what people do with the hits of the new generation beside those of the old one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from ultrarag.retrieve import read_status
from ultrarag.retrieve.feedback import FeedbackLog, after_swap, watch
from ultrarag.retrieve.feedback.after_swap import COMPARED, WATCHED, Change
from ultrarag.retrieve.live import LiveIndex

SWAP = 1_000_000.0


@pytest.fixture
def log(tmp_path: Path):
    with FeedbackLog(tmp_path / "feedback.sqlite3") as opened:
        yield opened


def searched(log: FeedbackLog, id: str, generation: int, at: float, text: str = "", client: str | None = None) -> None:
    hits = [("a", 0.5), ("b", 0.25)]
    log.remember([(id, text or id, hits)], fingerprint="f", generation=generation, client=client, at=at)


def outcomes(log: FeedbackLog, generation: int = 2) -> dict[str, tuple[int, int]]:
    return log.outcomes(generation, SWAP, SWAP + WATCHED, 3)


@pytest.mark.parametrize(
    ("new", "old", "low", "high"),  # Newcombe, Statistics in Medicine 17 (1998), 873-890, table II, method 10
    [((56, 70), (48, 80), 0.0524, 0.3339), ((9, 10), (3, 10), 0.1705, 0.8090), ((5, 56), (0, 29), -0.0381, 0.1926)],
)
def test_the_interval_is_the_published_one(monkeypatch, new, old, low, high):
    monkeypatch.setattr(after_swap, "Z", 1.95996)
    assert Change("x", old, new).interval == pytest.approx((low, high), abs=5e-5)


def test_worse_is_what_chance_does_not_explain():
    assert Change("x", (500, 1000), (380, 1000)).worse
    assert not Change("x", (500, 1000), (480, 1000)).worse
    assert not Change("x", (380, 1000), (500, 1000)).worse
    assert not Change("x", (0, 0), (0, 1000)).worse
    assert Change("x", (0, 0), (0, 1000)).interval == (-1.0, 1.0)


def test_only_searches_of_the_generation_and_the_time_count(log):
    for id, generation, at in (("q1", 2, SWAP), ("q2", 2, SWAP + 5), ("q3", 1, SWAP + 5), ("q4", 2, SWAP - 1)):
        searched(log, id, generation, at)
        log.add(id, "click", "a", at=at + 1)
    log.remember([("nothing", "nothing", [])], fingerprint="f", generation=2, at=SWAP)
    assert outcomes(log)["first hit clicked"] == (2, 2)


def test_a_click_further_down_and_a_second_one_are_not_counted(log):
    for number, action, passage in ((1, "click", "b"), (2, "click", "a"), (2, "click", "a"), (3, "cite", "b")):
        searched(log, f"q{number}", 2, SWAP)
        log.add(f"q{number}", action, passage)
    assert outcomes(log)["first hit clicked"] == (1, 3)
    assert outcomes(log)["a hit cited"] == (1, 3)


def test_nobody_decides_by_asking_again_and_again(log):
    for number in range(9):
        searched(log, f"ann{number}", 2, SWAP + number, "Same  QUESTION" if number % 2 else "same question", "ann")
        searched(log, f"nobody{number}", 2, SWAP + number, "same question")
        log.add(f"ann{number}", "click", "a")
    assert outcomes(log)["first hit clicked"] == (3, 12)


def test_of_a_client_s_votes_the_last_counts(log):
    searched(log, "q1", 2, SWAP, "one", "ann")
    searched(log, "q2", 2, SWAP + 1, "one", "ann")
    for id, action, passage, client in (
        ("q1", "relevant", "a", "ann"),
        ("q2", "not_relevant", "a", "ann"),
        ("q1", "relevant", "a", "bob"),
        ("q1", "relevant", "b", "eve"),
        ("q1", "unsure", "b", "eve"),
        ("q1", "answer_up", None, "ann"),
        ("q1", "answer_down", None, "bob"),
        ("q1", "answer_up", None, "bob"),
    ):
        log.add(id, action, passage, client=client)
    found = outcomes(log)
    assert found["votes for relevant"] == (1, 2)
    assert found["answers voted up"] == (2, 2)


def test_it_ends_after_a_day_and_compares_with_the_week_before(log):
    for id, generation, at in (("old", 1, SWAP - 5), ("older", 1, SWAP - COMPARED - 5), ("new", 2, SWAP + 5)):
        searched(log, id, generation, at)
    found = watch(log, 2, 1, SWAP, SWAP + 10)
    assert found is not None
    assert {(change.old[1], change.new[1]) for change in found.changes if "hit" in change.what} == {(1, 1)}
    assert found.to_dict()["worse"] == []
    assert watch(log, 2, 1, SWAP, SWAP + WATCHED + 1) is None
    assert watch(log, 2, 1, SWAP, SWAP - 1) is None  # the clock was put back
    nothing = watch(None, 2, 1, SWAP, SWAP + 10)
    assert nothing is not None
    assert nothing.changes == ()


def test_an_index_knows_when_it_was_swapped(live: LiveIndex, other: Any, quick_builds: Any) -> None:
    live.add([{"id": "1", "text": "red apple"}, {"id": "2", "text": "blue ocean"}])
    assert live.watch() is None
    before = live.search("red apple", log=True, heads=["dense"])
    live.feedback(before.query_id, before[0].id, "click")
    began = time.time()
    live.swap(live.build(other))
    after = live.search("red apple", log=True, heads=["dense"])
    found = live.watch()
    assert found is not None
    assert (found.live, found.previous) == (after.generation, before.generation) == (2, 1)
    assert began <= found.since <= time.time()
    assert read_status(live.path)["live_since"] == found.since
    assert {change.what: (change.old, change.new) for change in found.changes}["first hit clicked"] == ((1, 1), (0, 1))
    assert live.watch(now=found.since + WATCHED + 1) is None
    live.rollback()
    back = live.watch()
    assert back is not None
    assert (back.live, back.previous) == (1, 2)
    assert back.since > found.since


def test_an_index_of_an_earlier_version_watches_nothing(live: LiveIndex, other: Any, quick_builds: Any) -> None:
    live.add([{"id": "1", "text": "red apple"}])
    live.swap(live.build(other))
    with live._core.store.database.transaction() as db:
        db.execute("DELETE FROM meta WHERE name = 'live_since'")
    assert live.status()["live_since"] is None
    assert live.watch() is None
