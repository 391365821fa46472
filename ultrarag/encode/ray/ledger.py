"""Ledger: the blocks of a build that the server has confirmed, so that a driver that was killed goes on after them.

A block is a fixed stretch of row numbers. Its line is written after the server has confirmed all its vectors, so the
ledger may be behind the server, never ahead: a block that is there and has no line is encoded and written again, over
itself. For that reason no line has to be on the disk at once; they are synced once a second.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ultrarag.io import sync_directory

#: Most blocks of a build: Ray's driver holds an entry for each, and a list of them all.
MOST_BLOCKS = 20_000
#: Seconds between two syncs.
SYNC_EVERY = 1.0


class Ledger:
    """Confirmed blocks in a file: a line that says of what, then a line for each."""

    def __init__(self, path: Path, collection: str, first: int, last: int, block: int) -> None:
        """Open, or begin anew where the file is of another collection or other rows.

        Args:
            collection: where the vectors are.
            first, last: the rows are those after `first`, up to `last`.
            block: rows of a block, unless that makes too many; where the file has blocks of another size, theirs.
        """
        self._path = path
        self.first, self.last = first, last
        self._key = {"collection": collection, "first": first}
        self.size = max(block, -(-(last - first) // MOST_BLOCKS), 1)
        #: block -> its passages
        self.confirmed: dict[int, int] = {}
        if not self._read():
            self._write()
        self._file = open(path, "a", encoding="ascii")  # noqa: SIM115
        self._synced = time.monotonic()

    @property
    def passages(self) -> int:
        """The number of passages confirmed."""
        return sum(self.confirmed.values())

    def missing(self) -> list[int]:
        """The blocks without a line."""
        return [block for block in range(self.block_of(self.last) + 1) if block not in self.confirmed]

    def block_of(self, row: int) -> int:
        """The block of a row; rows count from 1, and those up to `first` are in none: -1."""
        return (row - self.first - 1) // self.size

    def rows_of(self, block: int) -> tuple[int, int]:
        """The rows of a block: those after the first number, up to the second."""
        start = self.first + block * self.size
        return start, start + self.size

    def confirm(self, block: int, passages: int) -> None:
        """Note a block that the server has."""
        self.confirmed[block] = passages
        self._file.write(f"{block} {passages}\n")
        self._file.flush()
        if time.monotonic() - self._synced >= SYNC_EVERY:
            self.sync()

    def forget(self, blocks: Iterable[int]) -> None:
        """Take back what turned out to be lost."""
        for block in blocks:
            self.confirmed.pop(block, None)
        self._file.close()
        self._write()
        self._file = open(self._path, "a", encoding="ascii")  # noqa: SIM115

    def sync(self) -> None:
        """Make every line durable."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()

    def _read(self) -> bool:
        """Take the lines of an earlier start; the last one may be torn."""
        try:
            head, *lines = self._path.read_text(encoding="ascii").split("\n")[:-1]
            found: dict[str, Any] = json.loads(head)
            size = int(found.pop("size"))
            if found != self._key:
                return False
            pairs = (line.split(" ") for line in lines)
            confirmed = {int(block): int(passages) for block, passages in pairs}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False  # not there, or damaged: everything is encoded again
        self.size, self.confirmed = size, confirmed
        self._write()  # without a torn end
        return True

    def _write(self) -> None:
        """Replace the file by one that holds what is confirmed."""
        stage = self._path.with_name(f".{self._path.name}.tmp")
        with open(stage, "w", encoding="ascii") as file:
            file.write(json.dumps({**self._key, "size": self.size}) + "\n")
            file.writelines(f"{block} {passages}\n" for block, passages in self.confirmed.items())
            file.flush()
            os.fsync(file.fileno())
        os.replace(stage, self._path)
        sync_directory(self._path.parent)
