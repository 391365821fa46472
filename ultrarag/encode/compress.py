"""Smaller dense vectors: fewer dimensions, 16 or 8 bits each, or one; and back to float32.

Rows are compressed one by one, so that a row's code does not depend on what else is stored. Bytes per vector of d
dimensions: float32 4 d, float16 2 d, int8 d + 4, binary d / 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ultrarag.errors import UsageError, did_you_mean

FORMATS = ("float32", "float16", "int8", "binary")


@dataclass(frozen=True)
class Compression:
    """How dense vectors are stored."""

    #: of each number: float32, float16, int8 or binary
    format: str = "float32"
    #: only the first dimensions; None: all. For models trained with Matryoshka losses (`--use_mrl`).
    truncate_dim: int | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(
                f"format '{self.format}' is unknown{did_you_mean(self.format, FORMATS)} ({', '.join(FORMATS)})"
            )
        if self.truncate_dim is not None and self.truncate_dim < 1:
            raise UsageError(f"truncate_dim is {self.truncate_dim}; it must be at least 1")

    def encode(self, dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compress vectors.

        Args:
            dense: (n, dim) float32.

        Returns:
            The codes, (n, width) of the format's type, and each row's scale, (n,) float32.
        """
        dense = truncated(dense, self.truncate_dim)
        ones = np.ones(len(dense), np.float32)
        if self.format == "binary":
            return np.packbits(dense > 0, axis=1), np.full(len(dense), dense.shape[1] ** -0.5, np.float32)
        if self.format != "int8":
            return dense.astype(self.format, copy=False), ones
        scale = np.abs(dense).max(axis=1).astype(np.float32) / 127
        safe = np.where(scale > 0, scale, 1)
        return np.rint(dense / safe[:, None]).astype(np.int8), safe.astype(np.float32)

    def decode(self, codes: np.ndarray, scale: np.ndarray, dim: int) -> np.ndarray:
        """Return what `encode` stored, (n, dim) float32; of binary vectors the signs, at unit length."""
        if self.format == "binary":
            signs = np.unpackbits(codes, axis=1, count=dim).astype(np.float32) * 2 - 1
            return signs * scale[:, None]
        found = codes.astype(np.float32, copy=False)
        return found * scale[:, None] if self.format == "int8" else found


def truncated(dense: np.ndarray, dim: int | None) -> np.ndarray:
    """The first dimensions of vectors; those of unit length have it again.

    Source:
        Matryoshka Representation Learning (Kusupati et al., 2022).

    Raises:
        UsageError: there are not so many.
    """
    if dim is None or dim == dense.shape[1]:
        return dense
    if dim > dense.shape[1]:
        raise UsageError(f"truncate_dim is {dim}, but the vectors have {dense.shape[1]} dimensions")
    kept = dense[:, :dim]
    unit = np.abs(np.linalg.norm(dense, axis=1) - 1) < 1e-3
    length = np.linalg.norm(kept, axis=1)
    factor = np.where(unit & (length > 0), 1 / np.maximum(length, 1e-12), 1)
    return (kept * factor[:, None]).astype(np.float32)
