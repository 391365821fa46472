"""Durable files: write beside, fsync, then rename; checksums that tell a whole folder from a damaged one."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import socket
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ultrarag.errors import IndexStateError
from ultrarag.io.child import process_exists
from ultrarag.io.conditions import REMEDIES
from ultrarag.io.lock import LOCK_FILE, hold, is_held

#: Folders in which the embedded vector engine writes a file before it takes its place.
ENGINE_STAGE = ".atomicwrite"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write into; it takes the place of `path`, atomically and durably, when the block ends well."""
    remove_stale_stages(path.parent, path.name)
    stage = _stage_of(path)
    try:
        with _naming(path), open(stage, "wb") as file:
            hold(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(stage, path)
    finally:
        stage.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_bytes(path: Path, *content: bytes) -> None:
    """Replace `path` atomically and durably by a file with this content."""
    with replacing(path) as file:
        file.writelines(content)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically and durably by a readable JSON file."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode())


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_cache(name: str) -> Path:
    """A folder of the user's cache, which may not be there: below XDG_CACHE_HOME, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "ultrarag" / name


def sync_directory(path: Path) -> None:
    """Make renames and new files in `path` survive a power cut."""
    if os.name == "nt":  # a directory cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """fsync every file and directory below `path`, and `path` itself."""
    for folder, _, names in os.walk(path):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(folder))


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Give a new hidden sibling of `target` to write into; it is removed unless it was moved away."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_stages(target.parent, target.name)
    stage = _stage_of(target)
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    handle = None if os.name == "nt" else os.open(stage, os.O_RDONLY)
    try:
        if handle is not None:
            hold(handle)
        with _naming(target):
            yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if handle is not None:
            os.close(handle)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have an error of the machine say what was being written: that of a write names no file."""
    try:
        yield
    except OSError as error:
        if error.errno in REMEDIES and error.filename is None:
            error.filename = str(path)
        raise


def _stage_of(target: Path) -> Path:
    """A hidden name beside `target` that no other process of any machine uses."""
    return target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def remove_stale_stages(folder: Path, name: str = "") -> None:
    """Remove the stages that killed processes of this machine left in a folder, whatever they were of.

    So whoever stages anything in a folder cleans it, and a process that was killed and is never started again leaves
    nothing for long.

    Args:
        name: of a file or folder whose stages of earlier versions, which did not name the machine, are removed too.
    """
    for left in folder.glob(".*.tmp"):
        if _is_stale_stage(left) or (name and _is_stale_stage_of_before(left, name)):
            _remove(left)


def left_over(name: str) -> bool:
    """Whether a relative path is, or lies in, a stage of ours or of the engine: nothing that lasts."""
    parts = name.split("/")
    return any(part.startswith(ENGINE_STAGE) or (part.startswith(".") and part.endswith(".tmp")) for part in parts)


def remove_left_over(folder: Path, working: Callable[[Path], bool] = lambda path: False) -> None:
    """Remove the stages that killed processes of this machine left anywhere below a folder that this process owns.

    Args:
        working: whether a folder may be another process's, whose engine writes there now; its own stages are known by
            the number of its process.
    """
    for place, folders, files in os.walk(folder):
        engine = not working(Path(place))
        for name in [*folders, *files]:
            if (engine and name.startswith(ENGINE_STAGE)) or _is_stale_stage(Path(place, name)):
                _remove(Path(place, name))


def _is_stale_stage(path: Path) -> bool:
    """Whether a path is a stage whose process of this machine has ended.

    The number of the process does not decide alone: of two containers with one host name and a common folder, neither
    sees the processes of the other. A stage in use is locked, which they both see.
    """
    rest, _, owner = path.name[1:].removesuffix(".tmp").rpartition(".")
    ours = path.name.startswith(".") and path.name.endswith(".tmp") and rest.endswith(f".{socket.gethostname()}")
    return ours and owner.isdigit() and not process_exists(int(owner)) and not is_held(path)


def _is_stale_stage_of_before(path: Path, target: str) -> bool:
    owner = path.name.removeprefix(f".{target}.").removesuffix(".tmp")
    return owner.isdigit() and not process_exists(int(owner))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def publish_directory(stage: Path, target: Path, keep: Callable[[str], bool] = lambda name: False) -> None:
    """Make the finished directory `stage` appear as `target` in one step.

    Args:
        keep: which entries of an existing `target` live on (by name); they are linked into `stage` first.
    """
    if target.exists():
        for entry in sorted(target.iterdir()):
            if keep(entry.name) and not (stage / entry.name).exists():
                _link(entry, stage / entry.name)
    sync_tree(stage)
    if not target.exists():
        os.rename(stage, target)
    else:
        _exchange(stage, target)
    sync_directory(target.parent)


def link_tree(source: Path, target: Path) -> None:
    """Hard-link all that a folder holds into another one, which is there (copied where there are no links)."""
    for entry in sorted(source.iterdir()):
        _link(entry, target / entry.name)


def _link(source: Path, target: Path) -> None:
    """Hard-link a file or a tree of files (no copy of the data); copy where the file system has no links."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link_file, symlinks=True)
    else:
        _link_file(str(source), str(target))


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _exchange(stage: Path, target: Path) -> None:
    """Swap two directories: in one system call on Linux, else by two renames with a moment in between."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        result = libc.renameat2(
            _AT_FDCWD, os.fsencode(stage), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(_RENAME_EXCHANGE)
        )
        if result == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))
    except AttributeError:
        pass
    old = stage.with_name(f"{stage.name}.old.{os.getpid()}.tmp")
    os.rename(target, old)
    os.rename(stage, target)
    shutil.rmtree(old, ignore_errors=True)


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


#: What to do about vectors or words that are damaged.
_REBUILD = "rebuild the vectors from the passages"


def verify_seal(directory: Path, what: str = "index", remedy: str = _REBUILD) -> dict[str, Any]:
    """Compare the files below a directory with their checksums, if it was sealed, and return these.

    Args:
        what: what the files are of, and `remedy` what to do where they are damaged, for the error.

    Raises:
        IndexStateError: naming every file that is missing, truncated or changed.
    """
    sums = read_seal(directory, remedy)
    lasting = {name: entry for name, entry in sums.items() if not left_over(name)}  # earlier versions sealed all files
    damages = [(directory / name, _damage(directory / name, entry)) for name, entry in lasting.items()]
    if details := "; ".join(f"'{path}' {damage}" for path, damage in damages if damage):
        raise IndexStateError(f"damaged {what}: {details}; {remedy}")
    return sums


def read_seal(directory: Path, remedy: str = _REBUILD) -> dict[str, Any]:
    """Return the checksums last written, {} where there are none; IndexStateError where they cannot be read."""
    path = directory / CHECKSUM_FILE
    try:
        sums: dict[str, Any] = json.loads(path.read_bytes())
        if any(entry.keys() != {"size", "time", "crc32"} for entry in sums.values()):
            raise ValueError("an entry is incomplete")
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        raise IndexStateError(f"'{path}' is damaged ({error}); {remedy}") from None
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
