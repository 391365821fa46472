"""Engines of an encoder: what computes its forward, torch itself or a runtime that the backbone is compiled for.

A model and a few of its batches come in; a model of the same adapter, whose backbone runs elsewhere, comes out. The
heads stay what the adapter says, so every head of every adapter is the adapter's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.encoder.engines.backbone import Dense, Forward
    from ultrarag.encoder.engines.choice import Choice, Engine
    from ultrarag.encoder.engines.int8 import Int8, Streams, quantise_backbone
    from ultrarag.encoder.engines.nncf_quantiser import versions
    from ultrarag.encoder.engines.quantised import (
        INT8,
        Pair,
        Quantised,
        copy_quantised,
        digest_of,
        family,
        is_int8,
        not_quantised,
        precision_of,
        publish_quantised,
        quantised_folder,
    )
    from ultrarag.encoder.engines.races import remembered_winner
    from ultrarag.encoder.engines.ready import QueryTokenizer, Ready, ReadyQueries, is_kept, tokenizer_for
    from ultrarag.encoder.engines.setting import AUTO, OPENVINO, PRECISIONS, add_engine_flag, asked_engine
    from ultrarag.encoder.engines.snapshot import Snapshot
else:
    __getattr__, __dir__, __all__ = exports(__name__)
