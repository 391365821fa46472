"""Queries and passages share the encoder by time, whoever has the longer turns."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import torch

from ultrarag.retrieve.generation.serving import FairLock, Serving, VectorSet
from ultrarag.types import Embeddings


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def order_of_turns(asked: list[tuple[str, float]]) -> list[int]:
    """The order in which turns are given that were all asked for while a passage had the lock: (kind, seconds)."""
    clock, order, threads = Clock(), [], []
    lock = FairLock(clock)

    def take(number: int, kind: str, seconds: float) -> None:
        with lock.turn(kind):
            order.append(number)
            clock.now += seconds

    with lock.turn("passage"):
        for number, what in enumerate(asked):
            threads.append(threading.Thread(target=take, args=(number, *what)))
            threads[-1].start()
            while sum(map(len, lock._waiting.values())) <= number:
                time.sleep(0.001)
        clock.now += 3.0
    for thread in threads:
        thread.join()
    return order


def test_a_lock_is_given_away_in_order_within_a_kind() -> None:
    assert order_of_turns([("query", 1.0)] * 5) == [0, 1, 2, 3, 4]


def test_a_kind_with_long_turns_has_fewer_of_them() -> None:
    passages, queries = [("passage", 3.0)] * 2, [("query", 1.0)] * 7
    assert order_of_turns([*passages, *queries]) == [2, 3, 4, 5, 0, 6, 7, 8, 1]


def test_passages_are_not_kept_waiting_by_queries_without_end() -> None:
    order = order_of_turns([*[("query", 1.0)] * 20, ("passage", 3.0)])
    assert order.index(20) == 4  # of equal time a query is first


class Timed:
    """An encoder that takes so many seconds for a text, and notes how many it was given at a time."""

    device, passage_fingerprint = torch.device("cpu"), "f"

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds, self.given = clock, seconds, []

    def encode(self, texts, kind, **options) -> Embeddings:
        self.given.append(len(texts))
        self.clock.now += self.seconds * len(texts)
        return Embeddings(dense=np.array([[float(text)] for text in texts], dtype=np.float32))


def windows(seconds: float, searched: bool) -> list[int]:
    """How many of 40 passages are encoded at a time, maybe after a query."""
    clock = Clock()
    clock.now = 100.0
    encoder = Timed(clock, seconds)
    schema, generation = SimpleNamespace(fingerprint="f"), SimpleNamespace(id=1, heads=("dense",), fingerprint="f")
    vectors = VectorSet(SimpleNamespace(schema=schema, close=lambda: None), None)
    vectors.join()
    serving = Serving(generation, encoder, vectors, clock)
    if searched:
        serving.encode_queries(["0"], ["dense"])
    found = serving.encode_passages([str(number) for number in range(40)])
    assert found.dense[:, 0].tolist() == list(range(40))
    serving.retire()
    return encoder.given[searched:]


def test_passages_are_encoded_in_short_turns_while_somebody_searches() -> None:
    assert windows(0.02, searched=False) == [8] * 5
    assert windows(0.012, searched=True) == [1, *[8] * 4, 7]  # but for the first, whose time is not known
    assert windows(0.024, searched=False) == [8] * 5
    assert windows(0.1, searched=True) == [1, *[2] * 4, *[8] * 3, 7]  # 250 ms at a time; the last query was long ago
