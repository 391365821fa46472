"""Data: from a pile of domain text to rows that are safe to train on; names load when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.data.checking import check
    from ultrarag.data.cleaning import clean
    from ultrarag.data.cli import main
    from ultrarag.data.converting import convert
    from ultrarag.data.scoring import score
    from ultrarag.data.splitting import split
    from ultrarag.data.synthesizing import synthesize
    from ultrarag.encode import EncodedCorpus, encode_corpus
    from ultrarag.finetune import DataReport
    from ultrarag.mining import mine_files as mine
else:
    __getattr__, __dir__, __all__ = exports(__name__)
