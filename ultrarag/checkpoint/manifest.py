"""A checkpoint's manifest: adapter, settings, files with checksums, identity by content, and descent.

`ultrarag.json`, the manifest, says which adapter wrote it, its settings, its fingerprint, its parent, the data
it was trained on and the digest of every file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.errors import CheckpointError, UsageError
from ultrarag.io import sha256_of, write_json
from ultrarag.types import EncoderSettings
from ultrarag.untrusted import refuse_outside

if TYPE_CHECKING:
    import torch
    from torch import nn

MANIFEST = "ultrarag.json"
FORMAT = 2
#: What the manifest records the versions of, each with the name of its distribution.
_PACKAGES = {"ultrarag": "ultrarag-retrieval"} | {
    name: name for name in ("torch", "transformers", "sentence-transformers", "tokenizers")
}


@dataclass
class Training:
    """How a checkpoint came about."""

    #: fingerprint of the checkpoint it was trained from
    parent: str = ""
    #: name of that checkpoint, for people; never used as an identity
    parent_name: str = ""
    #: one row per data set: name, rows, sha256
    data: list[dict[str, Any]] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    #: "before" and "after": metric -> value
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    steps: int = 0
    loss: float | None = None
    #: which model the trained weights were averaged with, the weight, and how it was chosen
    merge: dict[str, Any] | None = None
    #: digests of files and keys of rows that were trained on; see `ultrarag.finetune.incremental`
    seen: dict[str, Any] | None = None
    #: the records of all models before this one, the oldest first; they outlive their folders
    ancestors: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Identity:
    """Who a model is, by content; of an asymmetric one, who its sides are."""

    fingerprint: str
    #: as in `Manifest.sides`
    sides: dict[str, dict[str, Any]] | None = None

    @classmethod
    def of_sides(cls, query: tuple[str, list[str]], passage: tuple[str, list[str]]) -> Identity:
        """The identity of two sides, each the fingerprint that its model would have alone, and its maps' digests."""
        sides: dict[str, dict[str, Any]] = {}
        for name, (side, maps) in (("query", query), ("passage", passage)):
            sides[name] = {"fingerprint": _digest([side, *maps]) if maps else side, "unmapped": side, "maps": maps}
        return cls(_digest(["sides", sides["query"]["fingerprint"], sides["passage"]["fingerprint"]]), sides)

    @property
    def query(self) -> str:
        """The identity of what queries are encoded by."""
        return self._of("query", "fingerprint", self.fingerprint)

    @property
    def passage(self) -> str:
        """The identity of what passages are encoded by."""
        return self._of("passage", "fingerprint", self.fingerprint)

    @property
    def unmapped_passage(self) -> str:
        """The same before the passage side's maps."""
        return self._of("passage", "unmapped", self.fingerprint)

    @property
    def query_maps(self) -> tuple[str, ...]:
        """The digests of the query side's maps, in order."""
        return tuple(self._of("query", "maps", ()))

    @property
    def passage_maps(self) -> tuple[str, ...]:
        """The digests of the passage side's maps, in order."""
        return tuple(self._of("passage", "maps", ()))

    def _of(self, side: str, name: str, symmetric: Any) -> Any:
        return self.sides[side][name] if self.sides else symmetric


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass
class Manifest:
    """What `ultrarag.json` holds."""

    adapter: str
    settings: EncoderSettings
    fingerprint: str = ""
    training: Training | None = None
    #: relative path -> {"size": bytes, "sha256": hex}
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    #: of an asymmetric model: "query" and "passage" -> `fingerprint`, `unmapped` (the same before its maps), and the
    #: digests of its `maps` in order; None for a symmetric one
    sides: dict[str, dict[str, Any]] | None = None
    #: it was made by running Python code that came with the model and is in the folder. A record, no consent: whoever
    #: loads it is asked anew
    remote_code: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, and those only that the model has: older releases read a symmetric one's."""
        values = {**asdict(self), "settings": self.settings.to_dict(), "format": FORMAT}
        if self.sides is None:
            del values["sides"]
            values["format"] = 1
        if not self.remote_code:
            del values["remote_code"]
        return values

    @property
    def identity(self) -> Identity:
        """Who the model is, and who its sides are."""
        return Identity(self.fingerprint, self.sides)

    @property
    def query_fingerprint(self) -> str:
        """The identity of what queries are encoded by; of a symmetric model, `fingerprint`."""
        return self.identity.query

    @property
    def passage_fingerprint(self) -> str:
        """The identity of what passages are encoded by; of a symmetric model, `fingerprint`."""
        return self.identity.passage

    @property
    def unmapped_passage_fingerprint(self) -> str:
        """The identity of what passages are encoded by, before the passage side's maps."""
        return self.identity.unmapped_passage

    @property
    def query_maps(self) -> tuple[str, ...]:
        """The digests of the query side's maps, in the order in which they are applied."""
        return self.identity.query_maps

    @property
    def passage_maps(self) -> tuple[str, ...]:
        """The digests of the passage side's maps, in the order in which they are applied."""
        return self.identity.passage_maps

    def lineage(self) -> list[dict[str, Any]]:
        """This model's record and those of all before it that were trained by ultrarag, the oldest first."""
        if self.training is None:
            return []
        own = asdict(self.training)
        before = own.pop("ancestors")
        return [*before, {"fingerprint": self.fingerprint, "created": self.created, "adapter": self.adapter, **own}]


