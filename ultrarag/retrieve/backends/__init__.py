"""Vector engines: each stores the Embeddings of one encoder in one directory, behind the protocol of `base`.

backend = create("kb/vectors", Schema(dense=384, fingerprint=encoder.fingerprint))
backend.upsert(["1"], encoder.encode(["..."]), [{"lang": "en"}])
backend.flush()
backend.search_dense(vector, k=10, filter={"lang": "en"})
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from ultrarag.errors import UsageError, did_you_mean
from ultrarag.retrieve.backends.base import Backend, Schema, read_schema

#: Name -> where its class is; imported when first needed, for an engine may be missing on a platform.
BACKENDS = {
    "qdrant-edge": "ultrarag.retrieve.backends.qdrant_edge:QdrantEdge",
    "numpy": "ultrarag.retrieve.backends.numpy_backend:NumpyBackend",
}

__all__ = ["BACKENDS", "Backend", "Schema", "create", "default_backend", "open_backend"]


def default_backend() -> str:
    """The embedded engine where its wheel is installed, the numpy reference elsewhere."""
    return "qdrant-edge" if importlib.util.find_spec("qdrant_edge") else "numpy"


def create(directory: str | Path, schema: Schema, backend: str | None = None) -> Backend:
    """Create an empty engine in a directory that is missing or empty.

    Raises:
        UsageError: when there is no backend of that name, or the schema has no head.
        IndexStateError: when the directory already holds something.
    """
    return _load(backend or default_backend()).create(Path(directory), schema)


def open_backend(directory: str | Path, fingerprint: str | None = None, verify: bool = True) -> Backend:
    """Open the engine that a directory holds; `verify` compares its files with their checksums first.

    Raises:
        IndexStateError: when the directory holds no engine, is in use by another owner, or has a damaged file.
        FingerprintError: when its vectors were made by an encoder with another fingerprint.
    """
    name, schema = read_schema(Path(directory))
    schema.check_fingerprint(fingerprint, Path(directory))
    return _load(name).open(Path(directory), schema, verify)


def _load(name: str) -> type[Backend]:
    if name not in BACKENDS:
        raise UsageError(f"no backend '{name}'{did_you_mean(name, BACKENDS)}; known: {', '.join(BACKENDS)}")
    module, _, attribute = BACKENDS[name].partition(":")
    loaded: type[Backend] = getattr(importlib.import_module(module), attribute)
    return loaded
