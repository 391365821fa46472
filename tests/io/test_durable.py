"""Durable writes: all of a file or the one before, and nothing left behind."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from ultrarag.io import replacing, staged_directory, sync_directory, write_bytes, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_fails_leaves_the_file_before(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"one", b"two")
    with pytest.raises(TypeError), replacing(tmp_path / "a") as file:
        file.writelines([b"half", "no bytes"])  # type: ignore[list-item]
    assert (tmp_path / "a").read_bytes() == b"onetwo"
    assert names(tmp_path) == ["a"]


def test_stages_of_killed_processes_are_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    here, gone = socket.gethostname(), ended.pid
    for mark in (f"{here}.{gone}", str(gone)):  # the second as earlier versions wrote it
        (tmp_path / f".a.{mark}.tmp").write_text("half")
        (tmp_path / f".b.{mark}.tmp").mkdir()
    kept = [f".a.elsewhere.{gone}.tmp", f".a.{here}.{os.getppid()}.tmp", ".a.note.tmp"]
    for name in kept:
        (tmp_path / name).write_text("somebody's")
    write_json(tmp_path / "a", {})
    with staged_directory(tmp_path / "b") as stage:
        (stage / "file").write_text("x")
    assert names(tmp_path) == sorted([*kept, "a"])


def test_no_directory_is_opened_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", lambda *given: pytest.fail("cannot be opened there"))
    monkeypatch.setattr("ultrarag.io.durable.os.name", "nt")
    sync_directory(tmp_path)
