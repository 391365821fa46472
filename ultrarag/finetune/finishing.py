"""The end of a run: did the model move at all, is it sound, and its checkpoint published whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ultrarag.checkpoint import Training
from ultrarag.encoder import Encoder
from ultrarag.errors import TrainingError
from ultrarag.finetune.distributed import rank
from ultrarag.finetune.output import kept_in_output
from ultrarag.finetune.trainer import EmbeddingTrainer
from ultrarag.fingerprint import fingerprint
from ultrarag.publish import largest_difference, probe_vectors, publish
from ultrarag.types import Embeddings


@dataclass
class Start:
    """The model before training, to see afterwards whether it moved."""

    fingerprint: str
    probes: Embeddings


def write_finished(trainer: EmbeddingTrainer, encoder: Encoder, start: Start, record: Training, output: Path) -> str:
    """Write the finished checkpoint, unless training changed nothing; low-rank adapters are merged for good.

    Returns:
        The model's identity; empty on all ranks but the first.
    """
    more = merge_adapters(trainer)
    identity = ""
    if rank() == 0:
        identity = fingerprint(encoder.model, encoder.adapter.name, encoder.settings)
        _check_moved(encoder, start, identity)
        publish(encoder, output, encoder.model.state_dict(), record, keep=kept_in_output(output), more=more)
    trainer._wait()
    return identity


def merge_adapters(trainer: EmbeddingTrainer) -> Callable[[Path], None] | None:
    """Put low-rank adapters into the weights for good; return what writes them by themselves into a folder."""
    lora = trainer.lora
    if lora is None:
        return None
    more = partial(lora.save, matrices=lora.matrices())
    lora.remove()
    trainer.lora = None
    return more


def _check_moved(encoder: Encoder, start: Start, identity: str) -> None:
    remedy = "look at the learning rate, the loss in the log, and what is frozen"
    if identity == start.fingerprint:
        raise TrainingError(f"training changed no weight, so no checkpoint is written; {remedy}")
    probes = probe_vectors(encoder)
    moved = largest_difference(start.probes, probes)
    if not _finite(probes):
        raise TrainingError(f"the trained model gives vectors that are not finite; no checkpoint is written; {remedy}")
    if all(value == 0 for value in moved.values()):
        raise TrainingError(f"the vectors of the probe texts did not move, so no checkpoint is written; {remedy}")


def _finite(embeddings: Embeddings) -> bool:
    import numpy as np

    return all(bool(np.isfinite(array).all()) for array in embeddings.arrays())
