"""Compressed lists and vocabulary: what goes in comes out, whatever the density, the numbers and the signs."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest

from ultrarag.retrieve.bm25 import lists as lists_
from ultrarag.retrieve.bm25 import vocabulary
from ultrarag.retrieve.bm25.compressor import Compressor
from ultrarag.retrieve.bm25.lists import Inverted, Lists, in_order, united
from ultrarag.retrieve.bm25.terms import digest, tokenize
from ultrarag.retrieve.bm25.vocabulary import Vocabulary

NORMS = (0.3, 0.03)


def inverted(rng: np.random.Generator, rows: int, shares: list[float], numbers: str) -> Inverted:
    """Lists that hold each row with a probability."""
    held = [np.flatnonzero(rng.random(rows) < share) for share in shares]
    keys = np.sort(rng.choice(1 << 62, len(shares), replace=False)).astype(np.uint64)
    counts = np.array([len(part) for part in held])
    values = {
        "ones": np.ones(counts.sum()),
        "few": rng.integers(1, 4, counts.sum()).astype(float),
        "many": rng.integers(1, 40, counts.sum()).astype(float),
        "values": rng.normal(size=counts.sum()),
    }[numbers]
    return Inverted(keys, counts, np.concatenate(held), values)


def compress(inverted: Inverted, rows: int, pieces: int = 1) -> Lists:
    compressor = Compressor(np.full(rows, 20), NORMS)
    borders = np.linspace(0, len(inverted.keys), pieces + 1).astype(int)
    starts = np.concatenate([[0], inverted.counts.cumsum()])
    for a, z in itertools.pairwise(borders):
        entries = slice(starts[a], starts[z])
        piece = inverted.rows[entries], inverted.numbers[entries]
        compressor.add(Inverted(inverted.keys[a:z], inverted.counts[a:z], *piece))
    return Lists(compressor.arrays(), rows)


@pytest.mark.parametrize("numbers", ["ones", "few", "many", "values"])
@pytest.mark.parametrize("rows", [1, 300, 3000, 70_001, 200_000])
def test_lists_come_back(rows: int, numbers: str) -> None:
    rng = np.random.default_rng(rows)
    given = inverted(rng, rows, [1.0, 0.999, 0.6, 0.1, 0.02, 0.009, 0.001, 3 / rows, 0.0, 1.0], numbers)
    held = compress(given, rows, pieces=3)
    starts = given.counts.cumsum() - given.counts
    for key, start, count in zip(given.keys, starts, given.counts, strict=True):
        [number] = held.find(np.array([key]))
        wanted, values = given.rows[start : start + count], given.numbers[start : start + count]
        assert held.count(number) == count
        np.testing.assert_array_equal(held.rows(number), wanted)
        np.testing.assert_array_equal(held.numbers(number), values)
        for asked in (rng.integers(0, rows, 40), rng.integers(0, rows, min(rows, 5000))):
            asked = np.unique(asked)
            found, places = held.lookup(number, asked) if count else (np.zeros(0, int), np.zeros(0, int))
            np.testing.assert_array_equal(asked[found], np.intersect1d(asked, wanted))
            np.testing.assert_array_equal(held.numbers_at(number, places), values[np.isin(wanted, asked)])
        if held.dense(number):
            windows = np.unique([0, held.windows - 1, *rng.integers(0, held.windows, 7)])
            cells, places = held.in_windows(number, windows)
            inside = np.isin(wanted >> 8, windows)
            np.testing.assert_array_equal((windows[cells >> 8] << 8) + (cells & 255), wanted[inside])
            np.testing.assert_array_equal(held.numbers_at(number, places), values[inside])
            gains = np.maximum(values, 0) / (np.maximum(values, 0) + NORMS[0] + NORMS[1] * 20)
            assert (held.most(number)[wanted >> 8] / 255 >= gains - 1e-12).all()
    assert held.find(np.array([1 << 63], np.uint64)) == [-1]
    back = held.between(0, None)
    middle = int(given.keys[4])
    halves = in_order([held.between(0, middle), held.between(middle, None)])
    for whole in (back, halves):
        there = given.counts > 0
        np.testing.assert_array_equal(whole.keys[whole.counts > 0], given.keys[there])
        np.testing.assert_array_equal(whole.rows, given.rows)
        np.testing.assert_array_equal(whole.numbers, given.numbers)


@pytest.mark.parametrize(("share", "most"), [(0.009, 1.25), (0.002, 1.5)])
def test_a_list_of_middle_length_takes_little_more_than_a_byte_an_entry(share: float, most: float) -> None:
    rng = np.random.default_rng(1)
    given = inverted(rng, 1_000_000, [share] * 5, "ones")
    compressor = Compressor(np.full(1_000_000, 20), NORMS)
    compressor.add(given)
    arrays = compressor.arrays()
    taken = sum(array.nbytes for array in arrays.values()) - 5 * 8 - 8 * 4  # without keys and where lists begin
    assert taken < most * len(given.rows)
    np.testing.assert_array_equal(Lists(arrays, 1_000_000).between(0, None).rows, given.rows)


def test_a_list_beyond_row_2_to_the_24_comes_back() -> None:
    rows = (1 << 24) + 70_000
    rng = np.random.default_rng(2)
    held = np.unique(np.concatenate([rng.integers(0, rows, 40_000), (1 << 24) + np.arange(-3, 3), [rows - 1]]))
    given = Inverted(np.array([5], np.uint64), np.array([len(held)]), held, np.ones(len(held)))
    compressor = Compressor(np.broadcast_to(np.int64(20), rows), NORMS)
    compressor.add(given)
    arrays = compressor.arrays()
    assert arrays["rows3"].nbytes == len(held)
    lists = Lists(arrays, rows)
    np.testing.assert_array_equal(lists.rows(0), held)
    found, places = lists.lookup(0, held[::7])
    np.testing.assert_array_equal(held[places], held[::7][found])
    assert len(found) == len(held[::7])


def test_windows_are_halved_or_compared_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    held = compress(inverted(rng, 20_000, [0.7, 0.05, 1.0], "few"), 20_000)
    asked = np.unique(rng.integers(0, 20_000, 60))
    compared = [held.lookup(number, asked) for number in range(3)]
    monkeypatch.setattr(lists_, "FEW_ENTRIES", 0)
    for number in range(3):
        np.testing.assert_array_equal(held.lookup(number, asked), compared[number])


def test_a_row_may_have_several_numbers_of_one_fact() -> None:
    rows = np.repeat(np.arange(2000), 300)
    given = Inverted(np.array([5], np.uint64), np.array([len(rows)]), rows, np.arange(len(rows)) / 2)
    held = compress(given, 2000)
    np.testing.assert_array_equal(held.rows(0), rows)
    np.testing.assert_array_equal(held.numbers(0), given.numbers)
    assert not held.dense(0)


def test_lists_of_one_key_are_joined_in_the_order_of_their_pieces() -> None:
    first = Inverted(np.array([1, 3], np.uint64), np.array([2, 1]), np.array([0, 4, 2]), np.array([1.0, 2, 3]))
    second = Inverted(np.array([2, 3], np.uint64), np.array([1, 2]), np.array([7, 8, 9]), np.array([4.0, 5, 6]))
    joined = united([first, second])
    assert joined.keys.tolist() == [1, 2, 3]
    assert joined.counts.tolist() == [2, 1, 3]
    assert joined.rows.tolist() == [0, 4, 7, 2, 8, 9]
    assert joined.numbers.tolist() == [1, 2, 4, 3, 5, 6]


@pytest.mark.parametrize("together", [100, 1 << 20])
def test_a_vocabulary_numbers_the_tokens_of_the_tokenizer(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_TOGETHER", together)
    rng = random.Random(1)
    signs = "ab cZ019_-'’“éïＡ中文 ſ\x00\t\n.…かﬁ½İK\ud800" + "abcdefghijklmnop    "
    texts = ["".join(rng.choice(signs) for _ in range(rng.randrange(120))) for _ in range(2000)]
    texts += [
        "",
        "a",
        "sixteenlettersab seventeenlettersab internationalizations " * 3,
        "Therapies of “glass” — viruses",
    ]
    known = Vocabulary()
    for _ in range(2):  # words met before take another way
        numbers, rows = known.numbers(texts)
        found = [Counter() for _ in texts]
        for number, row in zip(numbers.tolist(), rows.tolist(), strict=True):
            found[row][known.keys[number]] += 1
        for text, counted in zip(texts, found, strict=True):
            assert counted == Counter(digest("term", token) for token in tokenize(text)), text


def test_words_that_share_a_place_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_BITS", 2)
    known = Vocabulary()
    words = [f"word{number}" for number in range(50)] + [f"averylongword{number}" for number in range(20)]
    for _ in range(3):
        numbers, _ = known.numbers([" ".join(words)])
        assert [known.keys[number] for number in numbers] == [digest("term", word) for word in words]
