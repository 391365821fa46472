"""The token vectors of a table's rows: files that only grow, as vectors while there are few, as codes from then on.

Refinements of codes lie in a file of their own, which is read for the few best passages of a search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ultrarag.errors import IndexStateError
from ultrarag.io import replacing, sha256_of
from ultrarag.retrieve.engines.ivf import Growing
from ultrarag.retrieve.engines.plaid.coder import Coder, Whole

#: Tokens that are read at a time, about, where all are.
BLOCK_TOKENS = 32_768


class Tokens:
    """Token vectors by row, in the files of the table with the same number."""

    def __init__(
        self, folder: Path, dim: int, state: dict[str, Any], read_only: bool = False, coder: Coder | None = None
    ) -> None:
        """Open what `state` described, or begin anew under its number, with `coder`, else as vectors."""
        number, rows = state["number"], int(state.get("rows", 0))
        self.path = folder / f"coder-{number}"
        #: the largest length of a vector, also of dead ones
        self.norm = float(state.get("token_norm", 0.0))
        self._sum: str | None = state.get("coder")
        if coder is not None:
            with replacing(self.path) as file:
                coder.write(file)
            self._sum = sha256_of(self.path)
        self.coder: Coder | Whole = self._read_coder() if self._sum else Whole(dim)
        self._files: list[Growing] = []
        try:
            count = int(state.get("tokens", 0))
            sizes = {"tokenvectors": count * self.coder.size, "tokenends": rows * 8}
            if self.coder.rest_size:
                sizes["tokenrests"] = count * self.coder.rest_size
            for name, size in sizes.items():
                self._files.append(Growing(folder / f"{name}-{number}", size, read_only))
            self._codes, self._ends, *self._rests = self._files
            self._map()
        except BaseException:
            self.close()
            raise

    def _read_coder(self) -> Coder:
        if not self.path.is_file() or sha256_of(self.path) != self._sum:
            raise IndexStateError(f"'{self.path}' is missing or damaged; rebuild the vectors from the passages")
        with open(self.path, "rb") as file:
            return Coder.read(file)

    @property
    def count(self) -> int:
        """Tokens written, of dead rows as well."""
        return self._codes.size // max(1, self.coder.size)

    def state(self) -> dict[str, Any]:
        """What the manifest says of it: tokens, and the checksum of what codes them."""
        return {"tokens": self.count, "token_norm": self.norm, "coder": self._sum}

    def files(self) -> list[Path]:
        """All its files."""
        return [*(file.path for file in self._files), *([self.path] if self._sum else [])]

    @property
    def refined(self) -> bool:
        """Whether there is more of a token than its code."""
        return bool(self._rests)

    def write(self, codes: Sequence[np.ndarray]) -> list[int]:
        """Write the codes of some rows behind the end, each (tokens, size + rest_size); return what `append` takes.

        An error of the disk leaves everything as it was.
        """
        ends = np.cumsum([len(part) for part in codes], dtype=np.int64) + self.count
        whole = np.concatenate(codes) if codes else np.zeros((0, self.coder.size + self.coder.rest_size), np.uint8)
        parts = np.split(whole, [self.coder.size], axis=1)[: 1 + len(self._rests)]
        contents = [np.ascontiguousarray(part) for part in parts]
        contents.insert(1, ends)
        return [
            file.write(content.data if content.size else b"")
            for file, content in zip(self._files, contents, strict=True)
        ]

    def append(self, sizes: Sequence[int], norm: float) -> None:
        """Let what was written count; its longest vector has the length `norm`."""
        for file, size in zip(self._files, sizes, strict=True):
            file.size = size
        self.norm = max(self.norm, norm)
        self._map()

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """How many tokens rows have, (len(rows),)."""
        return self._bounds[rows + 1] - self._bounds[rows]

    def read(self, rows: np.ndarray, whole: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The codes of some rows, one behind the other, and how many each has, (len(rows),).

        Args:
            whole: with their refinement, (tokens, size + rest_size), else (tokens, size).
        """
        counts = self.counts(rows)
        codes = self._read(self._codes, self.coder.size, rows, counts)
        if whole and self.refined:
            rests = self._read(self._rests[0], self.coder.rest_size, rows, counts)
            codes = np.concatenate([codes, rests], axis=1)
        return codes, counts

    def _read(self, file: Growing, size: int, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """What a file has of some rows with so many tokens, (tokens, size)."""
        starts, ends = self._bounds[rows], np.cumsum(counts)
        found = np.empty((int(ends[-1]) if len(ends) else 0, size), np.uint8)
        # rows that follow each other in the file are read at once
        breaks = np.flatnonzero(starts[1:] != starts[:-1] + counts[:-1]) + 1
        firsts = np.append(0, breaks)[: len(rows)]
        lasts = np.append(breaks, len(rows))[: len(rows)] - 1
        for start, place, end in zip(starts[firsts], (ends - counts)[firsts], ends[lasts], strict=True):
            file.fill(found[place:end], int(start) * size)
        return found

    def each(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """All that is stored of rows, one after another, each (tokens, size + rest_size)."""
        for part in self.blocks(rows):
            codes, counts = self.read(part, whole=True)
            yield from np.split(codes, np.cumsum(counts)[:-1])

    def blocks(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Rows in parts of as many as have about BLOCK_TOKENS tokens."""
        places = (np.cumsum(self.counts(rows)) - 1) // BLOCK_TOKENS
        yield from (part for part in np.split(rows, np.flatnonzero(np.diff(places)) + 1) if len(part))

    def sync(self) -> None:
        """Make everything so far survive a power cut."""
        for file in self._files:
            file.sync()

    def close(self) -> None:
        """Let go of the files; closing twice is harmless."""
        for file in self._files:
            file.close()

    def _map(self) -> None:
        #: where the tokens of each row begin, and where the last ones end, (rows + 1,) int64
        self._bounds = np.concatenate([np.zeros(1, np.int64), self._ends.array(np.int64)])
