"""Making a shared index, another mirror of one, and removing one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ultrarag.errors import IndexStateError, UsageError
from ultrarag.io import publish_directory, read_owner, staged_directory
from ultrarag.retrieve.bm25 import BM25
from ultrarag.retrieve.engines import parse_uri, remove, with_quantise
from ultrarag.retrieve.generation import Catalog, Generation, IndexLayout, lay_out
from ultrarag.retrieve.passages import URI, Store
from ultrarag.retrieve.shared.documents import SharedState, lease_numbers, open_documents, vector_collections
from ultrarag.retrieve.shared.lease import Lease
from ultrarag.retrieve.shared.link import CHECKPOINTS
from ultrarag.retrieve.shared.mirror import Checkpoints, row_of

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder


def create_shared(
    root: Path, encoder: Encoder, uri: str, checkpoints: str | None, heads: tuple[str, ...], bm25: bool
) -> None:
    """Create the index in its server, and the first mirror of it.

    Raises:
        IndexStateError: when the server has an index of that name, or does not answer.
    """
    address = parse_uri(uri)
    with open_documents(uri, "states") as states, open_documents(uri, "passages") as passages:
        if lease_numbers(states.collections(), address.name):
            raise _exists(uri, address.name)
        states.create()
        passages.create()
        with staged_directory(root) as stage:
            lay_out(stage, encoder, uri, heads, bm25)
            layout, store = IndexLayout(stage), Store.open(stage)
            try:
                # without what it says of one generation: the next may be quantised otherwise
                store.set_meta(**{URI: with_quantise(uri, ""), CHECKPOINTS: checkpoints or ""})
                folder = Path(checkpoints or root / "checkpoints").absolute()
                live = Catalog(store).live()
                row = row_of(layout, live, None)
                state = SharedState(epoch=1, holder="", released=True, bm25=bm25, checkpoints=str(folder))
                state = state.model_copy(update={"last_generation": live.id, "generations": [row]})
                target = Checkpoints(stage / "checkpoints" if not checkpoints else folder)
                target.add(layout.checkpoint(layout.final(live.id)), live.fingerprint)
                if not Lease(states, root).initialize(state):
                    remove(layout.vectors(layout.final(live.id)))
                    raise _exists(uri, address.name)
            finally:
                store.close()
            publish_directory(stage, root)


def create_mirror(root: Path, uri: str, checkpoints: str | None) -> None:
    """Make an empty mirror of an index; opening it fills it.

    Raises:
        IndexStateError: when the server has no such index, or does not answer.
    """
    with open_documents(uri, "states") as states:
        state = Lease(states, root).read()
    with staged_directory(root) as stage:
        layout, store = IndexLayout(stage), Store.create(stage)
        try:
            layout.generations.mkdir()
            if state.bm25:
                BM25.create(layout.bm25).close()
            meta = {URI: with_quantise(uri, ""), CHECKPOINTS: checkpoints or ""}
            store.set_meta(bm25=str(int(state.bm25)), bm25_seq="0", **meta)
        finally:
            store.close()
        publish_directory(stage, root)


def check_mirror(root: Path, uri: str) -> None:
    """Raise IndexStateError unless a directory mirrors the index at an address."""
    store = Store.open(root, read_only=True)
    try:
        found = store.get_meta(URI)
    finally:
        store.close()
    if found != with_quantise(uri, ""):
        held = f"mirrors '{found}'" if found else "holds an index of its own"
        raise IndexStateError(f"'{root}' {held}; name another directory for '{uri}'")


def check_quantise(uri: str, live: Generation) -> None:
    """Raise IndexStateError where an address asks for vectors to be kept otherwise than the live generation's are."""
    asked, held = parse_uri(uri).quantise, parse_uri(live.backend).quantise
    if asked and asked != held:
        raise IndexStateError(
            f"'{uri}': the server keeps the vectors of the live generation {live.id} as {held or 'float32'}, not as "
            f"{asked}: leave quantise out, and build the next generation with backend='{uri}' to change it"
        )


def mirror_path(uri: str) -> Path:
    """A directory for a mirror that nobody named: the first below the user's cache that no process owns."""
    address = parse_uri(uri)
    name = re.sub(r"\W+", "_", f"{address.engine}_{address.host or address.folder}_{address.port}_{address.name}")
    parent = Path.home() / ".cache" / "ultrarag" / "mirrors" / name
    number = 1
    while (parent / str(number)).exists() and read_owner(parent / str(number)) is not None:
        number += 1
    return parent / str(number)


def remove_shared(uri: str) -> None:
    """Delete a shared index from its server, passages included; mirrors and checkpoints stay where they are.

    Raises:
        UsageError: when the server has none of that name.
    """
    name = parse_uri(uri).name
    with open_documents(uri, "states") as states:
        held = states.collections()
        numbers = lease_numbers(held, name)
        wanted = [each for each in (f"{name}_passages", f"{name}_states") if each in held]
        if not numbers and not wanted:
            raise UsageError(f"'{uri}' has no shared index '{name}'")
        # the leases last, so that what is left after an interruption can be removed again, and cannot be opened
        for collection in (*wanted, *vector_collections(held, name), *(f"{name}_lease_{number}" for number in numbers)):
            states.drop(collection)


def _exists(uri: str, name: str) -> IndexStateError:
    return IndexStateError(
        f"'{uri}' has a shared index '{name}' already; open it with LiveIndex.open(path, uri=...) (ultrarag index "
        f"mirror), or end the URI in another name"
    )
