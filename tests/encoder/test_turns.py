"""Queries first, passages by their share: neither keeps the other waiting for ever."""

from __future__ import annotations

import pytest

from ultrarag.encoder.turns import CROWDED, LULL, TURN_TOKENS, Turns


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Simulation:
    """Turns of so many seconds each."""

    def __init__(self, **seconds: float) -> None:
        self.clock, self.seconds = Clock(), seconds
        self.turns = Turns(4096, self.clock)
        self.had = {"query": 0.0, "passage": 0.0}

    def arrive(self, lane: str) -> None:
        self.turns.arrive(lane, idle=True, alone=True)

    def turn(self, *waiting: str) -> str | None:
        """One turn of those that wait, or the wait for queries."""
        lane, seconds = self.turns.next(waiting)
        self.clock.now += seconds
        if lane is not None:
            self.clock.now += self.seconds[lane]
            self.had[lane] += self.seconds[lane]
            self.turns.ran(lane, self.seconds[lane], 512)
        return lane


@pytest.mark.parametrize("seconds", [{"query": 0.1, "passage": 0.05}, {"query": 0.01, "passage": 3.0}])
def test_where_both_never_end_passages_have_a_third_of_the_time(seconds) -> None:
    both = Simulation(**seconds)
    both.arrive("query")
    both.arrive("passage")
    assert both.turn("query", "passage") == "query"
    for _ in range(20000):
        both.turn("query", "passage")
    assert both.had["passage"] / sum(both.had.values()) == pytest.approx(1 / 3, abs=0.03)


def test_whoever_asks_one_query_after_the_other_is_waited_for() -> None:
    """The next query comes 2 ms after each answer: passages alone in the line do not begin a turn at once."""
    one = Simulation(query=0.01, passage=0.05)
    one.arrive("passage")
    for _ in range(500):
        one.arrive("query")
        while one.turn("query", "passage") != "query":
            pass
        one.clock.now += 0.002
        lane, seconds = one.turns.next(["passage"])
        if lane is None:
            assert 0 < seconds <= LULL
        else:
            one.turn("passage")
    assert one.had["passage"] / sum(one.had.values()) == pytest.approx(1 / 3, abs=0.03)


@pytest.mark.parametrize("pause", [0.0, 0.002, 0.0049])
def test_time_that_is_kept_for_queries_is_their_share(pause) -> None:
    """However long one client thinks within a lull: passages that wait have their third of all the time."""
    one, start = Simulation(query=0.002, passage=0.05), 100.0
    one.arrive("passage")
    comes = start
    while one.clock.now < start + 60:
        here = comes <= one.clock.now
        if here:
            one.turns.arrive("query", idle=True, alone=False)
        lane, seconds = one.turns.next(["query", "passage"] if here else ["passage"])
        if lane is None:
            one.clock.now += min(seconds, comes - one.clock.now) + 1e-9
            continue
        one.clock.now += one.seconds[lane]
        one.had[lane] += one.seconds[lane]
        one.turns.ran(lane, one.seconds[lane], 100)
        comes = one.clock.now + pause if lane == "query" else comes
    assert one.had["passage"] / 60 == pytest.approx(1 / 3, abs=0.04)


def test_passages_go_on_once_no_query_comes() -> None:
    one = Simulation(query=0.01, passage=0.05)
    for lane in ("query", "passage", "query"):
        one.arrive(lane)
    assert [one.turn("query", "passage") for _ in range(3)] == ["query", "passage", "query"]
    assert one.turn("passage") is None  # for the next query, once
    assert [one.turn("passage") for _ in range(100)] == ["passage"] * 100


def test_nobody_saves_up_while_away() -> None:
    one = Simulation(query=0.1, passage=0.05)
    one.arrive("passage")
    for _ in range(1000):
        one.turn("passage")
    one.arrive("query")
    order = [one.turn("query", "passage") for _ in range(9)]
    assert order[0] == "query"
    assert order.count("passage") == 4  # one each from then on: no fifty seconds of queries alone
    away = Simulation(query=0.1, passage=0.05)
    away.arrive("query")
    for _ in range(1000):
        away.turn("query")
    away.arrive("passage")
    order = [away.turn("query", "passage") for _ in range(9)]
    assert order.count("passage") in (4, 5)


def test_a_turn_is_short_beside_others_and_long_alone() -> None:
    one = Simulation(query=0.1, passage=0.1)
    assert one.turns.tokens("passage") == 4096
    one.turns.arrive("query", idle=True, alone=True)
    assert one.turns.tokens("query") == 4096
    assert one.turns.tokens("passage") == TURN_TOKENS
    one.turns.ran("passage", 0.02, 1000)  # a fast machine: 30 ms of it
    assert one.turns.tokens("passage") == 1500
    one.turns.ran("passage", 0.001, 1000)
    assert one.turns.tokens("passage") == 4096
    one.turns.arrive("query", idle=False, alone=False)
    assert one.turns.tokens("query") == TURN_TOKENS
    one.clock.now += CROWDED
    assert one.turns.tokens("query") == one.turns.tokens("passage") == 4096
