"""From a text to its terms, and the binary layout of their inverted lists.

A text is stemmed lower-case words, and characters with their pairs where words are not spaced. Measured, nDCG@10
(medquad, scifact, covidqa; stard, cmrc): as here 0.566, 0.649, 0.657; 0.617, 0.980. Without the plural stemmer 0.01
less on medquad and covidqa; with Lucene's English stop words 0.01 and 0.015 less on scifact and covidqa (0.002 more on
medquad); Chinese by pairs only 0.025 less on stard, by single characters only 0.03 less.

A list holds 16-bit distances from a first row, and a number with each. Numbers are term frequencies, or values of
metadata for ranges: nothing is stored where all are 1, 16 bits each where they are small integers, doubles otherwise.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Hashable, Iterator
from typing import TypeAlias

import numpy as np

#: Rows that one entry may span.
SEGMENT_ROWS = 1 << 16
#: A frequency above this counts as this.
MOST_FREQUENT = (1 << 16) - 1
#: (key, first row, distances from it, numbers)
Entry: TypeAlias = "tuple[object, int, bytes, bytes]"
#: Scripts written without spaces between words, or with endings attached: kana, Han, Hangul.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_RUN = re.compile(rf"([{_UNSPACED}]+)|[^\W_{_UNSPACED}]+")


def tokenize(text: str) -> list[str]:
    """Return the tokens of a text in order; a text without letters or digits has none."""
    tokens: list[str] = []
    for found in _RUN.finditer(unicodedata.normalize("NFKC", text).lower()):
        run = found[0]
        if found[1]:
            tokens.extend(run)
            tokens.extend(run[i : i + 2] for i in range(len(run) - 1))
        else:
            tokens.append(stem(run))
    return tokens


def stem(word: str) -> str:
    """Take the plural off an English word: diseases -> disease, therapies -> therapy; not glass, virus, analysis.

    Source:
        The S-stemmer (Harman, 1991), without its rarer exceptions.
    """
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    return f"{word[:-3]}y" if word.endswith("ies") and len(word) > 4 else word[:-1]


def grouped(keys: np.ndarray, values: np.ndarray, rows: np.ndarray, starts: np.ndarray) -> Iterator[Entry]:
    """Cut arrays sorted by key into one entry per key, `starts` being where each begins."""
    if not len(starts):
        return
    ends = np.append(starts[1:], len(keys))
    distances = (rows - np.repeat(rows[starts], ends - starts)).astype("<u2").tobytes()
    short, long = values.clip(0, MOST_FREQUENT).astype("<u2").tobytes(), values.astype("<f8").tobytes()
    all_ones = np.logical_and.reduceat(values == 1, starts)
    all_short = np.logical_and.reduceat(_short(values), starts)
    columns = (keys[starts], rows[starts], starts, ends, all_ones, all_short)
    for key, first, a, b, ones, fits in zip(*(column.tolist() for column in columns), strict=True):
        numbers = b"" if ones else short[2 * a : 2 * b] if fits else long[8 * a : 8 * b]
        yield key, first, distances[2 * a : 2 * b], numbers


def entries(key: object, rows: np.ndarray, numbers: np.ndarray) -> Iterator[Entry]:
    """Cut one list where its rows no longer fit 16 bits."""
    while len(rows):
        first = int(rows[0])
        end = int(np.searchsorted(rows, first + SEGMENT_ROWS)) if rows[-1] >= first + SEGMENT_ROWS else len(rows)
        yield key, first, (rows[:end] - first).astype("<u2").tobytes(), _pack(numbers[:end])
        rows, numbers = rows[end:], numbers[end:]


def segment(first: int, rows: bytes, numbers: bytes) -> tuple[np.ndarray, np.ndarray]:
    distances = np.frombuffer(rows, "<u2")
    if not numbers:
        values = np.ones(len(distances), np.float32)
    else:
        values = np.frombuffer(numbers, "<u2" if len(numbers) == len(rows) else "<f8")
    return distances.astype(np.int32) + np.int32(first), values


def _pack(numbers: np.ndarray) -> bytes:
    """Nothing where all are 1, 16 bits each where all are frequencies, doubles otherwise."""
    if (numbers == 1).all():
        return b""
    return numbers.astype("<u2" if _short(numbers).all() else "<f8").tobytes()


def _short(numbers: np.ndarray) -> np.ndarray:
    """Which numbers 16 bits can hold."""
    return (numbers >= 0) & (numbers <= MOST_FREQUENT) & (numbers == np.floor(numbers))


def unpack_forward(forward: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The keys of a passage, int64, and the number of each, float64."""
    half = len(forward) // 16
    return np.frombuffer(forward, "<i8", half), np.frombuffer(forward, "<f8", half, 8 * half)


_NOTHING = (np.zeros(0, np.int32), np.zeros(0, np.float64))


class Postings:
    """In-memory inverted lists: key -> (rows, values); rows must be added in ascending order."""

    def __init__(self) -> None:
        self._lists: dict[Hashable, tuple[array[int], array[float]]] = {}

    def add(self, key: Hashable, row: int, value: float) -> None:
        """Note that `row` holds `key` with `value`."""
        held = self._lists.get(key)
        if held is None:
            held = self._lists[key] = (array("i"), array("d"))
        held[0].append(row)
        held[1].append(value)

    def get(self, key: Hashable) -> tuple[np.ndarray, np.ndarray]:
        """Return copies of the rows, int32, and their values, float64; both empty for an unknown key."""
        held = self._lists.get(key)
        if held is None:
            return _NOTHING
        return np.array(held[0], np.int32), np.array(held[1], np.float64)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._lists

    def __iter__(self) -> Iterator[Hashable]:
        """Iterate over the keys."""
        return iter(self._lists)

    def __len__(self) -> int:
        return len(self._lists)
