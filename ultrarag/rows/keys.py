"""Keys of texts: equal for texts that say the same but for case, width and spaces; 63 bits, the same everywhere."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable


def normalized(text: str) -> str:
    """Return a text without differences of case, of width (NFKC) and of spaces."""
    folded = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return " ".join(folded.casefold().split())


def text_key(text: str) -> int:
    """Return a number above 0 that stands for the normalised text; two texts share one by chance once in 2**63."""
    return _number(normalized(text).encode("utf-8", "surrogatepass"))


def row_key(query: str, positives: Iterable[str]) -> int:
    """Return a number for a row: its query and its positives in any order; other negatives make no other row."""
    parts = [normalized(query), *sorted(normalized(text) for text in positives)]
    return _number("\0".join(parts).encode("utf-8", "surrogatepass"))


def _number(content: bytes) -> int:
    return (int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1) or 1
