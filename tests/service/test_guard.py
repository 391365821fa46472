"""Who may ask, how much, and under which name."""

from __future__ import annotations

import socket
import threading
import time

import httpx2
import pytest

from tests.service.running import Running
from ultrarag.errors import IndexStateError, UsageError
from ultrarag.service import Limits, Settings
from ultrarag.service.faults import Fault
from ultrarag.service.guard import Rates
from ultrarag.service.settings import is_loopback, read_token

TOKEN = "a-token-of-twenty-four-chars"


@pytest.fixture
def guarded(index):
    running = Running(index, token=TOKEN, limits=Limits(body=2000, body_seconds=0.5))
    yield running
    running.stop()


def test_without_the_token_nothing_but_health_is_answered(guarded: Running) -> None:
    with httpx2.Client(base_url=guarded.url) as stranger:
        for path in ("/", "/v1/status", "/metrics", "/openapi.json", "/mcp", "/nowhere", "/v1/passages/milvus"):
            response = stranger.get(path)
            assert response.status_code == 401, path
            assert response.headers["WWW-Authenticate"].startswith("Bearer")
            assert "Bearer TOKEN" in response.json()["error"]["message"]
        for token in (TOKEN[:-1], TOKEN + "x", "x", "\xe9" * 20):
            wrong = stranger.get("/v1/status", headers={"Authorization": f"Bearer {token}".encode("latin-1")})
            assert wrong.status_code == 401
        assert stranger.get("/health").status_code == 200
        assert stranger.get("/v1/status", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
    assert guarded.get("/v1/status").status_code == 200
    assert TOKEN not in repr(guarded.service.settings)


def test_a_body_that_is_too_large_is_not_read(guarded: Running) -> None:
    response = guarded.post("/v1/search", {"query": "x" * 3000})
    assert response.status_code == 413
    assert "at most 2,000 bytes" in response.json()["error"]["message"]

    def chunks():
        for _ in range(30):
            yield b" " * 100

    streamed = guarded.client.post("/v1/search", content=chunks(), headers={"Content-Type": "application/json"})
    assert streamed.status_code == 413


def test_a_body_that_does_not_come_is_not_waited_for(guarded: Running) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    head = f"POST /v1/search HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as slow:
        slow.sendall(head.encode() + b"{")
        assert b"408" in slow.recv(100)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example:8080"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": ""}, 421),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:8080"}, 200),
        ({"Host": "LOCALHOST"}, 200),
        ({"Host": "named.example"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:80", "Origin": "http://localhost:80"}, 200),
        ({"Host": "localhost:80", "Origin": "http://localhost:81"}, 403),
    ],
)
def test_strangers_names_and_pages_are_refused(index, headers, status) -> None:
    running = Running(index, allowed_hosts=("named.example",))
    try:
        assert running.post("/v1/search", {"query": "x"}, headers=headers).status_code == status
        assert running.get("/v1/status", headers=headers).status_code == status
    finally:
        running.stop()


def test_a_client_that_asks_too_often_is_told_when_to_come_back() -> None:
    now = [0.0]
    rates = Rates(2.0, lambda: now[0])
    for _ in range(4):
        rates.take("a")
    with pytest.raises(Fault) as refused:
        rates.take("a")
    assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "1"})
    rates.take("b")
    now[0] = 0.5
    rates.take("a")
    with pytest.raises(Fault):
        rates.take("a")


def test_a_rate_is_a_clients(index) -> None:
    running = Running(index, limits=Limits(rate=1.0))
    try:
        answered = [running.get("/v1/count").status_code for _ in range(4)]
        assert answered[:2] == [200, 200]
        assert 429 in answered[2:]
        assert running.get("/health").status_code == 200
    finally:
        running.stop()


def test_a_stopping_service_ends_what_it_has_begun(index) -> None:
    running, asked, release = Running(index), threading.Event(), threading.Event()
    search = index.search_many

    def slow(*args, **options):
        asked.set()
        release.wait(30)
        return search(*args, **options)

    index.search_many = slow  # type: ignore[method-assign]
    found = []
    client = threading.Thread(target=lambda: found.append(running.post("/v1/search", {"query": "milvus"})))
    client.start()
    assert asked.wait(30)
    running.service.stopping = True
    with httpx2.Client(base_url=running.url) as late:
        assert late.get("/v1/status").status_code == 503
    stopper = threading.Thread(target=running.stop)
    stopper.start()
    time.sleep(0.2)
    release.set()
    client.join(30)
    stopper.join(60)
    assert found[0].status_code == 200
    with pytest.raises(IndexStateError, match="was closed"):
        len(index)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"host": "0.0.0.0"}, "ULTRARAG_TOKEN"),
        ({"host": "::"}, "ULTRARAG_TOKEN"),
        ({"host": "index.example"}, "ULTRARAG_TOKEN"),
        ({"port": 70_000}, "--port"),
        ({"workers": 0}, "--workers"),
        ({"tls_cert": "a.pem"}, "--tls_key"),
        ({"data_dir": "/nowhere/at/all"}, "--data_dir"),
    ],
)
def test_settings_that_are_not_safe_are_refused(settings, words) -> None:
    with pytest.raises(UsageError, match=words):
        Settings("kb", **settings).check()


def test_a_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("ULTRARAG_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("ULTRARAG_TOKEN", TOKEN)
    assert read_token(None) == TOKEN
    file = tmp_path / "token"
    for content in ("short", "two words that are long", "", "\x00" * 30, "é" * 30):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(UsageError, match="at least 16"):
            read_token(str(file))
    file.write_text(f"{TOKEN[::-1]}\n")
    assert read_token(str(file)) == TOKEN[::-1]
    with pytest.raises(UsageError, match="cannot be read"):
        read_token(str(tmp_path / "none"))


def test_loopback_is_known_by_its_names() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost", "localhost.")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.example", "", "127.0.0.1.example")))
