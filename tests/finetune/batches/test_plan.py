"""The plan of batches: each row once per epoch, the same in every process, and never a step without a loss."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.finetune.batches.planning import batch_plan, train_data
from ultrarag.errors import DataError, UsageError
from ultrarag.finetune.batches.plan import Batch, BatchPlan
from ultrarag.finetune.batches.train_data import Draws, TrainData


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def rows(count: int, negatives: int = 3, name: str = "", **more: Any) -> list[dict[str, Any]]:
    return [
        {"query": f"{name}q{i}", "pos": [f"{name}p{i}"], "neg": [f"{name}n{i}.{j}" for j in range(negatives)], **more}
        for i in range(count)
    ]


def load(tmp_path, files: dict[str, list[dict[str, Any]]], **options: Any) -> TrainData:
    """TrainData of one file per name."""
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in content))
    return train_data([tmp_path / f"{name}.jsonl" for name in files], **options)


def steps(plan: BatchPlan, epoch: int = 0) -> list[list[Batch]]:
    """[step][rank] of an epoch."""
    return [
        [plan.batch(epoch, index, rank) for rank in range(plan.schedule.world_size)]
        for index in range(plan.steps_per_epoch)
    ]


def sources(step: list[Batch]) -> list[str]:
    return [source for batch in step for source in batch.sources]


# ---- each row once


@pytest.mark.parametrize("same_dataset", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_every_row_is_seen_once_per_epoch_over_the_ranks(tmp_path, same_dataset, world_size, batch_size):
    sizes = {"a": 10, "b": 37, "c_no_in_batch_neg": 7 * 3}
    data = load(tmp_path, {name: rows(count, name=name) for name, count in sizes.items()})
    plan = batch_plan(data, batch_size, world_size, train_group_size=3, same_dataset_within_batch=same_dataset)
    for epoch in range(2):
        seen = Counter(source for step in steps(plan, epoch) for source in sources(step))
        assert set(seen) == {data[i].source for i in range(len(data))}
        twice = sum(int(note.split(": ")[1].split()[0]) for note in plan.notes if "seen twice" in note)
        assert sum(seen.values()) == len(data) + twice
        assert max(seen.values()) <= (2 if twice else 1)
    if world_size == 1:
        assert plan.notes == []


@pytest.mark.parametrize("same_dataset", [False, True])
def test_ranks_have_equal_steps_and_sizes_that_differ_by_one_at_most(tmp_path, same_dataset):
    data = load(tmp_path, {"a": rows(10, name="a"), "b": rows(37, name="b")})
    plan = batch_plan(data, 4, 3, train_group_size=2, same_dataset_within_batch=same_dataset)
    for step in steps(plan):
        counts = [len(batch.queries) for batch in step]
        assert min(counts) >= 1
        assert max(counts) - min(counts) <= 1
    assert plan.steps_per_epoch == (1 + 4 if same_dataset else 4)


def test_a_step_over_all_ranks_is_of_one_dataset(tmp_path):
    data = load(tmp_path, {"a": rows(10, name="a"), "b": rows(37, name="b"), "c": rows(3, name="c")})
    plan = batch_plan(data, 4, 2, train_group_size=2, same_dataset_within_batch=True)
    found = [{batch.dataset for batch in step} for step in steps(plan)]
    assert all(len(names) == 1 for names in found)
    assert Counter(name for names in found for name in names) == {"a": 2, "b": 5, "c": 1}
    assert all(
        source.split("/")[-1][0] == batch.dataset for step in steps(plan) for batch in step for source in batch.sources
    )


def test_a_file_smaller_than_a_step_is_not_lost():
    # the peer never sees 10 rows at batch 16, and none of 80 rows at batch 16 on 8 ranks
    plan = batch_plan(train_data(rows(10)), 16, train_group_size=2, same_dataset_within_batch=True)
    assert len(steps(plan)[0][0].queries) == 10
    plan = batch_plan(train_data(rows(80)), 16, 8, train_group_size=2, same_dataset_within_batch=True)
    assert [len(batch.queries) for batch in steps(plan)[0]] == [10] * 8


def test_a_tail_with_fewer_rows_than_ranks_is_filled_and_counted():
    data = train_data(rows(9))
    plan = batch_plan(data, 2, 4, train_group_size=2)
    assert plan.notes == ["'<rows>': 3 rows are seen twice in each epoch, so that no rank is without rows"]
    tails = [step for step in steps(plan) if len(sources(step)) == 4]
    assert len(tails) == 1
    assert len(set(sources(tails[0]))) == 4


def test_fewer_rows_than_ranks_at_all():
    plan = batch_plan(train_data(rows(3)), 2, 8, train_group_size=2)
    (step,) = steps(plan)
    assert [len(batch.queries) for batch in step] == [1] * 8
    assert set(sources(step)) == {"<rows>:1", "<rows>:2", "<rows>:3"}


def test_drop_last_drops_and_counts(tmp_path):
    data = load(tmp_path, {"a": rows(10, name="a"), "b": rows(37, name="b")})
    plan = batch_plan(data, 8, 2, train_group_size=2, same_dataset_within_batch=True, drop_last=True)
    assert [len(sources(step)) for step in steps(plan)] == [16, 16]
    assert plan.notes == [
        "'a': 10 of 10 rows are dropped in each epoch (drop_last); no row of it is ever trained on",
        "'b': 5 of 37 rows are dropped in each epoch (drop_last)",
    ]
    assert batch_plan(data, 8, 2, train_group_size=2, drop_last=True).steps_per_epoch == 2


def test_drop_last_that_leaves_nothing_is_refused(tmp_path):
    data = load(tmp_path, {"a": rows(10, name="a"), "b": rows(15, name="b")})
    with pytest.raises(DataError, match=r"leaves no batch: 'b' has 15 rows, and a step takes 8 x 2 ranks; lower"):
        batch_plan(data, 8, 2, train_group_size=2, same_dataset_within_batch=True, drop_last=True)


# ---- the order


def test_any_batch_can_be_asked_for_as_a_resumed_run_does(tmp_path):
    data = load(tmp_path, {"a": rows(20, name="a"), "b": rows(37, name="b")})
    options = {"world_size": 2, "seed": 7, "train_group_size": 3, "shuffle_ratio": 0.5}
    whole = batch_plan(data, 4, **options)
    run = [whole.batch(epoch, index, 1) for epoch in range(3) for index in range(whole.steps_per_epoch)]
    resumed = batch_plan(load(tmp_path, {"a": rows(20, name="a"), "b": rows(37, name="b")}), 4, **options)
    start = whole.steps_per_epoch + 3
    positions = [divmod(at, resumed.steps_per_epoch) for at in range(start, len(run))]
    assert [resumed.batch(epoch, index, 1) for epoch, index in positions] == run[start:]
    assert [resumed.batch(epoch, index, 1) for epoch, index in reversed(positions)] == run[: start - 1 : -1]


def test_epochs_and_seeds_differ_in_rows_and_texts():
    data = train_data(rows(40, negatives=9))

    def passages(seed: int, epoch: int) -> dict[str, list[str]]:
        (batch,) = steps(batch_plan(data, 40, seed=seed, train_group_size=3), epoch)[0]
        return {query: batch.passages[3 * i : 3 * i + 3] for i, query in enumerate(batch.queries)}

    first, other_epoch, other_seed = passages(1, 0), passages(1, 1), passages(2, 0)
    for other in (other_epoch, other_seed):
        assert list(first) != list(other)
        assert first != other
        assert first.keys() == other.keys()


def test_datasets_come_in_another_order_in_each_epoch(tmp_path):
    data = load(tmp_path, {"a": rows(20, name="a"), "b": rows(20, name="b")})
    plan = batch_plan(data, 4, train_group_size=2, same_dataset_within_batch=True)
    orders = [[step[0].dataset for step in steps(plan, epoch)] for epoch in range(4)]
    assert len({tuple(order) for order in orders}) > 1
    assert all(sorted(order) == ["a"] * 5 + ["b"] * 5 for order in orders)


def test_texts_of_a_row_do_not_depend_on_batch_or_ranks():
    data = train_data(rows(24, negatives=9))

    def texts(batch_size: int, world_size: int) -> dict[str, tuple[str, ...]]:
        plan = batch_plan(data, batch_size, world_size, train_group_size=4)
        batches = [batch for step in steps(plan) for batch in step]
        return {q: tuple(b.passages[4 * i : 4 * i + 4]) for b in batches for i, q in enumerate(b.queries)}

    assert texts(24, 1) == texts(3, 4)


WORKER = """
import hashlib, sys
from dataclasses import astuple
from tests.finetune.batches.planning import batch_plan, train_data
settings = {"train_group_size": 3, "shuffle_ratio": 0.5, "same_dataset_within_batch": True}
data = train_data(sys.argv[1:], max_example_num_per_dataset=30, **settings)
plan = batch_plan(data, 4, 2)
seen = [astuple(plan.batch(e, i, r)) for e in (0, 1) for i in range(plan.steps_per_epoch) for r in (0, 1)]
print(hashlib.sha256(repr(seen).encode()).hexdigest())
"""


def test_the_order_is_the_same_in_every_process(tmp_path):
    load(tmp_path, {"a": rows(20, 1, "a"), "b": rows(37, 5, "b")})
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    printed = {
        subprocess.run(
            [sys.executable, "-c", WORKER, *paths],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


def test_draws_are_these_for_good():
    # a checkpoint's order must outlive upgrades of numpy
    draws = Draws(1, 2, 3)
    assert draws.order(8).tolist() == [1, 2, 4, 6, 5, 0, 7, 3]
    assert [draws.below(100) for _ in range(4)] == [0, 84, 12, 67]
    assert [draws.happens(0.5) for _ in range(6)] == [False, False, True, True, False, False]
    assert Draws(0).order(0).tolist() == []


def test_draws_are_fair():
    draws = Draws(5)
    firsts = Counter(int(draws.order(4)[0]) for _ in range(4000))
    assert all(900 < firsts[i] < 1100 for i in range(4))
    assert 900 < sum(draws.happens(0.25) for _ in range(4000)) < 1100
    assert not any(draws.happens(0) for _ in range(100))
    assert all(draws.happens(1) for _ in range(100))


def test_a_plan_can_be_sent_to_worker_processes(tmp_path):
    plan = batch_plan(load(tmp_path, {"a": rows(20)}), 4, train_group_size=2)
    assert pickle.loads(pickle.dumps(plan)).batch(0, 2, 0) == plan.batch(0, 2, 0)
    plan = batch_plan(train_data(rows(20)), 4, train_group_size=2)
    assert pickle.loads(pickle.dumps(plan)).batch(0, 2, 0) == plan.batch(0, 2, 0)


@pytest.mark.parametrize("place", [(0, 5, 0), (0, -1, 0), (0, 0, 1), (-1, 0, 0)])
def test_a_batch_that_is_not_there(place):
    plan = batch_plan(train_data(rows(20)), 4, train_group_size=2)
    with pytest.raises(IndexError, match="5 steps per epoch and 1 ranks"):
        plan.batch(*place)


# ---- what a batch holds


def test_candidates_stand_behind_their_positive_with_the_teachers_scores():
    content = [
        {
            "query": f"q{i}",
            "pos": [f"p{i}a", f"p{i}b"],
            "neg": [f"n{i}{j}" for j in "abcd"],
            "pos_scores": [10 * i + 1, 10 * i + 2],
            "neg_scores": [10 * i + 3, 10 * i + 4, 10 * i + 5, 10 * i + 6],
        }
        for i in range(6)
    ]
    data = train_data(content, knowledge_distillation=True)
    plan = batch_plan(data, 6, train_group_size=3, knowledge_distillation=True)
    (batch,) = steps(plan)[0]
    assert batch.group_size == 3
    assert np.shape(batch.teacher) == (6, 3)
    for i, query in enumerate(batch.queries):
        row = content[int(query[1:])]
        scores = dict(zip([*row["pos"], *row["neg"]], [*row["pos_scores"], *row["neg_scores"]], strict=True))
        group = batch.passages[3 * i : 3 * i + 3]
        assert group[0] in row["pos"]
        assert set(group[1:]) < set(row["neg"])
        assert len(set(group)) == 3
        assert batch.teacher[i] == [scores[text] for text in group]
    assert batch_plan(data, 6, knowledge_distillation=False).batch(0, 0, 0).teacher is None


def test_prompts_are_raw_and_never_the_word_none():
    content = [{"query": "a", "pos": ["x"], "prompt": "Find: "}, {"query": "b", "pos": ["y"], "prompt": None}]
    for same_dataset in (False, True):
        plan = batch_plan(train_data(content), 2, same_dataset_within_batch=same_dataset)
        batch = plan.batch(0, 0, 0)
        assert dict(zip(batch.queries, batch.prompts, strict=True)) == {"a": "Find: ", "b": None}
        assert not any("None" in text for text in batch.queries + batch.passages)


def test_long_positives_are_shuffled_with_the_ratio():
    long = " ".join(f"word{i}" for i in range(40))
    data = train_data([{"query": f"q{i}", "pos": [f"{i} {long}"], "neg": [long]} for i in range(300)])
    assert all(f" {long}" in text for text in steps(batch_plan(data, 300, train_group_size=2))[0][0].passages[::2])
    batch = batch_plan(data, 300, train_group_size=2, shuffle_ratio=0.5).batch(0, 0, 0)
    moved = sum(f" {long}" not in text for text in batch.passages[::2])
    assert 80 < moved < 170  # a sixth of the orders is the old one, with spaces between the thirds
    assert set(batch.passages[1::2]) == {long}
    assert all(Counter(text.replace(" ", ""))["w"] == 40 for text in batch.passages[::2])


def test_fewer_negatives_than_asked_are_repeated():
    plan = batch_plan(train_data(rows(4, negatives=2)), 4, train_group_size=8)
    assert plan.notes == ["'<rows>': 4 rows have fewer than 7 negatives, which are repeated"]
    batch = plan.batch(0, 0, 0)
    for i, query in enumerate(batch.queries):
        assert set(batch.passages[8 * i + 1 : 8 * i + 8]) == {f"n{query[1:]}.0", f"n{query[1:]}.1"}


@pytest.mark.parametrize("neg", [{}, {"neg": []}, {"neg": None}])
def test_without_any_negatives_the_group_is_one(neg):
    plan = batch_plan(train_data([{"query": f"q{i}", "pos": [f"p{i}"], **neg} for i in range(5)]), 4)
    assert any("no row has negatives" in note for note in plan.notes)
    for step in steps(plan):
        assert step[0].group_size == 1
        assert [text[1:] for text in step[0].passages] == [text[1:] for text in step[0].queries]


def test_a_row_without_negatives_borrows_but_never_its_own_positive():
    content = [
        {"query": "a", "pos": ["right", "also right"]},
        {"query": "b", "pos": ["b"], "neg": ["right", "wrong"]},
        {"query": "a", "pos": ["right too"]},
        {"query": "c", "pos": ["c"]},
    ]
    plan = batch_plan(train_data(content), 4, train_group_size=3)
    assert "'<rows>': 3 rows without negatives get passages of other rows of their dataset" in plan.notes
    borrowed = set()
    for epoch in range(30):
        batch = plan.batch(epoch, 0, 0)
        at = batch.sources.index("<rows>:1")
        group = batch.passages[3 * at : 3 * at + 3]
        assert not {"right", "also right", "right too"} & set(group[1:])
        borrowed |= set(group[1:])
    assert borrowed == {"wrong", "c"}


def test_rows_borrow_from_their_own_dataset_only(tmp_path):
    data = load(tmp_path, {"a": [{"query": "a", "pos": ["p"]}, *rows(3, 1, "a")], "b": rows(50, 1, "b")})
    plan = batch_plan(data, 60, train_group_size=3)
    for epoch in range(5):
        batch = plan.batch(epoch, 0, 0)
        at = batch.queries.index("a")
        assert {text[0] for text in batch.passages[3 * at + 1 : 3 * at + 3]} == {"a"}


def test_nothing_to_borrow_is_an_error_that_names_the_row():
    content = [{"query": "a", "pos": ["x", "y"]}, {"query": "b", "pos": ["y"], "neg": ["x"]}]
    with pytest.raises(DataError, match="<rows>:1 has no 'neg'"):
        batch_plan(train_data(content), 2, train_group_size=2).batch(0, 0, 0)


def test_borrowed_passages_have_no_teachers_score():
    scored = {"pos_scores": [1]}
    content = [
        {"query": "a", "pos": ["x"], **scored},
        {"query": "b", "pos": ["y"], "neg": ["z"], "neg_scores": [0], **scored},
    ]
    data = train_data(content, knowledge_distillation=True)
    with pytest.raises(DataError, match=r"1 rows of '<rows>' have no 'neg'.*<rows>:1"):
        batch_plan(data, 2, train_group_size=2, knowledge_distillation=True)
    alone = train_data([content[0], {**content[0], "query": "c"}], knowledge_distillation=True)
    assert batch_plan(alone, 2, knowledge_distillation=True).batch(0, 0, 0).teacher == [[1.0], [1.0]]


# ---- datasets of several kinds


@pytest.mark.parametrize("same_dataset", [False, True])
def test_in_batch_negatives_or_not_never_meet_in_a_batch(tmp_path, same_dataset):
    files = {"a": rows(9, name="a"), "b_no_in_batch_neg": rows(7, name="b"), "c": rows(6, name="c")}
    plan = batch_plan(load(tmp_path, files), 4, train_group_size=2, same_dataset_within_batch=same_dataset)
    for step in steps(plan):
        for query in step[0].queries:
            assert step[0].in_batch_negatives == (query[0] != "b")
    assert {step[0].in_batch_negatives for step in steps(plan)} == {True, False}


def test_plain_batches_mix_datasets_and_say_so(tmp_path):
    plan = batch_plan(load(tmp_path, {"a": rows(20, name="a"), "b": rows(20, name="b")}), 10, train_group_size=2)
    assert "mixed" in {step[0].dataset for step in steps(plan)}


def test_types_decide_group_and_batch_size(tmp_path):
    files = {
        "normal": rows(16, 3, "n"),
        "one": rows(16, 3, "o", type="only_1neg"),
        "sts": rows(16, 3, "s", type="symmetric_sts"),
        "class": rows(16, 2, "c", type="symmetric_class"),
        "clustering": rows(16, 3, "k", type="symmetric_clustering"),
        "own": rows(16, 3, "w", batch_size=16, train_group_size=3),
    }
    data = load(tmp_path, files)
    plan = batch_plan(data, 8, train_group_size=4, same_dataset_within_batch=True)
    found = {step[0].dataset: step[0] for step in steps(plan)}
    kinds = {n: (len(b.queries), b.group_size, b.passages_as_queries) for n, b in found.items()}
    assert kinds == {
        "normal": (8, 4, False),
        "one": (8, 2, False),
        "sts": (4, 4, True),
        "class": (4, 3, False),
        "clustering": (4, 4, True),
        "own": (16, 3, False),
    }
    plain = batch_plan(data, 8, train_group_size=4)
    assert {len(step[0].queries) for step in steps(plain)} == {8}
    assert any("'batch_size' in the rows of own" in note for note in plain.notes)


# ---- a loss that would be 0


def test_one_query_with_one_passage_has_nothing_to_compare(tmp_path):
    data = train_data(rows(5, negatives=0))
    for world_size in (1, 2):
        with pytest.raises(UsageError, match="the loss would be 0; raise --per_device_train_batch_size"):
            batch_plan(data, 1, world_size)
    with pytest.raises(UsageError, match="the loss would be 0"):
        batch_plan(train_data(rows(5)), 1, train_group_size=1)
    batch_plan(data, 1, 2, negatives_cross_device=True)
    batch_plan(train_data(rows(5)), 1, train_group_size=2)
    with pytest.raises(UsageError, match="the loss would be 0"):
        batch_plan(data, 1, 1, negatives_cross_device=True)


def test_no_negatives_from_anywhere_is_refused():
    data = train_data(rows(5, negatives=0), no_in_batch_neg=["*"])
    with pytest.raises(DataError, match="neither in its row nor from its batch"):
        batch_plan(data, 4)


def test_a_single_row_without_negatives_is_refused(tmp_path):
    with pytest.raises(DataError, match="a single row and no negatives"):
        batch_plan(train_data(rows(1, negatives=0)), 4)
    assert batch_plan(train_data(rows(1)), 4, train_group_size=2).steps_per_epoch == 1


@pytest.mark.parametrize(
    ("count", "batch_size", "world_size"), [(5, 4, 1), (9, 2, 2), (13, 4, 3), (3, 2, 2), (3, 2, 4)]
)
def test_no_step_of_any_rank_is_left_with_one_candidate(count, batch_size, world_size):
    plan = batch_plan(train_data(rows(count, negatives=0)), batch_size, world_size)
    for step in steps(plan):
        for batch in step:
            assert len(set(batch.passages)) >= 2
            assert len(set(batch.queries)) == len(batch.queries)
    assert {source for step in steps(plan) for source in sources(step)} == {f"<rows>:{i + 1}" for i in range(count)}
    assert any("seen twice" in note for note in plan.notes)


@pytest.mark.parametrize("name", ["per_device_batch_size", "world_size", "train_group_size"])
def test_sizes_must_be_positive(name):
    sizes = {"per_device_batch_size": 4, "world_size": 1, "train_group_size": 2, name: 0}
    with pytest.raises(UsageError, match=f"{name} is 0"):
        batch_plan(train_data(rows(4)), **sizes)
    with pytest.raises(UsageError, match="seed is -1"):
        batch_plan(train_data(rows(4)), 4, seed=-1)


# ---- grouped by length


def uneven(count: int) -> list[dict[str, object]]:
    """Rows whose texts' lengths are spread over two orders of magnitude, in no order."""
    sizes = [1 + (number * 7919) % count for number in range(count)]
    return [
        {"query": f"q{n}", "pos": [f"p{n} " + "x" * size], "neg": [f"n{n} " + "y" * size]}
        for n, size in enumerate(sizes)
    ]


