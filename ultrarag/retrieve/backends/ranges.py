"""Ranges of numbers as sets of words, for engines whose filters only test whether a list holds a word.

A number is written as an unsigned integer of 64 bits in the order of the numbers, and stored as its prefixes of 4, 8,
... 64 bits. A range is the smallest set of prefixes that covers it: at most 450, and exact, also for keys with several
numbers, of which one must lie within both bounds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ultrarag.retrieve.filters import InRange

#: Bits that one more prefix adds.
STEP = 4
_BITS = 64
_LAST = (1 << _BITS) - 1


def prefixes(fact: str, value: float) -> list[str]:
    """The words stored for a number under a fact."""
    position = _position(value)
    return [_word(fact, position >> shift, shift) for shift in range(0, _BITS, STEP)]


def covering(node: InRange) -> list[str]:
    """The words of which a number in the range has exactly one, and no other number has any."""
    low = 0 if node.gte is None else _position(node.gte)
    high = _LAST if node.lte is None else _position(node.lte)
    if node.gt is not None:
        low = max(low, _position(node.gt) + 1)
    if node.lt is not None:
        high = min(high, _position(node.lt) - 1)
    return [_word(node.fact, prefix, shift) for prefix, shift in _cover(low, high)]


def _cover(low: int, high: int) -> Iterator[tuple[int, int]]:
    """(prefix, bits cut off) of the blocks between two positions, both included."""
    shift, size = 0, 1 << STEP
    while low <= high:
        if shift + STEP >= _BITS:
            yield from ((prefix, shift) for prefix in range(low, high + 1))
            return
        while low <= high and low % size:
            yield low, shift
            low += 1
        while low <= high and (high + 1) % size:
            yield high, shift
            high -= 1
        low, high, shift = low >> STEP, (high + 1 >> STEP) - 1, shift + STEP


def _position(value: float) -> int:
    """Doubles as integers in the same order; -0.0 is 0.0."""
    bits: int = struct.unpack(">Q", struct.pack(">d", value + 0.0))[0]
    return bits ^ _LAST if bits >> 63 else bits | 1 << 63


def _word(fact: str, prefix: int, shift: int) -> str:
    return f"{fact}\n{shift}:{prefix:x}"
