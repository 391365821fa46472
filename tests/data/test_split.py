"""Splitting: held-out passages are unseen; lengths go into their buckets."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.data.files import read, write
from ultrarag.data import split
from ultrarag.errors import DataError, UsageError


def random_rows(count: int) -> list[dict]:
    """Rows that share passages and queries, so that groups of several rows arise."""
    draws = random.Random(0)
    return [
        {
            "query": f"q{draws.randrange(count * 3)}",
            "pos": [f"p{draws.randrange(count * 5)}" for _ in range(2)],
            "neg": [f"p{draws.randrange(count * 5)}" for _ in range(20)],
            "neg_scores": [0.1] * 20,
        }
        for _ in range(count)
    ]


def files(folder: Path) -> dict[str, list[dict]]:
    return {path.stem: read(path) for path in sorted(folder.iterdir())}


def test_held_out_queries_and_passages_are_unseen(tmp_path):
    path = write(tmp_path / "rows.jsonl", *random_rows(200))
    report = split(path, tmp_path / "out", test_share=0.2, dev_share=0.1)
    found = files(tmp_path / "out")
    assert {name: len(rows) for name, rows in found.items()} == {"dev": 20, "test": 40, "train": 140}
    assert sum(report.files.values()) == 200
    for name in ("test", "dev"):
        held = {text for row in found[name] for text in row["pos"]}
        seen = {text for row in found["train"] for text in (*row["pos"], *row["neg"])}
        assert not held & seen
        assert not {row["query"] for row in found[name]} & {row["query"] for row in found["train"]}
    assert report.negatives_left_out > 0
    assert all(len(row["neg"]) == len(row["neg_scores"]) for rows in found.values() for row in rows)


def test_the_seed_decides(tmp_path):
    path = write(tmp_path / "rows.jsonl", *random_rows(100))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        split(path, tmp_path / name, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_rows_that_all_hang_together_cannot_be_split(tmp_path):
    path = write(tmp_path / "rows.jsonl", *({"query": f"q{i}", "pos": ["one", f"p{i}"]} for i in range(20)))
    with pytest.raises(DataError, match=r"no group of rows fits into test.*1 groups.*holds 20"):
        split(path, tmp_path / "out")


def test_lengths_go_into_buckets_and_empty_ones_are_not_written(tmp_path, minilm):
    rows = [{"query": "bread", "pos": ["oven " * size]} for size in (1, 7, 8, 60)]
    path = write(tmp_path / "rows.jsonl", *rows)
    report = split(path, tmp_path / "out", by="length", length_list=[0, 5, 10, 40, 100], model=minilm)
    found = files(tmp_path / "out")
    # [CLS] and [SEP] count: 7 words are 9 tokens, 8 are 10 and fall into the bucket that begins there
    assert found == {
        "len-0-5": [rows[0]],
        "len-5-10": [rows[1]],
        "len-10-40": [rows[2]],
        "len-40-100": [rows[3]],
    }
    assert sum(report.files.values()) == 4


def test_bad_values_are_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"query": "q", "pos": ["p"]})
    with pytest.raises(UsageError, match="did you mean 'length'"):
        split(path, tmp_path / "out", by="lenght")
    with pytest.raises(UsageError, match="begin with 0"):
        split(path, tmp_path / "out", by="length", length_list=[5, 1])
    with pytest.raises(UsageError, match="test_share"):
        split(path, tmp_path / "out", test_share=1.5)


def test_a_run_killed_when_it_had_published_is_done_by_the_same_call(tmp_path, killed_when_published):
    path, out = write(tmp_path / "rows.jsonl", *random_rows(2)), tmp_path / "out"
    killed_when_published(lambda: split(path, out, by="length", length_list=[0, 500]))
    empty = [file for file in out.iterdir() if not file.stat().st_size]
    assert empty  # not removed yet
    before = {file: file.read_bytes() for file in out.glob("*.jsonl") if file not in empty}
    report = split(path, out, by="length", length_list=[0, 500])
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    assert sum(report.files.values()) == 2