def read_manifest(folder: Path) -> Manifest | None:
    """Read `ultrarag.json`; None where there is none.

    Raises:
        CheckpointError: when it is damaged, of a newer format, or a file that it lists is missing, cut or outside.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") > FORMAT:
            raise CheckpointError(f"{path} was written by a newer ultrarag: upgrade ultrarag to read it")
        training = values.pop("training")
        manifest = Manifest(
            **{**values, "settings": EncoderSettings.from_dict(values["settings"])},
        )
        manifest.training = Training(**training) if training else None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    refuse_outside(folder, manifest.files, path)
    _check_sizes(folder, manifest)
    return manifest


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    for name, expected in manifest.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete; copy it again")
        if size != expected["size"]:
            raise CheckpointError(f"{path} has {size} bytes, not {expected['size']}: it is damaged; copy it again")


def changed_files(folder: Path, manifest: Manifest) -> list[str]:
    """The files whose content is no longer what the manifest says, by checksum."""
    return [name for name, expected in manifest.files.items() if sha256_of(folder / name) != expected["sha256"]]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Record the files of `folder` and their digests, and write the manifest, last."""
    manifest.files = {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in _files(folder)
    }
    manifest.versions = _versions()
    manifest.created = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(folder / MANIFEST, manifest.to_dict())


def _files(folder: Path) -> list[str]:
    found = [
        os.path.relpath(os.path.join(parent, name), folder) for parent, _, names in os.walk(folder) for name in names
    ]
    return sorted(name for name in found if name != MANIFEST)


