"""Passages on their way in: dicts become Passages, and what no index could hold is refused by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ultrarag.errors import DataError, did_you_mean
from ultrarag.retrieve.search import facts
from ultrarag.types import Passage

#: The names under which a mapping may give each field; the layouts of BEIR and of pyserini are among them.
FIELDS = {"id": ("id", "_id"), "text": ("text", "contents"), "title": ("title",), "metadata": ("metadata",)}


@dataclass(frozen=True)
class Record:
    """A checked passage as the store keeps it."""

    id: str
    text: str
    title: str
    #: JSON
    metadata: str
    #: of what is encoded
    hash: bytes

    @property
    def passage(self) -> Passage:
        """The passage as a user sees it."""
        return Passage(self.id, self.text, self.title, json.loads(self.metadata))


def records(passages: Iterable[Passage | Mapping[str, Any]]) -> Iterator[Record]:
    """Check passages, or mappings with the same fields, one by one.

    A mapping has `id` (or `_id`), `text` (or `contents`), and may have `title` and `metadata`. NUL bytes, slashes and
    any script are kept as they are; the text may be empty where there is a title.

    Raises:
        DataError: for an id or text that is no text (a lone surrogate, another type), an empty id, unknown fields,
            metadata that is not JSON, or a passage without a visible character; names the passage.
    """
    for number, item in enumerate(passages, 1):
        passage = item if isinstance(item, Passage) else _from_mapping(item, number)
        record = to_record(passage)
        if passage.blank:
            raise DataError(
                f"passage {passage.id!r} is blank: title and text have no visible character, and its vector would be "
                "near every short query; leave it out"
            )
        yield record


def to_record(passage: Passage) -> Record:
    """Check one passage."""
    _check_text(passage.id, "id", passage.id)
    if not passage.id:
        raise DataError("a passage's id is a non-empty string, not ''")
    _check_text(passage.id, "text", passage.text)
    _check_text(passage.id, "title", passage.title)
    metadata = _to_json(passage)
    return Record(passage.id, passage.text, passage.title, metadata, content_hash(passage.content))


def content_hash(content: str) -> bytes:
    """SHA-256 of what is encoded."""
    return hashlib.sha256(content.encode()).digest()


def _from_mapping(item: Any, number: int) -> Passage:
    if not isinstance(item, Mapping):
        raise DataError(f"passage {number} is {type(item).__name__}; give a Passage, or a dict with 'id' and 'text'")
    known = [name for names in FIELDS.values() for name in names]
    for name in item:
        if name not in known:
            raise DataError(
                f"passage {number} has the unknown field '{name}'{did_you_mean(str(name), known)}; "
                f"put what is neither id, text nor title into 'metadata'"
            )
    found = {field: _value(item, names) for field, names in FIELDS.items()}
    if found["id"] is None or found["text"] is None:
        missing = "id" if found["id"] is None else "text"
        raise DataError(f"passage {number} ({found['id']!r}) has no '{missing}'")
    return Passage(found["id"], found["text"], found["title"] or "", found["metadata"] or {})


def _value(item: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((item[name] for name in names if name in item), None)


def _check_text(id: object, field: str, value: object) -> None:
    if not isinstance(value, str):
        raise DataError(f"passage {id!r}: '{field}' is {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"passage {id!r}: '{field}' holds a lone surrogate (character {error.start}), which is not text; "
            f"decode the source with errors='replace', or drop the passage"
        ) from error


def _to_json(passage: Passage) -> str:
    if not isinstance(passage.metadata, Mapping):
        raise DataError(
            f"passage {passage.id!r}: 'metadata' is {type(passage.metadata).__name__}; it must be a mapping"
        )
    try:
        facts(passage.metadata)  # engines could not filter by what this refuses
        text = json.dumps(dict(passage.metadata), ensure_ascii=False, sort_keys=True, allow_nan=False)
    except (DataError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"passage {passage.id!r}: {error}") from error
    _check_text(passage.id, "metadata", text)
    return text
