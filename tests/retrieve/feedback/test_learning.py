"""From searches through feedback to a refreshed index."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.retrieve.refresh.refresh_worker import ARGUMENTS, IDS, ROWS, TEXTS
from ultrarag.cli import main
from ultrarag.errors import DataError, IndexStateError, UsageError
from ultrarag.retrieve.feedback import Rules, TrainingRows
from ultrarag.retrieve.feedback.labels import is_held_out
from ultrarag.retrieve.live import LiveIndex
from ultrarag.rows import text_key
from ultrarag.types import Passage

pytestmark = pytest.mark.usefixtures("quick_builds")

SETTINGS = {name: value for name, value in ARGUMENTS.items() if name != "unified_finetuning"}
DENSE = {"weights": {"dense": 1}}


@pytest.fixture
def live(tmp_path: Path, tiny_m3: Any) -> Iterator[LiveIndex]:
    from ultrarag import Encoder

    opened = LiveIndex.create(tmp_path / "kb", Encoder.load(tiny_m3, "bge", device="cpu"), backend="numpy")
    opened.add([Passage(IDS[text], text) for text in TEXTS])
    yield opened
    opened.close()


def vote(live: LiveIndex, row: dict[str, Any], query: str | None = None) -> None:
    found = live.search(query or row["query"], k=5, log=True, client="ann", **DENSE)
    live.feedback(found.query_id, IDS[row["pos"][0]], "relevant")


def held_out(text: str) -> bool:
    return is_held_out(text_key(text), Rules())


def test_a_search_is_remembered_when_it_is_asked_to_be(live, caplog):
    caplog.set_level(logging.DEBUG)
    live.search("words nobody may read", k=3, **DENSE)
    assert not (live.path / "feedback.sqlite3").exists()
    found = live.search("words nobody may read", k=3, log=True, client="ann", **DENSE)
    live.feedback(found.query_id, found[0].id, "click")
    (query,) = live.feedback_log.queries()
    assert (query.query_id, query.text, query.fingerprint) == (
        found.query_id,
        "words nobody may read",
        live.fingerprint,
    )
    assert [id for id, _ in query.hits] == [hit.id for hit in found]
    assert query.options == {"k": 3, **DENSE}
    assert "words nobody may read" not in caplog.text
    live.search_many(["one", " ", "two"], log=True, **DENSE)
    assert live.feedback_log.counts()["searches"] == 3  # a blank one is nothing to learn from


def test_judged_queries_are_nobodys_searches(live):
    with pytest.raises(UsageError, match="takes no 'log'"):
        live.evaluate({"q": TEXTS[0]}, {"q": {IDS[TEXTS[0]]: 1}}, log=True, **DENSE)
    assert not (live.path / "feedback.sqlite3").exists()


def test_what_is_too_old_goes_while_the_index_is_open(live, monkeypatch):
    live.search(TEXTS[0], log=True, **DENSE)
    with live.feedback_log._database.transaction() as db:
        db.execute("UPDATE queries SET time = 5")
    assert live.feedback_log.counts()["searches"] == 1
    monkeypatch.setattr("ultrarag.retrieve.signals.EXPIRY", -1.0)
    assert live.feedback_log.counts()["searches"] == 0


@pytest.mark.parametrize("how", ["forget", "hashed"])
def test_what_is_forgotten_is_in_no_rows_of_a_refresh_either(live, tmp_path, how):
    vote(live, next(row for row in ROWS if not held_out(row["query"])))
    with pytest.raises(UsageError, match="no held-out query"):
        live.refresh("feedback", output_dir=tmp_path / "out", **SETTINGS)
    (place,) = (live.path / "feedback_rows").iterdir()
    live.feedback_log.forget(client="nobody")
    assert place.is_dir()
    if how == "forget":
        live.feedback_log.forget(client="ann")
    else:
        live.feedback_log.set(texts="hashed")
    assert not place.exists()


def test_an_index_that_can_only_be_read_says_so_before_it_searches(live, monkeypatch):
    live._core.reading = "the disk is full"
    monkeypatch.setattr(live._core, "searching", None)
    with pytest.raises(IndexStateError, match="open for reading"):
        live.search(TEXTS[0], log=True, **DENSE)


def test_a_cancelled_search_is_not_remembered(live, monkeypatch):
    """Nobody has seen its hits, so that no click on them is no sign."""
    begun, go = threading.Event(), threading.Event()
    searched = live.search_many
    monkeypatch.setattr(
        live, "search_many", lambda *args, **more: (begun.set(), go.wait(60), searched(*args, **more))[2]
    )

    async def run() -> None:
        task = asyncio.create_task(live.asearch("nobody waits", log=True, **DENSE))
        await asyncio.to_thread(begun.wait, 60)
        task.cancel()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        found = await live.asearch("somebody waits", 3, log=True, client="ann", **DENSE)
        (query,) = live.feedback_log.queries()
        assert (query.text, query.query_id, query.options) == ("somebody waits", found.query_id, {"k": 3, **DENSE})

    asyncio.run(run())


def test_feedback_survives_close_and_open(live, tmp_path):
    found = live.search(TEXTS[0], log=True, **DENSE)
    live.close()
    with LiveIndex.open(tmp_path / "kb") as again:
        again.feedback(found.query_id, found[0].id, "click")
        assert again.feedback_log.counts()["events"]["click"] == 1
    with pytest.raises(IndexStateError):
        again.feedback(found.query_id, found[0].id, "click")


def test_refresh_from_feedback(live, tmp_path):
    for row in ROWS:
        vote(live, row)
    number = 0
    while len(live.training_rows().qrels) < 4:  # held-out queries to judge by
        number += 1
        if held_out(text := f"{ROWS[0]['query']} {number}"):
            vote(live, ROWS[0], text)
    made = live.training_rows()
    assert {row["query"] for row in made.rows} == {row["query"] for row in ROWS if not held_out(row["query"])}
    settings = {**SETTINGS, "cache_path": str(tmp_path / "cache"), "search": DENSE, "output_dir": tmp_path / "out"}
    report = live.refresh("feedback", force=True, effort="query", **settings)
    assert report.outcome in ("swapped", "forced")
    assert report.verdict["change"]["queries"] == len(made.qrels)
    assert (live.path / "feedback_rows").is_dir()
    vote(live, ROWS[1], f"{ROWS[1]['query']} anew")  # the same call returns the report again, on the same rows
    assert live.refresh("feedback", force=True, effort="query", **settings).generation == report.generation


def test_a_refresh_without_rows_or_without_votes_is_refused(live, tmp_path):
    with pytest.raises(DataError, match="no rows to train on"):
        live.refresh("feedback", output_dir=tmp_path / "out", **SETTINGS)
    row = next(row for row in ROWS if not held_out(row["query"]))
    vote(live, row)
    with pytest.raises(UsageError, match="no held-out query has votes"):
        live.refresh("feedback", output_dir=tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()


class Made:
    """What a log gives, as a schedule sees it."""

    def __init__(self, rows: int, below: int = 50, judged: int = 100, first: int = 0) -> None:
        self.made = TrainingRows(
            [{"id": f"feedback-{n}"} for n in range(first, rows)], {}, {str(n): {"p": 1} for n in range(judged)}
        )
        self.made.report["rows with a positive below rank 1"] = below

    def __call__(self) -> TrainingRows:
        return self.made


@pytest.mark.parametrize(
    ("made", "missing"),
    [
        (Made(199), "199 of 200 new rows"),
        (Made(200, below=49), "49 of 50 rows with a positive below rank 1"),
        (Made(200, judged=99), "99 of 100 held-out queries"),
    ],
)
def test_a_schedule_waits_for_enough(live, made, missing):
    schedule = live.schedule()
    schedule.rows = made
    assert (schedule.due().ready, missing in schedule.due().reason) == (False, True)


def test_a_schedule_begins_once_a_day_and_asks_for_more_after_a_refusal(live):
    schedule = live.schedule()
    schedule.rows = Made(200)
    assert schedule.due(now=0.0).ready
    schedule.begun(Made(200)(), now=0.0)
    assert "the next in 23.0 h" in schedule.due(now=3600.0).reason
    schedule.ended(swapped=False)
    assert "200 of 400 new rows" in schedule.due(now=90_000.0).reason
    schedule.rows = Made(400)
    assert schedule.due(now=90_000.0).ready
    schedule.begun(Made(400)(), now=90_000.0)
    schedule.ended(swapped=True)
    schedule.rows = Made(599)
    assert "199 of 200 new rows" in schedule.due(now=1e9).reason


def test_new_rows_are_new_also_when_as_many_old_ones_went(live):
    schedule = live.schedule()
    schedule.begun(Made(200)(), now=0.0)
    schedule.ended(swapped=True)
    schedule.rows = Made(300, first=100)  # the log keeps half a year
    assert "100 of 200 new rows" in schedule.due(now=1e9).reason
    schedule.rows = Made(400, first=200)
    assert schedule.due(now=1e9).ready
    assert "feedback-" not in str(schedule.state())


def test_a_refresh_that_never_ended_is_tried_again_the_next_day(live):
    live.schedule().begun(Made(200)(), now=0.0)
    schedule = live.schedule()
    schedule.rows = Made(200)
    assert not schedule.due(now=86_000.0).ready
    assert schedule.due(now=87_000.0).ready


def test_a_schedule_that_makes_no_sense_is_refused(live):
    with pytest.raises(UsageError, match="daily"):
        live.schedule("yearly")
    for wrong in (0, "5", True):
        with pytest.raises(UsageError, match="judged"):
            live.schedule(judged=wrong)


def test_the_command(live, tmp_path, capsys):
    kb = str(live.path)
    assert main(["feedback", "stats", kb]) == 1
    assert "no feedback yet" in capsys.readouterr().err
    row = next(row for row in ROWS if not held_out(row["query"]))
    vote(live, row)
    assert main(["feedback", "stats", kb, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["searches"], found["events"]["relevant"], found["rules"]["rows"]) == (1, 1, 1)
    out = tmp_path / "rows.jsonl"
    assert main(["feedback", "rows", kb, "--out", str(out), "--held_out", str(tmp_path / "qrels")]) == 0
    assert json.loads(out.read_text())["pos"] == row["pos"]
    assert main(["feedback", "export", kb, "--out", str(tmp_path / "ubi.jsonl")]) == 0
    assert main(["feedback", "keep", kb, "--retention_days", "30"]) == 0
    assert "retention_days: 30" in capsys.readouterr().out
    assert main(["feedback", "forget", kb, "--client", "ann"]) == 0
    assert "searches deleted: 1" in capsys.readouterr().out
    assert main(["feedback", "import", kb, str(tmp_path / "ubi.jsonl")]) == 0
    assert live.feedback_log.counts()["searches"] == 1
    assert main(["feedback", "forget", kb, "--before", "someday"]) == 2
    assert "is no date" in capsys.readouterr().err
    assert main(["feedback", "stats", str(tmp_path / "nowhere")]) == 1


def test_the_command_refuses_files_that_cannot_be(live, tmp_path, capsys):
    live.add([Passage("a b", "a passage whose id has a space")])
    text = next(text for text in (f"{TEXTS[0]} {number}" for number in range(100)) if held_out(text))
    found = live.search(text, log=True, **DENSE)
    live.feedback(found.query_id, "a b", "relevant")
    kb, out = str(live.path), str(tmp_path / "out")
    for words in (["export", kb, "--out", str(tmp_path / "no" / "x")], ["rows", kb, "--out", str(tmp_path)]):
        assert main(["feedback", *words]) == 2
        assert "in a folder that exists" in capsys.readouterr().err
    assert main(["feedback", "rows", kb, "--out", out, "--held_out", str(tmp_path / "qrels")]) == 1
    assert "an id with a space" in capsys.readouterr().err
    assert not (tmp_path / "qrels").exists()


def test_refresh_from_feedback_on_the_command_line(live, tmp_path, capsys):
    row = next(row for row in ROWS if not held_out(row["query"]))
    vote(live, row)
    live.close()
    words = ["index", "refresh", str(live.path), "--train_data", "feedback", "--output_dir", str(tmp_path / "out")]
    assert main(words) == 2
    assert "no held-out query has votes" in capsys.readouterr().err


KILLED = """
import sys
from tests.retrieve.refresh.refresh_worker import arm
from tests.retrieve.feedback.test_learning import DENSE, SETTINGS
from ultrarag.retrieve.live import LiveIndex
arm("finetune")
with LiveIndex.open(sys.argv[1]) as live:
    live.refresh("feedback", force=True, output_dir=sys.argv[2], search=DENSE, cache_path=sys.argv[3], **SETTINGS)
"""


@pytest.mark.long
def test_a_killed_refresh_goes_on_with_the_rows_it_began_with(live, tmp_path):
    for row in ROWS:
        vote(live, row)
    number = 0
    while not live.training_rows().qrels:
        number += 1
        if held_out(text := f"{ROWS[0]['query']} {number}"):
            vote(live, ROWS[0], text)
    live.close()
    where = [str(tmp_path / name) for name in ("kb", "out", "cache")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *where], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with LiveIndex.open(where[0]) as again:
        (rows,) = (again.path / "feedback_rows").glob("*/rows.jsonl")
        before = rows.read_text(encoding="utf-8")
        vote(again, ROWS[1], f"{ROWS[1]['query']} in other words")
        again.delete([IDS[ROWS[0]["pos"][0]]])  # what a row names is gone meanwhile
        report = again.refresh(
            "feedback", force=True, output_dir=where[1], search=DENSE, cache_path=where[2], **SETTINGS
        )
        assert report.outcome in ("swapped", "forced")
        assert rows.read_text(encoding="utf-8") == before
