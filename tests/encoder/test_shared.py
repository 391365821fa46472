"""Texts of many threads are joined into one forward, and nobody notices but by the time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ultrarag.encoder import SharedEncoder
from ultrarag.errors import DataError, UsageError
from ultrarag.types import Embeddings, Tokens

QUERIES = ["what is milvus?", "a", "an old castle on a hill beside the river", "books", "who reads here in silence?"]


class Held:
    """An encoder whose first forward waits until it is let go; a text's vector is its number, a token each letter."""

    device, precision, settings = torch.device("cpu"), "fp32", SimpleNamespace()

    def __init__(self) -> None:
        self.go, self.began = threading.Event(), threading.Event()
        #: the texts of each forward
        self.forwards: list[list[str]] = []
        #: who ran them
        self.threads: list[int] = []
        self.fails: Callable[[list[str]], None] = lambda texts: None

    def gives_dense(self, *_: Any) -> bool:
        """Nothing is compiled."""
        return False

    def check_kind(self, kind: str) -> None: ...

    def checked_heads(self, heads: Any) -> tuple[str, ...]:
        return tuple(heads or ("dense",))

    def max_length(self, kind: str, asked: int | None = None) -> int | None: ...

    def tokenize(self, texts: list[str], kind: Any, *_: Any) -> Tokens:
        return Tokens([list(text.encode()) for text in texts], kind=kind)

    def encode_tokens(self, tokens: Tokens, heads: tuple[str, ...], *_: Any) -> Embeddings:
        texts = [bytes(ids).decode() for ids in tokens.ids]
        self.forwards.append(texts)
        self.threads.append(threading.get_ident())
        self.began.set()
        assert self.go.wait(60)
        self.fails(texts)
        return Embeddings(dense=np.array([[float(text.split()[0])] for text in texts], np.float32))


class Compiled(Held):
    """The same by a compiled model."""

    def gives_dense(self, kind: str, *_: Any) -> bool:
        return kind == "query"


class Callers:
    """Threads that each ask for something; what they were given, or what was raised."""

    def __init__(self, shared: SharedEncoder) -> None:
        self.shared, self.threads, self.found = shared, [], {}
        submit, self.asked = shared._submit, 0

        def counting(request: Any) -> None:
            submit(request)
            self.asked += 1

        shared._submit = counting  # type: ignore[method-assign]

    def ask(self, name: str, texts: Any, kind: str = "query", **options: Any) -> None:
        """Ask in a thread of its own, and wait until it waits (or has ended)."""

        def run() -> None:
            try:
                self.found[name] = self.shared.encode(texts, kind, **options)
            except BaseException as error:
                self.found[name] = error

        before = self.asked
        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()
        self.wait_for(before + 1)

    def wait_for(self, asked: int) -> None:
        """Until so many texts wait, or did."""
        deadline = time.monotonic() + 60
        while self.asked < asked:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def end(self) -> dict[str, Any]:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive(), "it hangs"
        return self.found


@pytest.fixture
def held():
    encoder = Held()
    with SharedEncoder(encoder, clock=lambda: 0.0) as shared:  # type: ignore[arg-type]  # no turn takes any time
        callers = Callers(shared)
        callers.ask("first", "0")
        assert encoder.began.wait(60)
        yield encoder, callers
        encoder.go.set()


def numbers(found: Any) -> list[float]:
    if isinstance(found, BaseException):
        raise found
    return found.dense[:, 0].tolist()


# Joining


