"""Encoding many texts to disk, resumably: by one process a device, by the ranks of torchrun, or on Ray.

Numbered texts come in; blocks of vectors with done-marks go out. `blocks` is what all launchers share: the marks, the
check that a rerun does the same work, the loop, the counted cuts and the progress.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.encode.blocks import CHUNK_TEXTS, Encode, Ledger, encode_apart, encode_rest, same_work
    from ultrarag.encode.corpus import FORMATS, IDS, INFO, Compression, EncodedCorpus, Shard
    from ultrarag.encode.processes import ModelChoice, encode_corpus
    from ultrarag.encode.ranks import Encoded, Known, Rank, passages_of
    from ultrarag.encode.vectors import KEYS, CorpusVectors, KeyIndex, passage_keys
else:
    __getattr__, __dir__, __all__ = exports(__name__)
