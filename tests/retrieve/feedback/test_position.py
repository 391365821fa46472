"""The position bias, estimated from simulated clicks whose exponent is known."""

from __future__ import annotations

import math
import random

import pytest

from ultrarag.retrieve import LiveIndex
from ultrarag.retrieve.feedback import LoggedQuery, Rules, estimate
from ultrarag.retrieve.feedback.position import ASSUMED, SURE

#: chance of a click on a hit that is looked at
RELEVANT, OTHER = 0.8, 0.15


def simulated(eta: float, searches: int, moved: bool = True, queries: int = 60) -> list[LoggedQuery]:
    """Searches whose hits stand in other orders now and then, the good ones near the top; clicks by position."""
    drawn, made = random.Random(7), []
    for number in range(searches):
        key = number % queries
        order = [(f"p{n}", 1.0) for n in range(10)]
        if moved and number // queries % 2:
            start = drawn.randrange(7)
            order[start : start + 4] = drawn.sample(order[start : start + 4], 4)
        events = [
            ("click", id, "", 0.0)
            for rank, (id, _) in enumerate(order, 1)
            if drawn.random() < rank**-eta * (RELEVANT if int(id[1:]) in (key % 3, key % 7) else OTHER)
        ]
        made.append(LoggedQuery(str(number), float(number), key, f"q{key}", "f", 1, {}, order, "", events))
    return made


def clicks_of(queries: list[LoggedQuery]) -> set[tuple[int, str]]:
    return {(query.key, passage) for query in queries for _, passage, *_ in query.events}


@pytest.mark.parametrize("eta", [0.5, 1.0, 1.6])
def test_a_known_exponent_is_found(eta: float) -> None:
    made = simulated(eta, 6000)
    found = estimate(made, clicks_of(made), 3)
    assert found.known
    assert abs(found.eta - eta) < 3 * found.error < 0.3
    assert found.clicks > 500


def test_until_there_is_evidence_it_is_one() -> None:
    for made in (simulated(0.5, 100), simulated(0.5, 6000, moved=False), []):
        found = estimate(made, clicks_of(made), 3)
        assert (found.eta, found.known) == (ASSUMED, False)
    assert math.isinf(found.error)
    assert SURE < estimate(simulated(0.5, 100), clicks_of(simulated(0.5, 100)), 3).error < math.inf


def test_one_client_alone_decides_nothing() -> None:
    made = [LoggedQuery(**{**vars(query), "client": "ann"}) for query in simulated(0.5, 6000)]
    assert not estimate(made, clicks_of(made), 3).known


def test_an_index_uses_what_its_log_tells(tmp_path, minilm_encoder) -> None:
    with LiveIndex.create(tmp_path / "kb", minilm_encoder, backend="numpy") as live:
        live.add([{"id": f"p{n}", "text": f"passage {n}"} for n in range(10)])
        log = live.feedback_log
        made = simulated(0.5, 3000, queries=30)
        with log._database.transaction() as db:  # an event at a time would be a flush of the disk each
            for query in made:
                row = (query.query_id, query.time, query.key, query.text, "f", 1, "{}")
                hits = "[" + ",".join(f'["{id}", 1.0]' for id, _ in query.hits) + "]"
                db.execute("INSERT INTO queries VALUES (?, ?, ?, ?, ?, ?, ?, ?, '')", (*row, hits))
                db.executemany(
                    "INSERT INTO events (query_id, passage_id, action, client, time) VALUES (?, ?, 'click', '', ?)",
                    [(query.query_id, passage, query.time) for _, passage, *_ in query.events],
                )
        assert log.clicked() == clicks_of(made)
        found = live.position_bias()
        assert found == estimate(made, clicks_of(made), 3)
        assert abs(found.eta - 0.5) < 3 * found.error
        report = live.training_rows().report
        assert report["position bias"] == round(found.eta, 2)
        assert report["clicks that tell the position bias"] == found.clicks
        assert live.training_rows(rules=Rules(eta=0.7)).report["position bias"] == 0.7
