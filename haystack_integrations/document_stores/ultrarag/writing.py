"""What is written, on which terms, and how a program that knows Haystack is told that it cannot be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from haystack import Document
from haystack.document_stores.errors import DocumentStoreError, DuplicateDocumentError
from haystack.document_stores.types import DuplicatePolicy

from ultrarag.errors import DataError, ExistsError

#: What becomes of documents whose id is there; by default an error, as with Haystack's own store.
ON_EXISTING: dict[DuplicatePolicy, Literal["replace", "skip", "fail"]] = {
    DuplicatePolicy.NONE: "fail",
    DuplicatePolicy.FAIL: "fail",
    DuplicatePolicy.SKIP: "skip",
    DuplicatePolicy.OVERWRITE: "replace",
}


def checked(documents: Any, policy: Any) -> list[Document]:
    """The documents as a list; ValueError where they are none, or the policy is none."""
    if policy not in ON_EXISTING:
        raise ValueError(f"policy is {policy!r}; it is a DuplicatePolicy, such as DuplicatePolicy.OVERWRITE")
    if not isinstance(documents, Iterable) or isinstance(documents, str | Mapping):
        raise ValueError(f"write_documents takes a list of Documents, not {type(documents).__name__}")
    wanted = list(documents)
    for document in wanted:
        if not isinstance(document, Document):
            raise ValueError(f"write_documents takes a list of Documents, and this one has {document!r}")
    return wanted


@contextmanager
def in_haystacks_words() -> Iterator[None]:
    """Raise what a program that knows Haystack catches."""
    try:
        yield
    except ExistsError as error:
        text = str(error).replace("on_existing='replace' or 'skip' adds", "DuplicatePolicy.OVERWRITE or SKIP writes")
        raise DuplicateDocumentError(text) from error
    except DataError as error:
        raise DocumentStoreError(str(error)) from error
