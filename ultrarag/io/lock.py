"""The owner's lock: one process at a time may use a directory, and any process may ask which."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from ultrarag.errors import IndexStateError
from ultrarag.io.child import process_exists

try:
    import fcntl
except ImportError:  # Windows: the locks of SQLite and of the vector engine stand
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "owner.lock"
#: Seconds to wait for whoever holds the lock, for it may be somebody who only asks who the owner is.
PATIENCE = 0.5
#: Seconds to wait for an owner that was killed: its lock goes when the child that inherited it has ended.
GRACE = 5.0


@dataclass(frozen=True)
class Owner:
    """The process that holds a directory."""

    pid: int
    host: str
    #: when it acquired the lock, ISO 8601
    since: str

    def __str__(self) -> str:
        who = "this process" if self._is_local() and self.pid == os.getpid() else f"process {self.pid}"
        return f"{who} on {self.host}, since {self.since}"

    def patience(self) -> float:
        """Seconds to wait until it lets go."""
        return GRACE if self._is_local() and not process_exists(self.pid) else PATIENCE

    def _is_local(self) -> bool:
        return self.host == socket.gethostname()


class OwnerLock:
    """The right to use a directory, held by one object in one process until `release` or the end of the process.

    A lock that is held is waited for: half a second, and five when the process that acquired it was killed and a child
    that inherited it has yet to end.
    """

    def __init__(self, directory: Path, hint: str = "", read_only: bool = False, patience: float = PATIENCE) -> None:
        """Acquire the lock.

        Args:
            hint: what else can be done while another owner holds it, for the error.
            read_only: keep owners out, and let others in who read as well; nothing is written.
            patience: seconds to wait for another owner, at least.

        Raises:
            IndexStateError: when another owner holds it; names process, host and since when.
        """
        self._file: IO[str] | None = None
        self._read_only = read_only
        if read_only and not (directory / LOCK_FILE).exists():  # a copy that never had an owner
            return
        self._file = open(directory / LOCK_FILE, "r" if read_only else "a+", encoding="utf-8")  # noqa: SIM115
        started = time.monotonic()
        while not _lock(self._file, read_only):
            holder = _holder(directory)
            if time.monotonic() - started >= max(patience, holder.patience() if holder else PATIENCE):
                self._file.close()
                raise IndexStateError(
                    f"'{directory}' is in use by {holder or 'another process'}; it has one owner at a time: close it "
                    f"there first{f' ({hint})' if hint else ''}"
                )
            time.sleep(0.02)
        if not read_only:
            self.name(os.getpid())

    def descriptors(self) -> tuple[int, ...]:
        """What a child process inherits (`pass_fds`) to hold the lock as well."""
        return () if fcntl is None or self._file is None else (self._file.fileno(),)

    def name(self, process: int) -> None:
        """Say who holds the lock: this process, or a child that inherited it and may outlive this one."""
        self._write(Owner(process, socket.gethostname(), datetime.now(UTC).isoformat(timespec="seconds")))

    def release(self) -> None:
        """Let another owner in; releasing twice is harmless."""
        if self._file is not None:
            if not self._read_only:
                self._file.truncate(0)
            self._file.close()
            self._file = None

    def _write(self, owner: Owner) -> None:
        assert self._file is not None
        try:
            os.ftruncate(self._file.fileno(), 0)
            os.write(self._file.fileno(), json.dumps(asdict(owner)).encode())  # no buffer that fails again at the end
        except BaseException:
            self._file.close()
            raise


def read_owner(directory: Path) -> Owner | None:
    """Return who owns a directory now, or None; nothing is locked for longer than the look at it."""
    try:
        file = open(directory / LOCK_FILE, encoding="utf-8")  # noqa: SIM115
    except FileNotFoundError:
        return None
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _holder(directory)
            return None
    return _holder(directory)


def hold(handle: int) -> None:
    """Lock an open file or folder until it is closed, where the file system knows such locks."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_held(path: Path) -> bool:
    """Whether any process has a file or folder open that it locked with `hold`."""
    if fcntl is None:
        return False
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # it has gone, or is somebody else's
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without such locks
        return False
    finally:
        os.close(handle)
    return False


def _lock(file: IO[str], shared: bool) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file.fileno(), (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(directory: Path) -> Owner | None:
    try:
        return Owner(**json.loads((directory / LOCK_FILE).read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError):
        return None
