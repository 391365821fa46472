"""Files that a crash or a second owner cannot spoil unnoticed: atomic writes, checksums, and the owner's lock."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from ultrarag.errors import IndexStateError

try:
    import fcntl
except ImportError:  # Windows: the engine's own lock stands, with a less helpful message
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "owner.lock"
CHECKSUM_FILE = "checksums.json"
#: How long an owner killed a moment ago may take to let go of its lock (its optimiser dies with it), in seconds.
GRACE = 5.0
BLOCK = 1 << 20


def write_atomically(path: Path, *content: bytes) -> None:
    """Write a file so that a reader, or a reader after a power failure, sees all of it or the one before."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.writelines(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    if os.name == "nt":  # a directory cannot be opened there
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class OwnerLock:
    """The right to use a directory; held by one process, and inside it by one object."""

    def __init__(self, directory: Path) -> None:
        """Take the lock, or raise IndexStateError naming the process that holds it."""
        self._file: IO[str] | None = open(directory / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115
        deadline = time.monotonic() + GRACE
        while not self._try():
            holder = self._holder()
            if _alive(holder) or time.monotonic() > deadline:
                self._file.close()
                raise IndexStateError(
                    f"'{directory}' is in use by {'this process' if holder == os.getpid() else f'process {holder}'}; "
                    f"a directory has one owner: close it there first"
                )
            time.sleep(0.02)
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def fileno(self) -> int:
        """The descriptor that carries the lock."""
        assert self._file is not None
        return self._file.fileno()

    def descriptors(self) -> tuple[int, ...]:
        """What a child process inherits to hold the lock as well."""
        return () if fcntl is None else (self.fileno(),)

    def release(self) -> None:
        """Let another owner in."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _try(self) -> bool:
        if fcntl is None:
            return True
        try:
            fcntl.flock(self.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _holder(self) -> int:
        assert self._file is not None
        self._file.seek(0)
        text = self._file.read()
        return int(text) if text.isdigit() else 0


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return process > 0


def seal(directory: Path, paths: Iterable[Path] | None = None, known: dict[str, Any] | None = None) -> None:
    """Write the checksums of `paths`, or of all files below a directory, while nobody writes to them.

    `known` are checksums that are believed for files whose size and time have not changed.
    """
    sums = {}
    for path in _files(directory) if paths is None else paths:
        name, status = path.relative_to(directory).as_posix(), path.stat()
        entry = (known or {}).get(name)
        if not entry or entry["size"] != status.st_size or entry["time"] != status.st_mtime_ns:
            entry = {"size": status.st_size, "time": status.st_mtime_ns, "crc32": checksum(path)}
        sums[name] = entry
    write_atomically(directory / CHECKSUM_FILE, json.dumps(sums, indent=1).encode())


def verify(directory: Path) -> dict[str, Any]:
    """Compare the files below a directory with their checksums, if it was sealed, and return these.

    Raises:
        IndexStateError: naming every file that is missing, truncated or changed.
    """
    sums = sealed(directory)
    damages = [(directory / name, _damage(directory / name, entry)) for name, entry in sums.items()]
    if details := "; ".join(f"'{path}' {damage}" for path, damage in damages if damage):
        raise IndexStateError(f"damaged index: {details}; rebuild the vectors from the passages")
    return sums


def sealed(directory: Path) -> dict[str, Any]:
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
    return "" if checksum(path) == entry["crc32"] else "does not have the content that was written (checksum)"


def unseal(directory: Path) -> None:
    """Remove the checksums before the files change."""
    (directory / CHECKSUM_FILE).unlink(missing_ok=True)
    sync_directory(directory)


def checksum(path: Path) -> int:
    """CRC-32 of the blocks of a file that are not all zero, with their places.

    The engine preallocates tens of megabytes a file, of which most are holes: these are neither read nor do they
    change the sum, so that it stays the same when a copy fills the holes with zeros.
    """
    total, zeros = 0, bytes(BLOCK)
    with open(path, "rb") as file:
        for block in _blocks_with_data(file.fileno(), path.stat().st_size):
            file.seek(block * BLOCK)
            content = file.read(BLOCK)
            if content != zeros[: len(content)]:
                total = zlib.crc32(content, zlib.crc32(block.to_bytes(8, "little"), total))
    return total


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
        yield from range(max(following, start // BLOCK), -(-position // BLOCK))
        following = -(-position // BLOCK)


def _files(directory: Path) -> Iterator[Path]:
    """Yield the files to be sealed; the write-ahead log of the engine checks itself."""
    for path in sorted(directory.rglob("*")):
        below = path.relative_to(directory).parts
        if path.is_file() and below[0] not in (LOCK_FILE, CHECKSUM_FILE, "wal"):
            yield path
