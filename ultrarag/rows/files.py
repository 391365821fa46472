"""DataFile: one file of training rows, found from the paths that were given; nothing is passed over silently."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ultrarag.errors import DataError

#: What a directory's files of rows are called (in any case); a file that is named itself may be called anything.
SUFFIXES = (".jsonl", ".json", ".ndjson", ".txt")

#: Files that look like data which nobody would want left out unseen.
_OTHER_DATA = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".parquet", ".arrow", ".csv", ".tsv", ".pkl")

#: A file or directory whose name ends in this takes no negatives from the other queries of its batch.
NO_IN_BATCH_NEG = "no_in_batch_neg"


@dataclass(frozen=True)
class DataFile:
    """A file of rows, which is a dataset."""

    path: str
    #: the directory that was given, where it came from one
    folder: str | None = None

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return without_suffix(Path(self.path).name)


def without_suffix(name: str) -> str:
    """Return a file's name without a suffix of data files, whatever other dots it has."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in SUFFIXES and stem else name


def find_files(sources: Sequence[str | os.PathLike[str]]) -> tuple[list[DataFile], list[str]]:
    """Return the files of rows in the order given, those of a directory sorted by name; and remarks.

    Directories are read one level deep, as FlagEmbedding does.

    Raises:
        DataError: a path does not exist, a directory holds no data, or holds data in a format that is not read.
    """
    files: list[DataFile] = []
    notes: list[str] = []
    for source in sources:
        path = os.path.normpath(_utf8(os.fspath(source)))
        if os.path.isdir(path):
            files += _directory(path, notes)
        else:
            files.append(DataFile(_regular(path)))
    if not files:
        raise DataError("no training data was given: name JSONL files or directories of them")
    return files, notes + _repeated(files)


def _utf8(path: str) -> str:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"the name {os.fsencode(path)!r} is not UTF-8; rename it") from None
    return path


def _regular(path: str) -> str:
    if not os.path.exists(path):
        raise DataError(f"'{path}' does not exist")
    if not os.path.isfile(path):
        raise DataError(f"'{path}' is neither a file nor a directory; it is read twice, so save it as a file first")
    return path


def _directory(path: str, notes: list[str]) -> list[DataFile]:
    found, unread = [], []
    for name in sorted(os.listdir(path)):
        full = os.path.join(path, _utf8(name))
        if os.path.isfile(full) and name.lower().endswith(SUFFIXES) and not name.startswith("."):
            found.append(DataFile(full, path))
        else:
            _refuse_other_data(full)
            unread.append(f"{name}/" if os.path.isdir(full) else name)
    expected = ", ".join(SUFFIXES)
    if not found:
        raise DataError(f"directory '{path}' holds no file ending in {expected}; it holds {_listed(unread)}")
    if unread:
        notes.append(f"{len(unread)} entries of '{path}' are not read (not files in {expected}): {_listed(unread)}")
    return found


def _refuse_other_data(path: str) -> None:
    name = os.path.basename(path).lower()
    if os.path.isfile(path) and name.endswith(_OTHER_DATA) and not name.startswith("."):
        raise DataError(f"'{path}' looks like data in a format that is not read; convert it to JSONL, or move it away")


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    shown = ", ".join(f"'{name}'" for name in names[:10])
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown


def _repeated(files: Sequence[DataFile]) -> list[str]:
    times: dict[str, int] = {}
    for file in files:
        real = os.path.realpath(file.path)
        times[real] = times.get(real, 0) + 1
    return [
        f"'{path}' is given {count} times, so its rows count {count} times"
        for path, count in times.items()
        if count > 1
    ]
