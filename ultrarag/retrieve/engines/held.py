"""Held vectors: those of many ids that an engine has, where some were deleted meanwhile or never had any."""

from __future__ import annotations

from collections.abc import Sequence

from ultrarag.errors import UsageError
from ultrarag.retrieve.engines.base import Backend
from ultrarag.types import Embeddings


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
