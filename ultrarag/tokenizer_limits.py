"""Truncation and padding of a fast tokenizer: every call sets them, and saving would write them into tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def keep_limits(tokenizer: Any) -> Iterator[None]:
    """Set the tokenizer's truncation and padding back after calls of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield
        return
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        _set(tokenizer.backend_tokenizer, truncation, padding)


def _set(backend: Any, truncation: dict[str, Any] | None, padding: dict[str, Any] | None) -> None:
    if truncation is None:
        backend.no_truncation()
    elif backend.truncation != truncation:
        backend.enable_truncation(**truncation)
    if padding is None:
        backend.no_padding()
    elif backend.padding != padding:
        backend.enable_padding(**padding)
