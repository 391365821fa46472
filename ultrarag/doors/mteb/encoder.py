"""An encoder as MTEB's EncoderProtocol: its dense head."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np

from ultrarag.doors.mteb.framework import ModelMeta, PromptType
from ultrarag.doors.mteb.meta import model_meta
from ultrarag.doors.mteb.texts import texts_of
from ultrarag.encoder import Encoder
from ultrarag.errors import FingerprintError, UsageError
from ultrarag.types import Kind


def loaded(model: Encoder | str | PathLike[str], revision: str | None, device: str | None, options: Any) -> Encoder:
    """The encoder itself, or loaded from a folder or hub name; a revision is a fingerprint, or its beginning."""
    encoder = model if isinstance(model, Encoder) else Encoder.load(model, device=device, **options)
    if revision and not encoder.fingerprint.startswith(revision):
        raise FingerprintError(f"the model has the fingerprint {encoder.fingerprint[:12]}, not {revision[:12]}")
    return encoder


class MtebEncoder:
    """A model of MTEB that encodes.

    Example:
        >>> import mteb
        >>> from ultrarag.doors.mteb import MtebEncoder
        >>> mteb.evaluate(MtebEncoder(encoder, name="me/model"), mteb.get_tasks(["SciFact"]), cache=None)
    """

    def __init__(
        self,
        model: Encoder | str | PathLike[str],
        revision: str | None = None,
        *,
        device: str | None = None,
        name: str | None = None,
        task_prompts: bool = False,
        **options: Any,
    ) -> None:
        """Take an encoder, or load one.

        Args:
            model: an Encoder, a checkpoint folder or a hub name.
            revision: a fingerprint, or its beginning, that it must have.
            name: in MTEB's results, with an organisation, such as "me/model".
            task_prompts: for models that follow instructions: that of each task, where MTEB has one, in place of the
                model's own.
            options: of `Encoder.load`.

        Raises:
            UsageError: the model has no dense vectors: search with it by `MtebSearch`, or score by `MtebReranker`.
        """
        self.encoder = loaded(model, revision, device, options)
        self.task_prompts = task_prompts
        if "dense" not in self.encoder.heads:
            raise UsageError(
                f"the model's heads are {', '.join(self.encoder.heads)}, and MTEB compares single dense vectors: use "
                "MtebSearch for sparse and colbert, MtebReranker for a cross-encoder"
            )
        self._meta = model_meta(self.encoder, name, task_prompts)

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """What MTEB records."""
        return self._meta

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Return the dense vectors, (n, dim) float32.

        A task without prompt types is symmetric: its texts are read without the instructions of queries and passages.
        Batches are made by tokens, whatever `batch_size` is.
        """
        if (precision := kwargs.get("precision")) not in (None, "float32"):
            raise UsageError(f"precision '{precision}': vectors are float32; load the encoder with a precision instead")
        progress = None if kwargs.get("show_progress_bar", True) else False
        instruction = prompt_of(task_metadata, prompt_type) if self.task_prompts else None
        vectors = self.encoder.encode(
            texts_of(inputs), self._kind(prompt_type), heads=("dense",), instruction=instruction, progress=progress
        )
        return np.asarray(vectors.dense)

    def _kind(self, prompt_type: PromptType | None) -> Kind:
        if prompt_type is None:  # two sides have no third: both texts are read as passages then
            return "passage" if self.encoder.asymmetric else "text"
        return "query" if prompt_type == PromptType.query else "passage"

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """The inner products, (n, m): cosine for vectors of unit length."""
        import torch

        left, right = (torch.atleast_2d(torch.as_tensor(item)) for item in (embeddings1, embeddings2))
        return left @ right.T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """The inner products of the rows, (n,)."""
        import torch

        left, right = (torch.atleast_2d(torch.as_tensor(item)) for item in (embeddings1, embeddings2))
        return (left * right).sum(-1)


def prompt_of(task_metadata: Any, prompt_type: PromptType | None) -> str | None:
    """The task's own instruction for texts of this kind; None where it has none."""
    prompt = task_metadata.prompt
    if isinstance(prompt, dict):
        prompt = prompt.get(prompt_type.value) if prompt_type else None
    elif prompt_type == PromptType.document:  # one prompt alone is the queries', or of a symmetric task
        return None
    return prompt or None
