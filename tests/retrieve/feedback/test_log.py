"""The log: what is kept, that it is kept, and that it goes when it should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ultrarag.errors import DataError, IndexStateError, UsageError
from ultrarag.retrieve.feedback import FeedbackLog, export_ubi, import_ubi

DAY = 86_400.0


@pytest.fixture
def log(tmp_path: Path):
    with FeedbackLog(tmp_path / "feedback.sqlite3") as opened:
        yield opened


def remember(log: FeedbackLog, id: str = "q1", text: str = "Secret question", **options) -> None:
    log.remember([(id, text, [("a", 0.5), ("b", 0.25)])], fingerprint="f", generation=3, **options)


def test_a_search_and_its_events_come_back(log):
    remember(log, options={"k": 2, "filter": {"lang": "en"}}, client="ann", at=5.0)
    log.add("q1", "click", "b", at=6.0)
    log.add("q1", "answer_up", client="bob", at=7.0)
    (found,) = log.queries()
    assert found == log.get("q1")
    assert (found.text, found.fingerprint, found.generation, found.time) == ("Secret question", "f", 3, 5.0)
    assert (found.options, found.hits) == ({"k": 2, "filter": {"lang": "en"}}, [("a", 0.5), ("b", 0.25)])
    assert [(action, id, at) for action, id, _, at in found.events] == [("click", "b", 6.0), ("answer_up", "", 7.0)]
    assert found.events[0][2] == found.client != found.events[1][2]
    assert (found.rank("b"), found.rank("c")) == (2, None)
    assert log.get("other") is None


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("q1", "clik", "a"), "did you mean 'click'"),
        (("q1", "click"), "takes the id of a passage"),
        (("q1", "answer_up", "a"), "takes no passage"),
        (("q2", "click", "a"), "'q2' is not in the feedback log"),
        (("q1", "click", "z"), "'z' was not among the hits"),
        (("q1", "cite", "z"), "'z' was not among the hits"),
    ],
)
def test_events_that_cannot_be_are_refused_by_name(log, arguments, word):
    remember(log)
    with pytest.raises(UsageError, match=word):
        log.add(*arguments)
    assert log.get("q1").events == []


def test_a_passage_found_elsewhere_can_be_voted_for(log):
    remember(log)
    log.add("q1", "relevant", "z")
    assert log.get("q1").events[0][:2] == ("relevant", "z")


def test_an_event_that_is_sent_twice_counts_once(log):
    remember(log)
    for _ in range(2):
        log.add("q1", "click", "a", event_id="e1")
    assert log.counts()["events"]["click"] == 1


def test_clients_are_kept_as_hashes_that_differ_from_index_to_index(log, tmp_path):
    remember(log, client="ann@example.org")
    with FeedbackLog(tmp_path / "other.sqlite3") as other:
        remember(other, client="ann@example.org")
        assert other.get("q1").client != log.get("q1").client
    log.close()
    assert b"ann@example.org" not in (tmp_path / "feedback.sqlite3").read_bytes()


def test_what_a_client_did_goes_and_cannot_be_read_in_the_file(log, tmp_path):
    remember(log, client="ann")
    remember(log, "q2", "another", client="bob")
    log.add("q2", "click", "a", client="ann")
    log.add("q2", "click", "b", client="bob")
    assert log.forget(client="ann") == 1
    (left,) = log.queries()
    assert [event[1] for event in left.events] == ["b"]
    log.close()
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"Secret question" not in content
    assert b"another" in content


def test_nobody_is_not_a_client_to_forget(log):
    remember(log)
    log.add("q1", "click", "a")
    with pytest.raises(UsageError, match="a client, or a time"):
        log.forget(client="")
    assert len(log.get("q1").events) == 1
    with pytest.raises(UsageError, match="a client, or a time"):
        log.forget()


def test_what_is_too_old_goes(log):
    remember(log, at=0.0)
    remember(log, "q2", at=100 * DAY)
    log.add("q1", "click", "a", at=1.0)
    assert log.expire(now=181 * DAY) == 1
    assert [query.query_id for query in log.queries()] == ["q2"]
    assert log.counts()["events"]["click"] == 0
    log.set(retention_days=0)
    assert log.expire(now=1e6 * DAY) == 0
    with pytest.raises(UsageError, match="retention_days"):
        log.set(retention_days=-1)


def test_hashed_texts_are_counted_and_cannot_be_read(log, tmp_path):
    remember(log)
    log.set(texts="hashed")
    remember(log, "q2", "secret   QUESTION")
    assert [query.text for query in log.queries()] == ["", ""]
    assert log.counts()["queries"] == 1
    log.close()
    assert b"ecret" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_only_what_is_new(log):
    for number in range(3):
        remember(log, f"q{number}", at=float(number))
    log.add("q0", "click", "a", at=9.0)
    assert [query.query_id for query in log.queries(since=2.0)] == ["q0", "q2"]
    assert [query.query_id for query in log.queries(until=1.0)] == ["q0"]


def test_threads_write_at_once(log):
    def work(number: int) -> None:
        for count in range(20):
            remember(log, f"{number}-{count}")
            log.add(f"{number}-{count}", "click", "a")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (log.counts()["searches"], log.counts()["events"]["click"]) == (80, 80)


WRITER = """
import sys
from pathlib import Path
from ultrarag.retrieve.feedback import FeedbackLog
log = FeedbackLog(Path(sys.argv[1]))
for number in range(100_000):
    log.remember([(f"q{number}", "text", [("a", 1.0)])], fingerprint="f", generation=1)
    log.add(f"q{number}", "click", "a")
    print(number, flush=True)
