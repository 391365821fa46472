"""Data: from a pile of domain text to rows that are safe to train on; names load when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "DataReport": "ultrarag.finetune.checking",
    "check": "ultrarag.data.checking",
    "clean": "ultrarag.data.cleaning",
    "convert": "ultrarag.data.converting",
    "EncodedCorpus": "ultrarag.data.encoding",
    "encode_corpus": "ultrarag.data.encoding",
    "mine": "ultrarag.data.mining",
    "score": "ultrarag.data.scoring",
    "split": "ultrarag.data.splitting",
    "synthesize": "ultrarag.data.synthesizing",
}

__all__ = [
    "DataReport",
    "EncodedCorpus",
    "check",
    "clean",
    "convert",
    "encode_corpus",
    "mine",
    "score",
    "split",
    "synthesize",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ultrarag.data' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
