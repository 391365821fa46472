"""What is wrong among rows, by hashes of texts in one pass.

Held per row: 8 bytes of its query, 8 of its query and positives together, 4 of its line; per passage: 8 bytes of
(query, passage) and 4 of its row. A million rows of 8 passages are about 115 MB.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ultrarag.rows.row import normalized, text_key

#: Share of common shingles from which two texts count as nearly the same.
NEAR = 0.8
#: Texts with fewer shingles are compared as a whole only: one word makes them another text.
_FEWEST = 4
#: Words of more characters than this on average are no words: the script has no spaces.
_LONG_WORDS = 15
#: Characters looked at to tell a text's script.
_SEEN = 160

#: Where the Unicode blocks of a script begin; None: letters of other scripts, or no letters.
_BLOCKS: list[tuple[int, str | None]] = [
    (0x0, "Latin"),
    (0x0370, "Greek"),
    (0x0400, "Cyrillic"),
    (0x0530, None),
    (0x0590, "Hebrew"),
    (0x0600, "Arabic"),
    (0x0780, None),
    (0x0900, "Devanagari"),
    (0x0980, "other Indian"),
    (0x0E00, "Thai"),
    (0x0E80, None),
    (0x1100, "Hangul"),
    (0x1200, None),
    (0x1E00, "Latin"),
    (0x1F00, "Greek"),
    (0x2000, None),
    (0x3040, "Kana"),
    (0x3100, None),
    (0x3400, "Han"),
    (0xA000, None),
    (0xAC00, "Hangul"),
    (0xD800, None),
    (0xF900, "Han"),
    (0xFB00, None),
    (0x20000, "Han"),
    (0x32000, None),
]
_STARTS = [start for start, _ in _BLOCKS]
_PUNCTUATION = re.compile(r"[\W_]+")


def shingles(text: str) -> frozenset[object]:
    """Return a text's runs of three words; of four characters where the script has no spaces."""
    plain = normalized(text)
    words = plain.split()
    if has_no_spaces(plain, words):
        return frozenset(plain[i : i + 4] for i in range(len(plain) - 3))
    return frozenset(zip(words, words[1:], words[2:], strict=False))


def has_no_spaces(plain: str, words: Sequence[str]) -> bool:
    """Whether the script of a text puts no spaces between its words."""
    return bool(words) and len(plain) > _LONG_WORDS * len(words)


def nearly_same(left: Collection[object], right: Collection[object], near: float = NEAR) -> bool:
    """Return whether two sets of shingles have a Jaccard similarity of at least `near`."""
    small, large = sorted((len(left), len(right)))
    if small < max(_FEWEST, near * large):
        return False
    common = len(frozenset(left) & frozenset(right))
    return common >= near * (small + large - common)


def leak_key(text: str) -> int:
    """Return a key that is the same for texts which differ in punctuation, case, width or spaces only."""
    return text_key(_PUNCTUATION.sub(" ", text) if text.strip() else text)


def script(text: str) -> str:
    """Return the script that most letters of a text's beginning are of; any kana makes it Japanese."""
    if text.isascii():
        return "Latin"
    found = Counter(_BLOCKS[bisect_right(_STARTS, ord(c)) - 1][1] for c in text[:_SEEN] if c.isalpha())
    found.pop(None, None)
    if not found:
        return "other"
    return "Han and Kana" if found["Kana"] else str(found.most_common(1)[0][0])


def guessed_tokens(text: str) -> int:
    """Return roughly how many tokens a text has: one per four letters of Latin, one per character of CJK."""
    if text.isascii():
        return len(text) // 4 + 2
    wide = sum(ord(character) >= 0x2E80 for character in text)
    return wide + (len(text) - wide) // 4 + 2


#: Places named per finding.
SHOWN = 5

_MASK = (1 << 63) - 1


@dataclass
class Finding:
    """Something that a user should know before training."""

    #: "error": the data should not be used as it is; "warning": look at it
    level: str
    #: a short name for scripts
    name: str
    #: rows, or texts, that it concerns
    rows: int
    #: what it is, and what to do about it
    text: str
    #: the first places, "file:line"
    places: list[str] = field(default_factory=list)


