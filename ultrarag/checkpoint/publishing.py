"""Publishing a checkpoint: write beside, reload, compare on probe texts, then appear in one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrarag.checkpoint.card import model_card
from ultrarag.checkpoint.manifest import Manifest, Training, write_manifest
from ultrarag.errors import CheckpointError
from ultrarag.hookspecs import LoadOptions
from ultrarag.io import publish_directory, quiet_progress, staged_directory
from ultrarag.types import Embeddings

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder

#: Encoded before and after: short and long, English and Chinese, one token, digits.
PROBES = (
    "What is a vector database?",
    "向量数据库是什么?",
    "a",
    "The quick brown fox jumps over the lazy dog. " * 4,
    "糖尿病患者 2024 年的 HbA1c 应低于 7.0 %",
)
#: The same for a model that reads pairs.
PROBE_PAIRS = tuple((query, passage) for query in (PROBES[0], PROBES[1]) for passage in PROBES[2:])
#: Largest difference of any component between the model in memory and the reloaded one.
TOLERANCE = 1e-5


def publish(
    encoder: Encoder,
    target: Path,
    state_dict: Mapping[str, Any],
    training: Training | None = None,
    keep: Callable[[str], bool] = lambda name: False,
    more: Callable[[Path], None] | None = None,
) -> Path:
    """Write `encoder` with the weights `state_dict` as the checkpoint `target`.

    Args:
        keep: which entries of an existing `target` stay in it, by name.
        more: writes further files into the folder that it is given.

    Raises:
        CheckpointError: when the reloaded checkpoint does not give the same vectors.
    """
    with staged_directory(target) as stage:
        write_checkpoint(encoder, stage, state_dict, training, more)
        publish_directory(stage, target, keep)
    return target


def write_checkpoint(
    encoder: Encoder,
    folder: Path,
    state_dict: Mapping[str, Any],
    training: Training | None = None,
    more: Callable[[Path], None] | None = None,
) -> Manifest:
    """Write all files of a checkpoint into `folder`, checked by loading them again."""
    with quiet_progress():
        encoder.adapter.save(encoder.model, str(folder), state_dict)
    if more:
        more(folder)
    manifest = Manifest(encoder.adapter.name, encoder.settings, training=training)
    reloaded = _reload(encoder, folder)
    _compare(encoder, reloaded, folder)
    manifest.fingerprint = reloaded.fingerprint
    card = folder / "README.md"
    card.write_text(model_card(manifest, encoder), encoding="utf-8")
    write_manifest(folder, manifest)
    return manifest


def _reload(encoder: Encoder, folder: Path) -> Encoder:
    from ultrarag.encoder import Encoder

    options = LoadOptions(heads=encoder.heads, pooling=encoder.settings.pooling, normalize=encoder.settings.normalize)
    with quiet_progress():
        model = encoder.adapter.load(str(folder), options)
    return Encoder(encoder.adapter, model, replace(encoder.settings), device=encoder.device)


def probe_vectors(encoder: Encoder) -> Embeddings:
    """The embeddings of the probe texts, or of the probe pairs, in float32, with every head."""
    if encoder.adapter.declared.pair_input:
        return encoder.encode_tokens(encoder.tokenize_pairs(PROBE_PAIRS), encoder.heads)
    return encoder.encode_tokens(encoder.tokenize(PROBES, "passage"), encoder.heads)


def largest_difference(left: Embeddings, right: Embeddings) -> dict[str, float]:
    """The largest absolute difference per head; infinite where shapes differ or a value is not finite."""
    found = {}
    for head in left.heads:
        mine, theirs = (_of_head(side, head) for side in (left, right))
        found[head] = float(np.abs(mine - theirs).max()) if mine.shape == theirs.shape else float("inf")
        if not np.isfinite(found[head]):
            found[head] = float("inf")
    return found


def _of_head(embeddings: Embeddings, head: str) -> np.ndarray:
    if head == "sparse":
        assert embeddings.sparse is not None
        return np.asarray(embeddings.sparse.weights)
    return np.asarray(getattr(embeddings, head))


def _compare(encoder: Encoder, reloaded: Encoder, folder: Path) -> None:
    for head, difference in largest_difference(probe_vectors(encoder), probe_vectors(reloaded)).items():
        if not difference <= TOLERANCE:
            what = "scores" if encoder.adapter.declared.pair_input else "vectors"
            raise CheckpointError(
                f"the checkpoint written to {folder} gives other {what} than the model in memory: head '{head}' "
                f"differs by {difference:.3g} (at most {TOLERANCE:g}); nothing was published. "
                f"Something is lost between the hooks 'save' and 'load' of {encoder.adapter.describe()}"
            )
