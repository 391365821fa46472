"""What the engines that speak Qdrant store of a passage besides its vectors: a UUID, its id, and its facts.

A point's payload holds its facts and not the metadata itself: one list of strings under one keyword index for all
that is tested for equality, whatever keys a corpus has, and one number field per key that has an order. So the
index needed by a filter exists before the graph is built, without which filtered recall falls to 0.3.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any

from ultrarag.retrieve.filters import facts

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
    id: str = json.loads(record.payload["id"])
    return id
