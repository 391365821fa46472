"""Groups of rows by document, and what is held out of them."""

from __future__ import annotations

import numpy as np

from ultrarag.rows.checks import DocumentGroups, hold_out


def grouped(*rows: tuple[str, list[str]]) -> np.ndarray:
    groups = DocumentGroups()
    for query, positives in rows:
        groups.add(query, positives)
    return groups.joined().roots()


def test_rows_that_share_a_document_stay_together() -> None:
    rows = [("a", ["T\none"]), ("b", ["T\ntwo"]), ("c", ["x"]), ("A ", ["y"]), ("d", ["X", "z"])]
    groups = grouped(*rows)
    assert groups[0] == groups[1] == groups[3]
    assert groups[2] == groups[4]
    assert groups[0] != groups[2]


def test_nearly_the_same_text_and_keys_that_name_a_document_join_rows() -> None:
    text = "the vector database keeps its segments sealed on disk and merges them when they are small enough " * 3
    assert len(set(grouped(("a", [text]), ("b", [text + "indeed"]), ("c", ["something else"])))) == 2
    groups = DocumentGroups()
    for query in ("a", "b"):
        groups.add(query, [query * 5], {"document": 7})
    assert len(set(groups.joined().roots())) == 1


def test_a_tenth_is_held_out_and_never_a_part_of_a_document() -> None:
    groups = np.repeat(np.arange(100), 5)
    held = hold_out(groups, {"test": 0.1}, 1) > 0
    assert 40 <= held.sum() <= 50
    assert not set(groups[held]) & set(groups[~held])
    assert not hold_out(np.zeros(50, np.int64), {"test": 0.1}, 1).any()
    both = hold_out(groups, {"test": 0.1, "dev": 0.2}, 1)
    assert [int((both == number).sum()) for number in range(3)] == [350, 50, 100]
