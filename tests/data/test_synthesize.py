"""Queries by a language model: against a local stand-in that is busy, slow, rude or talks nonsense."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ultrarag.data.cli import main as data
from ultrarag.data.synthesize_client import (
    BadAnswer,
    Endpoint,
    EndpointError,
    Prompt,
    key_from,
    language_of,
    read_queries,
    retry_after,
)
from ultrarag.data.synthesize_command import main
from ultrarag.data.synthesize_journal import Journal
from ultrarag.data.synthesizing import SynthesisSettings, by_first_sentence, by_title, synthesize
from ultrarag.errors import DataError, UsageError
from ultrarag.types import Passage

KEY = "sk-secret-0123456789"
NAMES = ["milvus", "seals", "bread", "bicycle", "steam"]
PASSAGES = [{"_id": str(n), "title": name, "text": f"All about {name} and more."} for n, name in enumerate(NAMES)]


class StandIn:
    """A chat endpoint whose behaviour a test decides: `reply(name, times asked) -> (status, headers, body)`."""

    def __init__(self, reply=None):
        self.asked = Counter()
        self.bodies, self.headers, self.at = [], [], []
        self.reply = reply or (lambda name, times: good(name))
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, headers, content = stand_in.answer(self.path, body, dict(self.headers))
                try:
                    self.send_response(status)
                    for header in {**headers, "Content-Length": str(len(content))}.items():
                        self.send_header(*header)
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # the client has gone
                    pass

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def answer(self, path, body, headers):
        assert path == "/v1/chat/completions"
        prompt = body["messages"][0]["content"]
        name = next(name for name in NAMES if f"All about {name}" in prompt)
        with self.lock:
            self.asked[name] += 1
            times = self.asked[name]
            self.bodies.append(body)
            self.headers.append(headers)
            self.at.append(time.monotonic())
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        try:
            status, more, content = self.reply(name, times)
        finally:
            with self.lock:
                self.busy -= 1
        return status, more, content if isinstance(content, bytes) else json.dumps(content).encode()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def chat(text, tokens_in=100, tokens_out=20, finish="stop"):
    usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}], "usage": usage}


def good(name):
    return 200, {}, chat(json.dumps({"queries": [f"what is {name}?", f"{name} facts"]}))


@pytest.fixture
def stand_in():
    made = []

    def make(reply=None):
        made.append(StandIn(reply))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def passages(tmp_path):
    path = tmp_path / "passages.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PASSAGES))
    return path


def endpoint(server, **options):
    return Endpoint(server.url, "stand-in", **{"first_wait": 0.01, "timeout": 5.0, **options})


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_queries_become_rows_and_tokens_are_counted(stand_in, passages, tmp_path):
    server = stand_in()
    body = {"temperature": 0.5, "seed": 3}
    settings = SynthesisSettings(queries=2)
    report = synthesize(passages, tmp_path / "out.jsonl", endpoint(server, key=KEY, body=body), settings)
    assert read(tmp_path / "out.jsonl") == [
        {"query": query, "pos": [f"{name}\nAll about {name} and more."], "passage_id": str(number)}
        for number, name in enumerate(NAMES)
        for query in (f"what is {name}?", f"{name} facts")
    ]
    assert (report.queries, report.tokens_in, report.tokens_out) == (10, 500, 100)
    assert report.cost(2.0, 10.0) == pytest.approx(500 * 2e-6 + 100 * 10e-6)
    assert {body["model"] for body in server.bodies} == {"stand-in"}
    assert (server.bodies[0]["temperature"], server.bodies[0]["seed"]) == (0.5, 3)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_as_many_requests_at_a_time_as_allowed(stand_in, passages, tmp_path):
    def slow(name, times):
        time.sleep(0.05)
        return good(name)

    server = stand_in(slow)
    synthesize(passages, tmp_path / "out.jsonl", endpoint(server), SynthesisSettings(), concurrency=2)
    assert server.most_busy == 2


def test_busy_slow_and_broken_answers_are_asked_for_again(stand_in, passages, tmp_path):
    def moody(name, times):
        if times > 1:
            return good(name)
        if name == "seals":
            return 503, {}, b"overloaded"
        if name == "bread":
            time.sleep(1.5)
        if name == "steam":
            return 200, {}, b"<html>proxy</html>"
        return good(name)

    server = stand_in(moody)
    report = synthesize(passages, tmp_path / "out.jsonl", endpoint(server, timeout=1.0), SynthesisSettings())
    assert server.asked == {"milvus": 1, "seals": 2, "bread": 2, "bicycle": 1, "steam": 2}
    assert (report.queries, report.without, report.tokens_in) == (10, 0, 500)


def test_too_many_requests_wait_as_long_as_they_are_told(stand_in, passages, tmp_path):
    def limited(name, times):
        return (429, {"Retry-After": "0.5"}, b"slow down") if name == "milvus" and times == 1 else good(name)

    server = stand_in(limited)
    synthesize(passages, tmp_path / "out.jsonl", endpoint(server), SynthesisSettings(), concurrency=1)
    assert server.asked["milvus"] == 2
    assert server.at[1] - server.at[0] >= 0.5


def test_retry_after_is_a_number_or_a_date():
    assert retry_after({"retry-after": "7"}) == 7.0
    assert 8 < retry_after({"retry-after": formatdate(time.time() + 10, usegmt=True)}) <= 10
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


def test_an_endpoint_that_refuses_stops_the_run_and_keeps_what_was_paid(stand_in, passages, tmp_path, caplog):
    def refusing(name, times):
        return good(name) if name in NAMES[:2] else (401, {}, f"bad key {KEY}, sorry".encode())

    server, output = stand_in(refusing), tmp_path / "out.jsonl"
    caplog.set_level(logging.DEBUG)
    with pytest.raises(EndpointError, match=r"401: bad key \*\*\*, sorry") as error:
        synthesize(passages, output, endpoint(server, key=KEY), SynthesisSettings(), concurrency=1)
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert KEY not in f"{error.value} {caplog.text} {written} {endpoint(server, key=KEY)!r}"
    assert not output.exists()
    server.reply = lambda name, times: good(name)
    synthesize(passages, output, endpoint(server), SynthesisSettings(), concurrency=1)
    assert server.asked == {"milvus": 1, "seals": 1, "bread": 2, "bicycle": 1, "steam": 1}
    assert len(read(output)) == 10
    gone = Endpoint("http://127.0.0.1:9", "m", first_wait=0.01, retries=2)
    with pytest.raises(EndpointError, match="3 times"):
        synthesize(passages, tmp_path / "b.jsonl", gone, SynthesisSettings())


def test_answers_without_queries_are_asked_again_and_then_counted(stand_in, passages, tmp_path):
    def garbage(name, times):
        if name == "bread":
            return 200, {}, chat("I cannot do that.", finish="length")
        if name == "seals" and times == 1:
            return 200, {}, chat('{"queries": []}')
        return good(name)

    server, output = stand_in(garbage), tmp_path / "out.jsonl"
    report = synthesize(passages, output, endpoint(server), SynthesisSettings(attempts=2))
    assert server.asked == {"milvus": 1, "seals": 2, "bread": 2, "bicycle": 1, "steam": 1}
    assert (report.queries, report.without, report.tokens_in) == (8, 1, 700)
    failed = [row for row in read(tmp_path / "out.jsonl.answers.jsonl")[1:] if "queries" not in row]
    assert failed[0]["error"] == "no JSON in 'I cannot do that.' (it was cut: raise --max_tokens)"


def test_a_killed_process_pays_for_nothing_twice(stand_in, passages, tmp_path):
    hold = threading.Event()

    def slow(name, times):
        if name not in NAMES[:3]:
            hold.wait(20)
        return good(name)

    server = stand_in(slow)
    words = [sys.executable, "-m", "ultrarag.data.cli", "synthesize", "--input_file", str(passages), "-o"]
    words += [str(tmp_path / "out.jsonl"), "--base_url", server.url, "--llm", "m", "--concurrency", "1"]
    child = subprocess.Popen(words)
    journal = tmp_path / "out.jsonl.answers.jsonl"
    for _ in range(1000):
        if sum(server.asked.values()) == 4:
            break
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    hold.set()
    with journal.open("ab") as file:
        file.write(b'{"n": 3, "quer')  # as a kill inside a write leaves it
    assert subprocess.run(words, check=True, capture_output=True, text=True).stdout.startswith("10 queries for 5")
    assert server.asked == {"milvus": 1, "seals": 1, "bread": 1, "bicycle": 2, "steam": 1}
    assert len(read(tmp_path / "out.jsonl")) == 10


def test_paid_answers_serve_another_output_and_no_other_question(stand_in, passages, tmp_path):
    server, output = stand_in(), tmp_path / "out.jsonl"
    synthesize(passages, output, endpoint(server), SynthesisSettings())
    again = SynthesisSettings(round_trip_k=1, weights={"bm25": 1})
    report = synthesize(passages, output, endpoint(server), again, overwrite=True)
    assert (report.queries, sum(server.asked.values())) == (10, 5)
    output.unlink()
    with pytest.raises(DataError, match="another model"):
        synthesize(passages, output, Endpoint(server.url, "other"), SynthesisSettings())
    synthesize(passages, output, Endpoint(server.url, "other"), SynthesisSettings(), overwrite=True)
    assert sum(server.asked.values()) == 10


@pytest.mark.parametrize("model", [True, False])
def test_only_queries_that_find_their_passage_are_kept(stand_in, passages, tmp_path, minilm_encoder, model):
    def wrong(name, times):
        return 200, {}, chat(json.dumps(["how to ride a bicycle", f"tell me of {name}"]))

    settings = SynthesisSettings(round_trip_k=1, weights=None if model else {"bm25": 1})
    encoder = minilm_encoder if model else None
    report = synthesize(passages, tmp_path / "o.jsonl", endpoint(stand_in(wrong)), settings, encoder=encoder)
    rows = read(tmp_path / "o.jsonl")
    assert [row["passage_id"] for row in rows if row["query"] == "how to ride a bicycle"] == ["3"]
    assert [row["passage_id"] for row in rows if row["query"].startswith("tell")] == ["0", "1", "2", "3", "4"]
    assert (report.queries, report.dropped) == (6, 4)
    assert not (tmp_path / "o.jsonl.roundtrip").exists()


def test_a_journal_knows_what_it_holds(tmp_path):
    journal = Journal(tmp_path / "j", {"a": 1})
    journal.add(5, {"queries": ["x\ny", "é"]})
    journal.add(2, {"error": "no"})
    assert (journal.get(5)["queries"], 2 in journal, 3 in journal, journal.get(9)) == (["x\ny", "é"], True, False, None)
    with pytest.raises(DataError, match="another process"):
        Journal(tmp_path / "j", {"a": 1})
    journal.close()
    again = Journal(tmp_path / "j", {"a": 1})
    assert (again.get(2)["error"], again.records) == ("no", 2)
    again.close()


@pytest.mark.parametrize(
    ("answer", "queries"),
    [
        ('{"queries": ["a", " b  c ", "a", 3, ""]}', ["a", "b c"]),
        ('Sure! Here:\n```json\n{"queries": ["a"]}\n```', ["a"]),
        ('["a", "b", "c", "d"]', ["a", "b", "c"]),
        ('Queries {as asked} [1]: {"queries": ["a"]} [done]', ["a"]),
    ],
)
def test_answers_are_read(answer, queries):
    assert read_queries(answer, 3) == queries


@pytest.mark.parametrize("answer", ["", "no", '{"query": "a"}', '{"queries": "a"}', '{"queries": [""]}', "[[[[" * 9999])
def test_answers_without_queries_are_refused(answer):
    with pytest.raises(BadAnswer):
        read_queries(answer, 3)


def test_prompts_are_files_in_the_language_of_the_passage(tmp_path):
    prompt = Prompt()
    chinese = prompt.render(Passage("", "骑车淋雨以后先擦干链条，再滴一点润滑油。{count}", "Bike"), 4)
    assert "写出 4 个" in chinese
    assert chinese.rstrip().endswith("润滑油。{count}")  # braces of the passage are left alone
    assert "Write 2 different" in prompt.render(Passage("", "Seals sleep."), 2)
    assert "写出 2 个" in Prompt("zh").render(Passage("", "Seals sleep."), 2)
    own = tmp_path / "own.txt"
    own.write_text("Ask {count}: {passage}")
    assert Prompt("auto", own).render(Passage("", "Seals."), 2) == "Ask 2: Seals."
    own.write_text("Ask")
    with pytest.raises(UsageError, match=r"does not hold \{passage\}"):
        Prompt("auto", own)
    assert language_of("《战国无双3》是由KOEI开发的") == "zh"


def test_baselines_leave_the_query_out_of_its_text():
    passage = Passage("1", "Dr. Who sleeps in water. Seals do too. So it is.", "Sleep")
    assert by_title(passage) == ("Sleep", passage.text)
    assert by_first_sentence(passage) == ("Dr. Who sleeps in water.", "Sleep\nSeals do too. So it is.")
    assert by_first_sentence(Passage("", "先擦干自行车的链条。再滴一点油。")) == (
        "先擦干自行车的链条。",
        "再滴一点油。",
    )
    assert by_title(Passage("", "text")) is None
    assert by_first_sentence(Passage("", "One sentence only, which has no end")) is None


def test_a_baseline_asks_nobody(passages, tmp_path, capsys):
    words = ["synthesize", "--input_file", str(passages), "-o", str(tmp_path / "out.jsonl"), "--baseline", "title"]
    assert data([*words, "--round_trip_k", "1", "--weights", "bm25=1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["queries"], printed["cost"]) == (5, 0)
    assert read(tmp_path / "out.jsonl")[0] == {
        "query": "milvus",
        "pos": ["All about milvus and more."],
        "passage_id": "0",
    }


def test_a_run_killed_when_it_had_published_is_done_by_the_same_call(
    stand_in, passages, tmp_path, killed_when_published
):
    server, output = stand_in(), tmp_path / "out.jsonl"
    settings = SynthesisSettings(round_trip_k=1, weights={"bm25": 1.0})

    def call():
        return synthesize(passages, output, endpoint(server), settings)

    killed_when_published(call)
    before, asked = output.read_bytes(), server.asked.total()
    assert (tmp_path / "out.jsonl.roundtrip").exists()
    report = call()
    assert (output.read_bytes(), server.asked.total()) == (before, asked)
    assert (report.passages, report.tokens_in) == (5, 500)
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl", "out.jsonl.answers.jsonl"]


def test_the_command_takes_its_key_from_a_variable(stand_in, passages, tmp_path, monkeypatch, capsys):
    server = stand_in()
    monkeypatch.setenv("MY_KEY", KEY)
    words = f"--input_file {passages} -o {tmp_path / 'out.jsonl'} --base_url {server.url} --llm m --api_key_env MY_KEY"
    assert main(f"{words} --price_in 1 --price_out 10 --limit 2 --json_mode --max_tokens 0".split()) == 0
    assert "4 queries for 2 passages" in (out := capsys.readouterr().out)
    assert "cost 0.0006" in out
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert "max_tokens" not in server.bodies[0]
    assert server.bodies[0]["response_format"] == {"type": "json_object"}


def test_a_key_that_is_named_must_be_there(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("NO_KEY", raising=False)
    assert key_from(None) is None
    with pytest.raises(UsageError, match="NO_KEY, which is not set"):
        key_from("NO_KEY")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--base_url and --llm"),
        ("--baseline title --llm m", "leave out --llm"),
        ("--baseline title --round_trip_k 3", "--round_trip_k needs"),
        ("--base_url localhost:8000 --llm m", "http://"),
        ("--baseline title --querys 3", "did you mean '--queries'"),
        ("--baseline title --queries 0", "at least 1"),
    ],
)
def test_wrong_flags_say_what_to_do(passages, tmp_path, flags, message):
    with pytest.raises(UsageError, match=message):
        main(["--input_file", str(passages), "-o", str(tmp_path / "out.jsonl"), *flags.split()])
