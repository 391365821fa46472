"""Retrieval: a live index over passages, evaluation, reranking, and mining; names load when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultrarag.retrieve.evaluation import Evaluation, differences, evaluate, evaluate_run
    from ultrarag.retrieve.flipping import Flip
    from ultrarag.retrieve.generations import Generation
    from ultrarag.retrieve.live import LiveIndex
    from ultrarag.retrieve.mining.miner import mine
    from ultrarag.retrieve.refresh_report import RefreshReport
    from ultrarag.retrieve.reranking import rerank
    from ultrarag.retrieve.shared.creation import remove_shared
    from ultrarag.retrieve.status import read_passages, read_status
    from ultrarag.retrieve.store import Written
    from ultrarag.retrieve.trec import read_run, write_run

_HOMES = {
    "Evaluation": "ultrarag.retrieve.evaluation",
    "Flip": "ultrarag.retrieve.flipping",
    "Generation": "ultrarag.retrieve.generations",
    "LiveIndex": "ultrarag.retrieve.live",
    "RefreshReport": "ultrarag.retrieve.refresh_report",
    "Written": "ultrarag.retrieve.store",
    "differences": "ultrarag.retrieve.evaluation",
    "evaluate": "ultrarag.retrieve.evaluation",
    "evaluate_run": "ultrarag.retrieve.evaluation",
    "mine": "ultrarag.retrieve.mining.miner",
    "read_passages": "ultrarag.retrieve.status",
    "read_run": "ultrarag.retrieve.trec",
    "read_status": "ultrarag.retrieve.status",
    "remove_shared": "ultrarag.retrieve.shared.creation",
    "rerank": "ultrarag.retrieve.reranking",
    "write_run": "ultrarag.retrieve.trec",
}

__all__ = [
    "Evaluation",
    "Flip",
    "Generation",
    "LiveIndex",
    "RefreshReport",
    "Written",
    "differences",
    "evaluate",
    "evaluate_run",
    "mine",
    "read_passages",
    "read_run",
    "read_status",
    "remove_shared",
    "rerank",
    "write_run",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ultrarag.retrieve' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
