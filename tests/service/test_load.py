"""The load of a process: rates and waits of a minute, and by generation."""

from __future__ import annotations

import pytest

from ultrarag.service import load as module
from ultrarag.service.load import Load


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_what_is_older_than_a_minute_is_forgotten(clock):
    load = Load(clock)
    assert load.last_minute() == {"searches_per_second": 0.0, "p50_seconds": None, "p99_seconds": None, "errors": 0}
    load.answered(1, 6, 0.5)
    clock.now += 61
    for milliseconds in range(1, 101):
        load.answered(1, 3, milliseconds / 1000)
    load.failed(9.0)
    found = load.last_minute()
    assert found == {"searches_per_second": 5.0, "p50_seconds": 0.051, "p99_seconds": 0.1, "errors": 1}
    clock.now += 61
    assert load.last_minute()["searches_per_second"] == 0


def test_generations_are_told_apart_within_a_tenth(clock):
    load = Load(clock)
    load.failed(1.0)  # before anything was answered
    for milliseconds in range(1, 1001):
        load.answered(1, 1, milliseconds / 1000)
        load.answered(2, 1, milliseconds / 10_000)
    load.failed(1.0)
    one, two = load.of(1), load.of(2)
    assert (one["requests"], one["errors"], two["errors"]) == (1000, 0, 1)
    assert one["p50_seconds"] == pytest.approx(0.5, rel=0.06)
    assert one["p99_seconds"] == pytest.approx(0.99, rel=0.06)
    assert two["p50_seconds"] == pytest.approx(0.05, rel=0.06)
    assert load.of(3) == {"requests": 0, "p50_seconds": None, "p99_seconds": None, "errors": 0}


def test_it_does_not_grow(clock, monkeypatch):
    monkeypatch.setattr(module, "GENERATIONS", 3)
    load = Load(clock)
    for generation in range(1, 9):
        load.answered(generation, 1, 0.0)
    assert [load.of(generation)["requests"] for generation in range(1, 9)] == [0] * 5 + [1] * 3
