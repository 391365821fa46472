"""Durable writes: all of a file or the one before, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ultrarag.io import (
    CHECKSUM_FILE,
    read_seal,
    remove_left_over,
    remove_stale_stages,
    replacing,
    seal,
    staged_directory,
    sync_directory,
    verify_seal,
    write_bytes,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_fails_leaves_the_file_before(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"one", b"two")
    with pytest.raises(TypeError), replacing(tmp_path / "a") as file:
        file.writelines([b"half", "no bytes"])  # type: ignore[list-item]
    assert (tmp_path / "a").read_bytes() == b"onetwo"
    assert names(tmp_path) == ["a"]


def _file(path: Path) -> None:
    with replacing(path):
        raise OSError(errno.ENOSPC, "full")


def _folder(path: Path) -> None:
    with staged_directory(path):
        raise OSError(errno.EDQUOT, "full")


def _bytes(path: Path) -> None:
    with open("/dev/full", "wb", buffering=0) as full, replacing(path):
        full.write(b"x")  # the error of a write, as the system gives it


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
@pytest.mark.parametrize("write", [_file, _folder, _bytes])
def test_the_error_of_a_full_disk_names_what_was_written(write, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=str(tmp_path / "target")):
        write(tmp_path / "target")
    assert names(tmp_path) == []


def test_other_errors_are_given_no_name(tmp_path: Path) -> None:
    with pytest.raises(ConnectionRefusedError) as caught, replacing(tmp_path / "target"):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "of a server")
    assert caught.value.filename is None


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


def test_stages_of_killed_processes_go_when_anything_is_staged_beside_them(tmp_path: Path) -> None:
    def left_by_a_killed_process() -> None:
        if (child := os.fork()) == 0:
            with staged_directory(tmp_path / "model") as stage, replacing(tmp_path / "run.trec") as file:
                (stage / "weights").write_text("x")
                file.write(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        assert len(names(tmp_path)) == 2

    for act in (write_another_file, stage_another_folder, lambda folder: remove_stale_stages(folder)):
        left_by_a_killed_process()
        act(tmp_path)
        for name in ("other.json", "other"):
            (tmp_path / name).unlink(missing_ok=True)
        assert names(tmp_path) == []


def write_another_file(folder: Path) -> None:
    write_json(folder / "other.json", {})


def stage_another_folder(folder: Path) -> None:
    with staged_directory(folder / "other"):
        pass


def test_a_stage_in_use_stays_where_its_process_cannot_be_seen(tmp_path: Path) -> None:
    """In another container with the same host name the number of its process is nobody's, or somebody else's."""
    with staged_directory(tmp_path / "model") as stage, replacing(tmp_path / "file") as file:
        mine, mark = (f"{socket.gethostname()}.{process}.tmp" for process in (os.getpid(), _ended_process()))
        for name in (stage.name, os.path.basename(file.name)):
            os.rename(tmp_path / name, tmp_path / name.replace(mine, mark))
        remove_stale_stages(tmp_path)
        seen = names(tmp_path)
        for name in seen:
            os.rename(tmp_path / name, tmp_path / name.replace(mark, mine))
    assert seen == [f".file.{mark}", f".model.{mark}"]
    assert names(tmp_path) == ["file"]


def test_no_directory_is_opened_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", lambda *given: pytest.fail("cannot be opened there"))
    monkeypatch.setattr("ultrarag.io.durable.os.name", "nt")
    sync_directory(tmp_path)


def test_stages_of_ended_processes_are_removed_everywhere_below_a_folder(tmp_path: Path) -> None:
    host, ended = socket.gethostname(), _ended_process()
    gone = [f"a/.x.json.{host}.{ended}.tmp", "a/b/.atomicwriteX1", f"2.tmp/.x.{host}.{ended}.tmp"]
    kept = [f"a/.y.json.{host}.{os.getpid()}.tmp", f"a/.z.elsewhere.{ended}.tmp", "2.tmp/.atomicwriteX2", "a/b.tmp"]
    for name in gone + kept:
        (tmp_path / name).mkdir(parents=True)
    remove_left_over(tmp_path, working=lambda path: path.name == "2.tmp")
    assert [name for name in gone if (tmp_path / name).exists()] == []
    assert [name for name in kept if not (tmp_path / name).exists()] == []


def _ended_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_seal_does_not_depend_on_what_is_left_over(tmp_path: Path) -> None:
    (tmp_path / "lasting").write_text("x")
    (tmp_path / ".atomicwrite1").mkdir()
    for name in (".atomicwrite1/half", ".checksums.json.host.1.tmp"):
        (tmp_path / name).write_text("x")
    seal(tmp_path)
    assert list(read_seal(tmp_path)) == ["lasting"]
    entry = json.loads((tmp_path / CHECKSUM_FILE).read_text())["lasting"]
    (tmp_path / CHECKSUM_FILE).write_text(json.dumps({"lasting": entry, ".atomicwrite1/gone": entry}))
    verify_seal(tmp_path)  # of an earlier version