class Places:
    """Where rows stand: numbers, not texts."""

    def __init__(self) -> None:
        self._lines = array("I")
        self._files: list[tuple[int, str]] = []

    def add(self, place: str) -> None:
        """Remember "file:17" or "file:row 17" of the next row."""
        file, _, line = place.rpartition(":")
        prefix = f"{file}:row " if line.startswith("row ") else f"{file}:"
        if not self._files or self._files[-1][1] != prefix:
            self._files.append((len(self._lines), prefix))
        number = line.removeprefix("row ")
        self._lines.append(int(number) if number.isdigit() else 0)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, row: int) -> str:
        prefix = next(prefix for start, prefix in reversed(self._files) if start <= row)
        return f"{prefix}{self._lines[row]}"

    def first(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The first few of some rows' places."""
        return [self[int(row)] for row in rows[:SHOWN]]


class RowChecks:
    """Duplicates, conflicts, positives among negatives, too few negatives, teachers that disagree, scripts."""

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size
        self.places = Places()
        #: script -> rows, of queries and of first positives
        self.scripts: dict[str, Counter[str]] = {"query": Counter(), "passage": Counter()}
        #: rows whose query and positive are of different scripts
        self.crossing = 0
        self.rows_with_negatives = 0
        self._queries, self._rows = array("q"), array("q")
        self._positives, self._positive_rows = array("q"), array("I")
        self._negatives, self._negative_rows = array("q"), array("I")
        self._same, self._near, self._few, self._disagree = array("I"), array("I"), array("I"), array("I")
        self._repeats = 0

    def add(
        self,
        place: str,
        query: str,
        pos: Sequence[str],
        neg: Sequence[str],
        pos_scores: Sequence[float] | None = None,
        neg_scores: Sequence[float] | None = None,
    ) -> None:
        """Look at one row."""
        row = len(self.places)
        self.places.add(place)
        asked, positives, negatives = text_key(query), [*map(text_key, pos)], [*map(text_key, neg)]
        self._queries.append(asked)
        self._rows.append(hash((asked, *sorted(set(positives)))) & _MASK)
        self._keep(row, asked, positives, self._positives, self._positive_rows)
        self._keep(row, asked, negatives, self._negatives, self._negative_rows)
        self._count_negatives(row, set(negatives))
        if not set(positives).isdisjoint(negatives):
            self._same.append(row)
        elif neg and _near(pos, neg):
            self._near.append(row)
        if pos_scores and neg_scores and max(neg_scores) > max(pos_scores):
            self._disagree.append(row)
        self._count_scripts(query, pos[0])

    def _keep(self, row: int, asked: int, texts: Sequence[int], pairs: array[int], rows: array[int]) -> None:
        for text in texts:
            pairs.append(hash((asked, text)) & _MASK)
            rows.append(row)

    def _count_negatives(self, row: int, distinct: set[int]) -> None:
        self.rows_with_negatives += bool(distinct)
        missing = self.group_size - 1 - len(distinct)
        if distinct and missing > 0:
            self._few.append(row)
            self._repeats += missing

    def _count_scripts(self, query: str, positive: str) -> None:
        asked, answered = script(query), script(positive)
        self.scripts["query"][asked] += 1
        self.scripts["passage"][answered] += 1
        self.crossing += asked != answered

    # ---- what was found

    def findings(self) -> Iterator[Finding]:
        """Yield what a user should know about the rows seen."""
        yield from self._duplicates()
        yield from self._conflicts()
        few = f"fewer distinct negatives than train_group_size - 1 = {self.group_size - 1}"
        yield from self._rows_of(
            self._few, "few_negatives", f"{few}: {self._repeats} repeats fill their groups; mine more, or lower it"
        )
        yield from self._rows_of(
            self._disagree, "teacher_disagrees", "the teacher scores a negative above every positive: see data clean"
        )
        yield from self._scripts()

    def _rows_of(self, rows: Sequence[int] | np.ndarray, name: str, text: str, level: str = "warning") -> list[Finding]:
        return [Finding(level, name, len(rows), text, self.places.first(rows))] if len(rows) else []

    def _duplicates(self) -> Iterator[Finding]:
        rows, queries = np.array(self._rows, np.int64), np.array(self._queries, np.int64)
        _, first = np.unique(rows, return_index=True)
        again = np.setdiff1d(np.arange(len(rows)), first)
        yield from self._rows_of(again, "duplicate_rows", "the query and the positives of an earlier row once more")
        kept = queries[first]
        names, counts = np.unique(kept, return_counts=True)
        split = np.sort(first[np.isin(kept, names[counts > 1])])
        yield from self._rows_of(
            split,
            "query_again",
            "the same query with other positives in several rows: in one batch they are each other's negatives; "
            "join them in one row, or use --false_negative_mask text",
        )

    def _conflicts(self) -> Iterator[Finding]:
        yield from self._rows_of(
            self._same, "positive_is_negative", "a text is a positive and a negative of its row; training leaves it out"
        )
        yield from self._rows_of(
            self._near,
            "positive_is_nearly_negative",
            "a negative is nearly the same text as a positive; leave it out (data mine does)",
        )
        both = np.intersect1d(np.array(self._positives, np.int64), np.array(self._negatives, np.int64))
        places = np.array(self._negative_rows, np.int64)[np.isin(np.array(self._negatives, np.int64), both)]
        across = np.setdiff1d(places, np.array(self._same, np.int64))
        yield from self._rows_of(
            across, "conflicting_rows", "a negative is a positive of the same query in another row; take it out of neg"
        )

    def _scripts(self) -> Iterator[Finding]:
        rows = len(self.places)
        if rows and 0 < self.crossing < rows / 20:
            text = "query and positive are of different scripts, unlike in the other rows: misaligned, or mixed up?"
            yield Finding("warning", "scripts_differ", self.crossing, text)


def _near(pos: Sequence[str], neg: Sequence[str]) -> bool:
    """Return whether a negative is nearly one of the positives; lengths are compared before shingles are made."""
    for positive in pos:
        size = len(positive)
        close = [text for text in neg if 0.7 * size <= len(text) <= size / 0.7]
        if close:
            found = shingles(positive)
            if any(nearly_same(found, shingles(text)) for text in close):
                return True
    return False


def described_scripts(counts: Counter[str]) -> dict[str, float]:
    """Return script -> share of the rows, most frequent first."""
    total = sum(counts.values()) or 1
    return {name: count / total for name, count in counts.most_common()}
