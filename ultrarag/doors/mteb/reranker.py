"""A reranker as MTEB's CrossEncoderProtocol."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np

from ultrarag.doors.mteb.encoder import loaded, prompt_of
from ultrarag.doors.mteb.framework import ModelMeta, PromptType
from ultrarag.doors.mteb.meta import model_meta
from ultrarag.doors.mteb.texts import texts_of
from ultrarag.encoder import Encoder
from ultrarag.types import text_of


class MtebReranker:
    """A model of MTEB that scores pairs: for tasks that bring candidates.

    A retrieval task brings none, and MTEB refuses it for every cross-encoder: give it those of a first stage by
    `task.convert_to_reranking`, take `beir_task(folder, candidates=...)`, or let `MtebSearch(encoder, reranker=...)`
    find and order them in one.
    """

    def __init__(
        self,
        model: Encoder | str | PathLike[str],
        revision: str | None = None,
        device: str | None = None,
        *,
        name: str | None = None,
        task_prompts: bool = False,
        weights: dict[str, float] | None = None,
        **options: Any,
    ) -> None:
        """Take a reranker, or load one; see `MtebEncoder`.

        Args:
            weights: of the heads, for an encoder with several that is to score pairs; see `Encoder.score`.
        """
        self.encoder = loaded(model, revision, device, options)
        self.task_prompts, self.weights = task_prompts, weights
        self._meta = model_meta(self.encoder, name, task_prompts, model_type=["cross-encoder"])

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """What MTEB records."""
        return self._meta

    def predict(
        self,
        inputs1: Any,
        inputs2: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Return the score of each (query, passage) pair, (n,) float32."""
        pairs = list(zip(map(text_of, texts_of(inputs1)), map(text_of, texts_of(inputs2)), strict=True))
        options: dict[str, Any] = {} if kwargs.get("show_progress_bar", True) else {"progress": False}
        if self.task_prompts and (prompt := prompt_of(task_metadata, PromptType.query)):
            options["instruction"] = prompt
        return self.encoder.score(pairs, weights=self.weights, **options)
