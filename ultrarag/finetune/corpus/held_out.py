"""Held-out queries whose documents training does not see, cut from the training rows themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ultrarag.finetune.batches import Draws
from ultrarag.rows import text_key

#: Says that a stream of draws is this one: see the first numbers of the others in `plan.py`.
_HELD_OUT = 6
#: The share of the rows that is held out, and how many at most.
SHARE, MOST = 0.1, 400


def document_groups(queries: Sequence[str], positives: Sequence[Sequence[str]]) -> np.ndarray:
    """A group for each row, (rows,) int64: rows of one group share a query, a passage or a title, directly or not.

    Args:
        positives: the texts of each row's positives; what stands before a text's first line break is its title.
    """
    parent = np.arange(len(queries))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = int(parent[row])
        return row

    first: dict[tuple[str, int], int] = {}
    for row, (query, texts) in enumerate(zip(queries, positives, strict=True)):
        marks = [("query", text_key(query)), *(("text", text_key(text)) for text in texts)]
        marks += [("title", text_key(title)) for text in texts for title, line, _ in [text.partition("\n")] if line]
        for mark in marks:
            parent[root(row)] = root(first.setdefault(mark, row))
    return np.array([root(row) for row in range(len(queries))], np.int64)


def hold_out(groups: np.ndarray, seed: int) -> np.ndarray:
    """Which rows are held out, (rows,) bool: whole groups in random order, until a tenth of the rows is reached.

    A group that would take more than twice as many stays in training; without two groups nothing is held out.
    """
    wanted = min(MOST, max(1, round(SHARE * len(groups))))
    names, members = np.unique(groups, return_inverse=True)
    sizes = np.bincount(members)
    held, taken = np.zeros(len(groups), bool), 0
    for number in Draws(_HELD_OUT, seed).order(len(names)):
        if taken < wanted and taken + sizes[number] <= 2 * wanted and taken + sizes[number] < len(groups):
            held |= members == number
            taken += int(sizes[number])
    return held
