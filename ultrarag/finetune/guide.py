"""Guide: a frozen model whose scores tell false negatives from negatives.

Source:
    GISTEmbed: Guided In-sample Selection of Training Negatives (Solatorio, 2024), for the scores of queries with
    passages; queries are not compared with queries here, nor passages with passages, since neither are negatives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultrarag.checkpoint import read_manifest
from ultrarag.encoder import Encoder
from ultrarag.errors import UsageError
from ultrarag.finetune.batches import Batch
from ultrarag.finetune.collator import Collator
from ultrarag.finetune.distributed import gather
from ultrarag.finetune.gradcache import split
from ultrarag.hookspecs import Features
from ultrarag.scores import head_scores
from ultrarag.types import Embeddings


@dataclass
class Guide:
    """A guide model: its dense vectors, or those of its first head."""

    encoder: Encoder
    collator: Collator
    #: texts encoded at a time
    chunk: int

    @classmethod
    def load(
        cls, path: str, adapter: str | None, lengths: tuple[int, int], device: torch.device, chunk: int | None
    ) -> Guide:
        """Load the model at `path`.

        Args:
            adapter: None: the one in its manifest.
            lengths: tokens of a query and of a passage, at most.

        Raises:
            UsageError: it gives no vectors.
        """
        encoder = Encoder.load(path, adapter, device=device)
        if encoder.adapter.declared.pair_input:
            raise UsageError(
                f"--guide_model {path}: {encoder.adapter.describe()} reads pairs and gives no vectors; a guide must be "
                "an embedding model (veto mined negatives with a cross-encoder instead)"
            )
        encoder.model.requires_grad_(False)
        query, passage = (min(length, encoder.limit or length) for length in lengths)
        return cls(encoder, Collator(encoder.tokenizer, encoder.settings, query, passage), chunk or 64)

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
            for part in split(features, self.chunk)
        ]
        return Embeddings.cat(parts)


def guide_adapter(path: str, otherwise: str) -> str | None:
    """The adapter of a guide that names none: None where its manifest says it, else that of the trained model."""
    folder = Path(path).expanduser()
    return None if folder.is_dir() and read_manifest(folder) else otherwise
