"""A Milvus server through its client: connection, what errors mean, and schema, filter and passage in its terms.

Milvus has no vector of vectors that all its versions know (Milvus Lite loses arrays of structs without a word), so
token vectors are in a second collection, several to a row. What a filter tests is one array of short words under an
inverted index: facts, and numbers as in `ranges`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from grpc import RpcError
from pymilvus import DataType, MilvusClient, MilvusException
from pymilvus.exceptions import ErrorCode

from ultrarag.errors import DataError
from ultrarag.retrieve.engines.address import Address
from ultrarag.retrieve.engines.arrays import sparse_rows, token_rows
from ultrarag.retrieve.engines.base import Schema
from ultrarag.retrieve.engines.qdrant import covering, key, prefixes
from ultrarag.retrieve.engines.server import Clients, Connection, uninterrupted
from ultrarag.retrieve.search import AllOf, AnyOf, HasFact, Node, Not, facts
from ultrarag.types import Embeddings

#: What pymilvus says when the server is away.
_AWAY = ("UNAVAILABLE", "Connection refused", "server unavailable", "StatusCode.CANCELLED")
#: The code of a collection that has to be loaded, as after its server was started again.
_NOT_LOADED = 101
#: Every read sees every write before it.
STRONG: dict[str, Any] = {"consistency_level": "Strong"}

_Result = TypeVar("_Result")

logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it prints every error, with its trace, before raising it


def connect(address: Address) -> MilvusClient:
    """Connect; the server must answer."""
    return MilvusClient(
        uri=address.url,
        token=address.secret() or "",
        db_name=address.database,
        timeout=address.timeout,
        dedicated=True,
        grpc_options={"grpc.keepalive_time_ms": 300_000},  # every 10 s, its default, makes servers hang up on it
    )


class MilvusConnection(Connection):
    """A client of Milvus, which of its errors pass, and what the others are to say."""

    clients = Clients(connect)

    @property
    def _time(self) -> dict[str, float]:
        """What a single try may take; pymilvus tries again by itself within it."""
        return {"timeout": self.address.timeout}

    def _run(self, work: Callable[[], _Result]) -> _Result:
        return uninterrupted(work, 2 * self.address.timeout)

    def _load(self) -> None:
        self._call(lambda client: client.load_collection(self.collection, **self._time))

    def _pause_after(self, error: Exception) -> float | None:
        if isinstance(error, MilvusException) and error.code == _NOT_LOADED:
            self._load()
            return 0.0
        limited = isinstance(error, MilvusException) and error.code == ErrorCode.RATE_LIMIT
        return 0.0 if limited or _unavailable(error) else None

    def _named(self, error: Exception) -> Exception:
        if isinstance(error, MilvusException | RpcError):
            return self._say(getattr(error, "message", None) or error)
        return error


def _unavailable(error: Exception) -> bool:
    """Tell whether the server is away; pymilvus closes the channel under other threads while it connects again."""
    if isinstance(error, ValueError):
        return "closed channel" in str(error)
    text = str(error)
    return isinstance(error, MilvusException | RpcError) and any(part in text for part in _AWAY)


#: Edges per node and candidates while building, as in the other engines.
HNSW_M, HNSW_EF_CONSTRUCT = 16, 128
#: The index over dense vectors by what is kept of them, and since when Milvus has it.
INDEXES = {"": "HNSW", "int8": "HNSW_SQ", "binary": "IVF_RABITQ"}
SINCE = {"int8": "2.5", "binary": "2.6"}
#: Lists of each segment of a million vectors or fewer; Milvus takes fewer where they would hold less than 39 each.
LISTS = 1024
#: Longest string and array that Milvus takes.
LONGEST, MOST_WORDS = 65_535, 4_096
#: Token vectors to a row, and the widest vector that Milvus takes.
CHUNK_TOKENS, WIDEST = 32, 32_768
#: A dimension that no query has: Milvus Lite drops rows whose sparse vector is empty.
NOTHING = {(1 << 32) - 2: 1.0}
_KEY_LENGTH = 48


def main_schema(schema: Schema, quantise: str = "") -> Any:
    """The fields of a passage; dense vectors whose codes are searched are mapped from the server's disk."""
    fields = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    fields.add_field("key", DataType.VARCHAR, is_primary=True, max_length=_KEY_LENGTH)
    fields.add_field("id", DataType.VARCHAR, max_length=LONGEST)
    fields.add_field(
        "facts", DataType.ARRAY, element_type=DataType.VARCHAR, max_capacity=MOST_WORDS, max_length=_KEY_LENGTH
    )
    fields.add_field("tokens", DataType.INT64)
    if schema.dense:
        on_disk = {"mmap_enabled": True} if quantise else {}
        fields.add_field("dense", DataType.FLOAT_VECTOR, dim=schema.dense, **on_disk)
    if schema.sparse or not schema.dense:  # a collection has a vector
        fields.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
    return fields


def main_indexes(schema: Schema, quantise: str = "") -> Any:
    """A graph for dense vectors, over their bytes where they are quantised so, or lists of their bits; inverted lists
    for lexical weights."""
    indexes = MilvusClient.prepare_index_params()
    if schema.dense:
        graph = {"M": HNSW_M, "efConstruction": HNSW_EF_CONSTRUCT}
        params: dict[str, dict[str, Any]] = {"": graph, "int8": {**graph, "sq_type": "SQ8"}, "binary": {"nlist": LISTS}}
        indexes.add_index("dense", index_type=INDEXES[quantise], metric_type="IP", params=params[quantise])
    if schema.sparse or not schema.dense:
        indexes.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
    return indexes


