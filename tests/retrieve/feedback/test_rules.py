"""The rules: what votes, citations and clicks become, and what they never become."""

from __future__ import annotations

import math
import tracemalloc

import pytest

from ultrarag.errors import UsageError
from ultrarag.retrieve.feedback import LoggedQuery, Rules, training_rows, wilson
from ultrarag.retrieve.feedback.labels import gathered, is_held_out
from ultrarag.rows import text_key
from ultrarag.types import Passage

IDS = [f"p{number}" for number in range(5)]
PASSAGES = {id: Passage(id, f"text of {id}") for id in IDS}


def trained_on(number: int = 0) -> str:
    """The number-th query text that is not held out."""
    texts = (f"query {count}" for count in range(1000))
    return [text for text in texts if not is_held_out(text_key(text), Rules())][number]


def held_out() -> str:
    return next(text for text in (f"query {n}" for n in range(1000)) if is_held_out(text_key(text), Rules()))


def search(*events: tuple, text: str | None = None, number: int = 0, client: str = "", hits=IDS) -> LoggedQuery:
    """A search that showed p0 to p4, with (action, passage[, client]) events."""
    text = trained_on() if text is None else text
    given = [(event[0], event[1], event[2] if len(event) > 2 else client, float(n)) for n, event in enumerate(events)]
    shown = [(id, 1.0) for id in hits]
    return LoggedQuery(f"q{number}", float(number), text_key(text), text, "f", 1, {}, shown, client, given)


def rows_of(*queries: LoggedQuery, rules: Rules | None = None, verify=None, passages=PASSAGES):
    return training_rows(queries, lambda ids: {id: passages[id] for id in ids if id in passages}, rules, verify)


def labels(*queries: LoggedQuery, **options) -> dict[str, str]:
    made = rows_of(*queries, **options)
    return made.rows[0]["feedback"] if made.rows else {}


def test_votes_count_at_once():
    made = rows_of(search(("relevant", "p3", "ann"), ("not_relevant", "p0", "ann")))
    (row,) = made.rows
    assert (row["pos"], row["neg"]) == (["text of p3"], ["text of p0"])
    assert row["feedback"] == {"p0": "vote", "p3": "vote"}
    assert made.report["rows with a positive below rank 1"] == 1


def test_of_one_persons_votes_the_last_counts():
    assert labels(search(("not_relevant", "p1", "ann"), ("relevant", "p1", "ann"))) == {"p1": "vote"}
    assert labels(search(("relevant", "p1", "ann"), ("unsure", "p1", "ann"))) == {}


def test_two_people_who_disagree_give_no_label():
    made = rows_of(search(("relevant", "p1", "ann"), ("not_relevant", "p1", "bob")))
    assert made.rows == []
    assert made.report["passages that people disagree about"] == 1


def test_votes_without_a_name_are_told_apart_by_their_search():
    disagreeing = search(("relevant", "p1"), number=1), search(("not_relevant", "p1"), number=2)
    assert labels(*disagreeing) == {}


@pytest.mark.parametrize(
    ("events", "label"),
    [
        ([("cite", "p2")], {}),
        ([("cite", "p2"), ("answer_up", "")], {"p2": "citation"}),
        ([("cite", "p2"), ("click", "p2")], {"p2": "citation"}),
        ([("cite", "p2"), ("click", "p2"), ("answer_down", "")], {}),
        ([("cite", "p2"), ("click", "p3")], {}),
    ],
)
def test_a_citation_needs_a_second_signal(events, label):
    assert labels(search(*events)) == label


def test_citations_are_shown_to_whoever_verifies():
    asked = []

    def verify(pairs):
        asked.extend(pairs)
        return [text == "text of p2" for _, text in pairs]

    assert labels(search(("cite", "p2"), ("cite", "p1")), verify=verify) == {"p2": "citation"}
    assert asked == [(trained_on(), "text of p1"), (trained_on(), "text of p2")]


def test_answers_that_were_rated_label_no_passage():
    assert labels(search(("answer_up", ""))) == {}
    assert labels(search(("answer_down", ""))) == {}


def test_few_clicks_say_nothing():
    assert labels(search(("click", "p0"))) == {}
    assert labels(*(search(("click", "p0"), number=n) for n in range(3))) == {"p0": "clicks"}


