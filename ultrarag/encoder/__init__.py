"""Encoder: a model with its adapter, from texts to `Embeddings`.

Texts and pairs come in; vectors, scores and their counted cuts go out. Tokenizing, batches by tokens, precision, and
the work on the devices stay inside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.encoder.adapted import adapted_part
    from ultrarag.encoder.beside import load_beside
    from ultrarag.encoder.choice import find_adapter
    from ultrarag.encoder.cuts import Cuts
    from ultrarag.encoder.device import in_background
    from ultrarag.encoder.encoder import Encoder
    from ultrarag.encoder.engine_of import check_quantisable, probe
    from ultrarag.encoder.forward import BATCH_TOKENS
    from ultrarag.encoder.hub import Pushed, push_to_hub
    from ultrarag.encoder.late import LateEncoder, LateShared, late_encoder
    from ultrarag.encoder.load import fastest_precision
    from ultrarag.encoder.low_rank import LowRank
    from ultrarag.encoder.pairs import render_pairs
    from ultrarag.encoder.shared import SharedEncoder
    from ultrarag.encoder.sides import MapLayer, Sides, read_passage_maps
    from ultrarag.encoder.tokens import pad, render, tokenize
    from ultrarag.encoder.turns import Lane
else:
    __getattr__, __dir__, __all__ = exports(__name__)
