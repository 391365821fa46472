"""`ultrarag data check`: one pass over files, the report for people and for scripts, and the exit status."""

from __future__ import annotations

import json

import pytest

from tests.data.files import write
from tests.finetune.test_run import ROWS
from ultrarag.cli import main
from ultrarag.data import check
from ultrarag.errors import DataError, UsageError
from ultrarag.evaluation import write_beir
from ultrarag.types import Passage


def test_good_rows_are_ok(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", *ROWS[:10])
    assert main(["data", "check", path, "--train-group-size", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["rows"], found["checked"], found["bad"]) == (True, 10, 10, 0)
    assert found["scripts"]["query"] == {"Latin": 1.0}
    assert found["cost"]["steps"] == 6  # ceil(10 / 8) batches, three epochs
    assert found["cost"]["seconds"] is None


def test_bad_rows_are_listed_with_their_lines_and_make_an_error(tmp_path, capsys):
    bad = [{"query": "q", "pos": []}, "{", {"query": "q", "pos": ["p"], "neg": ["n"], "neg_scores": [1.0, 2.0]}]
    path = write(tmp_path / "a.jsonl", ROWS[0], *bad, ROWS[1])
    assert main(["data", "check", path]) == 1
    out = capsys.readouterr().out
    assert "a.jsonl:2: 'pos' is empty" in out
    assert "a.jsonl:3: not valid JSON" in out
    assert "a.jsonl:4: 'neg_scores' has 2 numbers for 1 texts in 'neg'" in out
    report = check(path)
    assert (report.rows, report.checked, report.bad, report.ok) == (5, 2, 3, False)


def test_a_teacher_is_asked_for_where_rows_need_one(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS[0])
    assert check(path).ok
    assert not check(path, knowledge_distillation=True).ok


def test_findings_name_lines_of_several_files(tmp_path):
    first = write(tmp_path / "a.jsonl", *ROWS[:3])
    second = write(tmp_path / "b.jsonl", "", ROWS[3], ROWS[1])
    (found,) = [finding for finding in check([first, second]).findings if finding.name == "duplicate_rows"]
    assert found.places == [f"{second}:3"]


def test_leaks_are_errors_here(tmp_path):
    path = write(tmp_path / "a.jsonl", *ROWS[:5])
    held = write(tmp_path / "eval.jsonl", ROWS[4], {"query": "new one", "pos": ["new text"]})
    report = check(path, eval_data=held)
    names = {finding.name: finding.level for finding in report.findings}
    assert names["eval_queries_in_train"] == "error"
    assert names["eval_passages_in_train"] == "warning"
    assert not report.ok
    assert (report.overlap.split, report.overlap.shared) == ("no split", {"query": 1, "passage": 0, "document": 0})
    assert report.to_dict()["overlap"]["share"] == 0.5
    assert "no split: 50.0% of 2 evaluation queries share a query 1" in str(report)


def test_keys_of_rows_tell_documents_of_the_evaluation_data(tmp_path):
    path = write(tmp_path / "a.jsonl", {"query": "q", "pos": ["one text"], "pos_ids": ["book#1"]})
    beir = tmp_path / "beir"
    write_beir(beir, [Passage("book#7", "another text")], {"q1": "what is it"}, {"test": {"q1": {"book#7": 1}}})
    report = check(path, eval_data=str(beir))
    assert report.overlap.split == "by query"
    assert [finding.name for finding in report.findings if "eval" in finding.name] == ["eval_documents_in_train"]


def test_a_model_counts_tokens_and_is_timed(tmp_path, minilm):
    path = write(tmp_path / "a.jsonl", *ROWS)
    report = check(path, model=minilm, adapter="bge", train_group_size=2, per_device_train_batch_size=4)
    assert report.lengths[0].counted
    assert 22_000_000 * 16 < report.cost.memory < 23_000_000 * 16 + 100_000_000
    assert report.cost.seconds > 0
    with_group = report.cost.tokens_per_step
    alone = check(path, model=minilm, adapter="bge", train_group_size=1, per_device_train_batch_size=4)
    assert alone.cost.tokens_per_step < with_group


def test_nothing_to_check_is_an_error(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        check(tmp_path / "none.jsonl")
    assert [finding.name for finding in check(write(tmp_path / "empty.jsonl")).findings] == ["no_rows"]


def test_flags_are_checked(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", *ROWS)
    assert main(["data", "check", path, "--train_group_sise", "3"]) == 2
    assert "did you mean '--train_group_size'" in capsys.readouterr().err
    with pytest.raises(UsageError, match="query_max_len is 0"):
        check(path, query_max_len=0)
    with pytest.raises(UsageError, match="known are train_group_size"):
        check(path, group=3)
    assert main(["data", "chek"]) == 2
    assert "did you mean 'check'" in capsys.readouterr().err
