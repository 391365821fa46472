"""Which texts are of one document, or nearly the same: what training and evaluation must not share.

A document is named by ids of the form doc#3, by metadata or keys of a row (document, source), or by a title, the first
line of a text that has several. Texts are nearly the same when about `NEAR` of their runs of three words (four
characters where a script has no spaces) are, as estimated by MinHash.

Source:
    Broder, On the resemblance and containment of documents, 1997; bands as in Leskovec, Rajaraman and Ullman, Mining of
    Massive Datasets, chapter 3.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ultrarag.rows.checks.rows import NEAR, has_no_spaces
from ultrarag.rows.row import normalized, text_key

#: Kinds of evidence that texts are of one document.
EVIDENCE = ("id", "document", "source", "title", "near")
#: Keys of a row or of metadata that name a document -> the kind of evidence.
NAMED_BY = {"document": "document", "document_id": "document", "doc_id": "document", "source": "source"}
#: Keys of a row that hold ids of its positives.
_IDS = ("pos_id", "pos_ids", "passage_id")
#: A longer first line is no title.
_TITLE = 300

#: Texts with fewer runs are compared as a whole only: one word makes them another text, and few runs are a poor sample.
_FEWEST = 10

#: Numbers of a signature, and the bands that they are compared by: two texts of a similarity of 0.8 share one of 8
#: bands of 4 numbers with a probability of 98 %.
_HASHES, _BANDS = 32, 8
#: Equal numbers from which two signatures count as nearly the same; one of the 32 is 0.03 of similarity.
_ALIKE = int(NEAR * _HASHES)
_DRAWN = np.random.default_rng(0).integers(1, 1 << 62, (3, _HASHES), dtype=np.uint64)
_FACTORS, _OFFSETS = _DRAWN[0] | np.uint64(1), _DRAWN[1]
#: Of the places in a run, and of the numbers in a band.
_PLACES = _DRAWN[2] | np.uint64(1)


def document_of(id: str) -> str | None:
    """The document of a passage whose id is of the form doc#3; None for other ids."""
    name, _, number = id.rpartition("#")
    return name if name and number.isdigit() else None


def title_of(text: str) -> str | None:
    """The first line of a text of several lines, where it is short enough for a title."""
    first, _, rest = text.strip().partition("\n")
    return first.strip() if rest.strip() and len(first) <= _TITLE else None


def names_of(text: str, id: str = "", metadata: Mapping[str, Any] | None = None) -> Iterator[tuple[str, str]]:
    """Yield (kind, name) of every document that a passage says it is of."""
    if (found := document_of(id)) is not None:
        yield "id", found
    yield from named_in(metadata or {})
    if (title := title_of(text)) is not None:
        yield "title", title


def names_in_row(extra: Mapping[str, Any], pos: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (kind, name) of every document that a row's positives are of.

    Args:
        extra: the row's keys beside those that training reads; `metadata` may hold them too.
    """
    for key in _IDS:
        yield from (("id", name) for id in _values(extra.get(key)) if (name := document_of(id)) is not None)
    yield from named_in(extra)
    metadata = extra.get("metadata")
    for part in metadata if isinstance(metadata, list) else [metadata]:
        yield from named_in(part if isinstance(part, Mapping) else {})
    yield from (("title", title) for title in _values(extra.get("title")))
    yield from (("title", title) for text in pos if (title := title_of(text)) is not None)


def named_in(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (kind, name) of the documents that metadata names."""
    for key, kind in NAMED_BY.items():
        yield from ((kind, name) for name in _values(values.get(key)))


def _values(value: Any) -> Iterator[str]:
    """A value, or those of a list; what is neither text nor a whole number names nothing."""
    for item in value if isinstance(value, list) else [value]:
        if (isinstance(item, str) and item.strip()) or (isinstance(item, int) and not isinstance(item, bool)):
            yield str(item)


def name_key(kind: str, name: str) -> int:
    """A number for a document; an id, metadata and keys of a row name the same one."""
    return text_key(f"{'title' if kind == 'title' else 'document'}\0{name}")


# ---- nearly the same text


def signature(text: str) -> np.ndarray | None:
    """MinHash of a text's runs of words, (32,) uint32, the same in every process; None for one too short to compare."""
    plain = normalized(text)
    words = plain.split()
    if has_no_spaces(plain, words):
        units = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
        size = 4
    else:
        numbers = (zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words)
        units, size = np.fromiter(numbers, np.uint64, len(words)), 3
    count = len(units) - size + 1
    if count < _FEWEST:
        return None
    runs = np.zeros(count, np.uint64)
    for place in range(size):
        runs += (units[place : place + count] + np.uint64(1)) * _PLACES[place]
    runs ^= runs >> np.uint64(29)  # the low bits reach the high ones, of which numbers are made
    found: np.ndarray = ((runs[:, None] * _FACTORS + _OFFSETS) >> np.uint64(32)).min(0).astype(np.uint32)
    return found


def bands(signatures: np.ndarray) -> np.ndarray:
    """A number per band of signatures, (texts, 32) -> (texts, 8) uint64."""
    parts = signatures.reshape(len(signatures), _BANDS, -1).astype(np.uint64)
    found: np.ndarray = (parts * _PLACES[: parts.shape[2]]).sum(2, dtype=np.uint64)
    return found


def near_pairs(signatures: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield pairs of texts that are nearly the same, enough of them to join each with all it is like.

    Args:
        signatures: (texts, 32) uint32.
    """
    for column in bands(signatures).T if len(signatures) else []:
        order = np.argsort(column, kind="stable")
        starts = np.flatnonzero(np.diff(column[order], prepend=column[order[0]] + np.uint64(1)))
        for group in np.split(order, starts[1:]):
            if len(group) > 1:
                # with the first of the band and with the one before: chains of texts that drift apart are found too
                for other in (np.repeat(group[:1], len(group) - 1), group[:-1]):
                    alike = (signatures[group[1:]] == signatures[other]).sum(1) >= _ALIKE
                    yield from zip(group[1:][alike].tolist(), other[alike].tolist(), strict=True)


class NearTexts:
    """Finds which of some texts another one is nearly the same as; 128 bytes and 8 dictionary entries per text."""

    def __init__(self) -> None:
        self._signatures: list[np.ndarray] = []
        self._values: list[int] = []
        self._bands: dict[tuple[int, int], list[int]] = {}

    def add(self, text: str, value: int) -> None:
        """Remember a text; `value` is what `find` returns for it."""
        found = signature(text)
        if found is None:
            return
        for key in _keys(found):
            self._bands.setdefault(key, []).append(len(self._signatures))
        self._signatures.append(found)
        self._values.append(value)

    def find(self, text: str) -> set[int]:
        """The values of the texts that are nearly this one."""
        found = signature(text) if self._signatures else None
        if found is None:
            return set()
        candidates = {number for key in _keys(found) for number in self._bands.get(key, ())}
        return {
            self._values[number] for number in candidates if int((self._signatures[number] == found).sum()) >= _ALIKE
        }


def _keys(found: np.ndarray) -> Iterable[tuple[int, int]]:
    return enumerate(bands(found[None])[0].tolist())


def counted(kinds: Iterable[str]) -> str:
    """How often each kind of evidence was seen, in words: "title 12, near 3"."""
    return ", ".join(f"{kind} {count}" for kind, count in Counter(kinds).most_common())
