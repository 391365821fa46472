"""Batches of MTEB as texts and passages, the title of a document apart from its text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ultrarag.doors.mteb.framework import Dataset, PromptType, create_dataloader
from ultrarag.types import Passage


def texts_of(batches: Iterable[Mapping[str, Any]]) -> list[str | Passage]:
    """The texts of a data loader in order; a document with a title becomes a Passage.

    MTEB joins title and text by a space; our encoders are given them apart, so that a model's own place for titles is
    used, and the figures are those of our evaluation. A query's instruction, where a task has one, stands behind its
    text, as MTEB puts it there.
    """
    return [text for batch in batches for text in _texts(batch)]


def _texts(batch: Mapping[str, Any]) -> list[str | Passage]:
    titles, bodies = batch.get("title"), batch.get("body")
    if titles is None or bodies is None:
        return list(batch["text"])
    return [Passage("", body, title) if title else body for title, body in zip(titles, bodies, strict=True)]


def queries_of(queries: Dataset, task_metadata: Any, num_proc: int | None) -> dict[str, str]:
    """Query id -> text, as MTEB's own models read it: instructions and conversations are in it."""
    loader = create_dataloader(
        queries, task_metadata=task_metadata, prompt_type=PromptType.query, batch_size=1024, num_proc=num_proc
    )
    return dict(zip(queries["id"], (text for batch in loader for text in batch["text"]), strict=True))


def passages_of(corpus: Dataset) -> list[Passage]:
    """The documents of a corpus."""
    columns = corpus.column_names
    titles = corpus["title"] if "title" in columns else [""] * len(corpus)
    rows = zip(corpus["id"], corpus["text"], titles, strict=True)
    return [Passage(id, text, title or "") for id, text, title in rows]
