"""Texts: the distinct texts of a mining run on disk, by number; 32 bytes of each are held in memory, however long."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ultrarag.files import sync_directory
from ultrarag.finetune.text_keys import text_key

_TEXTS, _TABLE = "texts.bin", "texts.npz"


class Texts:
    """Distinct texts on disk, read by number; `write` makes them, `open` finds them again."""

    def __init__(self, folder: Path) -> None:
        with np.load(folder / _TABLE) as table:
            #: where each text begins and ends in the file, (texts,) int64
            self.starts, self.ends = table["starts"], table["ends"]
            self._keys, self._numbers = table["keys"], table["numbers"]
            #: the first so many are candidates; those after them are positives that the pool lacks
            self.pool = int(table["pool"])
            #: texts of the pool that were there before
            self.repeated = int(table["repeated"])
        self._file = os.open(folder / _TEXTS, os.O_RDONLY)

    @classmethod
    def write(cls, folder: Path, pool: Iterable[str], others: Iterable[str]) -> Texts:
        """Store the texts of the pool and, after them, others; the first of several equal ones is kept."""
        ends, keys = array("q"), array("Q")
        with open(folder / _TEXTS, "wb") as file:
            _append(file, pool, ends, keys)
            given = len(ends)
            _append(file, others, ends, keys)
            file.flush()
            os.fsync(file.fileno())
        _write_table(folder, np.array(ends), np.array(keys), given)
        return cls(folder)

    @classmethod
    def open(cls, folder: Path) -> Texts | None:
        """The texts that `write` finished there; None where it did not."""
        return cls(folder) if (folder / _TABLE).is_file() else None

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, number: int) -> str:
        """Return one text."""
        start = int(self.starts[number])
        return os.pread(self._file, int(self.ends[number]) - start, start).decode()

    def find(self, texts: Sequence[str]) -> np.ndarray:
        """The numbers of texts, (n,) int64; -1 for one that is not here."""
        return self.find_keys(np.array([text_key(text) for text in texts], np.uint64))

    def find_keys(self, wanted: np.ndarray) -> np.ndarray:
        """The numbers of texts with these keys, (n,) int64; -1 for one that is not here."""
        if not len(self):
            return np.full(len(wanted), -1, np.int64)
        places = np.searchsorted(self._keys, wanted).clip(max=len(self) - 1)
        found: np.ndarray = np.where(self._keys[places] == wanted, self._numbers[places], -1)
        return found

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _append(file: object, texts: Iterable[str], ends: array[int], keys: array[int]) -> None:
    end = ends[-1] if ends else 0
    for text in texts:
        content = text.encode()
        end += file.write(content)  # type: ignore[attr-defined]
        ends.append(end)
        keys.append(text_key(text))


def _write_table(folder: Path, ends: np.ndarray, keys: np.ndarray, given: int) -> None:
    """Write where the first of each group of equal texts stands; the table appears whole or not at all."""
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ends) else ends
    kept, first = np.unique(keys, return_index=True)
    order = np.argsort(first)
    numbers = np.empty(len(first), np.int64)
    numbers[order] = np.arange(len(first))
    pool = int((first < given).sum())
    where = first[order]
    staging = folder / f".{_TABLE}"
    with open(staging, "wb") as file:
        arrays: dict[str, Any] = {"starts": starts[where], "ends": ends[where], "keys": kept, "numbers": numbers}
        np.savez(file, **arrays, pool=pool, repeated=given - pool)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, folder / _TABLE)
    sync_directory(folder)
