"""Corpus: training against the stored vectors of all passages, by one side of a model or by a linear map.

Stored vectors and training rows come in; what a step's queries are compared with, and learned maps, go out. Nothing
here encodes passages that have a vector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.finetune.corpus.bank import Bank, Known, Nearest, keys_of
    from ultrarag.finetune.corpus.maps import (
        RATES,
        STRENGTHS,
        Choice,
        MapData,
        MapSettings,
        NoMap,
        choose_settings,
        learned_map,
    )
    from ultrarag.finetune.corpus.negatives import CorpusNegatives, FrozenQueries, encode_asked
else:
    __getattr__, __dir__, __all__ = exports(__name__)
