"""Held vectors: those of many ids that an engine has, where some were deleted meanwhile or never had any."""

from __future__ import annotations

from collections.abc import Sequence

from ultrarag.errors import UsageError
from ultrarag.retrieve.engines.base import Backend
from ultrarag.types import Embeddings


def kept(backend: Backend, embeddings: Embeddings) -> Embeddings:
    """What an engine would give for these once they are stored: the same, where it keeps no codes."""
    found: Embeddings = backend.kept(embeddings) if hasattr(backend, "kept") else embeddings
    return found


def held_vectors(backend: Backend, ids: Sequence[str]) -> tuple[list[str], Embeddings]:
    """The ids that an engine has vectors of, and these; the few that it lacks are found by halving."""
    try:
        return list(ids), backend.vectors(ids)
    except UsageError:
        if len(ids) == 1:
            return [], backend.vectors([])
    parts = [held_vectors(backend, part) for part in (ids[: len(ids) // 2], ids[len(ids) // 2 :])]
    held = [(found, vectors) for found, vectors in parts if found]
    if not held:
        return [], backend.vectors([])
    return [id for found, _ in held for id in found], Embeddings.cat([vectors for _, vectors in held])
