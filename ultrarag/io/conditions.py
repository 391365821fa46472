"""Conditions of the machine: a full disk, a folder that cannot be written, too few file descriptors. None is damage."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ultrarag.errors import ResourceError, UltraragError

_FULL = "make room on the disk; what was acknowledged before is kept, nothing of this write is"
_CLOSED = "nothing is damaged: mount it for writing, or give this user the right to"
_FEW = "nothing is damaged: raise the limit of open files (ulimit -n), or close some"
#: errno -> what to do about it.
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _FULL),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _CLOSED),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _FEW),
}
#: Those in which a folder can still be read.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
#: How engines written in Rust give the system's error: by its number, or by its name.
_OS_ERROR = re.compile(r"\(os error (\d+)\)|\bcode: (\d+)")
_RUST_NAMES = {
    "TooManyOpenFiles": errno.EMFILE,
    "StorageFull": errno.ENOSPC,
    "ReadOnlyFilesystem": errno.EROFS,
    "PermissionDenied": errno.EACCES,
}
#: SQLite's result codes that say which condition it is, and those that do not: it cannot open, read or write a file.
_SQLITE = {sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_READONLY: errno.EROFS}
_SQLITE_UNCLEAR = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR}
#: What SQLite opens for one connection: the file, its log and the log's index.
_SQLITE_FILES = 3
#: Bytes that must be free for a writer that does not say why it failed not to have failed for want of them.
_ROOM = 1 << 18


def resource_error(error: BaseException | None, path: Path) -> ResourceError | None:
    """The error that names the machine's condition behind another error; None where there is none.

    Args:
        path: what could not be used, where the error does not say it.
    """
    seen: set[int] = set()  # an error that was raised again in another thread can be its own context
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, ResourceError):
            return error
        number = _number(error, path)
        if number in REMEDIES:
            return _error(number, getattr(error, "filename", None) or path)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


@contextmanager
def named_conditions(path: Path) -> Iterator[None]:
    """Raise a ResourceError where a block fails by a condition of the machine; errors raised on purpose stay."""
    try:
        yield
    except UltraragError:
        raise
    except Exception as error:
        if found := resource_error(error, path):
            raise found from error
        raise


@contextmanager
def named_when_full(path: Path) -> Iterator[None]:
    """`named_conditions` for writers that lose the system's error, as torch.save does: then the disk is looked at."""
    with named_conditions(path):
        try:
            yield
        except (UltraragError, OSError):
            raise
        except Exception as error:
            if shutil.disk_usage(path.parent).free < _ROOM:
                raise _error(errno.ENOSPC, path) from error
            raise


def check_room(path: Path, size: int) -> None:
    """Raise ResourceError unless `size` bytes are free below `path`: for what dies where it finds the disk full."""
    if (free := shutil.disk_usage(path).free) < size:
        raise _error(errno.ENOSPC, path, f" ({free >> 20} MiB are free, {size >> 20} are needed)")


def _error(number: int, path: Path | str, detail: str = "") -> ResourceError:
    found = ResourceError(f"'{path}': {os.strerror(number)}{detail}; {REMEDIES[number]}")
    found.errno = number
    return found


def _number(error: BaseException, path: Path) -> int:
    """The errno behind an error, 0 where there is none."""
    if isinstance(error, OSError):
        return error.errno or 0
    if isinstance(error, sqlite3.Error):
        if "disk is full" in str(error):  # also where the error carries no code
            return errno.ENOSPC
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest is detail
        return _look(path) if code in _SQLITE_UNCLEAR else _SQLITE.get(code, 0)
    return _told(str(error))


def _told(text: str) -> int:
    if number := _OS_ERROR.search(text):
        return int(number.group(1) or number.group(2))
    for known in REMEDIES:
        if os.strerror(known) in text:
            return known
    return next((number for name, number in _RUST_NAMES.items() if name in text), 0)


def _look(path: Path) -> int:
    """Find out why SQLite can open or write no file at `path`, which it does not say."""
    handles: list[int] = []
    try:
        for _ in range(_SQLITE_FILES):
            handles.append(os.open(path, os.O_RDONLY))
        if shutil.disk_usage(path).free < _ROOM:
            return errno.ENOSPC
        if hasattr(os, "statvfs") and os.statvfs(path).f_flag & os.ST_RDONLY:
            return errno.EROFS
    except OSError as error:
        return error.errno or 0
    finally:
        for handle in handles:
            os.close(handle)
    return 0 if os.access(path.parent, os.W_OK) else errno.EACCES
