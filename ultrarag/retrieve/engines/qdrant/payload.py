"""What Qdrant stores of a passage, embedded or in a server: its key, its facts, and numbers as words for ranges.

No client of a server is needed for it, which takes a second to import.
"""

from __future__ import annotations

import hashlib
import json
import struct
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from ultrarag.retrieve.search import InRange, facts

#: Payload field of the facts without a number.
FACTS = "facts"
#: Payload field under which each ordered key has its numbers.
NUMBERS = "numbers"
#: Ordered metadata keys that get an index; filters on further ones work, but slower.
MOST_NUMBER_INDEXES = 64

_NAMESPACE = uuid.UUID("6c1a3a1e-52a2-4c0b-9c39-0f3d3f6a2b57")


def key(id: str) -> str:
    """The UUID under which the engine stores an id; the id itself is in the payload."""
    return str(uuid.uuid5(_NAMESPACE, json.dumps(id)))


def to_payload(id: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored of a passage: its id, as JSON for ids that are not valid Unicode, and its facts."""
    held: list[str] = []
    numbers: dict[str, list[float]] = {}
    for fact, value in facts(metadata):
        if fact[0] in "#@":
            numbers.setdefault(field(fact), []).append(value)
        else:
            held.append(fact)
    return {"id": json.dumps(id), FACTS: held, NUMBERS: numbers}


def field(fact: str) -> str:
    """A field name without the characters that mean something in a JSON path."""
    return "n" + hashlib.blake2b(fact.encode(), digest_size=8).hexdigest()


def new_number_fields(payloads: list[dict[str, Any]], known: set[str]) -> list[str]:
    """The fields of ordered keys seen for the first time, as far as there is room for their indexes."""
    fields = {f"{NUMBERS}.{name}" for payload in payloads for name in payload[NUMBERS]}
    return sorted(fields - known)[: max(0, MOST_NUMBER_INDEXES - len(known))]


def stored_id(record: Any) -> str:
    """The id of a passage, from the payload of its point."""
    held: str = record.payload["id"]
    id: str = json.loads(held) if "\\" in held else held[1:-1]  # a search reads a hundred, and few have an escape
    return id


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
