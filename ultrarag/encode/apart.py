"""Texts encoded together, where one that cannot be encoded does not stop the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ultrarag.io import resource_error
from ultrarag.types import Embeddings, Passage

Encode = Callable[[Sequence[str]], Embeddings]

#: Texts of which a sound encoder can encode one at least; with none of them it is the encoder that fails.
PROBES = ("dimension", "1", "a b c")
#: Characters of a reason that are kept.
REASON = 300


@dataclass
class Apart:
    """What became of some passages."""

    passages: list[Passage]
    #: a row for each passage; None without passages
    embeddings: Embeddings | None
    #: id -> why it could not be encoded
    failed: dict[str, str] = field(default_factory=dict)


def encode_apart(passages: Sequence[Passage], encode: Encode) -> Apart:
    """Encode passages together; where that fails, find the ones at fault and encode the others.

    Raises:
        Exception: what the encoder raises where it cannot encode anything, so that no passage is at fault.
    """
    found = _halved(list(passages), encode)
    if found.failed:
        _check_encoder(encode)
    return found


def _halved(passages: list[Passage], encode: Encode) -> Apart:
    if not passages:
        return Apart([], None)
    try:
        return _finite(passages, encode([passage.content for passage in passages]))
    except Exception as error:
        if resource_error(error, Path()):  # no passage is at fault
            raise
        if len(passages) == 1:
            _check_encoder(encode, error)
            return Apart([], None, {passages[0].id: _reason(error)})
    half = len(passages) // 2
    return _joined(_halved(passages[:half], encode), _halved(passages[half:], encode))


def _finite(passages: list[Passage], embeddings: Embeddings) -> Apart:
    """Leave out the rows that hold a value which is not finite."""
    sound = np.ones(len(passages), bool)
    for array in embeddings.arrays():
        sound &= np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
    if sound.all():
        return Apart(passages, embeddings)
    kept = [passage for passage, good in zip(passages, sound, strict=True) if good]
    failed = {p.id: "its vector is not finite" for p, good in zip(passages, sound, strict=True) if not good}
    return Apart(kept, embeddings[np.flatnonzero(sound)] if kept else None, failed)


def _joined(left: Apart, right: Apart) -> Apart:
    parts = [part for part in (left.embeddings, right.embeddings) if part is not None]
    embeddings = Embeddings.cat(parts) if parts else None
    return Apart(left.passages + right.passages, embeddings, left.failed | right.failed)


def _check_encoder(encode: Encode, error: Exception | None = None) -> None:
    """Raise where not even a probe can be encoded: then no passage is at fault."""
    for probe in PROBES:
        try:
            if all(np.isfinite(array).all() for array in encode([probe]).arrays()):
                return
        except Exception as other:
            error = error or other
    raise error or ValueError("the encoder gives vectors that are not finite, whatever the text")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:REASON]
