"""The seal of a directory: checksums of its files, written while nobody changes them, compared before they are used."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ultrarag.errors import IndexStateError
from ultrarag.io.durable import left_over, sync_directory, write_bytes
from ultrarag.io.lock import LOCK_FILE

CHECKSUM_FILE = "checksums.json"
#: Bytes that are read at a time, and that a hole is as large as.
BLOCK_BYTES = 1 << 20


def seal(directory: Path, paths: Iterable[Path] | None = None, known: dict[str, Any] | None = None) -> None:
    """Write the checksums of `paths`, or of all files below a directory, while nobody writes to them.

    `known` are checksums that are believed for files whose size and time have not changed.
    """
    sums = {}
    for path in _files(directory) if paths is None else paths:
        name, status = path.relative_to(directory).as_posix(), path.stat()
        entry = (known or {}).get(name)
        if not entry or entry["size"] != status.st_size or entry["time"] != status.st_mtime_ns:
            entry = {"size": status.st_size, "time": status.st_mtime_ns, "crc32": _checksum(path)}
        sums[name] = entry
    write_bytes(directory / CHECKSUM_FILE, json.dumps(sums, indent=1).encode())


def verify_seal(directory: Path) -> dict[str, Any]:
    """Compare the files below a directory with their checksums, if it was sealed, and return these.

    Raises:
        IndexStateError: naming every file that is missing, truncated or changed.
    """
    sums = read_seal(directory)
    lasting = {name: entry for name, entry in sums.items() if not left_over(name)}  # earlier versions sealed all files
    damages = [(directory / name, _damage(directory / name, entry)) for name, entry in lasting.items()]
    if details := "; ".join(f"'{path}' {damage}" for path, damage in damages if damage):
        raise IndexStateError(f"damaged index: {details}; rebuild the vectors from the passages")
    return sums


def read_seal(directory: Path) -> dict[str, Any]:
    """Return the checksums last written, {} where there are none."""
    path = directory / CHECKSUM_FILE
    try:
        sums: dict[str, Any] = json.loads(path.read_bytes())
        if any(entry.keys() != {"size", "time", "crc32"} for entry in sums.values()):
            raise ValueError("an entry is incomplete")
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        raise IndexStateError(f"'{path}' is damaged ({error}); rebuild the vectors from the passages") from None
    return sums


def _damage(path: Path, entry: dict[str, Any]) -> str:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != entry["size"]:
        return f"has {path.stat().st_size} bytes instead of {entry['size']}"
    return "" if _checksum(path) == entry["crc32"] else "does not have the content that was written (checksum)"


def remove_seal(directory: Path) -> None:
    """Remove the checksums before the files change."""
    (directory / CHECKSUM_FILE).unlink(missing_ok=True)
    sync_directory(directory)


def _checksum(path: Path) -> int:
    """CRC-32 of the blocks of a file that are not all zero, with their places.

    The engine preallocates tens of megabytes a file, of which most are holes: these are neither read nor do they
    change the sum, so that it stays the same when a copy fills the holes with zeros.
    """
    total, zeros = 0, bytes(BLOCK_BYTES)
    with open(path, "rb") as file:
        for block in _blocks_with_data(file.fileno(), path.stat().st_size):
            file.seek(block * BLOCK_BYTES)
            content = file.read(BLOCK_BYTES)
            if content != zeros[: len(content)]:
                total = zlib.crc32(content, zlib.crc32(block.to_bytes(8, "little"), total))
    return total


def copy_with_holes(source: Path, target: Path) -> None:
    """Copy a directory; what is a hole in a file stays one in its copy."""
    shutil.copytree(source, target, copy_function=_copy_file)


def _copy_file(source: str, target: str) -> None:
    size = os.path.getsize(source)
    with open(source, "rb") as file, open(target, "wb") as copy:
        for block in _blocks_with_data(file.fileno(), size):
            file.seek(block * BLOCK_BYTES)
            copy.seek(block * BLOCK_BYTES)
            copy.write(file.read(BLOCK_BYTES))
        copy.truncate(size)


def _blocks_with_data(handle: int, size: int) -> Iterator[int]:
    """Yield the numbers of the blocks that are not entirely holes."""
    position, following = 0, 0
    while position < size:
        try:
            start = os.lseek(handle, position, os.SEEK_DATA)
            position = os.lseek(handle, start, os.SEEK_HOLE)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno == 6:  # ENXIO: holes up to the end
                return
            start, position = position, size  # a platform or file system that does not know holes
        yield from range(max(following, start // BLOCK_BYTES), -(-position // BLOCK_BYTES))
        following = -(-position // BLOCK_BYTES)


def _files(directory: Path) -> Iterator[Path]:
    """Yield the files to be sealed; the write-ahead log of the engine checks itself."""
    for path in sorted(directory.rglob("*")):
        below = path.relative_to(directory).parts
        if path.is_file() and below[0] not in (LOCK_FILE, CHECKSUM_FILE, "wal") and not left_over("/".join(below)):
            yield path