"""


def test_nothing_acknowledged_is_lost_by_a_kill(tmp_path):
    path = tmp_path / "feedback.sqlite3"
    for stop in (1, 4, 9):
        path.unlink(missing_ok=True)
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        assert child.stdout is not None
        done = -1
        for line in child.stdout:
            done = int(line)
            if done >= stop:
                child.send_signal(signal.SIGKILL)
                break
        done = max([done, *(int(line) for line in child.stdout)])
        child.wait()
        child.stdout.close()
        with FeedbackLog(path) as log:
            found = {query.query_id: [event[0] for event in query.events] for query in log.queries()}
        assert all(found[f"q{number}"] == ["click"] for number in range(done + 1))


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "feedback.sqlite3"
    path.write_bytes(b"not a database at all, " * 100)
    with pytest.raises(IndexStateError, match=r"feedback\.sqlite3"):
        FeedbackLog(path)


# UBI


def test_ubi_out_and_in_is_the_same_log(log, tmp_path):
    remember(log, options={"k": 2}, client="ann", at=1_700_000_000.5)
    log.add("q1", "click", "b", at=1_700_000_001.5)
    log.add("q1", "answer_down", at=1_700_000_002.0)
    assert export_ubi(log, tmp_path / "ubi.jsonl") == {"queries": 1, "events": 2}
    lines = [json.loads(line) for line in (tmp_path / "ubi.jsonl").read_text().splitlines()]
    assert lines[0]["user_query"] == "Secret question"
    assert lines[0]["query_response_hit_ids"] == ["a", "b"]
    assert lines[1]["event_attributes"]["object"]["object_id"] == "b"
    assert lines[1]["event_attributes"]["position"]["ordinal"] == 2
    with FeedbackLog(tmp_path / "other.sqlite3") as other:
        for _ in range(2):  # again changes nothing
            assert import_ubi(other, tmp_path / "ubi.jsonl") == {"queries": 1, "events": 2, "left out": 0}
        (found,), (first,) = other.queries(), log.queries()
        assert [event[:2] + event[3:] for event in found.events] == [event[:2] + event[3:] for event in first.events]
        assert (found.text, found.hits, found.options, found.time) == (
            first.text,
            first.hits,
            first.options,
            first.time,
        )


def test_ubi_of_other_collectors(log, tmp_path):
    """Names as ubi.js and OpenSearch's examples write them: milliseconds, actions of other names."""
    query = {"query_id": "u1", "client_id": "c", "user_query": "shoes", "timestamp": 1_700_000_000_000}
    query["query_response_hit_ids"] = ["a", "b"]
    thing = {"object": {"object_id": "a", "object_id_field": "id"}}
    event = {"action_name": "item_click", "query_id": "u1", "client_id": "c", "timestamp": "2023-11-14T22:13:21Z"}
    lines = [query, {**event, "event_attributes": thing}, {**event, "action_name": "on_search"}]
    (tmp_path / "ubi.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    assert import_ubi(log, tmp_path / "ubi.jsonl") == {"queries": 1, "events": 1, "left out": 1}
    assert log.get("u1").time == 1_700_000_000.0
    assert log.get("u1").events[0][0::3] == ("click", 1_700_000_001.0)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("[1]", "is not a JSON object"),
        ("{", "not valid JSON"),
        ('{"a": 1}', "is neither an event"),
        ('{"action_name": "click", "query_id": "q9", "timestamp": 1}', "takes the id of a passage"),
        ('{"user_query": "x", "query_id": "q"}', "lacks 'timestamp'"),
        ('{"user_query": "x", "query_id": "q", "timestamp": "tomorrow"}', "tomorrow"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(log, tmp_path, line, word):
    (tmp_path / "ubi.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(DataError, match=f"line 2: .*{word}"):
        import_ubi(log, tmp_path / "ubi.jsonl")


@pytest.mark.parametrize("when", ["2026-01-01", "now", float("nan"), True, [1]])
def test_a_time_that_is_no_number_deletes_and_finds_nothing(log, when):
    remember(log)
    for call in (
        lambda: log.forget(before=when),
        lambda: list(log.queries(since=when)),
        lambda: log.add("q1", "click", "a", at=when),
        lambda: remember(log, "q2", at=when),
    ):
        with pytest.raises(UsageError, match="seconds since 1970"):
            call()
    assert log.counts()["searches"] == 1


@pytest.mark.parametrize("days", [1.5, "30", True, -1, 10**20])
def test_days_that_are_none_are_refused_and_the_log_goes_on(log, days):
    with pytest.raises(UsageError, match="whole number of days"):
        log.set(retention_days=days)
    assert log.retention_days == 180


@pytest.mark.parametrize(
    ("query", "passage", "event"), [(["q1"], "a", None), ("q1", 5, None), ("\ud800", "a", None), ("q1", "a", ["e"])]
)
def test_ids_that_are_no_text_are_refused(log, query, passage, event):
    remember(log)
    with pytest.raises(UsageError, match="the id of the"):
        log.add(query, "relevant", passage, event_id=event)


def test_fewer_days_delete_at_once(log):
    remember(log, at=5.0)
    log.set(retention_days=30)
    assert log.counts()["searches"] == 0


def test_what_comes_back_from_an_export_is_not_a_second_client(log, tmp_path):
    """Two machines that exchange their logs would else vote against themselves."""
    remember(log, client="ann")
    log.add("q1", "relevant", "a")
    log.add("q1", "answer_up")
    export_ubi(log, tmp_path / "ubi.jsonl")
    with FeedbackLog(tmp_path / "other.sqlite3") as other:
        for _ in range(2):
            import_ubi(other, tmp_path / "ubi.jsonl")
        assert len(other.get("q1").events) == 2
        export_ubi(other, tmp_path / "back.jsonl")
    before = log.get("q1").events
    import_ubi(log, tmp_path / "back.jsonl")
    assert log.get("q1").events == before


def test_what_was_deleted_beside_a_reader_goes_when_it_has_left(log, monkeypatch, caplog):
    def readable() -> bool:  # by another process: closing the file in this one would end SQLite's locks
        script = "import sys; print(any(b'Secret' in open(p, 'rb').read() for p in sys.argv[1:]))"
        files = [str(path) for path in log.path.parent.glob("feedback.sqlite3*")]
        return subprocess.check_output([sys.executable, "-c", script, *files], text=True).strip() == "True"

    monkeypatch.setattr("ultrarag.retrieve.feedback.keeping.READER_SECONDS", 0.05)
    remember(log, client="ann")
    for number in range(9):
        remember(log, f"other {number}", "another")
    reader = log.queries()
    next(reader)
    log.forget(client="ann")
    assert "is reading it" in caplog.text
    reader.close()
    assert readable()
    log.expire()
    assert not readable()
    assert not log.noted("unclean")
