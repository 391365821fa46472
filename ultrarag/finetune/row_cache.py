"""The cache of checked rows: read and checked once, then mapped from disk by every process and every later run.

A manifest, named by what the rows depend on, names a file of rows, named by its own content. Both appear whole or
not at all, and two runs that build the same cache at once write the same bytes under the same name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from ultrarag.errors import DataError
from ultrarag.files import sha256_of, sync_directory
from ultrarag.finetune.arrow_rows import SCHEMA_VERSION, ArrowRows, write_rows
from ultrarag.finetune.rows import Dataset, RowReader
from ultrarag.finetune.sources import DataFile
from ultrarag.types import Example

_STAGE = ".stage"
#: Seconds after which what a killed process left behind is removed.
_STALE = 24 * 3600


@dataclass
class CheckedRows:
    """The usable rows of some files, one after the other, and what was found while reading them."""

    rows: ArrowRows
    #: one per file
    datasets: list[Dataset]
    notes: list[str]
    #: SHA-256 of the files' content
    digest: str
    #: path -> SHA-256 of each file
    files: dict[str, str] = field(default_factory=dict)


def cached_rows(files: Sequence[DataFile], reader: RowReader, cache_path: str | os.PathLike[str] | None) -> CheckedRows:
    """Return the rows of `files` from the cache; they are read, checked and cached first where they are not in it.

    Raises:
        DataError: rows cannot be used, or the cache cannot be written.
    """
    folder = Path(cache_path) if cache_path else default_cache()
    contents = [_content(file) for file in files]
    digest = hashlib.sha256("".join(contents).encode()).hexdigest()
    manifest = folder / f"{_key(files, contents, reader)}.json"
    found = _read(manifest, digest) or _build(manifest, digest, files, contents, reader)
    return replace(found, files={file.path: content for file, content in zip(files, contents, strict=True)})


def default_cache() -> Path:
    """The user's cache directory: XDG_CACHE_HOME, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "ultrarag" / "data"


def _content(file: DataFile) -> str:
    try:
        return sha256_of(Path(file.path))
    except OSError as error:
        raise DataError(f"cannot read '{file.path}': {error.strerror}") from error


def _key(files: Sequence[DataFile], contents: Sequence[str], reader: RowReader) -> str:
    # the paths count too: rows carry theirs
    parts = [SCHEMA_VERSION, reader.on_bad_rows, reader.teacher, [file.path for file in files], list(contents)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _read(manifest: Path, digest: str) -> CheckedRows | None:
    """Return what the manifest names, or None where it, or the rows, are missing or damaged."""
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        rows = manifest.with_name(f"{found['sha256']}.arrow")
        if sha256_of(rows) != found["sha256"]:
            return None
        return CheckedRows(
            ArrowRows(str(rows)), [Dataset(**item) for item in found["datasets"]], found["notes"], digest
        )
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def _build(
    manifest: Path, digest: str, files: Sequence[DataFile], contents: Sequence[str], reader: RowReader
) -> CheckedRows:
    datasets = [Dataset() for _ in files]
    try:
        manifest.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(manifest.parent)
        with _stage(manifest.parent) as stage:
            with open(stage, "wb") as file:
                write_rows(_examples(files, contents, reader, datasets), file)
                _sync(file)
            content = sha256_of(stage)
            os.replace(stage, manifest.with_name(f"{content}.arrow"))
        found = {"sha256": content, "datasets": [asdict(item) for item in datasets], "notes": reader.notes}
        _write_manifest(manifest, found)
    except OSError as error:
        raise DataError(
            f"cannot write the cache of training data in '{manifest.parent}': {error.strerror or error}; "
            "name another directory with --cache_path"
        ) from error
    return CheckedRows(ArrowRows(str(manifest.with_name(f"{content}.arrow"))), datasets, reader.notes, digest)


def _examples(
    files: Sequence[DataFile], contents: Sequence[str], reader: RowReader, datasets: Sequence[Dataset]
) -> Iterator[Example]:
    for file, content, dataset in zip(files, contents, datasets, strict=True):
        yield from reader.read(file, dataset)
        if _content(file) != content:
            raise DataError(f"'{file.path}' was changed while it was read; start again when it is finished")
    reader.finish()


def _write_manifest(manifest: Path, value: dict[str, Any]) -> None:
    with _stage(manifest.parent) as stage:
        with open(stage, "wb") as file:
            file.write(json.dumps(value, indent=1).encode())
            _sync(file)
        os.replace(stage, manifest)
    sync_directory(manifest.parent)


@contextlib.contextmanager
def _stage(folder: Path) -> Iterator[Path]:
    """Give a new file of a random name (process numbers repeat between machines that share a disk)."""
    handle, name = tempfile.mkstemp(_STAGE, ".", folder)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _remove_stale(folder: Path) -> None:
    for left in folder.glob(f".*{_STAGE}"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE:
                left.unlink()
