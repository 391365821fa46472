"""The data loader: whole planned batches as padded features; instructions are put in here, the same as in serving.

Which rows a batch holds is a function of (seed, epoch, index, rank), so that a resumed run goes on exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, cast

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from ultrarag.encoder import in_background, pad, render_pairs, tokenize
from ultrarag.finetune.batches.plan import AnyPlan, Batch
from ultrarag.hookspecs import Features
from ultrarag.types import KINDS, EncoderSettings, Kind

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ultrarag.encoder import Encoder
    from ultrarag.finetune.flags import DataArguments


class TrainingBatch(TypedDict):
    """One step's input of one rank."""

    #: None where `passages` holds (query, passage) pairs
    queries: Features | None
    #: None where the passages' side is frozen, and their vectors are stored
    passages: Features | None
    #: (queries, group) raw scores
    teacher: torch.Tensor | None
    group_size: int
    in_batch_negatives: bool
    dataset: str
    #: "file:line" of each query
    sources: list[str]
    #: what finding false negatives needs; None where none are looked for
    masking: dict[str, Any] | None
    #: what training against a corpus needs to know of the texts; None without one
    corpus: dict[str, Any] | None


@dataclass
class Collator:
    """Renders, tokenizes and pads as `Encoder` does."""

    tokenizers: Mapping[Kind, Any]
    settings: EncoderSettings
    #: lengths in tokens: `query_max_len`, `passage_max_len`, `pad_to_multiple_of`
    data: DataArguments
    #: gives what finding false negatives needs of a batch's texts
    masking: Callable[[Batch], dict[str, Any]] | None = None
    #: gives what training against a corpus needs to know of a batch's texts
    corpus: Callable[[Batch], dict[str, Any]] | None = None
    #: the side that is not encoded
    frozen: str | None = None

    @classmethod
    def of(
        cls, encoder: Encoder, data: DataArguments, masking: Callable[[Batch], dict[str, Any]] | None = None
    ) -> Collator:
        """Read texts as this encoder does."""
        return cls({kind: encoder.reader(kind).tokenizer for kind in KINDS}, encoder.settings, data, masking)

    def __call__(self, batches: list[Batch]) -> TrainingBatch:
        (batch,) = batches
        queries = [self.settings.render(t, "query", p) for t, p in zip(batch.queries, batch.prompts, strict=True)]
        kinds: tuple[Kind, Kind] = ("text", "text") if batch.passages_as_queries else ("query", "passage")
        return TrainingBatch(
            queries=None if self.frozen == "query" else self._features(queries, self.data.query_max_len, kinds[0]),
            passages=None
            if self.frozen == "passage"
            else self._features(self.passages(batch), self.data.passage_max_len, kinds[1]),
            teacher=None if batch.teacher is None else torch.tensor(batch.teacher, dtype=torch.float32),
            group_size=batch.group_size,
            in_batch_negatives=batch.in_batch_negatives,
            dataset=batch.dataset,
            sources=list(batch.sources),
            masking=self.masking(batch) if self.masking else None,
            corpus=self.corpus(batch) if self.corpus else None,
        )

    def passages(self, batch: Batch) -> list[str]:
        """The rendered passages; those of a symmetric task are read as its queries are, instruction and all."""
        if not batch.passages_as_queries:
            return [self.settings.render(text, "passage") for text in batch.passages]
        prompts = [prompt for prompt in batch.prompts for _ in range(batch.group_size)]
        return [self.settings.render(t, "query", p) for t, p in zip(batch.passages, prompts, strict=True)]

    def _features(self, texts: list[str], max_length: int, kind: Kind) -> Features:
        tokenizer = self.tokenizers[kind]
        ids = tokenize(tokenizer, texts, max_length).ids
        return pad(ids, tokenizer.pad_token_id, tokenizer.padding_side, self.data.pad_to_multiple_of, kind=kind)


