"""Vector engines: each stores the Embeddings of one encoder, behind the protocol of `base`.

Embeddings and facts come in; ids with scores go out. A folder holds each engine of more than one file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.retrieve.engines.address import CLIENTS, Address, is_uri, parse_uri, with_quantise
    from ultrarag.retrieve.engines.base import SCHEMA_FILE, read_schema, write_schema
    from ultrarag.retrieve.engines.held import held_vectors, kept
    from ultrarag.retrieve.engines.registry import (
        Backend,
        Schema,
        create,
        default_backend,
        next_backend,
        open_backend,
        remove,
        settled,
    )
    from ultrarag.retrieve.engines.server import (
        COLLECTION_FILE,
        REQUEST_POINTS,
        ServerError,
        collection_of,
        name_collection,
        requests,
    )
else:
    __getattr__, __dir__, __all__ = exports(__name__)
