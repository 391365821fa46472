"""Collators: a planned Batch becomes padded features; instructions are put in here, the same as in serving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from ultrarag.encoder import pad, read_pairs, tokenize
from ultrarag.hookspecs import Features
from ultrarag.types import EncoderSettings

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder
    from ultrarag.finetune.batches.plan import Batch


class TrainingBatch(TypedDict):
    """One step's input of one rank."""

    #: None where `passages` holds (query, passage) pairs
    queries: Features | None
    passages: Features
    #: (queries, group) raw scores
    teacher: torch.Tensor | None
    group_size: int
    in_batch_negatives: bool
    dataset: str
    #: "file:line" of each query
    sources: list[str]
    #: what finding false negatives needs; None where none are looked for
    masking: dict[str, Any] | None


@dataclass
class Collator:
    """Renders, tokenizes and pads as `Encoder` does."""

    tokenizer: Any
    settings: EncoderSettings
    query_max_length: int
    passage_max_length: int
    pad_to_multiple_of: int | None = None
    #: gives what finding false negatives needs of a batch's texts
    masking: Callable[[Batch], dict[str, Any]] | None = None

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
            masking=self.masking(batch) if self.masking else None,
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


@dataclass
class PairCollator:
    """Joins each query with its candidates, as the cross-encoder reads pairs, and pads.

    A row's `prompt` is the instruction of its query, or for a language model the question put to it after the pair.
    """

    encoder: Encoder
    query_max_length: int
    #: None: as long as the pair allows
    passage_max_length: int | None
    #: tokens of the whole pair
    max_length: int
    pad_to_multiple_of: int | None = None

    def __call__(self, batches: list[Batch]) -> TrainingBatch:
        (batch,) = batches
        return TrainingBatch(
            queries=None,
            passages=self._features(batch),
            teacher=None if batch.teacher is None else torch.tensor(batch.teacher, dtype=torch.float32),
            group_size=batch.group_size,
            in_batch_negatives=False,
            dataset=batch.dataset,
            sources=list(batch.sources),
            masking=None,
        )

    def _features(self, batch: Batch) -> Features:
        settings = self.encoder.settings
        asks = settings.prompt is not None
        instructions = [None] * len(batch.queries) if asks else batch.prompts
        queries = [settings.render(t, "query", p) for t, p in zip(batch.queries, instructions, strict=True)]
        limits: dict[str, Any] = {"passage_max_length": self.passage_max_length} if self.passage_max_length else {}
        if asks:
            limits["prompts"] = [prompt for prompt in batch.prompts for _ in range(batch.group_size)]
        tokens = read_pairs(
            self.encoder,
            [query for query in queries for _ in range(batch.group_size)],
            [settings.render(text, "passage") for text in batch.passages],
            self.query_max_length,
            self.max_length,
            **limits,
        )
        return self.encoder.features(tokens, multiple_of=self.pad_to_multiple_of)