@pytest.mark.parametrize("heads", [None, ("dense",), ("sparse", "colbert")])
def test_joined_queries_have_the_vectors_of_single_ones(m3_encoder, heads, monkeypatch) -> None:
    alone = [m3_encoder.encode(query, "query", heads=heads) for query in QUERIES]
    encode, began, go, rows = m3_encoder.encode_tokens, threading.Event(), threading.Event(), []

    def noting(tokens, *rest):
        rows.append(len(tokens))
        began.set()
        assert go.wait(60)
        return encode(tokens, *rest)

    monkeypatch.setattr(m3_encoder, "encode_tokens", noting)
    with SharedEncoder(m3_encoder) as shared:
        callers = Callers(shared)
        callers.ask("first", "the first", heads=heads)
        assert began.wait(60)
        for number, query in enumerate(QUERIES):
            callers.ask(str(number), query, heads=heads)
        go.set()
        found = callers.end()
    assert rows == [1, len(QUERIES)]
    for number, wanted in enumerate(alone):
        given = found[str(number)]
        assert given.heads == wanted.heads
        for one, other in zip(given.arrays(), wanted.arrays(), strict=True):
            assert one.shape == other.shape
            np.testing.assert_allclose(one, other, atol=1e-6)


def test_what_arrives_during_one_forward_is_the_next(held) -> None:
    encoder, callers = held
    for number in range(1, 6):
        callers.ask(str(number), [str(number), str(10 + number)])
    encoder.go.set()
    found = callers.end()
    assert [sorted(map(int, texts)) for texts in encoder.forwards] == [[0], [1, 2, 3, 4, 5, 11, 12, 13, 14, 15]]
    assert all(numbers(found[str(number)]) == [number, 10 + number] for number in range(1, 6))


def test_only_what_may_share_a_forward_does(held) -> None:
    encoder, callers = held
    callers.ask("1", "1")
    callers.ask("2", "2", heads=("other",))
    callers.ask("3", "3", "passage")
    callers.ask("4", "4", "text")
    callers.ask("5", "5")
    encoder.go.set()
    callers.end()
    assert sorted(encoder.forwards) == [["0"], ["1", "5"], ["2"], ["3"], ["4"]]


def test_many_queries_of_one_caller_keep_no_other_waiting(held) -> None:
    encoder, callers = held
    callers.ask("many", [f"{number} " + 98 * "x" for number in range(10, 60)])
    callers.ask("one", "7")
    encoder.go.set()
    found = callers.end()
    assert [len(texts) for texts in encoder.forwards[1:4]] == [3, 2, 2]  # 256 tokens at a time
    assert "7" in encoder.forwards[1]
    assert numbers(found["many"]) == list(range(10, 60))


def test_a_long_text_is_a_turn_of_its_own(held) -> None:
    encoder, callers = held
    callers.ask("long", ["1 " + 2000 * "x", "2"])
    callers.ask("one", "3")
    encoder.go.set()
    found = callers.end()
    assert numbers(found["long"]) == [1, 2]
    assert [len(texts) for texts in encoder.forwards] == [1, 2, 1]


def test_queries_go_before_the_passages_of_a_write(held) -> None:
    encoder, callers = held
    callers.ask("write", [f"{number} " + 507 * "x" for number in range(10, 20)], "passage")
    callers.ask("query", "1")
    encoder.go.set()
    found = callers.end()
    assert encoder.forwards[1] == ["1"]
    assert [len(texts) for texts in encoder.forwards[2:]] == [1] * 10
    assert numbers(found["write"]) == list(range(10, 20))


@pytest.mark.parametrize("endless", ["query", "passage"])
def test_neither_keeps_the_other_waiting_for_ever(endless: str) -> None:
    encoder, stop = Held(), threading.Event()
    encoder.go.set()
    with SharedEncoder(encoder) as shared:  # type: ignore[arg-type]

        def ask() -> None:
            while not stop.is_set():
                shared.encode([f"1 {600 * 'x'}"], endless)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        other = "passage" if endless == "query" else "query"
        try:
            for number in range(20):
                assert numbers(shared.encode([str(number)], other)) == [number]
        finally:
            stop.set()
            for thread in threads:
                thread.join()


# Faults