def tokens_schema(schema: Schema, quantise: str = "") -> Any:
    """The fields of some token vectors of a passage, one behind the other in one long vector.

    They are fetched and never searched, so that they need no codes: with quantised dense vectors they are mapped.
    """
    assert schema.colbert
    fields = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    fields.add_field("key", DataType.VARCHAR, is_primary=True, max_length=_KEY_LENGTH)
    fields.add_field("passage", DataType.VARCHAR, max_length=_KEY_LENGTH)
    on_disk = {"mmap_enabled": True} if quantise else {}
    fields.add_field("vectors", DataType.FLOAT_VECTOR, dim=tokens_per_row(schema.colbert) * schema.colbert, **on_disk)
    return fields


def tokens_indexes(quantise: str = "") -> Any:
    """Milvus loads no collection without an index on its vectors; nobody searches these."""
    indexes = MilvusClient.prepare_index_params()
    params = {"mmap.enabled": True} if quantise else {}
    indexes.add_index("vectors", index_type="FLAT", metric_type="IP", params=params)
    return indexes


def word_index(field: str) -> Any:
    """An inverted index over words, which must be there before the rows."""
    indexes = MilvusClient.prepare_index_params()
    indexes.add_index(field, index_type="INVERTED")
    return indexes


def tokens_per_row(width: int) -> int:
    """How many token vectors go into one row."""
    return max(1, min(CHUNK_TOKENS, WIDEST // width))


def main_rows(ids: Sequence[str], batch: Embeddings, payloads: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each passage."""
    rows: list[dict[str, Any]] = []
    for id, payload in zip(ids, payloads, strict=True):
        if len(name := json.dumps(id)) > LONGEST:
            raise DataError(f"passage '{id[:50]}...': its id has {len(name)} characters; Milvus takes {LONGEST}")
        rows.append({"key": key(id), "id": name, "facts": words(id, payload), "tokens": 0})
    if batch.dense is not None:
        for row, vector in zip(rows, batch.dense, strict=True):
            row["dense"] = np.ascontiguousarray(vector, np.float32)
    if batch.sparse is not None:
        for row, (tokens, weights) in zip(rows, sparse_rows(ids, batch.sparse), strict=True):
            row["sparse"] = dict(zip(tokens.tolist(), weights.tolist(), strict=True)) or NOTHING
    elif batch.dense is None:
        for row in rows:
            row["sparse"] = NOTHING
    return rows


def token_rows_of(rows: list[dict[str, Any]], batch: Embeddings, width: int) -> list[dict[str, Any]]:
    """The rows with the token vectors of passages, whose own rows then hold how many there are."""
    found = []
    step = tokens_per_row(width)
    for row, tokens in zip(rows, token_rows(batch), strict=True):
        row["tokens"] = len(tokens)
        for number, start in enumerate(range(0, len(tokens), step)):
            vectors = np.zeros((step, width), np.float32)
            vectors[: len(tokens) - start] = tokens[start : start + step]
            found.append({"key": token_key(row["key"], number), "passage": row["key"], "vectors": vectors.ravel()})
    return found


def token_key(passage: str, number: int) -> str:
    """The key of the row with the n-th chunk of a passage's tokens."""
    return f"{passage}:{number}"


def words(id: str, metadata: Mapping[str, Any]) -> list[str]:
    """What a filter can ask of a passage."""
    found: dict[str, None] = {}
    for fact, value in facts(metadata):
        for word in prefixes(fact, value) if fact[0] in "#@" else [fact]:
            found[short(word)] = None
    if len(found) > MOST_WORDS:
        raise DataError(
            f"passage '{id}': its metadata needs {len(found)} entries (1 for a value, 16 for a number); Milvus "
            f"filters by {MOST_WORDS} at most"
        )
    return list(found)


def expression(node: Node) -> str:
    """Translate a filter's tree."""
    if isinstance(node, Not):
        return f"not ({expression(node.node)})"
    if isinstance(node, AllOf | AnyOf):
        join = " and " if isinstance(node, AllOf) else " or "
        return "(" + join.join(expression(child) for child in node.nodes) + ")"
    wanted = node.facts if isinstance(node, HasFact) else covering(node)
    # an empty range holds nothing, and no passage has the word for it
    return f"array_contains_any(facts, {quoted([short(word) for word in wanted or ['']])})"


def quoted(names: Sequence[str]) -> str:
    """Strings without quotes and backslashes as a list in an expression."""
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"


def short(word: str) -> str:
    """16 characters that stand for a fact; 96 bits, so that two never meet."""
    return urlsafe_b64encode(hashlib.blake2b(word.encode(), digest_size=12).digest()).decode()


def lexical_row(vector: Mapping[int, float] | None) -> tuple[np.ndarray, np.ndarray]:
    """The token ids, ascending, and weights of a stored vector."""
    held = sorted((int(token), weight) for token, weight in (vector or {}).items() if int(token) not in NOTHING)
    return np.array([t for t, _ in held], np.int64), np.array([w for _, w in held], np.float32)
