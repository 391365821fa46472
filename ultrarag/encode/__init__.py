"""The room of encoding many texts to disk, resumably: by one process a device, by the ranks of torchrun, or on Ray.

Numbered texts come in; blocks of vectors with done-marks go out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.encode.compress import FORMATS, Compression
    from ultrarag.encode.corpus import EncodedCorpus, ModelChoice, encode_corpus
else:
    __getattr__, __dir__, __all__ = exports(__name__)
