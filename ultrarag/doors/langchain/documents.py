"""Documents of LangChain and passages of an index, made of each other."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document

from ultrarag.errors import DataError, UsageError
from ultrarag.retrieve import jsonable
from ultrarag.types import Passage


def document(passage: Passage) -> Document:
    """A passage as LangChain has it; a title, which LangChain has not, stands before the text, as it is encoded."""
    return Document(id=passage.id, page_content=passage.content, metadata=dict(passage.metadata))


def passages(
    texts: Iterable[str],
    metadatas: Sequence[Mapping[str, Any] | None] | None = None,
    ids: Sequence[str | None] | None = None,
) -> list[Passage]:
    """Texts with their metadata, which `jsonable` makes JSON of; without an id each has a new one.

    Raises:
        UsageError: there are not as many texts, metadatas and ids, or one of them is no list.
        DataError: a text is blank, or metadata cannot be kept; names the place in the call.
    """
    for name, given in (("texts", texts), ("metadatas", metadatas), ("ids", ids)):
        if isinstance(given, str | Mapping):  # whose letters and keys would be taken for items
            raise UsageError(f"{name} is one {type(given).__name__}; put one alone into a list")
    texts = list(texts)
    for name, given in (("metadatas", metadatas), ("ids", ids)):
        if given is not None and len(given) != len(texts):
            raise UsageError(f"{len(texts)} texts and {len(given)} {name}: they must be as many")
    rows = zip(texts, metadatas or [None] * len(texts), ids or [None] * len(texts), strict=True)
    return [_passage(number, *row) for number, row in enumerate(rows)]


def _passage(number: int, text: str, metadata: Mapping[str, Any] | None, id: str | None) -> Passage:
    try:
        if not isinstance(text, str):
            raise DataError(f"its text is {type(text).__name__}, not a string")
        made = Passage(str(uuid.uuid4()) if id is None else id, text, metadata=jsonable(metadata or {}))
        if made.blank:
            raise DataError("it has no visible text; leave it out")
    except DataError as error:
        raise DataError(f"document {number}{_source(metadata)}: {error}") from error
    return made


def _source(metadata: Mapping[str, Any] | None) -> str:
    """What its loader said of where a document is from, with the page."""
    said = {name: (metadata or {})[name] for name in ("source", "page") if name in (metadata or {})}
    return f" ({', '.join(f'{name} {value}' for name, value in said.items())})" if said else ""
