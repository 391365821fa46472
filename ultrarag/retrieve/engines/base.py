"""What every vector engine does, and the checks that all of them share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ultrarag.errors import FingerprintError, IndexStateError, UsageError
from ultrarag.io import write_bytes
from ultrarag.retrieve.ranking import Scored
from ultrarag.retrieve.search import Filter
from ultrarag.types import Embeddings

SCHEMA_FILE = "schema.json"
FORMAT = 1

#: Called about once a second with the seconds passed.
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Schema:
    """Which heads an engine stores, and of which encoder."""

    #: width of the dense vectors; None without that head
    dense: int | None = None
    sparse: bool = False
    #: width of the token vectors; None without that head
    colbert: int | None = None
    #: of the encoder whose vectors these are; no other encoder's may be mixed in
    fingerprint: str = ""

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads stored, in the order of `ultrarag.types.HEADS`."""
        held = {"dense": self.dense, "sparse": self.sparse, "colbert": self.colbert}
        return tuple(name for name, value in held.items() if value)

    @staticmethod
    def of(embeddings: Embeddings, fingerprint: str = "") -> Schema:
        """The schema that fits these Embeddings."""
        width = {name: getattr(embeddings, name) for name in ("dense", "colbert")}
        return Schema(
            sparse=embeddings.sparse is not None,
            fingerprint=fingerprint,
            **{name: None if array is None else int(array.shape[-1]) for name, array in width.items()},
        )

    def check_fingerprint(self, fingerprint: str | None, directory: Path) -> None:
        """Raise FingerprintError when a fingerprint is given and is not the one stored."""
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise FingerprintError(
                f"'{directory}' holds vectors of the encoder {self.fingerprint or '(unnamed)'}, not of {fingerprint}; "
                f"open it with the encoder that built it, or build a new generation"
            )


class Backend(Protocol):
    """A vector engine over one directory: the vectors of one encoder, and facts of the metadata for filters.

    Scores are raw inner products; nothing is normalised. Ids are any non-empty strings. A write is seen by the
    next search and survives a crash once `flush` has returned; writes are idempotent, so that a write log can be
    replayed over them. Searches may run in many threads.
    """

    directory: Path
    schema: Schema

    @classmethod
    def create(cls, directory: Path, schema: Schema) -> Backend:
        """Create an empty engine; see `ultrarag.retrieve.engines.create`."""
        ...

    @classmethod
    def open(cls, directory: Path, schema: Schema, verify: bool = True, read_only: bool = False) -> Backend:
        """Open an engine; see `ultrarag.retrieve.engines.open_backend`."""
        ...

    def upsert(self, ids: Sequence[str], embeddings: Embeddings, payloads: Sequence[Mapping[str, Any]]) -> None:
        """Insert passages, or replace those with the same id; of an id twice in one call the last wins.

        `embeddings` hold exactly the heads of the schema, a row per id; `payloads` the metadata of each.
        """
        ...

    def delete(self, ids: Sequence[str]) -> None:
        """Delete passages; ids that are not stored are ignored."""
        ...

    def search_dense(self, vector: np.ndarray, k: int, filter: Filter = None, exact: bool = False) -> list[Scored]:
        """The k passages with the highest inner product with `vector`, (dim,); `exact` compares with all."""
        ...

    def search_sparse(
        self, token_ids: Sequence[int], weights: Sequence[float], k: int, filter: Filter = None
    ) -> list[Scored]:
        """The k passages that share a token id with the query, by inner product of their lexical weights; exact."""
        ...

    def search_tokens(self, tokens: np.ndarray, k: int, filter: Filter = None, exact: bool = False) -> list[Scored]:
        """The k passages with the highest MaxSim with query tokens, (tokens, dim); compares with all.

        One that has `finds_tokens` compares with the best candidates, and with all where `exact`.

        None for a query without tokens, and none of the passages that have no tokens.
        """
        ...

    def score_dense(self, vector: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """Inner products with given passages, (len(ids),); NaN for an id that is not stored."""
        ...

    def score_sparse(self, token_ids: Sequence[int], weights: Sequence[float], ids: Sequence[str]) -> np.ndarray:
        """Lexical scores of given passages, (len(ids),); 0 without a common token, NaN for an unknown id."""
        ...

    def maxsim(self, tokens: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """MaxSim of query tokens, (tokens, dim), with given passages, (len(ids),); NaN for an unknown id.

        The mean over the query's tokens of the best inner product with any of the passage's, as
        `ultrarag.scores.colbert_scores`; 0 for a query or a passage without tokens.
        """
        ...

    def count(self) -> int:
        """The number of passages stored."""
        ...

    def ids(self) -> Iterator[str]:
        """Iterate over the ids stored, in no order."""
        ...

    def vectors(self, ids: Sequence[str]) -> Embeddings:
        """What is stored for these ids, a row each (for checks); UsageError for an unknown id."""
        ...

    def flush(self) -> None:
        """Make every write so far durable."""
        ...

    def optimize(self, progress: Progress | None = None) -> None:
        """Build the approximate index and give back the space of what was deleted; not searchable meanwhile."""
        ...

    def close(self) -> None:
        """Flush, and let another owner open the directory; closing twice is harmless."""
        ...


def write_schema(directory: Path, backend: str, schema: Schema) -> None:
    """Prepare a missing or empty directory for an engine."""
    if not schema.heads:
        raise UsageError("a backend stores at least one head: dense, sparse or colbert")
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise IndexStateError(f"'{directory}' is not empty; open what it holds, or name another directory")
    content = {"format": FORMAT, "backend": backend, **asdict(schema)}
    write_bytes(directory / SCHEMA_FILE, json.dumps(content, indent=2).encode())


def read_schema(directory: Path) -> tuple[str, Schema]:
    """Return the name of the backend that a directory holds, and its schema."""
    path = directory / SCHEMA_FILE
    try:
        content = json.loads(path.read_bytes())
        name, version = content.pop("backend"), content.pop("format")
        schema = Schema(**content)
    except FileNotFoundError:
        raise IndexStateError(f"'{directory}' holds no vectors: '{SCHEMA_FILE}' is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IndexStateError(f"'{path}' is damaged ({error}); restore it, or rebuild the index") from None
    if version != FORMAT:
        raise IndexStateError(f"'{path}' has format {version}; this version of ultrarag reads format {FORMAT}")
    return name, schema
