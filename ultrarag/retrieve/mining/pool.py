"""MiningSources: where candidates come from: a file, a BEIR folder, the rows' own passages, or a live index."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from ultrarag.errors import DataError
from ultrarag.finetune.json_rows import BadJson, raw_rows
from ultrarag.finetune.row import Row
from ultrarag.finetune.text_keys import text_key
from ultrarag.types import Passage

if TYPE_CHECKING:
    from ultrarag.retrieve.live import LiveIndex


class _PoolRow(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)
    id: str = Field("", validation_alias=AliasChoices("_id", "id"))
    text: str = Field(validation_alias=AliasChoices("text", "contents"))
    title: str | None = None


def read_pool(path: str | os.PathLike[str]) -> Iterator[Passage]:
    """Yield the passages of a pool: a JSONL file (or list) with `text` and maybe `title` and `id`, or a BEIR folder.

    Empty ones are left out, and an id may be missing: it is empty then.

    Raises:
        DataError: names file and line of what cannot be used.
    """
    for place, raw in raw_rows(str(pool_file(path))):
        if isinstance(raw, BadJson):
            raise DataError(f"{place}: {raw}")
        try:
            row = _PoolRow.model_validate_json(raw) if isinstance(raw, bytes) else _PoolRow.model_validate(raw)
        except ValidationError as error:
            raise DataError(f"{place}: a passage is a JSON object with 'text': {_reason(error)}") from None
        passage = Passage(row.id, row.text, row.title or "")
        if passage.content.strip():
            yield passage


def pool_file(path: str | os.PathLike[str]) -> Path:
    """The file of a pool: itself, or the corpus.jsonl of a folder in BEIR's layout.

    Raises:
        DataError: it is not there.
    """
    file = Path(path) / "corpus.jsonl" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise DataError(f"there is no '{file}'; a pool is a JSONL file with 'text', or a folder in BEIR's layout")
    return file


def _reason(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}".removeprefix(": ")


@dataclass
class MiningSources:
    """What is mined: rows, which are read more than once, and where their candidates come from."""

    rows: Callable[[], Iterable[Row]]
    #: None: the passages of the rows themselves, positives and negatives
    pool: Callable[[], Iterable[str]] | None = None
    #: an open index: its passages are the pool, and their vectors need not be computed
    live: LiveIndex | None = None
    #: (query, positive) keys of all rows, filled while they are read
    judged: array[int] = field(default_factory=lambda: array("Q"))

    def pool_texts(self) -> Iterator[str]:
        """The candidates."""
        if self.live is not None:
            yield from (passage.content for passage in self.live.passages() if passage.content.strip())
        elif self.pool is not None:
            yield from self.pool()
        else:
            for row in self.rows():
                self._note(row)
                yield from (*row.pos, *(row.neg or ()))

    def other_texts(self) -> Iterator[str]:
        """The positives, whose scores are needed also where the pool lacks them."""
        if self.live is None and self.pool is None:
            return
        for row in self.rows():
            self._note(row)
            yield from row.pos

    def judgements(self) -> np.ndarray:
        """(pairs, 2): the keys of each row's query and positives."""
        return np.array(self.judged, np.uint64).reshape(-1, 2)

    def _note(self, row: Row) -> None:
        query = text_key(row.query)
        for text in row.pos:
            self.judged.extend((query, text_key(text)))
