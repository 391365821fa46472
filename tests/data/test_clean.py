"""Cleaning by teachers' scores: the rules of UltraRAG, to the letter, and what is reported."""

from __future__ import annotations

import pytest

from tests.data.files import read, write
from ultrarag.data import clean
from ultrarag.errors import DataError, UsageError

ROW = {
    "query": "q",
    "pos": ["a", "b"],
    "pos_scores": [0.9, 0.8],
    "neg": ["n9", "n8", "n7", "n3", "n1"],
    "neg_scores": [0.9, 0.8, 0.7, 0.3, 0.1],
    "note": "kept",
}
LOGITS = {"query": "q", "pos": ["a"], "pos_scores": [-2.0], "neg": ["x", "y", "z"], "neg_scores": [-1.9, -2.1, -3.0]}


@pytest.mark.parametrize(
    ("row", "rules", "kept"),
    [
        (ROW, {"score_ratio": 1.0}, ["n8", "n7", "n3", "n1"]),  # the worst positive, 0.8, is the reference
        (ROW, {"score_ratio": 0.5}, ["n3", "n1"]),
        (ROW, {"score_margin": 0.1}, ["n7", "n3", "n1"]),
        (ROW, {"max_neg_score": 0.3}, ["n3", "n1"]),
        (ROW, {"max_neg_score": 0.85, "score_margin": 0.4, "score_ratio": 0.2}, ["n1"]),
        (ROW, {"min_pos_score": 0.8}, ["n9", "n8", "n7", "n3", "n1"]),
        (ROW, {"min_pos_score": 0.81}, None),
        (ROW, {"score_ratio": 0.5, "keep_neg_num": 2}, ["n3", "n1"]),
        (ROW, {"score_ratio": 0.5, "keep_neg_num": 3}, None),
        (LOGITS, {"score_ratio": 0.9}, ["z"]),  # below 0: a tenth of the distance to 0 under the reference, -2.2
        (LOGITS, {"score_margin": 0.5}, ["z"]),
    ],
)
def test_rules(row, rules, kept, tmp_path):
    report = clean(write(tmp_path / "in.jsonl", row), tmp_path / "out.jsonl", **rules)
    rows = read(tmp_path / "out.jsonl")
    if kept is None:
        assert rows == []
        assert report.rows_left_out == {list(rules)[-1]: 1}
        return
    scores = dict(zip(row["neg"], row["neg_scores"], strict=True))
    assert rows == [{**row, "neg": kept, "neg_scores": [scores[text] for text in kept]}]
    assert report.negatives_left_out.total() == len(row["neg"]) - len(kept)


def test_reasons_are_counted_in_the_order_of_the_rules(tmp_path):
    found = clean(
        write(tmp_path / "in.jsonl", ROW, ROW), tmp_path / "out.jsonl",
        max_neg_score=0.85, score_margin=0.1, score_ratio=0.5,
    )  # fmt: skip
    assert found.negatives_left_out == {"max_neg_score": 2, "score_margin": 2, "score_ratio": 2}
    assert "max_neg_score 2, score_margin 2, score_ratio 2" in str(found)


def test_rows_without_scores_are_refused_with_their_line(tmp_path):
    path = write(tmp_path / "in.jsonl", ROW, {"query": "q", "pos": ["a"], "neg": ["n"]})
    with pytest.raises(DataError, match=r"in\.jsonl:2: 'pos_scores' is missing; ultrarag data score"):
        clean(path, tmp_path / "out.jsonl", score_margin=0.1)


def test_a_stopped_run_counts_on(tmp_path, monkeypatch):
    from ultrarag.data import cleaning

    path, out = write(tmp_path / "in.jsonl", *[ROW] * 5), tmp_path / "out.jsonl"

    def stop(row, rules, report, real=cleaning.cleaned):
        if report.rows == 3:
            raise KeyboardInterrupt
        return real(row, rules, report)

    monkeypatch.setattr(cleaning, "cleaned", stop)
    with pytest.raises(KeyboardInterrupt, match="same command"):
        clean(path, out, score_ratio=0.5)
    monkeypatch.undo()
    report = clean(path, out, score_ratio=0.5)
    assert (report.rows, report.negatives_left_out.total(), len(read(out))) == (5, 15, 5)


def test_no_rule_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="no rule"):
        clean(write(tmp_path / "in.jsonl", ROW), tmp_path / "out.jsonl")
