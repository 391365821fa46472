"""Splitting: held-out passages are unseen; lengths go into their buckets."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.data.files import read, write
from ultrarag.cli import main
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
    with pytest.raises(DataError, match=r"no group of rows fits into test.*1 groups.*20 of 20 rows.*the positive \("):
        split(path, tmp_path / "out")


SENTENCE = "dough rises when yeast eats sugar and gives off gas that the gluten holds in many small bubbles"
WORDS = SENTENCE.split()
#: Two positives of one document, by each kind of evidence: keys of the rows, and texts with which each row begins.
DOCUMENTS = {
    "id": lambda d, n: {"pos": [f"text {d} {n}"], "pos_ids": [f"book {d}#{n}"]},
    "document": lambda d, n: {"pos": [f"text {d} {n}"], "metadata": {"document": f"book {d}"}},
    "source": lambda d, n: {"pos": [f"text {d} {n}"], "source": f"https://books/{d}"},
    "title": lambda d, n: {"pos": [f"{'The Book' if n else 'the  book'} {d}\ntext {d} {n}"]},
    "near": lambda d, n: {"pos": [" ".join([f"{word}{d}" for word in WORDS[:-1]] + [f"end {n}"])]},
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_passages_of_one_document_stay_together_unless_that_is_left_out(tmp_path, kind):
    rows = [{"query": f"q{d}-{n}", **DOCUMENTS[kind](d, n)} for d in range(30) for n in range(4)]
    path = write(tmp_path / "rows.jsonl", *rows)
    report = split(path, tmp_path / "out", test_share=0.2)
    found = files(tmp_path / "out")
    documents = {name: {row["query"].split("-")[0] for row in part} for name, part in found.items()}
    assert len(found["test"]) == 24
    assert not documents["test"] & documents["train"]
    assert (report.by, report.components, report.largest["rows"]) == ("document", 30, 4)
    assert list(report.largest["held"]) == [kind]
    others = [name for name in DOCUMENTS if name != kind]
    assert split(path, tmp_path / "other", test_share=0.2, together=others).components == 120


def test_by_query_only_queries_stay_together_and_nothing_is_left_out(tmp_path):
    rows = [{"query": f"q{n // 2}", "pos": ["The Book\none"], "neg": [f"p{n}"]} for n in range(40)]
    path = write(tmp_path / "rows.jsonl", *rows)
    report = split(path, tmp_path / "out", by="query", test_share=0.2)
    found = files(tmp_path / "out")
    assert (report.by, report.components, report.negatives_left_out) == ("query", 20, 0)
    assert len(found["test"]) == 8
    assert not {row["query"] for row in found["test"]} & {row["query"] for row in found["train"]}


def test_a_giant_group_is_named_with_what_holds_it_and_what_to_do(tmp_path, capsys):
    rows = [{"query": f"q{n}", "pos": [f"p{n}"], "source": "faq" if n < 30 else f"s{n}"} for n in range(40)]
    path = write(tmp_path / "rows.jsonl", *rows)
    assert main(["data", "split", path, "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "the largest group holds 30 of 40 rows, which share: source 29" in out
    assert "most rows (30) share the source 'faq'" in out
    assert "leave it out: --together id document title near" in out
    words = ["--together", "id", "document", "title", "near", "--overwrite"]
    assert main(["data", "split", path, "--output", str(tmp_path / "out"), *words]) == 0
    assert "note:" not in capsys.readouterr().out
    assert main(["data", "split", path, "--output", str(tmp_path / "none"), "--together", "none"]) == 0
    all_of_one = write(tmp_path / "one.jsonl", *rows[:30])
    with pytest.raises(DataError, match=r"share the source 'faq' \(.*one.jsonl:1, .*leave it out: --together"):
        split(all_of_one, tmp_path / "one")


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
    with pytest.raises(UsageError, match="did you mean 'title'"):
        split(path, tmp_path / "out", together=["titel"])
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
