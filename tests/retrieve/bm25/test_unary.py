"""The windows of entries as bits: as the rule says them one by one, and back, of one list and of many."""

from __future__ import annotations

import numpy as np
import pytest

from ultrarag.retrieve.bm25.unary import EntryWindows, as_bits


def said(entry_windows: list[int], windows: int) -> str:
    """For each window a 1 for each of its entries, then a 0; zeros at the end belong to the last byte alone."""
    bits = "".join("1" * entry_windows.count(window) + "0" for window in range(windows))[:-1]
    return bits + "0" * (-len(bits) % 8)


@pytest.mark.parametrize(
    ("lists", "windows"),
    [
        ([[0]], 1),
        ([[0, 0, 0, 0, 0, 0, 0, 0, 0]], 1),
        ([[7]], 8),
        ([[0, 3, 3, 3], [2], [0, 1, 2, 3]], 4),
        ([[0] * 300 + [1, 9], [9] * 257], 10),
        ([[0, 255, 256, 257], [65_535, 65_536], [0, 70_000]], 70_001),  # rows on both sides of 2^16 and of 2^24
    ],
)
def test_windows_are_the_bits_that_the_rule_says(lists: list[list[int]], windows: int) -> None:
    counts = np.array([len(part) for part in lists])
    bits = as_bits(np.concatenate(lists), counts, windows)
    assert "".join(f"{byte:08b}" for byte in bits) == "".join(said(part, windows) for part in lists)
    held = EntryWindows(bits, np.concatenate([[0], counts.cumsum()]).astype(np.uint32), windows)
    for at, part in enumerate(lists):
        assert held.of(at).tolist() == part
    for first in range(len(lists)):
        for last in range(first, len(lists) + 1):
            assert held.between(first, last).tolist() == [entry for part in lists[first:last] for entry in part]
