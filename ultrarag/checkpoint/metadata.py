"""The front matter of a model card, which model hubs read: what is known of the model, and its base's card says."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultrarag.checkpoint.manifest import Manifest

_TEXT_TAGS = ("feature-extraction", "sentence-similarity")
_PAIR_TAGS = ("text-ranking", "reranker", "cross-encoder")
#: Of the base's card: what holds for a model that was trained from it. Without a card there is no licence to guess.
_INHERITED = ("license", "license_name", "license_link", "language", "datasets")
#: A model's name on the hub, with its organisation.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def front_matter(manifest: Manifest, pairs: bool) -> list[str]:
    """Return the lines between the card's two rules, those included.

    Args:
        pairs: whether the model reads (query, passage) pairs.
    """
    from huggingface_hub import ModelCardData

    base = {} if manifest.training is None else inherited(manifest.training.parent_name)
    results = _results(manifest, pairs)
    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="text-ranking" if pairs else "sentence-similarity",
        tags=["sentence-transformers", *(_PAIR_TAGS if pairs else _TEXT_TAGS), "ultrarag"],
        eval_results=results,
        model_name=f"ultrarag-{manifest.fingerprint[:12]}" if results else None,
        **base,
    )
    return ["---", *data.to_yaml(line_break="\n").splitlines(), "---", ""]


def inherited(parent: str) -> dict[str, Any]:
    """What the card of the model that it was trained from hands on, and that model's name on the hub, if it has one.

    Args:
        parent: a folder or a hub name.
    """
    card = card_of(parent)
    found = {name: card[name] for name in _INHERITED if card.get(name)}
    base = hub_name(parent) or card.get("base_model")
    return {**found, **({"base_model": base, "base_model_relation": "finetune"} if base else {})}


def card_of(model: str) -> dict[str, Any]:
    """The front matter of a model's card, from its folder or the hub's cache; empty where there is none to read."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    file: Any = Path(model) / "README.md"
    if not Path(model).is_dir():
        file = try_to_load_from_cache(model, "README.md") if _HUB_NAME.fullmatch(model) else None
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return {}
    try:
        return dict(ModelCard(Path(file).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict())
    except Exception:  # a card that nobody can read, in whatever way, has nothing to hand on
        return {}


def hub_name(model: str) -> str | None:
    """A model's name on the hub: of a name that is no folder, or of a folder in the hub's cache."""
    if Path(model).is_dir():
        place = next((part for part in Path(model).resolve().parts if part.startswith("models--")), "")
        model = "/".join(place.split("--")[1:])
    return model if _HUB_NAME.fullmatch(model) else None


def _results(manifest: Manifest, pairs: bool) -> list[Any] | None:
    """The metrics after training, as the hub's model index; a metric that is no number is left out."""
    from huggingface_hub import EvalResult

    measured: Mapping[str, float] = manifest.training.metrics.get("after", {}) if manifest.training else {}
    kind = ("text-ranking", "Reranking") if pairs else ("information-retrieval", "Information Retrieval")
    return [
        EvalResult(
            task_type=kind[0],
            task_name=kind[1],
            dataset_type="unknown",
            dataset_name="held-out evaluation data",
            metric_type=metric.lower().replace("@", "_at_"),
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in measured.items()
        if math.isfinite(value)
    ] or None
