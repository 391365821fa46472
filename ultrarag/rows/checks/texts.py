"""Facts about one text for the check of training data: near-duplicates, script, a guess at its length in tokens."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection

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
    if words and len(plain) > _LONG_WORDS * len(words):
        return frozenset(plain[i : i + 4] for i in range(len(plain) - 3))
    return frozenset(zip(words, words[1:], words[2:], strict=False))


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
