"""Collator: a planned Batch becomes padded features; instructions are put in here, the same as in serving."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from ultrarag.hookspecs import Features
from ultrarag.tokenize import pad, tokenize
from ultrarag.types import EncoderSettings

if TYPE_CHECKING:
    from ultrarag.finetune.batches import Batch


class TrainingBatch(TypedDict):
    """One step's input of one rank."""

    queries: Features
    passages: Features
    #: (queries, group) raw scores
    teacher: torch.Tensor | None
    group_size: int
    in_batch_negatives: bool
    dataset: str
    #: "file:line" of each query
    sources: list[str]


@dataclass
class Collator:
    """Renders, tokenizes and pads as `Encoder` does."""

    tokenizer: Any
    settings: EncoderSettings
    query_max_length: int
    passage_max_length: int
    pad_to_multiple_of: int | None = None

    def __call__(self, batches: list[Batch]) -> TrainingBatch:
        (batch,) = batches
        queries = [self.settings.render(t, "query", p) for t, p in zip(batch.queries, batch.prompts, strict=True)]
        return TrainingBatch(
            queries=self._features(queries, self.query_max_length),
            passages=self._features(self._passages(batch), self.passage_max_length),
            teacher=None if batch.teacher is None else torch.tensor(batch.teacher, dtype=torch.float32),
            group_size=batch.group_size,
            in_batch_negatives=batch.in_batch_negatives,
            dataset=batch.dataset,
            sources=list(batch.sources),
        )

    def _passages(self, batch: Batch) -> list[str]:
        """The rendered passages; those of a symmetric task are read as its queries are, instruction and all."""
        if not batch.passages_as_queries:
            return [self.settings.render(text, "passage") for text in batch.passages]
        prompts = [prompt for prompt in batch.prompts for _ in range(batch.group_size)]
        return [self.settings.render(t, "query", p) for t, p in zip(batch.passages, prompts, strict=True)]

    def _features(self, texts: list[str], max_length: int) -> Features:
        ids = tokenize(self.tokenizer, texts, max_length).ids
        return pad(ids, self.tokenizer.pad_token_id, self.tokenizer.padding_side, self.pad_to_multiple_of)
