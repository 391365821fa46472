"""Conditions of the machine are found behind every library's error, and nothing else is taken for one."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

import pytest

from ultrarag.errors import ResourceError, UsageError, kind_of
from ultrarag.io import check_room, named_conditions, resource_error

#: As safetensors, the vector engine and the system say it.
TOLD = {
    "I/O error: No space left on device (os error 28)": errno.ENOSPC,
    "failed to open WAL: Custom { kind: TooManyOpenFiles, error: Error { kind: Uncategorized } }": errno.EMFILE,
    "Os { code: 30, kind: ReadOnlyFilesystem, message: ... }": errno.EROFS,
    "cannot be loaded: Permission denied": errno.EACCES,
}


@pytest.mark.parametrize(("text", "number"), TOLD.items())
def test_a_condition_is_found_in_what_a_library_says(text: str, number: int, tmp_path: Path) -> None:
    found = resource_error(RuntimeError(text), tmp_path / "kb")
    assert found is not None
    assert found.errno == number
    assert str(tmp_path / "kb") in str(found)


def test_it_is_found_behind_another_error_and_names_the_file(tmp_path: Path) -> None:
    behind = OSError(errno.ENOSPC, "No space left on device", "/there")
    expected = pytest.raises(ResourceError, match=r"'/there': No space left on device; make room")
    with expected as caught, named_conditions(tmp_path):
        raise ValueError("something else") from behind
    assert kind_of(caught.value) == "ResourceError"


def test_sqlite_says_full_and_is_asked_what_it_does_not_say(tmp_path: Path) -> None:
    db = sqlite3.connect(":memory:")
    db.execute("CREATE TABLE t (x)")
    db.execute("PRAGMA max_page_count = 2")
    with pytest.raises(ResourceError, match="No space left"), named_conditions(tmp_path):
        db.execute("INSERT INTO t VALUES (zeroblob(100000))")
    db.close()
    (tmp_path / "damaged").write_bytes(b"no database" * 99)
    with pytest.raises(sqlite3.DatabaseError), named_conditions(tmp_path / "damaged"):
        sqlite3.connect(tmp_path / "damaged").execute("SELECT * FROM t")


@pytest.mark.parametrize(
    "error", [ValueError("code: 7"), FileNotFoundError(2, "gone"), UsageError("no space, says he")]
)
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, named_conditions(tmp_path):
        raise error
    assert caught.value is error


def test_room_that_is_not_there_is_said_in_numbers(tmp_path: Path) -> None:
    check_room(tmp_path, 1)
    with pytest.raises(ResourceError, match=rf"'{tmp_path}'.* MiB are free, {1 << 40} are needed\); make room"):
        check_room(tmp_path, 1 << 60)


def test_errors_that_are_each_others_context_end(tmp_path):
    first, second = ValueError("one"), ValueError("two")
    first.__context__, second.__context__ = second, first
    assert resource_error(first, tmp_path) is None
    second.__context__ = OSError(errno.ENOSPC, "full")
    assert resource_error(first, tmp_path).errno == errno.ENOSPC
