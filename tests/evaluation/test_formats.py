"""TREC run files: what is written reads back, and what cannot be read is named by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ultrarag.errors import DataError, UsageError
from ultrarag.retrieve import read_run, write_run


def test_a_run_reads_back_as_the_same_numbers(tmp_path: Path) -> None:
    run = {"q1": {"a/b": 0.1 + 0.2, "文": -1e-9}, "q2": {"c": float("inf")}}
    write_run(tmp_path / "x.run", run)
    assert read_run(tmp_path / "x.run") == run


def test_lines_are_ranked_by_score_and_equal_ones_keep_their_order(tmp_path: Path) -> None:
    write_run(tmp_path / "x.run", {"q": {"low": 1.0, "first": 2.0, "second": 2.0}}, tag="mine")
    assert (tmp_path / "x.run").read_text().splitlines() == [
        "q Q0 first 1 2.0 mine",
        "q Q0 second 2 2.0 mine",
        "q Q0 low 3 1.0 mine",
    ]


def test_a_run_of_another_tool_is_ranked_by_its_scores(tmp_path: Path) -> None:
    (tmp_path / "x.run").write_text("\ufeffq\tQ0\ta\t1\t1\tt\r\n\nq 0 b 2 3e1 t\n", encoding="utf-8")
    assert list(read_run(tmp_path / "x.run")["q"].items()) == [("b", 30.0), ("a", 1.0)]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("q Q0 a 1 1.0 t\nq Q0 b 2 t\n", r"x\.run:2: 5 fields"),
        ("q Q0 a 1 high t\n", r"x\.run:1: the score 'high'"),
        ("q Q0 a 1 nan t\n", r"x\.run:1: the score 'nan'"),
        ("q Q0 a 1 2 t\nq Q0 a 2 1 t\n", r"x\.run:2: passage 'a' is there twice"),
        ("\n", r"x\.run' holds no hits"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, lines: str, said: str) -> None:
    (tmp_path / "x.run").write_text(lines)
    with pytest.raises(DataError, match=said):
        read_run(tmp_path / "x.run")


def test_files_that_are_no_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "x.run").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        read_run(tmp_path / "x.run")
    with pytest.raises(DataError, match="cannot read"):
        read_run(tmp_path / "none.run")
    with pytest.raises(DataError, match="cannot write"):
        write_run(tmp_path / "no" / "x.run", {"q": {"a": 1.0}})


def test_what_the_format_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.run"
    write_run(path, {"q": {"a": 1.0}})
    before = path.read_text()
    for run in ({"q": {"a b": 1.0}}, {"": {"a": 1.0}}, {"q": {"a": 1.0}, "x\ny": {"a": 1.0}}):
        with pytest.raises(DataError, match="cannot hold the id"):
            write_run(path, run)
    with pytest.raises(UsageError, match="one word"):
        write_run(path, {"q": {"a": 1.0}}, tag="two words")
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
