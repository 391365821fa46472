"""`ultrarag serve`: what it refuses, that it starts, and that it stops in order."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from tests import forked
from tests.retrieve.conftest import rest  # noqa: F401  fixture
from tests.retrieve.servers import free_port, wait_for
from ultrarag.cli import main
from ultrarag.errors import UsageError
from ultrarag.retrieve import LiveIndex, read_status
from ultrarag.service.command import read_settings

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-of-twenty-four-chars"


@pytest.fixture
def closed(index: LiveIndex) -> Path:
    """An index that nobody owns."""
    index.close()
    return index.path


def test_flags_become_settings(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("ULTRARAG_TOKEN", raising=False)
    settings = read_settings(["kb", "--weights", "dense=1,bm25=0.5", "--max_k", "5", "--allowed_hosts", "A,b"])
    assert (settings.weights, settings.limits.k, settings.limits.rate) == ({"dense": 1.0, "bm25": 0.5}, 5, 0.0)
    assert (settings.allowed_hosts, settings.host) == (("a", "b"), "127.0.0.1")
    with pytest.raises(UsageError, match="--report_to wandbb is unknown; did you mean 'wandb'"):
        read_settings(["kb", "--report_to", "wandbb"])
    with pytest.raises(UsageError, match="ULTRARAG_TOKEN"):
        read_settings(["kb", "--host", "0.0.0.0"])
    file = tmp_path / "token"
    file.write_text(TOKEN)
    settings = read_settings(["kb", "--host", "0.0.0.0", "--token_file", str(file)])
    assert (settings.token, settings.limits.rate) == (TOKEN, 100.0)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--host", "0.0.0.0"], 2, "can be reached from other machines"),
        (["--workers", "2"], 2, "is embedded in the one process that owns it"),
        (["--port", "70000"], 2, "--port is 70000"),
        (["--tls-cert", "a.pem"], 2, "belong together"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(closed, words, status, said, capsys, monkeypatch) -> None:
    monkeypatch.delenv("ULTRARAG_TOKEN", raising=False)
    assert main(["serve", str(closed), *words]) == status
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken_is_said_at_once(closed, capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(closed), "--port", str(port)]) == 2
    assert f"--port {port} cannot be served" in capsys.readouterr().err


def test_an_index_that_is_not_there(tmp_path, capsys) -> None:
    assert main(["serve", str(tmp_path / "none"), "--port", "0"]) == 1
    err = capsys.readouterr().err
    assert "there is no index" in err
    assert "(ultrarag index create) makes one" in err
    assert logging.getLogger("ultrarag").propagate  # the process's logging is as it was
    assert logging.getLogger("ultrarag").handlers == []


def started(words: list[str], port: int, **env: str) -> forked.Popen:
    program = forked.Popen(
        ["-m", "ultrarag", "serve", *words, "--port", str(port)], env={**os.environ, **env}, cwd=ROOT
    )

    def answers() -> bool:
        assert program.poll() is None, program.communicate()
        try:
            return httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200
        except httpx2.TransportError:
            return False

    wait_for(answers, 180)
    return program


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_and_stops_in_order(closed, number) -> None:
    port = free_port()
    program = started([str(closed)], port, ULTRARAG_TOKEN=TOKEN)
    url, token = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {TOKEN}"}
    assert httpx2.get(f"{url}/v1/status").status_code == 401
    added = httpx2.post(f"{url}/v1/passages", json={"passages": [{"id": "new", "text": "New."}]}, headers=token)
    assert added.json()["added"] == 1
    program.send_signal(number)
    assert program.wait(60) == 0
    out, err = program.communicate()
    assert out == ""
    assert f"serving '{closed}' at {url}: 4 passages" in err
    assert "POST /v1/passages 200" in err
    assert err.rstrip().endswith("stopped; every write that was answered is kept")
    assert TOKEN not in err
    assert "New." not in err
    assert read_status(closed)["passages"] == 5
    assert read_status(closed)["owner"] is None


def test_killed_it_has_lost_nothing_that_was_answered(closed) -> None:
    port = free_port()
    program = started([str(closed)], port)
    url, answered = f"http://127.0.0.1:{port}/v1/passages", 0
    for number in range(5):
        body = {"passages": [{"id": f"n{number}", "text": f"Number {number}."}]}
        answered += httpx2.post(url, json=body).json()["added"]
    program.kill()
    program.communicate()
    assert read_status(closed)["passages"] == 4 + answered == 9


def test_workers_share_an_index_in_a_server(rest, minilm_encoder, tmp_path) -> None:  # noqa: F811
    """Each has a mirror of its own; what one writes the other finds."""
    with LiveIndex.create(tmp_path / "first", minilm_encoder, uri=rest.uri) as live:
        live.add([{"id": "milvus", "text": "Milvus is a vector database."}])
    port = free_port()
    words = [
        sys.executable,
        "-m",
        "ultrarag",
        "serve",
        str(tmp_path / "kb"),
        "--uri",
        rest.uri,
        "--workers",
        "2",
        "--port",
    ]
    program = subprocess.Popen(
        [*words, str(port)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )
    try:
        url = f"http://127.0.0.1:{port}"

        def both() -> bool:
            try:
                httpx2.get(f"{url}/health")
            except httpx2.TransportError:
                return False
            return all(read_owner_of(tmp_path / name) for name in ("kb", "kb.worker-2"))

        wait_for(both, 240)
        assert {best(url, "vector database") for _ in range(10)} == {"milvus"}
        added = httpx2.post(f"{url}/v1/passages", json={"passages": [{"id": "new", "text": "A castle by the sea."}]})
        assert added.status_code == 200, added.text
        wait_for(lambda: {best(url, "castle by the sea") for _ in range(10)} == {"new"}, 60)
        shown = httpx2.post(f"{url}/v1/search", json={"query": "castle", "k": 1, "log": True}).json()
        body = {"query_id": shown["query_id"], "action": "click", "passage_id": shown["hits"][0]["id"]}
        assert {httpx2.post(f"{url}/v1/feedback", json=body).status_code for _ in range(10)} == {200}
    finally:
        program.send_signal(signal.SIGTERM)
        _, err = program.communicate(timeout=60)
    assert program.returncode == 0, err


def best(url: str, query: str) -> str:
    """The best hit, by a connection of its own: maybe of another worker than the last."""
    answer = httpx2.post(f"{url}/v1/search", json={"query": query, "k": 1})
    assert answer.status_code == 200, answer.text
    return answer.json()["hits"][0]["id"]


def read_owner_of(path: Path) -> bool:
    from ultrarag.io import read_owner

    return path.exists() and read_owner(path) is not None
