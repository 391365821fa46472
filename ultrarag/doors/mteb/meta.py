"""What MTEB records of a model: only what is known of it, and nothing guessed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ultrarag.doors.mteb.framework import ModelMeta, ScoringFunction
from ultrarag.encoder import Encoder

#: A model's one head -> what MTEB calls such a model.
TYPES = {"dense": "dense", "sparse": "sparse", "colbert": "late-interaction", "scores": "cross-encoder"}


def model_meta(encoder: Encoder, name: str | None = None, task_prompts: bool = False, **more: Any) -> ModelMeta:
    """Return the ModelMeta of an encoder.

    Its revision is the fingerprint: results that MTEB keeps are found again for the same content alone, wherever the
    model lies. A precision other than float32 is part of the experiment, as MTEB calls it, and so tells results apart.
    Licence, languages, dates and training data are left open.

    Args:
        name: with an organisation, such as "BAAI/bge-m3"; default: "ultrarag/" and the adapter's name.
        task_prompts: whether it reads each task's own prompt, which tells results apart.
        more: other fields, in place of ours.
    """
    prompted = {"task_prompts": True} if task_prompts else None
    experiment = _experiment(encoder, more.pop("experiment_kwargs", prompted))
    fields: dict[str, Any] = {
        "name": name or f"ultrarag/{encoder.adapter.name}",
        "revision": encoder.fingerprint,
        "max_tokens": encoder.max_length("passage"),
        "embed_dim": encoder.dim,
        "similarity_fn_name": similarity_of(encoder),
        "use_instructions": task_prompts or _instructed(encoder),
        "adapted_from": _parent(encoder),
        "model_type": [TYPES[head] for head in encoder.heads],
        "framework": ["PyTorch"],
        "modalities": ["text"],
        "experiment_kwargs": experiment or None,
        **_size(encoder),
        **dict.fromkeys(_UNKNOWN),
    }
    return ModelMeta(**{**fields, **more})


_UNKNOWN = (
    *("loader", "release_date", "languages", "license", "open_weights", "public_training_code"),
    *("public_training_data", "training_datasets"),
)


def similarity_of(encoder: Encoder) -> ScoringFunction | None:
    """How the first head's vectors are compared; None for a model that scores pairs."""
    if "dense" in encoder.heads:
        return ScoringFunction.COSINE if encoder.settings.normalize else ScoringFunction.DOT_PRODUCT
    if "colbert" in encoder.heads:
        return ScoringFunction.MAX_SIM
    return ScoringFunction.DOT_PRODUCT if "sparse" in encoder.heads else None


def _experiment(encoder: Encoder, setting: Mapping[str, Any] | None) -> dict[str, Any]:
    """The setting, with the precision where it is not float32; as it may stand in a folder's name."""
    precision = {} if encoder.precision == "fp32" else {"precision": encoder.precision.replace(":", "-")}
    return {**precision, **(setting or {})}


def _instructed(encoder: Encoder) -> bool:
    settings = encoder.settings
    return bool(settings.query_instruction or settings.passage_instruction or settings.prompt)


def _parent(encoder: Encoder) -> str | None:
    training = encoder.manifest.training if encoder.manifest else None
    return (training.parent_name or None) if training else None


def _size(encoder: Encoder) -> dict[str, float]:
    weights = list(encoder.model.parameters())
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    return {"n_parameters": sum(weight.numel() for weight in weights), "memory_usage_mb": size / 2**20}


def search_meta(encoder: Encoder, name: str | None, setting: Mapping[str, Any]) -> ModelMeta:
    """The same of a search with this encoder, whose setting tells its results from those of other searches.

    Args:
        setting: options of the search, as JSON; MTEB makes a folder's name of them.
    """
    heads = _searched(encoder, setting)
    if heads == ["dense"] and set(setting) <= {"heads", "weights"}:
        return model_meta(encoder, name)
    kinds = [TYPES.get(head, "sparse") for head in heads] + ["cross-encoder"] * ("reranker" in setting)
    kind = {"model_type": kinds if len(heads) == 1 else ["hybrid"], "similarity_fn_name": ScoringFunction.CUSTOM}
    return model_meta(encoder, name, experiment_kwargs=dict(setting), **kind)


def _searched(encoder: Encoder, setting: Mapping[str, Any]) -> list[str]:
    """The heads that count in a search."""
    named = setting.get("heads") or [head for head, weight in (setting.get("weights") or {}).items() if weight]
    return [named] if isinstance(named, str) else list(named or encoder.heads)
