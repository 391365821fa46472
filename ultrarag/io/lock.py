"""The owner's lock: one process at a time may write to an index, and any process may ask which."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from ultrarag.errors import IndexStateError

try:
    import fcntl
except ImportError:  # Windows: the locks of SQLite and of the vector engine stand
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "owner.lock"
#: Seconds to wait, for it may be somebody who only asks who the owner is.
PATIENCE = 0.5


@dataclass(frozen=True)
class Owner:
    """The process that holds an index."""

    pid: int
    host: str
    #: when it took the index, ISO 8601
    since: str

    def __str__(self) -> str:
        who = "this process" if self.pid == os.getpid() else f"process {self.pid}"
        return f"{who} on {self.host}, since {self.since}"


class OwnerLock:
    """The right to write to an index directory, held until `release` or the end of the process."""

    def __init__(self, directory: Path) -> None:
        """Take the lock.

        Raises:
            IndexStateError: when another owner holds it; names process, host and since when.
        """
        self._file: IO[str] | None = open(directory / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115
        deadline = time.monotonic() + PATIENCE
        while not (taken := _lock(self._file)) and time.monotonic() < deadline:
            time.sleep(0.02)
        if not taken:
            self._file.close()
            raise IndexStateError(
                f"'{directory}' is in use by {_holder(directory) or 'another process'}; an index has one owner: close "
                f"it there first (status and passages can be read meanwhile: ultrarag.retrieve.read_status)"
            )
        self._write(Owner(os.getpid(), socket.gethostname(), datetime.now(UTC).isoformat(timespec="seconds")))

    def release(self) -> None:
        """Let another owner in; releasing twice is harmless."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None

    def _write(self, owner: Owner) -> None:
        assert self._file is not None
        self._file.truncate(0)
        self._file.write(json.dumps(asdict(owner)))
        self._file.flush()


def read_owner(directory: Path) -> Owner | None:
    """Return who owns an index now, or None; nothing is locked for longer than the question takes."""
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


def _lock(file: IO[str]) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(directory: Path) -> Owner | None:
    try:
        return Owner(**json.loads((directory / LOCK_FILE).read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError):
        return None
