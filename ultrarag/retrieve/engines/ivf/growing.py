"""A file that only grows, so that a crash leaves what was flushed."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from ultrarag.errors import IndexStateError


class Growing:
    """A file that only grows; what lies behind `size` does not count."""

    def __init__(self, path: Path, size: int, read_only: bool) -> None:
        self.path, self.size = path, size
        self.handle = os.open(path, os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if (found := os.fstat(self.handle).st_size) < size:
                raise IndexStateError(f"'{path}' has {found} bytes instead of {size}; rebuild the vectors")
            if not read_only:
                os.ftruncate(self.handle, size)
        except BaseException:
            os.close(self.handle)
            raise

    def write(self, content: bytes | memoryview) -> int:
        """Write behind the end; return the size that the file has when this counts."""
        place, left = self.size, memoryview(content).cast("B")
        while left:
            written = os.pwrite(self.handle, left, place)
            place, left = place + written, left[written:]
        return place

    def read(self, place: int, size: int) -> bytes:
        """So many bytes from a place on."""
        content = os.pread(self.handle, size, place)
        self._check_read(len(content), size)
        return content

    def fill(self, array: np.ndarray, place: int) -> None:
        """The same into an array, (n, width) uint8."""
        if array.size:
            self._check_read(os.preadv(self.handle, [array.data], place), array.size)

    def _check_read(self, found: int, wanted: int) -> None:
        if found < wanted:
            raise IndexStateError(f"'{self.path}' ends too early; rebuild the vectors from the passages")

    def sync(self) -> None:
        """Make what was written survive a power cut."""
        os.fsync(self.handle)

    def close(self) -> None:
        """Let go of the file; closing twice is harmless."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1

    def array(self, kind: Any, width: int = 0) -> np.ndarray:
        """What counts, mapped: (n,), or (n, width)."""
        shape = (-1, width) if width else (-1,)
        if not self.size:
            return np.zeros((0, width) if width else 0, kind)
        held = mmap.mmap(self.handle, self.size, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            held.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(held, kind).reshape(shape)
