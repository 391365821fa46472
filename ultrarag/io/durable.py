"""Durable files: write beside, fsync, then rename, so that a reader sees all of it or nothing."""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ultrarag.io.child import process_exists

#: Folders in which the embedded vector engine writes a file before it takes its place.
ENGINE_STAGE = ".atomicwrite"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write into; it takes the place of `path`, atomically and durably, when the block ends well."""
    remove_stale_stages(path)
    stage = _stage_of(path)
    try:
        with open(stage, "wb") as file:
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
    remove_stale_stages(target)
    stage = _stage_of(target)
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _stage_of(target: Path) -> Path:
    """A hidden name beside `target` that no other process of any machine uses."""
    return target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def remove_stale_stages(target: Path) -> None:
    """Remove what killed processes of this machine left beside `target`."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        if not _in_use(left.name.removeprefix(f".{target.name}.").removesuffix(".tmp")):
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
            if (engine and name.startswith(ENGINE_STAGE)) or _is_stale_stage(name):
                _remove(Path(place, name))


def _is_stale_stage(name: str) -> bool:
    """Whether a name is that of a stage whose process of this machine has ended."""
    rest, _, owner = name[1:].removesuffix(".tmp").rpartition(".")
    ours = name.startswith(".") and name.endswith(".tmp") and rest.endswith(f".{socket.gethostname()}")
    return ours and owner.isdigit() and not process_exists(int(owner))


def _in_use(mark: str) -> bool:
    """Whether the process in a stage's name may still write to it: HOST.PID, or PID as earlier versions wrote it."""
    host, _, owner = mark.rpartition(".")
    if not owner.isdigit() or host not in ("", socket.gethostname()):
        return True
    return process_exists(int(owner))


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
