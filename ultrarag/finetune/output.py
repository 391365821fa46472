"""The output directory: may it be used, which checkpoint is resumed, and what of it lives on."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ultrarag.checkpoint import (
    MANIFEST,
    Training,
    largest_difference,
    probe_vectors,
    publish,
    read_manifest,
)
from ultrarag.encoder import Encoder
from ultrarag.errors import CheckpointError, TrainingError, UsageError
from ultrarag.finetune.flags import FinetuneArguments
from ultrarag.finetune.step import EmbeddingTrainer, rank, wait
from ultrarag.types import Embeddings

#: Where a checkpoint keeps the weights as trained, when its own are merged ones.
UNMERGED = "unmerged"
#: What a run leaves beside its checkpoint, which is not to be taken for that of the next one.
LEFT = (UNMERGED, "report.json", "report.html")
#: Hard negatives of an epoch's beginning, with which a resumed run goes on.
MINED = "nearest-*.npy"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
#: Settings that may differ between a run that was stopped before merging and the one that goes on.
_INCIDENTAL = ("overwrite_output_dir", "incremental")


def checkpoints_in(output: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in output.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def asked_to_resume(arguments: FinetuneArguments) -> bool:
    """Whether the run shall go on where it was, if it had begun."""
    return arguments.training.resume_from_checkpoint not in (None, False, "", "False")


def find_resume(arguments: FinetuneArguments, note: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from; None starts from the model.

    `--resume_from_checkpoint True` takes the newest one of the output directory; where there is none yet (the
    process was killed before the first save), the run starts anew, which gives the same batches and weights.

    Raises:
        UsageError: a named checkpoint does not exist or is incomplete.
    """
    asked = arguments.training.resume_from_checkpoint
    if not asked_to_resume(arguments):
        return None
    if asked in (True, "True"):
        found = checkpoints_in(Path(str(arguments.training.output_dir)))
        if not found:
            note("there is no checkpoint to resume from yet: starting from the model")
            return None
        note(f"resuming from {found[-1]}")
        return found[-1]
    path = Path(str(asked))
    if not (path / "trainer_state.json").is_file():
        raise UsageError(f"--resume_from_checkpoint {path}: no such checkpoint (it has no trainer_state.json)")
    return path


def check_output_dir(output: Path, overwrite: bool) -> None:
    """Make sure that a new run may write into `output`; nothing is changed there.

    Raises:
        UsageError: it holds a model or checkpoints and `overwrite` is not set, or a model of another program.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output_dir {output} is a file; name a directory")
    old = checkpoints_in(output)
    finished = (output / MANIFEST).is_file()
    if not finished and (output / "config.json").is_file():
        raise UsageError(f"--output_dir {output} holds a model that ultrarag did not write; name another directory")
    if (old or finished) and not overwrite:
        what = "a finished model" if finished else f"{len(old)} checkpoints"
        raise UsageError(
            f"--output_dir {output} holds {what} of an earlier run: give --resume_from_checkpoint True to go on, "
            "--overwrite_output_dir to start anew, or another directory"
        )
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise UsageError(f"--output_dir {output}: '{there}' cannot be written to; name another directory")


def claim_output_dir(output: Path, overwrite: bool, note: Callable[[str], None]) -> None:
    """Make `output` ready for a new run: checkpoints of an earlier one are removed.

    Raises:
        UsageError: see `check_output_dir`.
    """
    check_output_dir(output, overwrite)
    if old := checkpoints_in(output):
        note(f"--overwrite_output_dir: removing {len(old)} checkpoints of an earlier run from {output}")
        for path in old:
            shutil.rmtree(path)
    output.mkdir(parents=True, exist_ok=True)


def remove_left(output: Path) -> None:
    """Remove what an earlier run left beside its checkpoint."""
    for path in (*(output / name for name in LEFT), *output.glob(MINED)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def kept_in_output(output: Path) -> Callable[[str], bool]:
    """Which entries of the output directory stay when the finished model replaces an earlier one: all but its files."""
    replaced = {MANIFEST}
    try:
        manifest = read_manifest(output)
    except CheckpointError:
        manifest = None
    if manifest:
        replaced |= {name.split("/")[0] for name in manifest.files}
    return lambda name: name not in replaced and not name.endswith(".tmp")


def find_trained(output: Path, record: Training) -> Training | None:
    """How the weights were trained that the same run left when it was stopped before the end; None without any."""
    try:
        manifest = read_manifest(output / UNMERGED)
    except CheckpointError:
        return None
    earlier = manifest.training if manifest else None
    if earlier is None or earlier.parent != record.parent:
        return None
    same = [item["sha256"] for item in earlier.data] == [item["sha256"] for item in record.data]
    return earlier if same and _settings(earlier.arguments) == _settings(record.arguments) else None


def _settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in arguments.items() if name not in _INCIDENTAL}
    kept["training"] = {k: v for k, v in kept["training"].items() if k != "resume_from_checkpoint"}
    return kept


@dataclass
class Start:
    """The model before training, to see afterwards whether it moved."""

    fingerprint: str
    probes: Embeddings

    @classmethod
    def of(cls, encoder: Encoder) -> Start:
        """Look at a model."""
        return cls(encoder.fingerprint, probe_vectors(encoder))


def write_finished(
    trainer: EmbeddingTrainer | None, encoder: Encoder, start: Start, record: Training, output: Path
) -> str:
    """Write the finished checkpoint, unless training changed nothing; low-rank adapters are merged for good.

    Args:
        trainer: None where a map was learned, and no weight.

    Returns:
        The model's identity; empty on all ranks but the first.
    """
    more = merge_adapters(trainer) if trainer else None
    identity = ""
    if rank() == 0:
        identity = encoder.identity().fingerprint
        _check_moved(encoder, start, identity)
        publish(encoder, output, encoder.model.state_dict(), record, keep=kept_in_output(output), more=more)
    wait()
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
