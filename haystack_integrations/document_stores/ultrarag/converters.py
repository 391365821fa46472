"""Documents become passages and passages documents, and nothing of either is lost on the way."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
from haystack import Document
from haystack.dataclasses import ByteStream, SparseEmbedding

from ultrarag.errors import DataError
from ultrarag.retrieve import jsonable
from ultrarag.types import Passage

#: The key of a passage's metadata for what a Document has and a passage lacks. Its value is one string: an index keeps
#: a fact of every value in the metadata, and a vector has hundreds.
RESERVED = "_haystack"
#: In place of an embedding that the index's own encoder made: what comes back is what the live generation stores.
OWN = "own"


class Vector(list[float]):
    """An embedding that says whose it is: a list of floats, with the fingerprint of the encoder that made it.

    Haystack hands it on as the list that it is, so no socket is needed for the fingerprint. Written to JSON it is a
    plain list, and nobody's. Each fingerprint has a class of its own: a pipeline copies a list by calling its class
    with its items, which an attribute of the object would not survive.
    """

    fingerprint: ClassVar[str | None] = None

    @staticmethod
    def of(values: Iterable[float], fingerprint: str | None) -> Vector:
        """These values, made by the encoder with this fingerprint."""
        return _class_of(fingerprint)(values)

    def __reduce__(self) -> Any:
        return Vector.of, (list(self), self.fingerprint)


@cache
def _class_of(fingerprint: str | None) -> type[Vector]:
    return type("Vector", (Vector,), {"fingerprint": fingerprint})


def fingerprint_of(embedding: Sequence[float] | None) -> str | None:
    """Whose an embedding is; None where it does not say."""
    return embedding.fingerprint if isinstance(embedding, Vector) else None


@dataclass(frozen=True)
class Converter:
    """How the documents of a store are written: the values of these fields of `meta` are put before the text."""

    meta_fields: tuple[str, ...] = ()
    separator: str = "\n"

    def passage(self, document: Document, own: frozenset[str]) -> Passage:
        """The passage of a document.

        Args:
            own: fingerprints of the live encoder, whose embeddings the index has anyway.

        Raises:
            DataError: the document has no text, or metadata that JSON cannot hold.
        """
        if document.content is None:
            raise DataError(f"document {document.id!r} has no content, and an index is of texts: leave it out")
        try:
            meta = jsonable(document.meta)
        except DataError as error:
            raise DataError(f"document {document.id!r}: {error}") from error
        if RESERVED in meta:
            raise DataError(f"document {document.id!r}: its meta has the key {RESERVED!r}, which is the store's own")
        if rest := _packed(document, own):
            meta[RESERVED] = rest
        return Passage(document.id, document.content, self._title(meta), meta)

    def document(self, passage: Passage, own: Vector | None = None) -> Document:
        """The document that a passage was; of a passage that was none, its title and text.

        Args:
            own: the passage's vector in the live generation, where the document is to have it.
        """
        meta = dict(passage.metadata)
        rest = _unpacked(meta.pop(RESERVED, None), own)
        content = passage.text if passage.title == self._title(meta) else passage.content
        return Document(id=passage.id, content=content, meta=meta, **rest)

    def _title(self, meta: Mapping[str, Any]) -> str:
        """What is encoded before the text, and what BM25 reads there."""
        return self.separator.join(meta_values(meta, self.meta_fields))


def meta_values(meta: Mapping[str, Any], fields: Iterable[str]) -> list[str]:
    """What is embedded with the content, as text."""
    return [str(meta[name]) for name in fields if meta.get(name) is not None]


def listed(name: str, values: Iterable[str] | None) -> list[str]:
    """An argument that is a list of names; ValueError for one alone, whose letters would be taken for names."""
    if isinstance(values, str):
        raise ValueError(f"{name} is the string {values!r}: put one alone into a list")
    return [*(values or [])]


def has_own_vector(passage: Passage) -> bool:
    """Whether it was a document with an embedding of the index's own encoder."""
    rest = passage.metadata.get(RESERVED)
    return rest is not None and json.loads(rest).get("embedding") == OWN


def _packed(document: Document, own: frozenset[str]) -> str | None:
    """What a document has beside id, content and meta, as JSON."""
    rest: dict[str, Any] = {}
    if document.embedding is not None:
        rest["embedding"] = OWN if fingerprint_of(document.embedding) in own else _numbers(document.embedding)
    if document.sparse_embedding is not None:
        rest["sparse_embedding"] = document.sparse_embedding.to_dict()
    if document.blob is not None:
        blob = document.blob
        rest["blob"] = {"data": _text(blob.data), "meta": jsonable(blob.meta), "mime_type": blob.mime_type}
    if document.score is not None:
        rest["score"] = float(document.score)
    return json.dumps(rest) if rest else None


def _unpacked(text: str | None, own: Vector | None) -> dict[str, Any]:
    rest = {} if text is None else json.loads(text)
    if "embedding" in rest:
        rest["embedding"] = own if rest["embedding"] == OWN else _vector(**rest["embedding"])
    if "sparse_embedding" in rest:
        rest["sparse_embedding"] = SparseEmbedding.from_dict(rest["sparse_embedding"])
    if "blob" in rest:
        rest["blob"] = ByteStream(**{**rest["blob"], "data": base64.b64decode(rest["blob"]["data"])})
    return rest


def _numbers(embedding: Sequence[float]) -> dict[str, str | None]:
    """An embedding, exactly: in half the bytes where it was made in single precision, as models do."""
    wide = np.asarray(embedding, np.float64)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    kept = narrow if (narrow == wide).all() else wide
    return {"kind": kept.dtype.str, "data": _text(kept.tobytes()), "fingerprint": fingerprint_of(embedding)}


def _vector(kind: str, data: str, fingerprint: str | None) -> list[float]:
    values = np.frombuffer(base64.b64decode(data), kind).tolist()
    return values if fingerprint is None else Vector.of(values, fingerprint)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
