from ultrarag.demo.corpus import comparison, example, reciprocal_rank, risen
from ultrarag.evaluation import Collection
from ultrarag.retrieve import Evaluation

TASK = Collection(
    corpus={},
    queries={"q1": "one?", "q2": "two?", "q3": "three?"},
    qrels={"q1": {"a": 1}, "q2": {"b": 1}, "q3": {"c": 1}},
)
BEFORE = {
    "q1": {"a": 0.9, "b": 0.5},
    "q2": {"a": 0.9, "b": 0.8},
    "q3": {"a": 0.9, "b": 0.8},
}
AFTER = {
    "q1": {"b": 0.9, "a": 0.5},
    "q2": {"b": 0.9, "a": 0.8},
    "q3": {"c": 0.7, "a": 0.6},
}


def test_the_example_is_the_query_whose_passage_rose_most():
    assert reciprocal_rank(TASK, BEFORE, "q3") == 0
    assert reciprocal_rank(TASK, BEFORE, "q2") == 0.5
    assert risen(TASK, BEFORE, AFTER) == "q3"
    assert example(TASK, BEFORE, AFTER).splitlines() == [
        'query: "three?"  (* is the right answer)',
        "  before     after",
        "    0.900 a  * 0.700 c",
        "    0.800 b    0.600 a",
    ]


def test_there_may_be_no_such_query():
    assert risen(TASK, AFTER, AFTER) is None
    assert example(TASK, AFTER, AFTER) == "No query's right passage rose."


def test_the_table_shows_means_before_and_after_for_every_way_of_searching():
    before = {"dense": Evaluation({"nDCG@10": 0.375}, {}, {}), "hybrid": Evaluation({"nDCG@10": 0.5}, {}, {})}
    after = {"dense": Evaluation({"nDCG@10": 0.75}, {}, {}), "hybrid": Evaluation({"nDCG@10": 0.25}, {}, {})}
    assert [line.split() for line in comparison(before, after).splitlines()[1:]] == [
        ["dense", "nDCG@10", "0.375", "0.750", "+0.375"],
        ["hybrid", "nDCG@10", "0.500", "0.250", "-0.250"],
    ]
