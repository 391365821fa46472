"""MTEB: an encoder, a reranker and a live index as models of MTEB 2, and BEIR folders as its tasks.

What `mteb.evaluate` asks of a model comes in; arrays and rankings go out, and a ModelMeta whose revision is the
fingerprint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.doors.mteb.command import main
    from ultrarag.doors.mteb.encoder import MtebEncoder
    from ultrarag.doors.mteb.meta import model_meta
    from ultrarag.doors.mteb.reranker import MtebReranker
    from ultrarag.doors.mteb.search import MtebSearch
    from ultrarag.doors.mteb.tasks import beir_task
else:
    __getattr__, __dir__, __all__ = exports(__name__)
