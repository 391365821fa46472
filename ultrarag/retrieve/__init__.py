"""Retrieval: a live index over passages, evaluation, reranking, and mining; names load when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.evaluation import Evaluation, differences, evaluate, evaluate_run, read_run, write_run
    from ultrarag.mining import mine
    from ultrarag.retrieve.aside import GenerationSearcher
    from ultrarag.retrieve.bridge import BridgeTerms
    from ultrarag.retrieve.generation import Generation
    from ultrarag.retrieve.live import LiveIndex
    from ultrarag.retrieve.passages import Written, jsonable
    from ultrarag.retrieve.refresh import RefreshReport
    from ultrarag.retrieve.search import Encoding, Hits, rerank
    from ultrarag.retrieve.shared import remove_shared
    from ultrarag.retrieve.status import read_passages, read_status
    from ultrarag.retrieve.swap import Flip
else:
    __getattr__, __dir__, __all__ = exports(__name__)