@dataclass(frozen=True)
class PairLengths:
    """How many tokens of a query, of a passage and of the whole pair are read."""

    query: int
    #: None: what the pair leaves
    passage: int | None
    pair: int

    @classmethod
    def of(cls, data: DataArguments) -> PairLengths:
        """Return what the flags say, as FlagEmbedding means them: `max_len`, or the sum of both sides' lengths.

        In the sum, a short passage leaves some of its room to the query and the other way round.
        """
        if data.max_len is not None:
            return cls(data.max_len * 3 // 4, None, data.max_len)
        query, passage = data.query_max_len, data.passage_max_len
        return cls(query + passage // 4, passage + query // 2, query + passage)


@dataclass
class PairCollator:
    """Joins each query with its candidates, as the cross-encoder reads pairs, and pads.

    A row's `prompt` is the instruction of its query, or for a language model the question put to it after the pair.
    """

    encoder: Encoder
    lengths: PairLengths
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
            corpus=None,
        )

    def _features(self, batch: Batch) -> Features:
        lengths = self.lengths
        tokens = render_pairs(
            self.encoder,
            [query for query in batch.queries for _ in range(batch.group_size)],
            batch.passages,
            [prompt for prompt in batch.prompts for _ in range(batch.group_size)],
            lengths.query,
            lengths.pair,
            **({"passage_max_length": lengths.passage} if lengths.passage else {}),
        )
        return self.encoder.features(tokens, multiple_of=self.pad_to_multiple_of)


class LooksUp(Protocol):
    """What a run is trained against, as far as its batches are concerned."""

    frozen: Any

    def features(self, batch: Batch) -> dict[str, Any]:
        """Look up what a step needs to know of the batch's texts."""


def make_collator(
    data: DataArguments,
    encoder: Encoder,
    masking: Callable[[Batch], dict[str, Any]] | None = None,
    corpus: LooksUp | None = None,
) -> Collator | PairCollator:
    """What makes features of a batch, for an embedding model or a cross-encoder.

    Args:
        corpus: looks up texts of the batch, and names the side that is not encoded.
    """
    if encoder.adapter.declared.pair_input:
        return PairCollator(encoder, PairLengths.of(data), data.pad_to_multiple_of)
    found = Collator.of(encoder, data, masking)
    return replace(found, corpus=corpus.features, frozen=corpus.frozen) if corpus else found


class PlannedBatches(Dataset[Batch]):
    """Item (epoch, index) is this rank's batch."""

    def __init__(self, plan: AnyPlan, rank: int) -> None:
        self.plan = plan
        self.rank = rank

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, index = key
        return self.plan.batch(epoch, index, self.rank)

    def __len__(self) -> int:
        """Rows per epoch (the Trainer reports it)."""
        return len(self.plan.data)


class EpochOrder(BatchSampler):
    """Yields [(epoch, 0)], [(epoch, 1)], ... for the epoch that the Trainer sets."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.epoch = 0
        self.batch_size = 1
        self.drop_last = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (the Trainer calls it before it iterates)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.steps):
            yield [(self.epoch, index)]

    def __len__(self) -> int:
        return self.steps


class PlannedLoader(DataLoader[Any]):
    """A DataLoader that passes `set_epoch` on to its order of batches, and may tokenize the next one in a thread."""

    #: whether the next batch is made while a step runs; worker processes, where there are any, do that anyway
    ahead = False

    def __iter__(self) -> Any:
        batches = super().__iter__()
        return in_background(lambda _: next(batches), range(len(self))) if self.ahead else batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        cast(EpochOrder, self.batch_sampler).set_epoch(epoch)


def make_loader(plan: AnyPlan, collator: Collator | PairCollator, rank: int, args: TrainingArguments) -> PlannedLoader:
    """Return the loader of one rank's batches, with the run's dataloader settings."""
    workers = args.dataloader_num_workers
    loader = PlannedLoader(
        PlannedBatches(plan, rank),
        batch_sampler=EpochOrder(plan.steps_per_epoch),
        collate_fn=collator,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
        persistent_workers=args.dataloader_persistent_workers and workers > 0,
        prefetch_factor=args.dataloader_prefetch_factor if workers > 0 else None,
        # its own generator: a loader must not draw from the one that dropout uses
        generator=torch.Generator().manual_seed(args.seed),
    )
    # on a CPU the step itself has need of every core
    loader.ahead = workers == 0 and args.device.type != "cpu"
    return loader
