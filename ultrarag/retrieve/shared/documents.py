"""What a shared index asks of its server beside vectors: numbered documents, and names that only one can take."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ultrarag.errors import UsageError
from ultrarag.optional import install
from ultrarag.retrieve.engines import CLIENTS, Address, parse_uri

#: Numbers asked for at a time.
WINDOW = 256

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
        """Create an empty collection; False where another did, told apart by their marks (letters and digits)."""
        ...

    def collections(self) -> list[str]:
        """The names of all collections of the server."""
        ...

    def drop(self, name: str) -> None:
        """Delete a collection, if it is there."""
        ...

    def close(self) -> None:
        """Let go of the connection."""
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


def leases(names: Iterable[str], name: str) -> list[int]:
    """The numbers of the leases of an index, among names of collections."""
    return sorted(int(found[1]) for each in names if (found := re.fullmatch(rf"{name}_lease_(\d+)", each)))


def vector_collections(names: Iterable[str], name: str) -> list[str]:
    """The collections of an index that hold vectors, token vectors included."""
    return [each for each in names if re.fullmatch(rf"{name}_[0-9a-f]{{12}}(_tokens)?", each)]
