"""Masks of false negatives: which passages of a batch are no negatives of a query; pure functions of tensors.

A mask is (queries, passages) bool and goes into the loss as data (`LossArguments.false_negatives`). It never hides
a query's positive, and a group that a teacher has scored is never hidden either.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ultrarag.checkpoint import probe_vectors
from ultrarag.encoder import Encoder, find_adapter
from ultrarag.errors import UsageError
from ultrarag.finetune.batches import Batch, Collator
from ultrarag.finetune.flags import DataArguments, FalseNegativeArguments
from ultrarag.finetune.step.distributed import gather, gather_rows
from ultrarag.finetune.step.gradcache import by_texts
from ultrarag.hookspecs import Features
from ultrarag.loss_arguments import LossArguments
from ultrarag.losses import combined_scores
from ultrarag.plugins import Adapter
from ultrarag.rows import text_key
from ultrarag.scores import head_scores
from ultrarag.types import Embeddings

if TYPE_CHECKING:
    from ultrarag.finetune.flags import FinetuneArguments


def text_keys(batch: Batch) -> dict[str, Tensor]:
    """The texts of a batch as numbers, made where it is tokenized.

    Returns:
        passages: (queries * group, 3) int64: the text's key, the key of its row's query, 1 for a row's positive.
        positives: (queries, most) int64: the keys of all positives of each row, 0 where it has fewer.
    """
    group = batch.group_size
    queries = [text_key(text) for text in batch.queries]
    rows = [[text_key(text), queries[i // group], int(i % group == 0)] for i, text in enumerate(batch.passages)]
    known = [[text_key(text) for text in row] for row in batch.positives]
    most = max((len(row) for row in known), default=0)
    return {
        "passages": torch.tensor(rows, dtype=torch.int64),
        "positives": torch.tensor([row + [0] * (most - len(row)) for row in known], dtype=torch.int64),
    }


def text_mask(passages: Tensor, positives: Tensor, group_size: int) -> Tensor:
    """Passages with the text of a positive of the query: of its own row, or of another row with the same query.

    Args:
        passages: (passages, 3), see `text_keys`; this rank's come first.
        positives: (queries, most), those of this rank's rows.
    """
    keys, asked, chosen = passages.unbind(1)
    mask = torch.zeros(len(positives), len(keys), dtype=torch.bool, device=keys.device)
    for column in positives.T:
        mask |= column[:, None] == keys
    own = asked[: len(positives) * group_size : group_size]
    query, twin = ((own[:, None] == asked) & chosen.bool()).nonzero(as_tuple=True)
    same = (keys[twin][:, None] == keys).int()  # (pairs of rows with one query, passages)
    return mask | (torch.zeros_like(mask, dtype=torch.int32).index_add_(0, query, same) > 0)


def score_mask(scores: Tensor, group_size: int, margin: float, relative: bool) -> Tensor:
    """Passages that score above the positive less a margin.

    Args:
        scores: (queries, passages); query i's positive is passage i * group_size.
        margin: in units of the score, or with `relative` a share of the positive's score (of its size, below 0).
    """
    rows = torch.arange(len(scores), device=scores.device)
    positive = scores[rows, rows * group_size][:, None]
    return scores > positive - (positive.abs() * margin if relative else margin)


def spare(mask: Tensor, group_size: int, whole_group: bool) -> Tensor:
    """Take each query's positive out of the mask, or its whole group."""
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    columns = rows * group_size + torch.arange(group_size if whole_group else 1, device=mask.device)
    return mask.scatter(1, columns, False)


