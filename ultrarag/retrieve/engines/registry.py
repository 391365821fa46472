"""Vector engines: each stores the Embeddings of one encoder, behind the protocol of `base`.

An embedded engine keeps them in a directory; for a server, named by a URI, the directory says which collection they
are in (docs/backends.md).

backend = create("kb/vectors", Schema(dense=384, fingerprint=encoder.fingerprint))
backend.upsert(["1"], encoder.encode(["..."]), [{"lang": "en"}])
backend.flush()
backend.search_dense(vector, k=10, filter={"lang": "en"})
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ultrarag.errors import UsageError, did_you_mean
from ultrarag.packages import install
from ultrarag.retrieve.engines.address import CLIENTS, is_uri, parse_uri
from ultrarag.retrieve.engines.base import Backend, Schema, read_schema
from ultrarag.retrieve.engines.server import COLLECTION_FILE

#: Name -> where its class is; imported when first needed, for an engine may be missing on a platform.
BACKENDS = {
    "qdrant-edge": "ultrarag.retrieve.engines.qdrant.embedded:QdrantEdge",
    "numpy": "ultrarag.retrieve.engines.numpy_engine:NumpyBackend",
    "ivf": "ultrarag.retrieve.engines.ivf.engine:IVF",
    "plaid": "ultrarag.retrieve.engines.plaid.engine:Plaid",
}

#: What an embedded engine may be told, behind its name (plaid?bits=4): the values of each option, the default first.
OPTIONS: dict[str, dict[str, tuple[int, ...]]] = {"plaid": {"bits": (2, 3, 4), "rest": (8, 0)}}

#: The same for servers, by the scheme of their URI.
SERVERS = {
    "qdrant": "ultrarag.retrieve.engines.qdrant.server:QdrantServer",
    "milvus": "ultrarag.retrieve.engines.milvus.server:MilvusServer",
}

#: Passages from which on a build that names no engine takes `ivf` (docs/backends.md has what was measured).
LARGE = 100_000

__all__ = [
    "BACKENDS",
    "SERVERS",
    "Backend",
    "Schema",
    "create",
    "default_backend",
    "next_backend",
    "open_backend",
    "remove",
    "settled",
]

logger = logging.getLogger("ultrarag")


def default_backend() -> str:
    """The embedded engine where its wheel is installed, the numpy reference elsewhere."""
    return "qdrant-edge" if importlib.util.find_spec("qdrant_edge") else "numpy"


def next_backend(live: str, passages: int) -> str:
    """The engine of a build with dense vectors that names none: the live one, but `ivf` for many in the default engine.

    Without faiss it is the live one all the same, and a warning says so once.
    """
    if live != default_backend() or passages < LARGE:
        return live
    if importlib.util.find_spec("faiss"):
        return "ivf"
    _tell_of_faiss(live)
    return live


@lru_cache
def _tell_of_faiss(live: str) -> None:
    logger.warning(
        "from %d passages on the engine 'ivf' is built faster than '%s' and takes less memory, after: %s",
        LARGE,
        live,
        install("faiss-cpu", "numba"),
    )


def create(directory: str | Path, schema: Schema, backend: str | None = None) -> Backend:
    """Create an empty engine in a directory that is missing or empty.

    Args:
        backend: the name of an embedded engine, or the URI of a server (see `uri`); default: `default_backend`.

    Raises:
        UsageError: when there is no backend of that name, its client is not installed, or the schema has no head.
        IndexStateError: when the directory already holds something, or the server does not answer.
    """
    name = settled(backend or default_backend())
    if is_uri(name):
        made: Backend = _server(name).create_at(Path(directory), schema, name)
        return made
    return _load(name).create(Path(directory), schema, **_options(name))


def open_backend(
    directory: str | Path, fingerprint: str | None = None, verify: bool = True, read_only: bool = False
) -> Backend:
    """Open the engine that a directory holds; `verify` compares its files with their checksums first.

    Args:
        read_only: for searches alone; nothing in the directory changes, and others may read it as well.

    Raises:
        ResourceError: when the machine does not allow it now; nothing is damaged then.
        IndexStateError: when the directory holds no engine, is in use by another owner, or has a damaged file; when
            the server does not answer, or has lost the collection.
        FingerprintError: when its vectors were made by an encoder with another fingerprint.
    """
    name, schema = read_schema(Path(directory))
    schema.check_fingerprint(fingerprint, Path(directory))
    if is_uri(name):
        opened: Backend = _server(name).open_at(Path(directory), schema, name, read_only)
        return opened
    return _load(name).open(Path(directory), schema, verify, read_only, **_options(name))


def remove(directory: str | Path) -> None:
    """Delete a directory and, where its vectors are in a server, the collection there.

    Raises:
        IndexStateError: when the server does not answer; nothing is deleted then.
    """
    directory = Path(directory)
    if (directory / COLLECTION_FILE).exists():
        name, schema = read_schema(directory)
        _server(name).drop_at(directory, schema, name)
    shutil.rmtree(directory, ignore_errors=True)


def check_backend(name: str) -> None:
    """Raise UsageError unless there is an engine of that name, or at that URI."""
    if is_uri(name):
        parse_uri(name)
        _server(name)
    elif _engine(name) in BACKENDS:
        _options(name)
    else:
        raise UsageError(
            f"no backend '{name}'{did_you_mean(_engine(name), BACKENDS)}; known: {', '.join(BACKENDS)}, and URIs such "
            f"as qdrant://localhost:6333 and milvus://localhost:19530"
        )


def settled(name: str) -> str:
    """The name of an engine with all its options: those that it leaves out have their defaults.

    A generation has this name, so that a later default does not change what an earlier one means: an option that a
    stored name leaves out is one that did not exist then.
    """
    known = OPTIONS.get(_engine(name), {})
    if is_uri(name) or not known:
        return name
    given = _options(name)
    return f"{_engine(name)}?" + "&".join(f"{option}={given.get(option, known[option][0])}" for option in known)


def _engine(name: str) -> str:
    return name.partition("?")[0]


def _options(name: str) -> dict[str, Any]:
    """The options behind the name of an embedded engine; of one that has any, also the whole name.

    Raises:
        UsageError: there is no such option, or it does not have that value.
    """
    engine, _, query = name.partition("?")
    known, found = OPTIONS.get(engine, {}), {}
    for option, value in parse_qsl(query, keep_blank_values=True):
        if option not in known:
            raise UsageError(
                f"'{name}': the engine '{engine}' has no option '{option}'{did_you_mean(option, known)}; "
                f"known: {', '.join(known) or 'none'}"
            )
        if value not in map(str, known[option]):
            raise UsageError(f"'{name}': {option} is '{value}'; it must be {' or '.join(map(str, known[option]))}")
        found[option] = int(value)
    return {**found, "name": name} if known else {}


def _server(uri: str) -> Any:
    engine = parse_uri(uri).engine
    try:
        return _imported(SERVERS[engine])
    except ModuleNotFoundError as error:
        raise UsageError(f"'{uri}' needs {error.name}: {install(CLIENTS[engine])}") from error


def _load(name: str) -> Any:
    check_backend(name)
    return _imported(BACKENDS[_engine(name)])


def _imported(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)
