"""UltraRAGDocumentStore: a live index, whose encoder can be exchanged under the pipelines that use it."""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haystack import Document, default_from_dict, default_to_dict
from haystack.document_stores.errors import DocumentStoreError
from haystack.document_stores.types import DuplicatePolicy
from haystack.errors import FilterError

from haystack_integrations.document_stores.ultrarag.async_methods import AsyncMethods
from haystack_integrations.document_stores.ultrarag.converters import RESERVED, Converter, has_own_vector, listed
from haystack_integrations.document_stores.ultrarag.filters import Choice, translate
from haystack_integrations.document_stores.ultrarag.loading import Device, load_encoder, torch_device
from haystack_integrations.document_stores.ultrarag.vectors import given_vectors, stored_vectors
from haystack_integrations.document_stores.ultrarag.writing import ON_EXISTING, checked, in_haystacks_words
from ultrarag.errors import FingerprintError
from ultrarag.retrieve import LiveIndex, jsonable

if TYPE_CHECKING:
    from ultrarag import Encoder, Passage
    from ultrarag.retrieve import Hits, Written

#: Held while a missing index is made, by whichever store of this process comes first.
_creating = threading.Lock()


class UltraRAGDocumentStore(AsyncMethods):
    """A live index of UltraRAG: hybrid search over documents that the index embeds itself.

    No embedder is needed before a `DocumentWriter`: the index encodes what is written, and encodes it anew when `live`
    is refreshed with a fine-tuned encoder, while pipelines go on. It is opened at the first use, and shared by all the
    stores of this process with the same path.

    ```python
    from haystack import Document
    from haystack_integrations.components.retrievers.ultrarag import UltraRAGRetriever
    from haystack_integrations.document_stores.ultrarag import UltraRAGDocumentStore

    store = UltraRAGDocumentStore("kb", model="BAAI/bge-small-en-v1.5")
    store.write_documents([Document(content="Milvus is a vector database.", meta={"lang": "en"})])
    retriever = UltraRAGRetriever(store, weights={"dense": 1, "bm25": 0.5})
    retriever.run("what is milvus?")["documents"]
    ```
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        model: str | os.PathLike[str] | None = None,
        adapter: str | None = None,
        uri: str | None = None,
        checkpoints: str | os.PathLike[str] | None = None,
        backend: str | None = None,
        heads: list[str] | None = None,
        bm25: bool = True,
        device: Device = None,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        return_embedding: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        """
        Creates a store; nothing is opened or loaded before it is used.

        :param path: The folder of the index; where there is none, one is made with `model`.
        :param model: The encoder of an index that is to be made: a folder or a name on the hub. An index that exists
            keeps its own, which a refresh may have replaced since.
        :param adapter: The adapter that reads the model; default: the one that claims it.
        :param uri: Of an index that many processes share through a server, such as "qdrant://host:6333/name", which
            exists; `path` is then its mirror and may be left out.
        :param checkpoints: Of a shared index: the folder with its checkpoints, if it has another path on this machine.
        :param backend: The vector engine of an index that is to be made.
        :param heads: The heads that it stores; default: all that the model has.
        :param bm25: Whether it also indexes words, as the head "bm25".
        :param device: Where the encoder runs.
        :param meta_fields_to_embed: Fields of `meta` whose values are encoded, and searched for words, before the
            content.
        :param embedding_separator: What stands between them.
        :param return_embedding: Whether documents come back with the embedding that they were written with.
        :param trust_remote_code: Run Python code that comes with the model.
        :raises ValueError: If there is neither a path nor a uri.
        """
        if path is None and uri is None:
            raise ValueError("UltraRAGDocumentStore needs the path of an index, or the uri of a shared one")
        self.path = None if path is None else str(path)
        self.model = None if model is None else str(model)
        self.checkpoints = None if checkpoints is None else str(checkpoints)
        self.adapter, self.uri, self.backend, self.bm25 = adapter, uri, backend, bm25
        self.heads = None if heads is None else listed("heads", heads)
        self.device, self.trust_remote_code = device, trust_remote_code
        self.meta_fields_to_embed = listed("meta_fields_to_embed", meta_fields_to_embed)
        self.embedding_separator = embedding_separator
        self.return_embedding = return_embedding
        self._converter = Converter(tuple(self.meta_fields_to_embed), embedding_separator)
        self._opened: LiveIndex | None = None
        self._opening = threading.Lock()

    def to_dict(self) -> dict[str, Any]:
        """
        Serializes the store to a dictionary; the documents stay where they are.

        :returns: Dictionary with serialized data.
        """
        return default_to_dict(
            self,
            path=self.path,
            model=self.model,
            adapter=self.adapter,
            uri=self.uri,
            checkpoints=self.checkpoints,
            backend=self.backend,
            heads=None if self.heads is None else [*self.heads],  # one list in two places would be an alias in YAML
            bm25=self.bm25,
            device=self.device,
            meta_fields_to_embed=[*self.meta_fields_to_embed],
            embedding_separator=self.embedding_separator,
            return_embedding=self.return_embedding,
            trust_remote_code=self.trust_remote_code,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> UltraRAGDocumentStore:
        """
        Deserializes the store from a dictionary.

        :param data: Dictionary to deserialize from.
        :returns: The store; in the process that serialized it, one over the same open index.
        """
        return default_from_dict(cls, data)

    @property
    def live(self) -> LiveIndex:
        """
        The index itself, opened where it is not: `live.refresh`, `live.swap`, `live.feedback`, `live.status`.

        :raises DocumentStoreError: If there is no index, and no model to make one with.
        """
        with self._opening:
            if self._opened is None:
                self._opened = self._open()
            return self._opened

    def _open(self) -> LiveIndex:
        options: dict[str, Any] = {"uri": self.uri, "checkpoints": self.checkpoints, "share": True}
        options |= {"device": torch_device(self.device), "trust_remote_code": self.trust_remote_code}
        with _creating:
            encoder = None if self.uri is not None or _holds_something(Path(self.path or "")) else self._create()
            return LiveIndex.open(self.path, encoder, **options)

    def _create(self) -> Encoder:
        """Make the index; returns its encoder, which is loaded."""
        if self.model is None:
            raise DocumentStoreError(
                f"there is no index '{self.path}', and no model to make one with: "
                f"UltraRAGDocumentStore({self.path!r}, model=...), or name the folder of an index"
            )
        encoder = load_encoder(self.model, self.adapter, self.device, trust_remote_code=self.trust_remote_code)
        LiveIndex.create(self.path, encoder, backend=self.backend, heads=self.heads, bm25=self.bm25).close()
        return encoder

    def close(self) -> None:
        """
        Closes this store's handle of the index, which the last one closes; a later call opens it again.
        """
        with self._opening:
            opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    async def close_async(self) -> None:
        """
        As `close`.
        """
        await asyncio.to_thread(self.close)

    def count_documents(self) -> int:
        """
        Returns the number of documents.
        """
        return len(self.live)

    def count_documents_by_filter(self, filters: dict[str, Any]) -> int:
        """
        Returns the number of documents that pass a filter.
        """
        choice = translate(filters)
        if choice.ids is None:
            return self.live.count(choice.filter)
        return sum(1 for _ in self.live.passages(**choice.options()))

    def filter_documents(self, filters: dict[str, Any] | None = None) -> list[Document]:
        """
        Returns the documents that pass a filter, in the order in which they were first written; default: all.

        :param filters: As Haystack documents them; `id` can be compared as well. Where a value in `meta` is a list,
            one of its items is enough.
        :raises FilterError: If the filter is malformed; says what is.
        """
        passages = list(self.live.passages(**translate(filters).options()))
        own = [passage.id for passage in passages if self.return_embedding and has_own_vector(passage)]
        vectors = stored_vectors(self.live, own)
        documents = [self._converter.document(passage, vectors.get(passage.id)) for passage in passages]
        return documents if self.return_embedding else [replace(document, embedding=None) for document in documents]

    def write_documents(self, documents: list[Document], policy: DuplicatePolicy = DuplicatePolicy.NONE) -> int:
        """
        Writes documents, which the index encodes; when it returns they are durable and found.

        An embedding that a document has is returned with it, and not searched by, unless it is the index's own
        encoder's (of an `UltraRAGDocumentEmbedder`): then it comes back as what the live generation stores. Where all
        documents have one of those, and the index stores dense vectors alone, they are not encoded again.

        :param documents: The documents, each with content.
        :param policy: What becomes of those whose id is there. `FAIL`, which is also `NONE`, writes all or none.
        :returns: How many were written.
        :raises ValueError: If they are no documents.
        :raises DuplicateDocumentError: With `FAIL`, if a document is there; names it. Nothing has changed then.
        :raises DocumentStoreError: For a document without content, or with meta that JSON cannot hold; names it.
        """
        with in_haystacks_words():
            passages, vectors = self._to_write(documents, policy)
            try:
                written = self.live.add(passages, on_existing=ON_EXISTING[policy], **vectors)
            except FingerprintError:  # another encoder came in between: it makes its own
                written = self.live.add(passages, on_existing=ON_EXISTING[policy])
            return _count(policy, passages, written)

    async def write_documents_async(
        self, documents: list[Document], policy: DuplicatePolicy = DuplicatePolicy.NONE
    ) -> int:
        """
        As `write_documents`, by the threads that the index has for writes.
        """
        with in_haystacks_words():
            passages, vectors = await asyncio.to_thread(self._to_write, documents, policy)
            try:
                written = await self.live.aadd(passages, on_existing=ON_EXISTING[policy], **vectors)
            except FingerprintError:
                written = await self.live.aadd(passages, on_existing=ON_EXISTING[policy])
            return _count(policy, passages, written)

    def _to_write(self, documents: Any, policy: Any) -> tuple[list[Passage], dict[str, Any]]:
        """The passages of documents, and the vectors that need not be made."""
        wanted = checked(documents, policy)
        with self.live.encoding() as lent:
            own = frozenset({lent.fingerprint, lent.encoder.passage_fingerprint})
            dense_alone = lent.heads == ("dense",)
        passages = [self._converter.passage(document, own) for document in wanted]
        fits = dense_alone and not any(passage.title for passage in passages)
        return passages, given_vectors(wanted, own) if fits else {}

    def delete_documents(self, document_ids: list[str]) -> None:
        """
        Deletes documents by their ids; those that do not exist are ignored.
        """
        self.live.delete(document_ids)

    def delete_all_documents(self, recreate_index: bool = False) -> None:
        """
        Deletes all documents; the index and its encoder stay.

        :param recreate_index: Also give back the space that they had on the disk.
        """
        self.live.clear()
        if recreate_index:
            self.live.vacuum()

    def delete_by_filter(self, filters: dict[str, Any]) -> int:
        """
        Deletes the documents that pass a filter, all at once.

        :returns: How many there were.
        :raises FilterError: If the filter is malformed or empty: `delete_all_documents` deletes all.
        """
        choice = _some(filters, "delete_all_documents deletes all documents")
        if choice.ids is None:
            return self.live.delete(filter=choice.filter)
        return self.live.delete([passage.id for passage in self.live.passages(**choice.options())])

    def update_by_filter(self, filters: dict[str, Any], meta: dict[str, Any]) -> int:
        """
        Merges `meta` into that of the documents that pass a filter, all at once; nothing is encoded again.

        :param filters: A filter by metadata.
        :param meta: Its keys are replaced whole; None removes a key.
        :returns: How many documents there were.
        :raises FilterError: If the filter is malformed, empty, or by `id`.
        :raises DocumentStoreError: For meta that JSON cannot hold, or for a field that is embedded with the content.
        """
        choice = _some(filters, "give one that all documents pass")
        if choice.ids is not None:
            raise FilterError("update_by_filter takes no condition on 'id': write those documents, with OVERWRITE")
        if fixed := sorted({RESERVED, *self.meta_fields_to_embed} & set(meta)):
            raise DocumentStoreError(
                f"meta '{fixed[0]}' cannot be updated by itself: write the documents, with OVERWRITE"
            )
        with in_haystacks_words():
            return self.live.update(choice.filter, jsonable(meta))

    def documents_of(self, hits: Hits, return_embedding: bool = False) -> list[Document]:
        """
        The documents of hits, with their scores.

        :param return_embedding: With the vectors that the live generation stores, which can be compared with queries
            and with each other; what documents were written with, `filter_documents` returns.
        """
        vectors = stored_vectors(self.live, [hit.id for hit in hits]) if return_embedding else {}
        return [
            replace(self._converter.document(hit.passage), score=hit.score, embedding=vectors.get(hit.id))
            for hit in hits
        ]


def _holds_something(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _some(filters: Any, advice: str) -> Choice:
    """What a filter chooses, which must not be everything."""
    if not (choice := translate(filters)):
        raise FilterError(f"an empty filter means all documents: {advice}")
    return choice


def _count(policy: DuplicatePolicy, passages: list[Passage], written: Written) -> int:
    return written.added if policy == DuplicatePolicy.SKIP else len(passages)