@dataclass
class FalseNegatives:
    """Finds the false negatives of each batch of a run."""

    arguments: FalseNegativeArguments
    guide: Guide | None = None
    #: what was found since the last log entry: passages left out, and queries
    masked: int = 0
    queries: int = 0

    @classmethod
    def of(cls, arguments: FinetuneArguments, encoder: Encoder, heads: tuple[str, ...]) -> FalseNegatives | None:
        """What the run's flags ask for; None where no false negatives are looked for.

        Raises:
            UsageError: the adapter's loss does not look at the mask, or the guide gives no vectors.
        """
        asked = arguments.false_negatives
        if asked.false_negative_mask == "none":
            return None
        _check_honoured(encoder.adapter, encoder, heads)
        if asked.guide_model is None:
            return cls(asked)
        adapter = asked.guide_adapter or find_adapter(asked.guide_model, usual=encoder.adapter.name)
        trusted, chunk_texts = arguments.model.trust_remote_code, arguments.model.chunk_texts
        return cls(asked, Guide.load(asked.guide_model, adapter, arguments.data, encoder.device, chunk_texts, trusted))

    def features(self, batch: Batch) -> dict[str, Any]:
        """What the mask needs of a batch's texts."""
        return self.guide.features(batch) if self.guide else text_keys(batch)

    @torch.no_grad()
    def __call__(
        self,
        features: dict[str, Any],
        query: Embeddings,
        passage: Embeddings,
        group_size: int,
        teacher: bool = False,
        across: bool = False,
    ) -> Tensor:
        """Return the mask, (queries, passages) bool.

        Args:
            features: what `features` gave, on the device.
            query, passage: what the loss will see.
            teacher: the groups carry a teacher's scores.
            across: `passage` holds other ranks' rows behind this rank's.
        """
        if self.arguments.false_negative_mask == "text":
            keys = gather_rows(features["passages"]) if across else features["passages"]
            mask = text_mask(keys, features["positives"], group_size)
        else:
            scores = self.guide.scores(features, across) if self.guide else combined_scores(query, passage)
            relative = self.arguments.false_negative_margin_type == "relative"
            mask = score_mask(scores, group_size, self.arguments.false_negative_margin, relative)
        own_model = self.arguments.false_negative_mask == "margin"  # that a hard negative scores high is what it is for
        mask = spare(mask, group_size, whole_group=own_model or teacher)
        self.masked, self.queries = self.masked + int(mask.sum()), self.queries + len(mask)
        return mask

    def share(self) -> float:
        """Passages left out per query since this was last asked."""
        found = self.masked / max(1, self.queries)
        self.masked = self.queries = 0
        return found


def _check_honoured(adapter: Adapter, encoder: Encoder, heads: tuple[str, ...]) -> None:
    """Refuse an adapter whose loss does not look at the mask.

    Raises:
        UsageError: hiding all negatives of the probe texts does not change its loss.
    """
    probes = probe_vectors(encoder).map(lambda array: torch.as_tensor(array, device=encoder.device))
    held = Embeddings(**{head: getattr(probes, head) for head in heads})
    held.mask = probes.mask if "colbert" in heads else None
    hidden = ~torch.eye(len(held), dtype=torch.bool, device=encoder.device)
    plain = LossArguments(temperature=1.0, group_size=1)
    masked = replace(plain, false_negatives=hidden)
    losses = [adapter.loss(encoder.model, held, held, None, 0, chosen) for chosen in (plain, masked)]
    if torch.equal(*losses):
        raise UsageError(
            f"--false_negative_mask: the loss of {adapter.describe()} does not look at args.false_negatives, so that "
            "nothing would be left out; leave the flag out, or have the plugin use ultrarag.losses.hide"
        )


@dataclass
class Guide:
    """A guide model: its dense vectors, or those of its first head."""

    encoder: Encoder
    collator: Collator
    #: texts encoded at a time
    chunk_texts: int

    @classmethod
    def load(
        cls,
        path: str,
        adapter: str | None,
        data: DataArguments,
        device: torch.device,
        chunk_texts: int | None = None,
        trust_remote_code: bool = False,
    ) -> Guide:
        """Load the model at `path`.

        Args:
            adapter: None: see `Encoder.load`.
            data: the run's lengths of a query and of a passage; the guide reads as much of that as it can.

        Raises:
            UsageError: it gives no vectors.
        """
        encoder = Encoder.load(path, adapter, device=device, trust_remote_code=trust_remote_code)
        if encoder.adapter.declared.pair_input:
            raise UsageError(
                f"--guide_model {path}: {encoder.adapter.describe()} reads pairs and gives no vectors; a guide must be "
                "an embedding model (veto mined negatives with a cross-encoder instead)"
            )
        encoder.model.requires_grad_(False)
        query, passage = (min(length, encoder.limit or length) for length in (data.query_max_len, data.passage_max_len))
        read = replace(data, query_max_len=query, passage_max_len=passage, pad_to_multiple_of=None)
        return cls(encoder, Collator.of(encoder, read), chunk_texts or 64)

    def features(self, batch: Batch) -> dict[str, Any]:
        """Tokenize the batch as the guide reads it: with its own instructions and not those of the rows."""
        found = self.collator([replace(batch, prompts=[None] * len(batch.queries))])
        return {"queries": found["queries"], "passages": found["passages"]}

    @torch.no_grad()
    def scores(self, features: dict[str, Any], across: bool) -> Tensor:
        """The guide's scores, (queries, passages); with the passages of all ranks where `across` is set."""
        query, passage = (self._encode(features[side]) for side in ("queries", "passages"))
        return head_scores(query, gather(passage) if across else passage)[self._head]

    @property
    def _head(self) -> str:
        return "dense" if "dense" in self.encoder.heads else self.encoder.heads[0]

    def _encode(self, features: Features) -> Embeddings:
        self.encoder.model.eval()
        parts = [
            self.encoder.adapter.encode(self.encoder.model, {**part, "heads": (self._head,)})
            for _, part in by_texts(self.chunk_texts)(features)
        ]
        return Embeddings.cat(parts)