def test_a_click_far_down_says_more_than_one_at_the_top():
    at_the_top = [search(*([("click", "p0")] if n < 4 else []), number=n) for n in range(10)]
    assert "p0" not in labels(*at_the_top)
    far_down = [search(*([("click", "p4")] if n < 4 else []), number=n) for n in range(10)]
    assert labels(*far_down)["p4"] == "clicks"


def test_a_hit_that_nobody_clicked_is_a_negative_only_where_many_examined_it():
    made = rows_of(*(search(("relevant", "p4", "ann"), number=n) for n in range(8)))
    assert "neg" not in made.rows[0]
    made = rows_of(*(search(("relevant", "p4", "ann"), number=n) for n in range(30)))
    assert made.rows[0]["neg"] == [f"text of p{n}" for n in range(3)]
    assert made.rows[0]["feedback"]["p0"] == "clicks"


def test_nobody_decides_alone_by_clicking_again_and_again():
    alone = [search(("click", "p4"), number=n, client="ann") for n in range(30)]
    shared = [search(("click", "p4"), number=n, client=f"client {n}") for n in range(30)]
    once = Rules(most_per_client=1)
    assert labels(*alone, rules=once) == {}
    assert labels(*shared, rules=once)["p4"] == "clicks"


def test_ways_to_write_a_query_are_one_query():
    text = trained_on()
    made = rows_of(search(("relevant", "p1", "ann"), text=text), search(text=f"  {text.upper()} ", number=1))
    assert [row["query"] for row in made.rows] == [f"  {text.upper()} "]
    assert (made.report["queries"], made.report["searches"]) == (1, 2)


def test_held_out_queries_are_never_trained_on():
    made = rows_of(
        search(("relevant", "p1", "ann"), ("not_relevant", "p0", "ann"), text=held_out()),
        search(("relevant", "p2", "ann"), number=1),
    )
    assert [row["query"] for row in made.rows] == [trained_on()]
    assert list(made.qrels.values()) == [{"p0": 0, "p1": 1}]
    assert list(made.gate[0].values()) == [held_out()]


def test_clicks_on_held_out_queries_do_not_reach_the_gate():
    made = rows_of(*(search(("click", "p0"), text=held_out(), number=n) for n in range(5)))
    assert (made.qrels, list(made.clicked.values())) == ({}, [{"p0": 1}])
    assert made.gate == ({}, {})


def test_a_fifth_is_held_out():
    keys = [text_key(f"what is {n}?") for n in range(5000)]
    assert 0.18 < sum(is_held_out(key, Rules()) for key in keys) / 5000 < 0.22


def test_passages_that_are_gone_are_left_out_and_counted():
    made = rows_of(search(("relevant", "p1", "ann"), ("relevant", "p2", "ann")), passages={"p2": PASSAGES["p2"]})
    assert made.rows[0]["pos"] == ["text of p2"]
    assert made.report["labels whose passage is gone"] == 1


def test_negatives_alone_make_no_row():
    made = rows_of(search(("not_relevant", "p0", "ann")))
    assert (made.rows, made.report["queries with negatives alone"]) == ([], 1)


def test_a_text_is_no_negative_of_itself():
    twins = {**PASSAGES, "p0": Passage("p0", "text of p1")}
    made = rows_of(search(("relevant", "p1", "ann"), ("not_relevant", "p0", "ann")), passages=twins)
    assert "neg" not in made.rows[0]


def test_wilson_bounds():
    # the values of E. B. Wilson's formula for 8 of 10 at 95 %
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(3, 1.5)  # more clicks than expected examinations
    assert 0 < low < high == 1.0


@pytest.mark.parametrize("wrong", [{"click_rate": 0}, {"held_out": 1}, {"eta": -1}, {"z": math.nan}, {"clicks": True}])
def test_rules_that_make_no_sense_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(UsageError, match=name):
        Rules(**wrong)


def test_rules_and_verify_must_be_what_they_are():
    with pytest.raises(UsageError, match="rules is dict; give"):
        rows_of(search(), rules={"click_rate": 0.4})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="shown 1 pairs and said something of 0"):
        rows_of(search(("cite", "p1")), verify=lambda pairs: [])


def test_a_passage_that_was_only_shown_takes_little_memory():
    queries = [search(number=n, hits=[f"p{n}-{i}" for i in range(10)]) for n in range(500)]
    tracemalloc.start()
    gathered(queries, Rules())
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most / 5000 < 500  # bytes; sets in each of them took 1,000
