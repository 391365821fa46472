"""Quantising a checkpoint: calibrated, compared with float32, judged, and only then published beside it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch

from ultrarag.checkpoint import check_replaceable, local_folder
from ultrarag.encoder import Encoder, check_quantisable, probe
from ultrarag.encoder.engines import (
    INT8,
    Pair,
    Quantised,
    precision_of,
    publish_quantised,
    quantise_backbone,
    quantised_folder,
    versions,
)
from ultrarag.errors import GateError, UsageError
from ultrarag.evaluation import Collection
from ultrarag.io import staged_directory
from ultrarag.quantise.calibration import Calibration
from ultrarag.quantise.judging import Terms, in_words, judge

DEFAULT = Terms()

logger = logging.getLogger("ultrarag")

#: Least mean cosine of vectors in int8 with those in float32, on calibration texts: below it something is broken.
ALIKE = 0.9
#: So many of them.
COMPARED = 16
#: What is quantised lies in a stage of this name, inside the checkpoint, until it was judged.
SCRATCH = "quantising"


def quantise(
    checkpoint: str | PathLike[str],
    calibration: Calibration,
    collection: Collection | None = None,
    *,
    terms: Terms = DEFAULT,
    output: str | PathLike[str] | None = None,
    adapter: str | None = None,
    trust_remote_code: bool = False,
) -> Quantised:
    """Put int8 beside a checkpoint, or into a copy of it.

    Args:
        collection: what int8 is judged on; None: nothing is, and `measured` of the record is empty.
        output: a folder for a copy of the checkpoint; default: the checkpoint's own.

    Raises:
        GateError: int8 is significantly worse than float32, by more than the tolerance; nothing is written.
        UsageError: the model cannot be quantised, or a package is missing; says which.
    """
    target = _target(checkpoint, output)
    float32 = Encoder.load(checkpoint, adapter, device="cpu", trust_remote_code=trust_remote_code)
    folder = local_folder(str(checkpoint))
    # beside what it becomes: whoever quantises there next removes what a killed process left
    with staged_directory(target.with_name(f"{target.name}-int8") if target else folder / SCRATCH) as place:
        record = _written(float32, calibration, place)
        int8 = float32.in_int8(place)
        _check_alike(float32, int8, calibration)
        if collection is not None:
            pairs = judge(float32, int8, collection, terms)
            record = replace(record, tolerance=terms.tolerance, measured=tuple(pairs))
            record.write(quantised_folder(place))
            _refuse_loss(pairs, terms)
        if target is not None:
            float32.save(target)
        _publish(place, target or folder)
    return record


def _target(checkpoint: str | PathLike[str], output: str | PathLike[str] | None) -> Path | None:
    """Where a copy of the checkpoint goes, checked before minutes are spent; None: none is made."""
    if output is None or Path(output).resolve() == Path(checkpoint).resolve():
        return None
    check_replaceable(Path(output))
    return Path(output)


def quantise_copy(checkpoint: Path, calibration: Calibration, trust_remote_code: bool = False) -> None:
    """Put int8 beside an index's copy of a checkpoint, unless it is there; the gate of a swap judges it."""
    if Quantised.read(checkpoint) is None:
        logger.info("quantising '%s' on %d texts of %s", checkpoint, len(calibration.texts), calibration.source)
        quantise(checkpoint, calibration, trust_remote_code=trust_remote_code)


def calibrated_precision(fingerprint: str, calibration: Calibration) -> str:
    """The precision that a model will have in int8 with this calibration."""
    return precision_of(fingerprint, versions(), calibration.digest)


def _written(float32: Encoder, calibration: Calibration, place: Path) -> Quantised:
    """Quantise, into a folder that is shaped like a checkpoint's."""
    check_quantisable(float32)
    with torch.no_grad():
        batches = [float32.features(float32.tokenize([text], kind)) for kind, text in calibration.texts]
        folder = quantised_folder(place)
        folder.mkdir()
        inputs, output = quantise_backbone(float32.model, probe(float32), batches, folder)
    about = {"digest": calibration.digest, "texts": len(calibration.texts), "source": calibration.source}
    record = Quantised(float32.fingerprint, versions(), about, inputs, output)
    record.write(folder)
    return record


def _check_alike(float32: Encoder, int8: Encoder, calibration: Calibration) -> None:
    texts = [text for _, text in calibration.texts[:COMPARED]]
    one, other = (encoder.encode(texts, progress=False) for encoder in (float32, int8))
    for head in ("dense", "colbert"):
        if (left := getattr(one, head)) is None:
            continue
        cosines = torch.cosine_similarity(torch.from_numpy(left), torch.from_numpy(getattr(other, head)), dim=-1)
        cosine = float(cosines[torch.from_numpy(one.mask).bool()].mean() if head == "colbert" else cosines.mean())
        if not cosine >= ALIKE:
            raise UsageError(
                f"this model's {head} vectors in int8 are not its own (cosine {cosine:.3f} with float32, at least "
                f"{ALIKE:g} is expected): calibrate on texts like those that are encoded, or stay with bf16"
            )


def _refuse_loss(pairs: Sequence[Pair], terms: Terms) -> None:
    lost = [pair for pair in pairs if not pair.accepted and (pair.passages, pair.queries) == (INT8, INT8)]
    if lost:
        raise GateError(
            f"int8 loses more than the tolerance of {terms.tolerance:g}, or cannot be judged, and is not published: "
            f"{'; '.join(in_words(pair) for pair in lost)}. Calibrate on other texts (--calibration), or stay with bf16"
        )


def _publish(place: Path, target: Path) -> None:
    publish_quantised(target, lambda stage: shutil.copytree(quantised_folder(place), stage, dirs_exist_ok=True))
