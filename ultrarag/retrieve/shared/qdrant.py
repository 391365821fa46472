"""Documents in a Qdrant server: points without vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qdrant_client import models

from ultrarag.retrieve.engines import REQUEST_POINTS, Address, ServerError, requests
from ultrarag.retrieve.engines.qdrant import QdrantConnection
from ultrarag.retrieve.shared.documents import CHUNK_ENTRIES, Document


def open_documents(address: Address, collection: str) -> QdrantDocuments:
    """Connect; nothing is sent yet."""
    return QdrantDocuments(address, collection, address.uri)


class QdrantDocuments(QdrantConnection):
    """The documents of one collection, ordered by an index over their numbers."""

    def create(self) -> None:
        """Create collection and index unless they are there."""
        if not self._exists(self.collection):
            self._make(self.collection, {})
        if self.address.folder is None:  # the local mode has no indexes
            integer = models.PayloadSchemaType.INTEGER
            self._call(lambda client: client.create_payload_index(self.collection, "seq", integer, wait=True))

    def put(self, documents: Sequence[Document]) -> None:
        """Write points, in their order."""
        points = [models.PointStruct(id=d.key, vector={}, payload={"seq": d.seq, "body": d.body}) for d in documents]
        for part in requests(points, lambda point: len((point.payload or {})["body"]) // 8):
            self._call(lambda client, part=part: client.upsert(self.collection, part, wait=True))  # type: ignore[misc]

    def get(self, keys: Sequence[str]) -> dict[str, Document]:
        """Ask for points by their ids."""
        found: dict[str, Document] = {}
        for start in range(0, len(keys), REQUEST_POINTS):
            part = list(keys[start : start + REQUEST_POINTS])
            records = self._call(lambda client, part=part: client.retrieve(self.collection, part))  # type: ignore[misc]
            found.update({str(record.id): _document(record) for record in records})
        return found

    def between(self, after: int, until: int) -> list[Document]:
        """Scroll through points by their numbers."""
        wanted = models.Filter(must=[models.FieldCondition(key="seq", range=models.Range(gt=after, lte=until))])
        found: list[Document] = []
        offset: Any = None
        while True:
            records, offset = self._call(
                lambda client, offset=offset: client.scroll(  # type: ignore[misc]
                    self.collection, wanted, limit=CHUNK_ENTRIES, offset=offset
                )
            )
            found += map(_document, records)
            if offset is None:
                return sorted(found, key=lambda document: document.seq)

    def delete(self, keys: Sequence[str]) -> None:
        """Delete points."""
        selector = models.PointIdsList(points=list(keys))
        self._call(lambda client: client.delete(self.collection, selector, wait=True))

    def claim(self, name: str, mark: str) -> bool:
        """Create a collection whose only vector is called `mark`."""
        one = models.VectorParams(size=1, distance=models.Distance.DOT)
        try:
            self._make(name, {mark: one})
        except (ServerError, ValueError):
            if not self._exists(name):
                raise
        info = self._call(lambda client: client.get_collection(name))
        return list(info.config.params.vectors) == [mark]

    def collections(self) -> list[str]:
        """Ask for all names."""
        return [each.name for each in self._call(lambda client: client.get_collections()).collections]

    def drop(self, name: str) -> None:
        """Delete a collection."""
        self._call(lambda client: client.delete_collection(name))

    def _exists(self, name: str) -> bool:
        return bool(self._call(lambda client: client.collection_exists(name)))

    def _make(self, name: str, vectors: dict[str, models.VectorParams]) -> None:
        try:
            self._call(lambda client: client.create_collection(name, vectors_config=vectors))
        except (ServerError, ValueError):  # the local mode says ValueError
            if name != self.collection or not self._exists(name):
                raise


def _document(record: Any) -> Document:
    return Document(str(record.id), int(record.payload["seq"]), record.payload["body"])
