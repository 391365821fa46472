"""What a shared index keeps in its server beside vectors: documents, names that only one can take, and a state.

The documents are the passages, with their place in the write log, and the state: what the processes know beside the
passages, one document that whoever holds the lease rewrites.
"""

from __future__ import annotations

import importlib
import json
import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from ultrarag.errors import IndexStateError, UsageError
from ultrarag.packages import install
from ultrarag.retrieve.engines import CLIENTS, Address, parse_uri

#: Of the state document; 2 where a generation shares or maps vectors, or its encoder has two sides, which version 1
#: does not know; 3 where one is quantised.
FORMAT, SHARING, QUANTISING = 1, 2, 3
#: Log entries asked for at a time.
CHUNK_ENTRIES = 256

_SPACE = uuid.UUID("7a0d6f0e-5d0c-4f57-9d55-3a6ff2a7d9b1")
_PLACES = {
    "qdrant": "ultrarag.retrieve.shared.qdrant",
    "milvus": "ultrarag.retrieve.shared.milvus",
}


@dataclass(frozen=True)
class Document:
    """Something stored under a key; writing the key again replaces it."""

    #: a UUID
    key: str
    seq: int
    #: JSON of any length
    body: str


class Documents(Protocol):
    """The documents of one collection, and the names of all collections of its server."""

    address: Address
    collection: str

    def create(self) -> None:
        """Create the collection unless it is there."""
        ...

    def put(self, documents: Sequence[Document]) -> None:
        """Write documents in their order; each is seen whole or not at all, by every read that follows."""
        ...

    def get(self, keys: Sequence[str]) -> dict[str, Document]:
        """The documents of these keys that exist."""
        ...

    def between(self, after: int, until: int) -> list[Document]:
        """The documents with after < seq <= until, by seq; one that is just being replaced may be missing."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Delete documents; unknown keys are ignored."""
        ...

    def claim(self, name: str, mark: str) -> bool:
        """Create an empty collection; False where another did, known by its mark (letters and digits)."""
        ...

    def collections(self) -> list[str]:
        """The names of all collections of the server."""
        ...

    def drop(self, name: str) -> None:
        """Delete a collection, if it is there."""
        ...

    def close(self) -> None:
        """Release the connection."""
        ...

    def __enter__(self) -> Documents: ...

    def __exit__(self, *exception: object) -> None: ...


def open_documents(uri: str, kind: str) -> Documents:
    """Connect to the documents of a shared index: its "passages" or its "states"."""
    address = parse_uri(uri)
    try:
        module = importlib.import_module(_PLACES[address.engine])
    except ModuleNotFoundError as error:
        raise UsageError(f"'{uri}' needs {error.name}: {install(CLIENTS[address.engine])}") from error
    documents: Documents = module.open_documents(address, f"{address.name}_{kind}")
    return documents


def lease_numbers(names: Iterable[str], name: str) -> list[int]:
    """The numbers of the leases of an index, among names of collections."""
    return sorted(int(found[1]) for each in names if (found := re.fullmatch(rf"{name}_lease_(\d+)", each)))


def vector_collections(names: Iterable[str], name: str) -> list[str]:
    """The collections of an index that hold vectors, token vectors included."""
    return [each for each in names if re.fullmatch(rf"{name}_[0-9a-f]{{12}}(_tokens)?", each)]


class VectorSchema(BaseModel):
    """The heads of a collection; see `ultrarag.retrieve.engines.Schema`."""

    model_config = ConfigDict(extra="forbid")
    dense: int | None = None
    sparse: bool = False
    colbert: int | None = None
    fingerprint: str


class SharedRow(BaseModel):
    """A generation, as `ultrarag.retrieve.generation.catalog.Generation`, and where it is."""

    model_config = ConfigDict(extra="forbid")
    id: int
    fingerprint: str
    state: str
    heads: list[str]
    precision: str
    base_seq: int
    applied_seq: int
    created: str
    forced: bool
    metrics: dict[str, Any]
    #: "" while it is being built
    collection: str = ""
    vectors: VectorSchema | None = None
    #: what follows is left out where it says nothing: "", 0 and None are what version 1 has
    passage_fingerprint: str = ""
    vectors_of: int = 0
    mapped_from: int | None = None
    #: what the server keeps in memory of its vectors, as `ultrarag.retrieve.engines.Address.quantise`
    quantise: str = ""

    @property
    def owner(self) -> int:
        """The generation that made its vectors."""
        return self.vectors_of or self.id

    @model_serializer(mode="wrap")
    def _brief(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = dump(self)
        return {name: value for name, value in found.items() if value or name not in (*_SINCE_2, *_SINCE_3)}


#: Fields of a generation that format 1 does not have, and those that 2 does not have.
_SINCE_2 = ("passage_fingerprint", "vectors_of", "mapped_from")
_SINCE_3 = ("quantise",)


class SharedState(BaseModel):
    """Rewritten with every change and every heartbeat."""

    model_config = ConfigDict(extra="forbid")
    format: int = FORMAT
    #: number of the lease that it was written under
    epoch: int
    #: whom the lease belongs to: "host:pid directory"
    holder: str
    #: counts the writings of this document, so that a heartbeat changes it
    beat: int = 0
    #: the holder has no more use for the lease
    released: bool = False
    #: the last entry of the write log that was acknowledged
    committed: int = 0
    bm25: bool = True
    #: the folder with the checkpoints, as who created the index sees it
    checkpoints: str
    #: the highest number that a generation ever had
    last_generation: int = 0
    generations: list[SharedRow] = []

    @property
    def live(self) -> SharedRow:
        """The generation that answers searches."""
        return next(row for row in self.generations if row.state == "live")

    def document(self) -> Document:
        """To be stored; older versions can read it unless a generation has what they do not know."""
        formats = {SHARING: _SINCE_2, QUANTISING: _SINCE_3}
        needed = [f for f, names in formats.items() for row in self.generations if any(getattr(row, n) for n in names)]
        body = self.model_copy(update={"format": max(needed, default=FORMAT)}).model_dump_json()
        return Document(state_key(self.epoch), self.beat, body)


def state_key(epoch: int) -> str:
    """The key of the state written under a lease."""
    return str(uuid.uuid5(_SPACE, str(epoch)))


def read_state(document: Document, place: str) -> SharedState:
    """Read a stored state.

    Raises:
        IndexStateError: when it is damaged, or of another version.
    """
    try:
        found = SharedState.model_validate_json(document.body)
    except ValidationError as error:
        version = _version(document.body)
        if version not in (None, FORMAT, SHARING, QUANTISING):
            raise IndexStateError(
                f"'{place}' has a shared index of format {version}; this version of ultrarag reads formats {FORMAT} "
                f"to {QUANTISING}: let all its processes use one version"
            ) from None
        raise IndexStateError(f"'{place}': the state of the shared index is damaged: {error}") from None
    return found


def _version(body: str) -> Any:
    try:
        return json.loads(body).get("format")
    except (ValueError, AttributeError):
        return None
