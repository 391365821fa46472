"""Documents in a Milvus server: rows with a vector of zeros, for Milvus knows no rows without one.

A field holds 65,535 bytes at most. What is longer lies in further rows, written before the first one, which says how
many they are: replacing the first row replaces the document in one step.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from pymilvus import DataType, MilvusClient

from ultrarag.retrieve.engines import REQUEST_POINTS, Address, ServerError, requests
from ultrarag.retrieve.engines.milvus import STRONG, MilvusConnection, quoted
from ultrarag.retrieve.shared.documents import Document

#: Characters of a document in one row; of four bytes each they still fit.
CHUNK_CHARACTERS = 16_000
_FIELDS = ["key", "owner", "seq", "number", "parts", "body"]
_NOTHING = [0.0, 0.0]


def open_documents(address: Address, collection: str) -> MilvusDocuments:
    """Connect; the server must answer."""
    return MilvusDocuments(address, collection, address.uri)


class MilvusDocuments(MilvusConnection):
    """The documents of one collection."""

    def create(self) -> None:
        """Create the collection unless it is there, and load it."""
        if not self._exists(self.collection):
            self._make(self.collection, _schema())
        if not self._call(lambda client: client.list_indexes(self.collection)):
            indexes = MilvusClient.prepare_index_params()
            indexes.add_index("nothing", index_type="FLAT", metric_type="IP")
            self._call(lambda client: client.create_index(self.collection, indexes, sync=False, **self._time))
        self._load()

    def put(self, documents: Sequence[Document]) -> None:
        """Write the further rows of all documents, then their first rows in their order; then prune older ones."""
        rows = [row for document in documents for row in _rows(document)]
        for part in requests([row for row in rows if row["number"]], lambda row: len(row["body"]) // 4):
            self._upsert(part)
        for part in requests([row for row in rows if not row["number"]], lambda row: len(row["body"]) // 4):
            self._upsert(part)
        self._prune([document.key for document in documents], min((d.seq for d in documents), default=0))

    def get(self, keys: Sequence[str]) -> dict[str, Document]:
        """Ask for first rows, then for the further ones that they count."""
        rows: list[dict[str, Any]] = []
        for start in range(0, len(keys), REQUEST_POINTS):
            rows += self._query(f"key in {quoted(list(keys[start : start + REQUEST_POINTS]))}")
        rest = [_key(row["key"], row["seq"], n) for row in rows for n in range(1, row["parts"])]
        for start in range(0, len(rest), REQUEST_POINTS):
            rows += self._query(f"key in {quoted(rest[start : start + REQUEST_POINTS])}")
        return {document.key: document for document in _whole(rows)}

    def between(self, after: int, until: int) -> list[Document]:
        """Ask for rows by their numbers."""
        return sorted(_whole(self._query(f"seq > {after} and seq <= {until}")), key=lambda document: document.seq)

    def delete(self, keys: Sequence[str]) -> None:
        """Delete rows."""
        self._delete(f"key in {quoted(list(keys))}")
        self._delete(f"owner in {quoted(list(keys))}")

    def claim(self, name: str, mark: str) -> bool:
        """Create a collection with a vector called `mark`."""
        schema = MilvusClient.create_schema()
        schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=8)
        schema.add_field(mark, DataType.FLOAT_VECTOR, dim=2)
        try:
            self._make(name, schema)
        except ServerError:
            if not self._appears(name):
                raise
        found = self._call(lambda client: client.describe_collection(name, **self._time))
        return mark in [field["name"] for field in found["fields"]]

    def collections(self) -> list[str]:
        """Ask for all names."""
        return list(self._call(lambda client: client.list_collections(**self._time)))

    def drop(self, name: str) -> None:
        """Delete a collection."""
        self._call(lambda client: client.drop_collection(name, **self._time))

    def _exists(self, name: str) -> bool:
        return bool(self._call(lambda client: client.has_collection(name, **self._time)))

    def _appears(self, name: str) -> bool:
        """Whether a collection is there; one that another process is creating may need a moment."""
        deadline = time.monotonic() + min(2.0, self.address.timeout)
        while not (there := self._exists(name)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return there

    def _make(self, name: str, schema: Any) -> None:
        try:
            self._call(lambda client: client.create_collection(name, schema=schema, **STRONG, **self._time))
        except ServerError:
            if name != self.collection or not self._exists(name):
                raise

    def _upsert(self, rows: list[dict[str, Any]]) -> None:
        self._call(lambda client: client.upsert(self.collection, rows, **self._time))

    def _delete(self, condition: str) -> None:
        self._call(lambda client: client.delete(self.collection, filter=condition, **self._time))

    def _prune(self, keys: Sequence[str], before: int) -> None:
        """Delete the further rows that documents had before."""
        for start in range(0, len(keys), REQUEST_POINTS):
            self._delete(f"owner in {quoted(list(keys[start : start + REQUEST_POINTS]))} and seq < {before}")

    def _query(self, condition: str) -> list[dict[str, Any]]:
        return list(
            self._call(
                lambda client: client.query(
                    self.collection, filter=condition, output_fields=_FIELDS, **STRONG, **self._time
                )
            )
        )


def _schema() -> Any:
    schema = MilvusClient.create_schema()
    schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=100)
    schema.add_field("owner", DataType.VARCHAR, max_length=100)  # of a further row: the key of the first
    schema.add_field("seq", DataType.INT64)
    schema.add_field("number", DataType.INT64)
    schema.add_field("parts", DataType.INT64)
    schema.add_field("body", DataType.VARCHAR, max_length=65_535)
    schema.add_field("nothing", DataType.FLOAT_VECTOR, dim=len(_NOTHING))
    return schema


def _rows(document: Document) -> list[dict[str, Any]]:
    texts = [
        document.body[start : start + CHUNK_CHARACTERS] for start in range(0, len(document.body), CHUNK_CHARACTERS)
    ] or [""]
    return [
        {
            "key": document.key if number == 0 else _key(document.key, document.seq, number),
            "owner": document.key if number else "",
            "seq": document.seq,
            "number": number,
            "parts": len(texts),
            "body": text,
            "nothing": _NOTHING,
        }
        for number, text in enumerate(texts)
    ]


def _key(owner: str, seq: int, number: int) -> str:
    return f"{owner}#{seq}#{number}"


def _whole(rows: Iterable[dict[str, Any]]) -> list[Document]:
    """Put documents together; one whose first row is newer or older than the others is left out."""
    held = {row["key"]: row for row in rows}
    found = []
    for row in held.values():
        if row["number"]:
            continue
        keys = [row["key"], *(_key(row["key"], row["seq"], number) for number in range(1, row["parts"]))]
        if all(key in held for key in keys):
            found.append(Document(row["key"], row["seq"], "".join(held[key]["body"] for key in keys)))
    return found
