"""From many texts to numbers of their terms, for writing: the tokens of `terms.tokenize`, ten times as fast.

Most texts are ASCII alone, or are when their other signs (quotes, dashes) have become spaces. The words of all of these
are found at once in their bytes, and looked up at once: a word of up to 16 letters is two 64-bit integers, and those
met before are in a table of such pairs. Every other word, and every other text, goes through Python.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Callable, Sequence

import numpy as np

from ultrarag.retrieve.bm25.terms import digest, stem, tokenize

#: Letters and digits in lower case, all else a space: what a text of ASCII becomes.
_ASCII = bytes(ord(chr(code).lower()) if code < 128 and chr(code).isalnum() else 32 for code in range(256))
#: Signs that are not ASCII and belong to no word.
_SIGNS = re.compile(r"[^\x00-\x7f\w]+")
#: Places of the table of words, a power of two: 20 bytes each.
_BITS = 18
#: The bytes of a word that an integer of 8 holds, by how many there are.
_KEPT = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)
_SPREAD, _SPREAD_SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
#: Bytes of text that are looked at together: a few arrays of 8 bytes for each word.
_TOGETHER = 1 << 20


class Vocabulary:
    """Numbers of the terms and facts that passages being gathered hold, in the order in which they were first met."""

    def __init__(self) -> None:
        #: the key of each number
        self.keys = array("Q")
        self.terms = _Numbers(lambda term: self._new("term", term))
        self.facts = _Numbers(lambda fact: self._new("fact", fact))
        self._words = _Numbers(lambda word: self.terms[stem(word)])
        self._table = _Table(self._words)

    def numbers(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the tokens of texts, int32, and the text, by its place, that each is in; in no order."""
        plain: list[bytes] = []
        rows: list[int] = []
        pieces: list[tuple[np.ndarray, np.ndarray]] = []
        size = 0
        for row, text in enumerate(texts):
            simple = _simplified(text)
            if simple is None:
                numbers = np.fromiter(map(self.terms.__getitem__, tokenize(text)), np.int32)
                pieces.append((numbers, np.full(len(numbers), row)))
                continue
            plain.append(simple)
            rows.append(row)
            size += len(simple) + 1
            if size >= _TOGETHER:
                pieces.append(self._table.numbers(plain, rows))
                plain, rows, size = [], [], 0
        pieces.append(self._table.numbers(plain, rows))
        return np.concatenate([part for part, _ in pieces]), np.concatenate([part for _, part in pieces])

    def _new(self, kind: str, content: str) -> int:
        self.keys.append(digest(kind, content))
        return len(self.keys) - 1


class _Numbers(dict[str, int]):
    """What was asked once is known; the rest is made."""

    def __init__(self, make: Callable[[str], int]) -> None:
        self._make = make

    def __missing__(self, content: str) -> int:
        number = self[content] = self._make(content)
        return number


class _Table:
    """Words of up to 16 letters with their numbers; each has one place, which the first that comes takes."""

    def __init__(self, words: _Numbers) -> None:
        self._words = words
        self._first, self._second = np.zeros(1 << _BITS, np.uint64), np.zeros(1 << _BITS, np.uint64)
        self._numbers = np.zeros(1 << _BITS, np.int32)

    def numbers(self, texts: Sequence[bytes], rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the words of texts of ASCII, in their order, and the row of each."""
        content = b" ".join([*texts, bytes(16)]).translate(_ASCII)
        starts, ends = _runs(content)
        first, second, places = _packed(content, starts, ends - starts)
        numbers = self._numbers[places]
        missed = np.flatnonzero((self._first[places] != first) | (self._second[places] != second))
        if len(missed):
            spans = zip(starts[missed].tolist(), ends[missed].tolist(), strict=True)
            numbers[missed] = np.fromiter((self._words[content[a:z].decode()] for a, z in spans), np.int32)
            self._keep(missed[(ends - starts)[missed] <= 16], first, second, places, numbers)
        borders = np.fromiter(map(len, texts), np.int64).cumsum() + np.arange(len(texts))
        return numbers, np.array(rows, np.int64)[borders.searchsorted(starts)]

    def _keep(
        self, new: np.ndarray, first: np.ndarray, second: np.ndarray, places: np.ndarray, numbers: np.ndarray
    ) -> None:
        new = new[self._first[places[new]] == 0]
        taken, once = np.unique(places[new], return_index=True)
        new = new[once]
        self._first[taken], self._second[taken], self._numbers[taken] = first[new], second[new], numbers[new]


def _simplified(text: str) -> bytes | None:
    """The text as ASCII with the same tokens; None where it has others."""
    if text.isascii():
        return text.encode()
    text = _SIGNS.sub(" ", unicodedata.normalize("NFKC", text).lower())
    return text.encode() if text.isascii() else None


def _runs(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Where the words begin and end; there is a space at the end."""
    letters = np.frombuffer(content, np.uint8) != 32
    borders = np.flatnonzero(letters[1:] != letters[:-1]) + 1
    if letters[0]:
        borders = np.concatenate([[0], borders])
    return borders[::2], borders[1::2]


def _packed(content: bytes, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first and the second eight letters of words, and their place in the table, where no long word is."""
    eight = np.ndarray((len(content) - 7,), "<u8", content, 0, (1,))  # the eight bytes from each byte on
    first = eight[starts] & _KEPT[np.minimum(lengths, 8)]
    second = eight[np.minimum(starts + 8, len(eight) - 1)] & _KEPT[np.clip(lengths - 8, 0, 8)]
    places = ((first ^ (second * _SPREAD_SECOND)) * _SPREAD) >> np.uint64(64 - _BITS)
    first[lengths > 16] = 1  # no word: a letter is above it
    return first, second, places.astype(np.int64)
