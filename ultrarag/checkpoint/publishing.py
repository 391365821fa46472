"""Publishing a checkpoint, or a copy of one: written beside, loaded again, compared on probes, then renamed."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from ultrarag.checkpoint.card import model_card
from ultrarag.checkpoint.manifest import MANIFEST, Identity, Manifest, Training, changed_files, write_manifest
from ultrarag.claims import ModelFolder
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.hookspecs import LoadOptions
from ultrarag.io import named_conditions, publish_directory, quiet_progress, staged_directory
from ultrarag.plugins import Adapter
from ultrarag.types import Embeddings, EncoderSettings, Kind, Tokens

if TYPE_CHECKING:
    from torch import nn

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

#: Of which one is in every model's folder.
MODEL_FILES = ("config.json", "modules.json")


class Publishable(Protocol):
    """What publishing needs of an encoder: its parts, its identity, and its vectors, here and loaded again."""

    adapter: Adapter
    model: nn.Module
    settings: EncoderSettings
    trust_remote_code: bool

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that the model has."""

    def identity(self) -> Identity:
        """Who it is, by content."""

    def around(self, model: nn.Module) -> Self:
        """The same around another model."""

    def max_length(self, kind: Kind) -> int | None:
        """The most tokens of a text of this kind."""

    def tokenize(self, texts: Sequence[str], kind: Kind) -> Tokens:
        """Read texts."""

    def tokenize_pairs(self, pairs: Sequence[tuple[str, str]]) -> Tokens:
        """Read (query, passage) pairs."""

    def encode_tokens(self, tokens: Tokens, heads: tuple[str, ...]) -> Embeddings:
        """Return the vectors, or scores, in float32."""


def publish(
    encoder: Publishable,
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
        ResourceError: there is no room, or the folder cannot be written; what was at `target` is as it was.
    """
    with named_conditions(target), staged_directory(target) as stage:
        write_checkpoint(encoder, stage, state_dict, training, more)
        publish_directory(stage, target, keep)
    return target


def check_replaceable(target: Path) -> None:
    """Raise UsageError where a checkpoint would take the place of what is none."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"'{target}' is a file, not a folder for a checkpoint: name another one")
    if any(target.iterdir()) and not any((target / name).is_file() for name in (MANIFEST, *MODEL_FILES)):
        raise UsageError(f"'{target}' holds other files, which a checkpoint would replace: name a new folder")


def write_checkpoint(
    encoder: Publishable,
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
    manifest.remote_code = encoder.trust_remote_code and bool(ModelFolder(folder).code)
    reloaded = _reload(encoder, folder)
    _compare(encoder, reloaded, folder)
    identity = reloaded.identity()
    manifest.fingerprint, manifest.sides = identity.fingerprint, identity.sides
    longest = encoder.max_length("query"), encoder.max_length("passage")
    card = model_card(manifest, encoder.adapter.declared.pair_input, longest)
    (folder / "README.md").write_text(card, encoding="utf-8")
    _follow_umask(folder)
    write_manifest(folder, manifest)
    return manifest


def _follow_umask(folder: Path) -> None:
    """Give all files the mode of any new file here: safetensors makes its own readable by their owner alone."""
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) != mode:
            file.chmod(mode)


def _reload(encoder: Publishable, folder: Path) -> Publishable:
    options = LoadOptions(
        heads=encoder.heads,
        pooling=encoder.settings.pooling,
        normalize=encoder.settings.normalize,
        trust_remote_code=encoder.trust_remote_code,
    )
    with quiet_progress():
        model = encoder.adapter.load(str(folder), options)
    return encoder.around(model)


def probe_vectors(encoder: Publishable) -> Embeddings:
    """The embeddings of the probe texts, as passages and then as queries, or of the pairs; every head, float32."""
    if encoder.adapter.declared.pair_input:
        return encoder.encode_tokens(encoder.tokenize_pairs(PROBE_PAIRS), encoder.heads)
    kinds: tuple[Kind, Kind] = ("passage", "query")
    return Embeddings.cat([encoder.encode_tokens(encoder.tokenize(PROBES, kind), encoder.heads) for kind in kinds])


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


def _compare(encoder: Publishable, reloaded: Publishable, folder: Path) -> None:
    for head, difference in largest_difference(probe_vectors(encoder), probe_vectors(reloaded)).items():
        if not difference <= TOLERANCE:
            what = "scores" if encoder.adapter.declared.pair_input else "vectors"
            raise CheckpointError(
                f"the checkpoint written to {folder} gives other {what} than the model in memory: head '{head}' "
                f"differs by {difference:.3g} (at most {TOLERANCE:g}); nothing was published. "
                f"Something is lost between the hooks 'save' and 'load' of {encoder.adapter.describe()}"
            )


def copy_checkpoint(source: Path, manifest: Manifest, target: Path) -> None:
    """Copy the files that a manifest lists, compare them with their checksums, and publish them in one step.

    Not hard links: a later training run may write into the same files.

    Raises:
        CheckpointError: when a file is not what the manifest says; nothing is at `target` then.
        ResourceError: there is no room, or the folder cannot be written.
    """
    with named_conditions(target), staged_directory(target) as stage:
        for name in (*manifest.files, MANIFEST):
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, stage / name)
        if damaged := changed_files(stage, manifest):
            raise CheckpointError(
                f"'{source / damaged[0]}' is not what the checkpoint's manifest says (checksum; {len(damaged)} such "
                f"files): it is damaged, or was changed; save the checkpoint again"
            )
        publish_directory(stage, target)
