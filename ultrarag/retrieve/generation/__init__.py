"""Generation: (encoder, vectors) pairs, from a line in the catalog to a pair in service.

A checkpoint's copy and the write log come in; a draft to be built, or a pair that answers searches, goes out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.retrieve.generation.catalog import (
        COLUMNS,
        VECTORS,
        Catalog,
        Generation,
        IndexLayout,
        Origin,
        Progress,
        note_live,
        note_vectors,
    )
    from ultrarag.retrieve.generation.open import REPAIR, lay_out, open_serving, open_words
    from ultrarag.retrieve.generation.replay import Follower, GenerationVectors, Unencoded
    from ultrarag.retrieve.generation.serving import Serving, VectorSet
    from ultrarag.retrieve.generation.source import (
        Draft,
        Source,
        consent,
        encoded_of,
        find_source,
        generation_adapter,
        identity_of,
        inherit_consent,
        load_encoder,
        prepare,
        publish,
        quantise_own,
        stored_heads,
    )
else:
    __getattr__, __dir__, __all__ = exports(__name__)
