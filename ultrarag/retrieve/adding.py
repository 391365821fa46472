"""Adding passages: on which terms those are replaced that are there, and with vectors that were made elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, get_args

import numpy as np

from ultrarag.errors import FingerprintError, UsageError
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.engines import Schema
from ultrarag.retrieve.generation import Serving
from ultrarag.retrieve.passages import OnExisting, Record, Written, records
from ultrarag.types import Embeddings, Passage

#: Passages written to the store in one transaction.
CHUNK_PASSAGES = 512
#: How far from 1 the length of a given vector may be, as that of a stored one in a swap.
TOLERANCE = 0.03

Passages = Iterable[Passage | Mapping[str, Any]]


def add(
    core: Core,
    passages: Passages,
    on_existing: OnExisting = "replace",
    embeddings: Embeddings | None = None,
    fingerprint: str | None = None,
) -> Written:
    """See `LiveIndex.add`."""
    if isinstance(passages, Passage | Mapping | str):
        raise UsageError("add takes an iterable of passages; put one alone into a list")
    if on_existing not in get_args(OnExisting):
        raise UsageError(f"on_existing is {on_existing!r}; it must be one of {', '.join(get_args(OnExisting))}")
    if (embeddings is None) != (fingerprint is None):
        raise UsageError("embeddings and fingerprint go together: the fingerprint is that of the encoder they are of")
    serving = core.live  # also a call without passages says that the index was closed
    total = Written()
    try:
        for chunk, given in _chunks(core, records(passages), embeddings, fingerprint, on_existing == "fail"):
            total += _write(core, chunk, on_existing, given, fingerprint)
    finally:
        serving.cuts.tell()
    return total


def _chunks(
    core: Core, source: Iterator[Record], embeddings: Embeddings | None, fingerprint: str | None, at_once: bool
) -> Iterator[tuple[list[Record], Embeddings | None]]:
    """What is written in a transaction each: everything where one that exists fails all."""
    size = None if at_once else CHUNK_PASSAGES
    if embeddings is None or fingerprint is None:
        while chunk := list(islice(source, size)):
            yield chunk, None
        return
    wanted, given = list(source), embeddings.numpy()
    if len(wanted) != len(given):
        raise UsageError(f"{len(wanted)} passages and {len(given)} embeddings: they must be as many")
    _check(core.live, given, fingerprint)
    for start in range(0, len(wanted), size or max(1, len(wanted))):
        end = len(wanted) if size is None else start + size
        yield wanted[start:end], given[start:end]


def _write(
    core: Core, chunk: Sequence[Record], on_existing: OnExisting, given: Embeddings | None, fingerprint: str | None
) -> Written:
    if given is None or fingerprint is None:
        return core.write(lambda: core.store.write(chunk, on_existing))

    def change() -> Written:  # no other encoder comes in now
        _check_encoder(core.live, fingerprint)
        return core.store.write(chunk, on_existing)

    return core.write(change, ({record.content: row for row, record in enumerate(chunk)}, given))


def _check_encoder(serving: Serving, fingerprint: str) -> None:
    known = serving.fingerprint, serving.encoder.passage_fingerprint
    if fingerprint not in known:
        raise FingerprintError(
            f"the passages' vectors come from the encoder {str(fingerprint)[:12] or '(unnamed)'}, the live generation "
            f"{serving.generation.id} from {serving.fingerprint[:12]}: encode them with the live encoder, or leave the "
            f"vectors out"
        )


def _check(serving: Serving, given: Embeddings, fingerprint: str) -> None:
    """Refuse vectors that are not what the live encoder would have made, as far as can be seen."""
    _check_encoder(serving, fingerprint)
    if not len(given):
        return
    wanted, found = serving.backend.schema, Schema.of(given)
    if found.heads != wanted.heads:
        raise UsageError(
            f"the embeddings hold {', '.join(found.heads)}, and the index stores {', '.join(wanted.heads)}: give "
            f"exactly these"
        )
    for head in ("dense", "colbert"):
        if (is_wide := getattr(found, head)) != (should := getattr(wanted, head)):
            raise UsageError(f"the {head} vectors are {is_wide} wide, those of the index {should}")
    for array in given.arrays():
        if not np.isfinite(array).all():
            raise UsageError("the embeddings hold a value that is not finite; leave such a passage out")
    if given.dense is not None and serving.encoder.settings.normalize:
        lengths = np.linalg.norm(given.dense, axis=1)
        worst = int(np.abs(lengths - 1).argmax())
        if abs(lengths[worst] - 1) > TOLERANCE:
            raise UsageError(
                f"the dense vector in row {worst} has length {lengths[worst]:.3f}; this encoder's have length 1"
            )
