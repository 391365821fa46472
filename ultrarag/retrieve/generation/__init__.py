"""The room of a generation: (encoder, vectors) pairs, from a line in the catalog to the flip that makes one live.

A checkpoint's copy and the write log come in; a pair in service goes out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.retrieve.generation.catalog import COLUMNS, Catalog, Generation, Layout
    from ultrarag.retrieve.generation.gate import Gate
    from ultrarag.retrieve.generation.open import REPAIR, lay_out, open_serving, open_words
    from ultrarag.retrieve.generation.replay import Follower, Vectors
    from ultrarag.retrieve.generation.serving import Serving
    from ultrarag.retrieve.generation.source import (
        Source,
        copy_checkpoint,
        end,
        enter,
        finish,
        prepare,
        run_builder,
        stored_heads,
    )
    from ultrarag.retrieve.generation.status import describe, read_passages, read_status
    from ultrarag.retrieve.generation.swap import Flip, Note, go_live
else:
    __getattr__, __dir__, __all__ = exports(__name__)
