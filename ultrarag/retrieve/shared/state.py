"""What the processes of a shared index know beside its passages: one document, rewritten by who holds the lease."""

from __future__ import annotations

import json
import uuid
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ultrarag.errors import IndexStateError
from ultrarag.retrieve.shared.documents import Document

FORMAT = 1
_SPACE = uuid.UUID("7a0d6f0e-5d0c-4f57-9d55-3a6ff2a7d9b1")


class VectorSchema(BaseModel):
    """The heads of a collection; see `ultrarag.retrieve.engines.Schema`."""

    model_config = ConfigDict(extra="forbid")
    dense: int | None = None
    sparse: bool = False
    colbert: int | None = None
    fingerprint: str


class Row(BaseModel):
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


class State(BaseModel):
    """Rewritten with every change and every beat."""

    model_config = ConfigDict(extra="forbid")
    format: int = FORMAT
    #: number of the lease that it was written under
    epoch: int
    #: whom the lease belongs to: "host:pid directory"
    holder: str
    #: counts the writings of this document
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
    generations: list[Row] = []

    @property
    def live(self) -> Row:
        """The generation that answers searches."""
        return next(row for row in self.generations if row.state == "live")

    def document(self) -> Document:
        """To be stored."""
        return Document(state_key(self.epoch), self.beat, self.model_dump_json())


def state_key(epoch: int) -> str:
    """The key of the state written under a lease."""
    return str(uuid.uuid5(_SPACE, str(epoch)))


def read_state(document: Document, place: str) -> State:
    """Read a stored state.

    Raises:
        IndexStateError: when it is damaged, or of another version.
    """
    try:
        found = State.model_validate_json(document.body)
    except ValidationError as error:
        version = _version(document.body)
        if version not in (None, FORMAT):
            raise IndexStateError(
                f"'{place}' has a shared index of format {version}; this version of ultrarag reads format {FORMAT}: "
                f"let all its processes use one version"
            ) from None
        raise IndexStateError(f"'{place}': the state of the shared index is damaged: {error}") from None
    return found


def _version(body: str) -> Any:
    try:
        return json.loads(body).get("format")
    except (ValueError, AttributeError):
        return None
