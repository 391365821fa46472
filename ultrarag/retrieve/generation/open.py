"""Laying out a new index, and bringing the parts of an existing one into memory."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ultrarag.errors import FingerprintError, IndexStateError
from ultrarag.io import OwnerLock, resource_error
from ultrarag.retrieve.bm25 import BM25
from ultrarag.retrieve.engines import Backend, ServerError, default_backend, open_backend, remove, settled
from ultrarag.retrieve.generation.catalog import Catalog, Generation, IndexLayout, Origin
from ultrarag.retrieve.generation.pairing import paired
from ultrarag.retrieve.generation.replay import Follower, GenerationVectors, Unencoded, Words
from ultrarag.retrieve.generation.serving import Serving, VectorSet
from ultrarag.retrieve.generation.source import Source, begin_late, create_vectors, load_encoder, prepare
from ultrarag.retrieve.passages import Store

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder

REPAIR = "open the index with repair=True to encode all passages again"

logger = logging.getLogger("ultrarag")


def lay_out(directory: Path, encoder: Encoder, backend: str | None, heads: tuple[str, ...], bm25: bool) -> None:
    """Write an empty index with one live generation into an empty directory."""
    layout, store = IndexLayout(directory), Store.create(directory)
    try:
        catalog, source = Catalog(store), Source(encoder)
        origin = Origin(encoder.passage_fingerprint)
        engine = settled(backend or default_backend())
        first = catalog.add(source.fingerprint, engine, heads, source.precision, "ready", 0, origin)
        layout.final(first.id).mkdir(parents=True)
        prepare(layout, first, source)
        create_vectors(encoder, first, layout.vectors(layout.final(first.id))).close()
        if bm25:
            BM25.create(layout.bm25).close()
        store.set_meta(bm25=str(int(bm25)), bm25_seq="0")
        catalog.flip(first.id)
    finally:
        store.close()


def open_serving(
    layout: IndexLayout,
    store: Store,
    generation: Generation,
    encoder: Encoder | None = None,
    device: str | None = None,
    repair: bool = False,
    check: Callable[[], object] = lambda: None,
    read_only: bool = False,
    beside: Serving | None = None,
    held: VectorSet | None = None,
    late: bool = False,
) -> tuple[Serving, Follower]:
    """Open the encoder and the vectors of a generation, and what keeps them up to date.

    Args:
        check: called before each write to the vectors, and may refuse it.
        read_only: change nothing on the disk.
        beside: a pair in service: models that the generation's encoder shares with its are used as they are in memory.
        held: the generation's vectors, where they may be open: they are used as they are.
        late: load the encoder when it is needed, where an engine left behind what queries are encoded with.

    Raises:
        FingerprintError: when another encoder is given than the one that made the vectors, or it is in a precision that
            was not measured with theirs.
        CheckpointError, IndexStateError: when the checkpoint or the vectors are damaged.
    """
    directory = layout.directory(generation.id)
    if encoder is None and late:
        encoder = cast("Encoder | None", begin_late(directory, generation, device))
    if encoder is None:
        encoder = load_encoder(directory, generation, device, beside.encoder if beside else None)
    elif encoder.fingerprint != generation.fingerprint:
        raise FingerprintError(
            f"the live generation {generation.id} of '{layout.root}' was built by the encoder "
            f"{generation.fingerprint[:12]}, not by the one given ({encoder.fingerprint[:12]}): open the index without "
            f"an encoder to use its own copy, and `build` and `swap` to change it"
        )
    encoder, precisions = paired(layout, generation, encoder)
    emptied = False
    if held is not None and held.join():
        vectors = held
    else:
        folder = layout.vectors(layout.directory(generation.vectors_of))
        backend, emptied = _opened(folder, generation, encoder, repair, read_only)
        vectors = VectorSet(backend, Unencoded(store, generation.vectors_of))
        vectors.join()
    try:
        serving = Serving(generation, encoder, vectors, precisions=precisions)
        catalog = Catalog(store)
        follower = Follower(
            store,
            GenerationVectors(vectors.backend, serving.encode_passages, vectors.unencoded, check),
            generation.applied_seq,
            lambda seq: catalog.set_applied(generation.vectors_of, seq),
        )
        if emptied:
            follower.refill()
    except BaseException:
        vectors.leave()
        raise
    return serving, follower


def _opened(
    directory: Path, generation: Generation, encoder: Encoder, repair: bool, read_only: bool
) -> tuple[Backend, bool]:
    """Open the vectors; to repair means to begin anew where they are damaged."""
    try:
        if not read_only:
            directory.mkdir(exist_ok=True)
        return open_backend(directory, encoder.passage_fingerprint, read_only=read_only), False
    except ServerError:  # it is away, or refuses us: nothing is known to be damaged
        raise
    except IndexStateError as error:
        _refuse_resources(error, directory)
        if read_only:
            raise
        OwnerLock(directory).release()  # it may be in use and not damaged: that raises here, before anything is removed
        if not repair:
            raise IndexStateError(f"{error} ({REPAIR})") from error
        logger.warning("%s; encoding all passages again", error)
        remove(directory)
        return create_vectors(encoder, generation, directory), True


def _refuse_resources(error: IndexStateError, path: Path) -> None:
    """Raise the error that names a condition of the machine, if there is one: nothing is known to be damaged then."""
    if found := resource_error(error, path):
        raise found from error


def open_words(layout: IndexLayout, store: Store, read_only: bool = False) -> tuple[BM25, Follower] | None:
    """Open BM25, where the index has it; a damaged one is made anew from the passages, unless it is only read."""
    if store.get_meta("bm25") != "1":
        return None
    emptied = False
    try:
        bm25 = BM25.open(layout.bm25, read_only=read_only)
    except IndexStateError as error:
        _refuse_resources(error, layout.bm25)
        if read_only:
            raise
        if layout.bm25.exists():
            OwnerLock(layout.bm25).release()
        logger.warning("%s; indexing the words of all passages again", error)
        shutil.rmtree(layout.bm25, ignore_errors=True)
        bm25, emptied = BM25.create(layout.bm25), True
    applied = int(store.get_meta("bm25_seq", "0"))
    follower = Follower(store, Words(bm25), applied, lambda seq: store.set_meta(bm25_seq=str(seq)))
    if read_only:
        return bm25, follower
    try:
        if not emptied:
            follower.catch_up()
        if bm25.count() != store.count():  # emptied, or cut off while it was filled anew
            follower.refill(bm25.ids())
    except BaseException:
        bm25.close()
        raise
    return bm25, follower