def spread(plan: BatchPlan, epoch: int = 0) -> float:
    """How much longer the longest passage of a rank's batch is than its mean, over the epoch: padding's share."""
    batches = [batch for step in steps(plan, epoch) for batch in step]
    longest = sum(max(map(len, batch.passages)) * len(batch.passages) for batch in batches)
    return 1 - sum(len(text) for batch in batches for text in batch.passages) / longest


@pytest.mark.parametrize("world_size", [1, 2])
def test_grouping_by_length_saves_padding_and_keeps_every_row_and_chance(world_size):
    data = train_data(uneven(900))
    plain = batch_plan(data, 4, world_size, train_group_size=2)
    grouped = batch_plan(data, 4, world_size, train_group_size=2, group_by_length=True)
    assert spread(grouped) < 0.3 * spread(plain)
    seen = [[tuple(sources(step)) for step in steps(grouped, epoch)] for epoch in (0, 1)]
    assert all(len({source for step in epoch for source in step}) == len(data) for epoch in seen)
    assert {frozenset(step) for step in seen[0]}.isdisjoint(frozenset(step) for step in seen[1])
    lengths = [max(map(len, step[0].passages)) for step in steps(grouped)]
    assert lengths != sorted(lengths)  # the steps come in random order


def test_grouped_batches_are_a_function_of_their_numbers():
    data = train_data(uneven(100))
    first, again = (batch_plan(data, 4, 2, train_group_size=2, group_by_length=True) for _ in range(2))
    assert again.batch(3, 5, 1) == first.batch(3, 5, 1)
