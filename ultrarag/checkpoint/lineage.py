"""Lineage: the chain of models that led to a checkpoint, each with its data, its arguments and its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from ultrarag.checkpoint.manifest import MANIFEST, read_manifest
from ultrarag.errors import CheckpointError

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
        raise CheckpointError(f"'{path}' holds a model that was saved and not trained: there is no run to tell of")
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