@pytest.mark.parametrize(
    ("texts", "options", "error", "said"),
    [
        ([7], {}, UsageError, r"texts\[0\] is int, not a string"),
        (["a", "\ud800"], {}, DataError, r"texts\[1\] holds a lone surrogate"),
        (["a"], {"heads": ("nose",)}, UsageError, "head 'nose' is unknown"),
        (["a"], {"kind": "pasage"}, UsageError, "kind is 'pasage'"),
        (["a"], {"max_length": 10**6}, UsageError, "a maximum of 1000000 tokens"),
    ],
)
def test_what_the_encoder_refuses_is_refused_before_it_is_joined(m3_encoder, texts, options, error, said) -> None:
    with SharedEncoder(m3_encoder) as shared, pytest.raises(error, match=said):
        shared.encode(texts, **{"kind": "query", **options})


@pytest.mark.parametrize("error", [RuntimeError("a plugin's own"), MemoryError("no memory"), SystemExit(3)])
def test_a_text_that_fails_is_its_callers_alone(held, error: BaseException) -> None:
    encoder, callers = held

    def fail(texts: list[str]) -> None:
        if "3 bad" in texts:
            raise error

    encoder.fails = fail
    for number in range(1, 6):
        callers.ask(str(number), f"{number} bad" if number == 3 else str(number))
    encoder.go.set()
    found = callers.end()
    assert found.pop("3") is error
    assert {name: numbers(one) for name, one in found.items()} == {"first": [0], "1": [1], "2": [2], "4": [4], "5": [5]}


def test_the_rest_of_a_call_that_failed_is_not_encoded(held) -> None:
    encoder, callers = held

    def fail(texts: list[str]) -> None:
        if any(text.startswith("10 ") for text in texts):
            raise RuntimeError("no")

    encoder.fails = fail
    callers.ask("many", [f"{number} " + 509 * "x" for number in range(10, 20)])
    callers.ask("one", "1")
    encoder.go.set()
    found = callers.end()
    assert str(found["many"]) == "no"
    assert numbers(found["one"]) == [1]
    assert [len(texts) for texts in encoder.forwards] == [1, 1, 1]


def test_nobody_hangs_by_a_fault_of_the_turns(held, monkeypatch) -> None:
    encoder, callers = held
    callers.ask("1", "1")
    callers.ask("2", "2", "passage")

    def broken(waiting: Any) -> Any:
        raise ZeroDivisionError("a fault")

    with monkeypatch.context() as patch:
        patch.setattr(callers.shared._turns, "next", broken)
        encoder.go.set()
        found = callers.end()
    assert [str(found[name]) for name in "12"] == ["a fault"] * 2
    assert numbers(callers.shared.encode("3", "query")) == [3]


def test_ctrl_c_in_a_thread_that_waits_takes_nothing_from_the_others(held) -> None:
    encoder, callers = held
    callers.ask("before", "1")

    def interrupt() -> None:
        callers.wait_for(3)
        callers.ask("after", "3")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    helper = threading.Thread(target=interrupt)
    helper.start()
    with pytest.raises(KeyboardInterrupt):
        callers.shared.encode("2", "query")
    helper.join()
    encoder.go.set()
    found = callers.end()
    assert [numbers(found[name]) for name in ("first", "before", "after")] == [[0], [1], [3]]
    assert ["2"] not in encoder.forwards
    assert sorted(encoder.forwards[1]) == ["1", "3"]


def test_closing_lets_those_that_wait_finish(held) -> None:
    encoder, callers = held
    callers.ask("1", "1")
    callers.shared.close()
    with pytest.raises(UsageError, match="was closed"):
        callers.shared.encode("2", "query")
    encoder.go.set()
    assert numbers(callers.end()["1"]) == [1]
    thread = next(iter(callers.shared._pool._threads))
    thread.join(60)
    assert not thread.is_alive()


def test_a_fork_is_refused(held, monkeypatch) -> None:
    _, callers = held
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(UsageError, match="make one after forking"):
        callers.shared.encode("1", "query")


