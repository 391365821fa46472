"""The swap as a protocol: no reader mixes generations, no acknowledged write is lost, one generation is live.

Two ways: the real index in one process, with interleavings and kills that hypothesis chooses; and a model of an index
shared by many processes, of which every interleaving is visited. Each also shows that it finds a fault when there is
one.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.retrieve.live_machine import LiveMachine
from tests.retrieve.live_stage import machine
from tests.retrieve.shared.shared_model import Design, Violation, explore
from ultrarag.retrieve import swap as swapping
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.generation.catalog import Catalog
from ultrarag.retrieve.search.searcher import Searcher

LONG = bool(os.environ.get("ULTRARAG_LONG_TESTS"))


def exploring(examples: int, **options) -> settings:
    """The same examples each time; with ULTRARAG_LONG_TESTS=1 many, and others each time."""
    return settings(
        max_examples=50 * examples if LONG else examples,
        stateful_step_count=12,
        deadline=None,
        database=None,
        derandomize=not LONG,
        print_blob=False,
        phases=list(Phase) if LONG else [Phase.generate],  # shrinking takes minutes
        suppress_health_check=list(HealthCheck),
        **options,
    )


def test_the_live_index_under_any_interleaving(tmp_path: Path) -> None:
    with machine(tmp_path) as (found, _):
        run_state_machine_as_test(found, settings=exploring(15))


# Faults that the machine must find


def flip_before_catching_up(patch: pytest.MonkeyPatch) -> None:
    def exchange(core, new, vectors, verdict, force) -> float:
        core.catalog.flip(new.generation.id)
        core.replace(new, vectors)
        vectors.catch_up()
        return 0.0

    patch.setattr(swapping, "_approach", lambda core, vectors: None)
    patch.setattr(swapping, "_exchange", exchange)


def search_in_whatever_is_live(patch: pytest.MonkeyPatch) -> None:
    class Loose:
        def __init__(self, core: Core) -> None:
            self._core, self._began = core, core.live

        def __getattr__(self, name: str):
            return getattr(self._core.live if name == "backend" else self._began, name)

    @contextmanager
    def searching(self):
        yield Searcher(Loose(self), self.store, self.bm25)  # type: ignore[arg-type]

    patch.setattr(Core, "searching", searching)


ANY = ("building", "ready", "live", "previous", "retired")


def flip_in_two_transactions(patch: pytest.MonkeyPatch) -> None:
    def flip(self, id: int, forced: bool = False, metrics=None) -> None:
        for found in self.in_state("previous"):
            self.set_state(found.id, "retired", ANY)
        self.set_state(self.live().id, "previous", ANY)
        self.set_state(id, "live", ANY)

    patch.setattr(Catalog, "flip", flip)


def acknowledge_before_it_is_searchable(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Core, "write", lambda self, change: change())


def search_after_the_flip(index: LiveMachine) -> None:
    """A write after the build; a swap that stops where it next reads the log; a search."""
    index._add(["a"])
    index.turns.finish()
    index._swap()
    index.turns.actors[-1].step("after replace")
    index._search()
    index.turns.actors[-1].step("")


def swap_within_a_search(index: LiveMachine) -> None:
    """The query is encoded, then the swap comes."""
    index._search()
    index.turns.actors[-1].step("after encode_queries")
    index._swap()
    index.turns.actors[-1].step("")  # to its end, or until it waits for the search


def search_after_a_write(index: LiveMachine) -> None:
    """One after the other."""
    index._add(["b"])
    index.turns.finish()
    index._search()


FAULTS = [
    (flip_before_catching_up, search_after_the_flip, "old text"),
    (search_in_whatever_is_live, swap_within_a_search, "another model"),
    (flip_in_two_transactions, swap_within_a_search, "assert 0 == 1|previous"),
    (acknowledge_before_it_is_searchable, search_after_a_write, "must be one of"),
]


@pytest.mark.parametrize(("fault", "scene", "said"), FAULTS)
def test_what_must_hold_notices_a_fault(tmp_path: Path, fault, scene, said: str) -> None:
    def play() -> None:
        index = found()
        try:
            index.begin(["a"], False)
            scene(index)
            index.turns.finish()
            index.one_is_live()
            index.nothing_failed()
        finally:
            index._leave()

    with machine(tmp_path) as (found, patch):
        play()
        fault(patch)
        with pytest.raises(AssertionError, match=said):
            play()


# The index that many processes share


@pytest.mark.parametrize(
    "design",
    [
        Design(readers=1),
        Design(writes=2, flips=0, crashes=2),
        Design(writes=0, flips=2, timely=False),  # flips need no clock
    ],
    ids=["write and flip", "writes", "flips"],
)
def test_the_shared_protocol_in_every_interleaving(design: Design) -> None:
    assert explore(design) > 500


@pytest.mark.parametrize(
    ("left_out", "design", "said"),
    [
        ("timely", Design(writes=2, flips=0), "acknowledged write|given twice"),
        ("vectors_too", Design(writes=2, flips=0), "not in the live generation"),
        ("state_for_each", Design(writes=0, flips=2, timely=False), "flip is lost"),
        ("copy_after_claim", Design(writes=0), "flip is lost"),
        ("confirm", Design(writes=0, flips=2, timely=False), "flip is lost"),
        ("adopt", Design(flips=0), "given twice"),
        ("catch_up", Design(), "not in the live generation"),
        ("apply_before_acknowledging", Design(flips=0), "not in the live generation"),
        ("search_by_name", Design(readers=1), "another"),
    ],
)
def test_every_rule_of_the_shared_protocol_is_needed(left_out: str, design: Design, said: str) -> None:
    explore(design)
    with pytest.raises(Violation, match=said):
        explore(replace(design, **{left_out: False}))


# What was found


def test_a_search_beside_a_delete_finds_the_others(tmp_path: Path) -> None:
    with machine(tmp_path) as (found, _):
        index = found()
        try:
            index.begin(["a", "b", "c"], False)
            index._delete(["b", "c"])
            index.turns.actors[-1].step("after delete")  # the store has it, the vectors do not yet
            assert [hit.id for hit in index.live.search("query", k=5)] == ["a"]
        finally:
            index._leave()


def test_a_discard_beside_a_swap_leaves_a_live_generation(tmp_path: Path) -> None:
    with machine(tmp_path) as (found, _):
        index = found()
        try:
            index.begin(["a"], False)
            discard = index.turns.start("discard", lambda: index.live.discard(2))
            while discard.at != "before set_state":
                discard.step()
            index.live.swap(2)
            index.turns.finish()
            index.one_is_live()
        finally:
            index._leave()
