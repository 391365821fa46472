"""A pair in service: searches of many threads are encoded together, by the encoder of the pair that they entered."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from tests.retrieve.test_live import corpus
from ultrarag.retrieve import LiveIndex

SEARCH = {"heads": ["dense"], "k": 3}


@contextmanager
def first_forward_held(encoder, patch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, list[int]]]:
    """The next forward begins, and waits for the event that is given away; beside it the texts of each forward."""
    encode, began, go, rows = encoder.encode_tokens, threading.Event(), threading.Event(), []

    def holding(tokens, *rest):
        rows.append(len(tokens))
        began.set()
        assert go.wait(60)
        return encode(tokens, *rest)

    patch.setattr(encoder, "encode_tokens", holding)
    try:
        yield go, rows
    finally:
        go.set()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_searches_beside_a_swap_are_encoded_together_by_the_pair_they_entered(
    live: LiveIndex, other, quick_builds, monkeypatch
) -> None:
    live.add(corpus(10))
    new, old = live.build(other), live._core.live
    texts = [f"castle number {number}" for number in range(6)]
    wanted = [live.search(text, **SEARCH) for text in texts]
    found: dict[str, list] = {}

    def search(text: str) -> None:
        found[text] = live.search(text, **SEARCH)

    with monkeypatch.context() as patch, first_forward_held(old.encoder, patch) as (go, rows):
        threads = [threading.Thread(target=search, args=(text,)) for text in texts]
        for number, thread in enumerate(threads):
            thread.start()
            wait_until(lambda: rows)
            wait_until(lambda: len(old._shared._lines["query"]) == number)  # noqa: B023
        swapper = threading.Thread(target=live.swap, args=(new,))
        swapper.start()
        wait_until(lambda: live.fingerprint == other.fingerprint)
        assert live.search(texts[0], **SEARCH)[0].score != wanted[0][0].score  # nobody waits for the old pair
        go.set()
        for thread in (*threads, swapper):
            thread.join()
    assert rows == [1, 5]
    for text, hits in zip(texts, wanted, strict=True):
        assert [hit.id for hit in found[text]] == [hit.id for hit in hits]
        np.testing.assert_allclose([h.score for h in found[text]], [h.score for h in hits], atol=1e-6)


def test_a_query_that_cannot_be_encoded_fails_for_its_caller_alone(live: LiveIndex, monkeypatch) -> None:
    live.add(corpus(5))
    serving, found = live._core.live, {}
    encode = serving.encoder.encode_tokens
    bad = serving.encoder.tokenize(["poison"], "query").ids[0]

    def search(text: str) -> None:
        try:
            found[text] = live.search(text, **SEARCH)
        except RuntimeError as error:
            found[text] = error

    def poisoned(tokens, *rest):
        if bad in tokens.ids:
            raise RuntimeError("no")
        return encode(tokens, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(serving.encoder, "encode_tokens", poisoned)
        with first_forward_held(serving.encoder, patch) as (go, rows):
            threads = [threading.Thread(target=search, args=(text,)) for text in ("first", "a", "poison", "b")]
            for thread in threads:
                thread.start()
                wait_until(lambda: rows)
            wait_until(lambda: len(serving._shared._lines["query"]) == 3)
            go.set()
            for thread in threads:
                thread.join()
    assert str(found.pop("poison")) == "no"
    assert all(len(hits) == 3 for hits in found.values())


def test_an_add_beside_searches_without_end_is_done(live: LiveIndex) -> None:
    live.add(corpus(5))
    stop, failed = threading.Event(), []

    def search() -> None:
        while not stop.is_set():
            try:
                live.search("an old castle", **SEARCH)
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        live.add([{"id": f"n{number}", "text": f"{number} " + "word " * 60} for number in range(30)])
        assert len(live.vectors([f"n{number}" for number in range(30)])) == 30
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failed == []