def _versions() -> dict[str, str]:
    found = {}
    for name, distribution in _PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def local_folder(name_or_path: str, cache_dir: str | None = None, token: str | None = None) -> Path:
    """Return the local folder of a model: itself where it exists, else a download from the model hub.

    Raises:
        UsageError: when there is no such folder and the hub does not give it.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists() or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1:
        raise UsageError(f"no model folder '{name_or_path}' (nor is that a hub name such as 'BAAI/bge-m3')")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name_or_path, cache_dir=cache_dir, token=token, ignore_patterns=_NOT_NEEDED))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"'{name_or_path}' is no local folder, and the model hub did not give it: {reason}; "
            "check the name and the network, or give the path of a local folder"
        ) from error


_NOT_NEEDED = ["*.msgpack", "*.h5", "*.onnx", "onnx/*", "openvino/*", "*.ot", "imgs/*"]


def fingerprint(model: nn.Module, adapter: str, settings: EncoderSettings) -> str:
    """Return the SHA-256, in hexadecimal, of everything that a vector depends on.

    Hashed: the adapter, the settings (heads, pooling, prompts, normalisation, lengths), the tokenizer, and every
    weight as float32. Two models with the same fingerprint give the same vectors; renaming, moving or re-saving a
    model changes nothing, changing one weight does.
    """
    import torch

    digest = hashlib.sha256()
    digest.update(json.dumps([1, adapter, _declared(settings)], sort_keys=True).encode())
    known = tokenizer_content(model.tokenizer)
    digest.update(known)
    for other in getattr(model, "route_tokenizers", ()):
        content = tokenizer_content(other)
        digest.update(content if content != known else b"")
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


#: Settings that no vector depends on.
_KEPT_FOR_OTHERS = ("prompts", "default_prompt", "similarity")


def _declared(settings: EncoderSettings) -> dict[str, Any]:
    """The settings that are not the default, so that a field added in a later release changes no identity."""
    default = EncoderSettings(heads=()).to_dict()
    values = {name: value for name, value in settings.to_dict().items() if name not in _KEPT_FOR_OTHERS}
    return {name: value for name, value in values.items() if value != default[name]}


def tokenizer_content(tokenizer: Any) -> bytes:
    """What decides how a text becomes token ids, without the padding and truncation of the last call."""
    special = json.dumps({key: str(value) for key, value in tokenizer.special_tokens_map.items()}, sort_keys=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
        return f"{type(tokenizer).__name__}{special}{vocabulary}".encode()
    return special.encode() + _of_backend(backend.to_str())


@lru_cache(maxsize=1)  # both sides of a model have one tokenizer, and a refresh asks for it a dozen times
def _of_backend(serialised: str) -> bytes:
    content = json.loads(serialised)
    content.pop("padding", None)
    content.pop("truncation", None)
    return json.dumps(content, sort_keys=True).encode()


def _bytes(tensor: torch.Tensor) -> Any:
    import torch

    if tensor.is_floating_point():
        tensor = tensor.float()
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


#: Arguments that are shown: the group that holds them, and their names.
_SHOWN = {
    "training": ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "seed"),
    "loss": ("temperature", "unified_finetuning"),
    "data": ("train_group_size", "query_max_len", "passage_max_len"),
    "incremental": ("replay_ratio",),
    "false_negatives": ("false_negative_mask",),
}


def checkpoint_log(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of a checkpoint and of all models before it, the newest first, as plain JSON values.

    They are all in the checkpoint's own manifest: the folders of the models before it need not be there any more.

    Raises:
        CheckpointError: it is no checkpoint of ultrarag's, or was not trained by ultrarag.
    """
    manifest = read_manifest(Path(path))
    if manifest is None:
        raise CheckpointError(f"'{path}' has no {MANIFEST}: it is no checkpoint of ultrarag's, so it has no log")
    if manifest.training is None:
        raise CheckpointError(f"'{path}' holds a model that was saved and not trained: there is no run to show")
    return manifest.lineage()[::-1]


def lineage_text(chain: list[dict[str, Any]]) -> str:
    """Return a log as text: one paragraph per model, then the model that it all began with."""
    first = chain[-1]
    began = f"{first['parent'][:12]}  {first['parent_name']} (what it began with)"
    return "\n\n".join([*("\n".join(_lines(record)) for record in chain), began])


def _lines(record: Mapping[str, Any]) -> list[str]:
    loss = f", loss {record['loss']:.4f}" if record["loss"] is not None else ""
    lines = [f"{record['fingerprint'][:12]}  {record['created']}  {record['steps']} steps{loss}"]
    lines += [
        f"  {_kind(item):<9}{item['name']}: {item['rows']} rows, {item['sha256'][:12]}" for item in record["data"]
    ]
    lines += [f"  {label:<9}{values}" for label, values in _metrics(record["metrics"]).items()]
    if merge := record.get("merge"):
        lines.append(f"  merged   {merge['weight']:g} of it, the rest of {merge['with']} {merge['fingerprint'][:12]}")
    shown = [
        f"{name} {record['arguments'][group][name]}"
        for group, names in _SHOWN.items()
        for name in names
        if record["arguments"].get(group, {}).get(name) not in (None, False, "none")
    ]
    return [*lines, f"  with     {', '.join(shown)}"]


def _kind(item: Mapping[str, Any]) -> str:
    return "replay" if item.get("replay") else "data"


def _metrics(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Label -> the metrics before and after, on the evaluation data and on the guard."""
    found = {}
    for label, prefix in (("metrics", ""), ("guard", "guard_")):
        before, after = metrics.get(f"{prefix}before", {}), metrics.get(f"{prefix}after", {})
        if before:
            found[label] = ", ".join(f"{name} {old:.4f} -> {after[name]:.4f}" for name, old in before.items())
    return found