def test_cuts_are_told_to_whoever_asked(m3_encoder, caplog) -> None:
    with SharedEncoder(m3_encoder) as shared:
        found = shared.encode(["a " * 50, "b"], "query", max_length=8)
        assert shared.encode([], "query").dense.shape == (0, found.dense.shape[1])
    assert "1 of 2 texts were longer than 8 tokens and were cut" in caplog.text
    np.testing.assert_allclose(found.dense, m3_encoder.encode(["a " * 50, "b"], "query", max_length=8).dense, atol=1e-6)


def asked_while_one_is_encoded(encoder: Compiled, shared: SharedEncoder) -> dict[str, Any]:
    """What "0", encoded by the thread that asks, and two more are given that ask meanwhile; closed before they are."""
    callers = Callers(shared)
    callers.threads.append(threading.Thread(target=lambda: found.update(caught(shared, "0")), daemon=True))
    found: dict[str, Any] = {}
    callers.threads[0].start()
    assert encoder.began.wait(60)
    callers.ask("1", "1")
    callers.ask("2", ["2", "2"])
    return {"found": found, "callers": callers}


def caught(shared: SharedEncoder, text: str) -> dict[str, Any]:
    try:
        return {text: shared.encode(text, "query")}
    except BaseException as error:
        return {text: error}


def test_a_compiled_query_is_encoded_by_who_asks_where_nobody_else_is_there() -> None:
    encoder = Compiled()
    encoder.go.set()
    with SharedEncoder(encoder) as shared:  # type: ignore[arg-type]
        assert numbers(shared.encode("1", "query")) == [1.0]
        assert encoder.threads == [threading.get_ident()]
        assert numbers(shared.encode(["2", "3"], "query")) == [2.0, 3.0]
        assert numbers(shared.encode("4", "passage")) == [4.0]
        assert threading.get_ident() not in encoder.threads[1:]
        assert numbers(shared.encode("5", "query")) == [5.0]
        assert encoder.threads[-1] == threading.get_ident()


def test_queries_that_were_alone_for_long_are_owed_nothing_by_those_to_come() -> None:
    """Their time is not counted against them when passages come, although no thread gave them their turns."""
    encoder, now = Compiled(), 0.0

    def clock() -> float:
        nonlocal now
        now += 0.01
        return now

    encoder.go.set()
    with SharedEncoder(encoder, clock=clock) as shared:  # type: ignore[arg-type]
        for _ in range(1000):
            shared.encode("1", "query")
        encoder.go.clear()
        callers = Callers(shared)
        callers.ask("a write", [f"{number} {'x' * 300}" for number in range(20)], "passage")
        callers.ask("a search", "7")
        encoder.go.set()
        callers.end()
    assert ["7"] in encoder.forwards[1000:1003]


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("failure", [None, DataError, KeyboardInterrupt])
def test_who_comes_while_a_caller_encodes_is_encoded_next_whatever_becomes_of_it(closed, failure) -> None:
    encoder = Compiled()
    if failure:
        encoder.fails = lambda texts: raising(failure) if texts == ["0"] else None
    with SharedEncoder(encoder, clock=lambda: 0.0) as shared:  # type: ignore[arg-type]
        asked = asked_while_one_is_encoded(encoder, shared)
        if closed:
            shared.close()
        encoder.go.set()
        found = {**asked["callers"].end(), **asked["found"]}
        assert numbers(found["1"]) == [1.0]
        assert numbers(found["2"]) == [2.0, 2.0]
        assert isinstance(found["0"], failure) if failure else numbers(found["0"]) == [0.0]
        assert encoder.forwards == [["0"], ["1", "2", "2"]]
        if not closed:
            assert numbers(shared.encode("7", "query")) == [7.0]
            assert encoder.threads[-1] == threading.get_ident()


def raising(error: type[BaseException]) -> None:
    raise error("it fails")
