"""Where the vectors of a new generation come from: shared with another one, mapped from the live one, or encoded.

Passages need no encoding where the passage side of the new encoder is the one that made the vectors which are there:
then the new generation uses them as they are. Where it is that one with linear maps behind it, the stored vectors are
mapped block by block into files below the index, which the builder takes as it takes those of torchrun's ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ultrarag.checkpoint import Identity
from ultrarag.errors import UsageError
from ultrarag.io import progress_bar
from ultrarag.maps import LinearMap
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.generation import (
    Catalog,
    Generation,
    IndexLayout,
    Origin,
    Source,
    encoded_of,
    identity_of,
    stored_heads,
)
from ultrarag.types import Embeddings

#: The generations whose vectors may be shared, the best first.
_DONORS = ("live", "ready", "previous")


def origin_of(
    layout: IndexLayout,
    catalog: Catalog,
    source: Source,
    backend: str | None,
    heads: Sequence[str] | None,
    share: bool | None,
) -> tuple[Origin, tuple[str, ...]]:
    """Decide where the vectors of a new generation come from, and which heads it has.

    Args:
        backend: of vectors that are shared; None: any, for none of them is moved.
        heads: those asked for; None: those whose vectors are shared or mapped, else all of the encoder's.
        share: True: encode no stored passage; False: encode all of them; None: encode them where it must be.

    Raises:
        UsageError: `share` is True and the passages must be encoded; says why.
    """
    all_heads, live = stored_heads(source.heads, heads), catalog.live()
    encoded = Origin(source.identity.passage), all_heads
    if share is False or source.fingerprint == live.fingerprint:
        if share:
            raise UsageError(
                f"generation {live.id} is live with this very encoder: building it again encodes all passages"
            )
        return encoded
    rest = further_maps(source.identity, identity_of(layout, live))
    donors = [found for state in _DONORS for found in catalog.in_state(state)]
    for donor in donors:
        asked = stored_heads(source.heads, donor.heads if heads is None else heads) if _has(source, donor) else ()
        made_alike = (donor.precision, donor.heads) == (source.precision, asked) and backend in (None, donor.backend)
        if made_alike and donor.passage_fingerprint == source.identity.passage:
            return Origin(source.identity.passage, vectors_of=donor.vectors_of), asked
    if _has(source, live) and source.precision == live.precision and rest:
        asked = stored_heads(source.heads, live.heads if heads is None else heads)
        if set(asked) <= set(live.heads):
            return Origin(source.identity.passage, mapped_from=live.vectors_of), asked
    if share:
        why = _why(source, live, backend or live.backend, all_heads, rest)
        raise UsageError(f"the passages must be encoded: {why}; leave share out")
    return encoded


def _has(source: Source, donor: Generation) -> bool:
    return set(donor.heads) <= set(source.heads)


def further_maps(new: Identity, old: Identity) -> tuple[str, ...] | None:
    """Digests of the maps that make one encoder's passage vectors another's; None where no maps do."""
    begun = len(old.passage_maps)
    if new.unmapped_passage != old.unmapped_passage or new.passage_maps[:begun] != old.passage_maps:
        return None
    return new.passage_maps[begun:]


def _why(source: Source, live: Generation, backend: str, heads: tuple[str, ...], rest: tuple[str, ...] | None) -> str:
    """Why the live generation's vectors are of no use for an encoder."""
    if rest is None:
        return (
            f"its passage side ({source.identity.passage[:12]}) is another one than that of the live generation "
            f"{live.id} ({live.passage_fingerprint[:12]})"
        )
    if source.precision != live.precision:
        return f"its precision is {source.precision}, that of generation {live.id} {live.precision}"
    if not set(heads) <= set(live.heads):
        return f"it is to store {', '.join(heads)}, and generation {live.id} stores {', '.join(live.heads)}"
    return f"it is to be in '{backend}' with {', '.join(heads)}, generation {live.id} is in '{live.backend}'"


def map_stored(core: Core, generation: Generation, progress: bool | None) -> None:
    """Map the stored vectors of the live generation into blocks for the builder; those that are there are kept.

    What was written since the build began is left to the builder, which replays the log.

    Raises:
        IndexStateError: other vectors are live now.
    """
    assert generation.mapped_from is not None
    from ultrarag.encoder import read_passage_maps

    maps = read_passage_maps(core.layout.checkpoint(core.layout.directory(generation.id)))
    rest = maps[len(identity_of(core.layout, core.live.generation).passage_maps) :]
    ahead = encoded_of(core.layout.root, generation, core.store.last_row())
    ahead.begin()
    blocks = ahead.missing()
    label = f"map vectors for generation {generation.id}"
    with progress_bar(len(blocks) * ahead.chunk_texts, label, "passage", progress) as bar:
        for block in blocks:
            after, last = ahead.rows_of(block)
            passages, held = core.stored(after, last, generation.mapped_from, generation.heads, generation.base_seq)
            found = None if held is None else mapped(held, rest)
            ahead.write(block, [passage.content for passage in passages], found)
            bar.update(ahead.chunk_texts)


def mapped(embeddings: Embeddings, maps: Sequence[LinearMap]) -> Embeddings:
    """Apply maps one after another, each to the head that it is of; padding of token vectors stays zero."""
    for item in maps:
        if (vectors := getattr(embeddings, item.head)) is None:
            continue
        found = item.apply(vectors)
        if item.head == "colbert":
            found *= embeddings.mask[..., None].astype(found.dtype)
        changed: dict[str, Any] = {item.head: found}
        embeddings = replace(embeddings, **changed)
    return embeddings
