"""Output: files that grow beside their names (NAME.part), resumable after any kill, and appear whole when done.

A note beside the first file says what makes the output (inputs and arguments), how many input items are done and
how long each part was then. A rerun cuts the parts to those lengths and goes on with the next item. The note is removed
last of all: where it is there and the files have their names, a rerun does no more than what comes after them.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ultrarag.errors import DataError
from ultrarag.io.durable import sync_directory, write_json

#: Seconds of work that a kill may lose.
COMMIT_SECONDS = 2.0


class Output:
    """One or more files of lines that are being written; made by `resumable`.

    Attributes:
        done: input items that earlier runs have dealt with: skip them.
        state: JSON values (counts, say) that are saved and restored with the position.
        finished: an earlier run has written everything, and was stopped before it could say so: write nothing.
    """

    def __init__(self, targets: Sequence[Path], made_by: Mapping[str, Any]) -> None:
        self.targets = list(targets)
        self.made_by = json.loads(json.dumps(made_by))
        self.done = 0
        self.state: dict[str, Any] = {}
        self.finished = False
        self._after: list[Callable[[], object]] = []
        self._files: list[BinaryIO] = []
        self._saved = 0.0
        #: done, sizes and state when they last agreed: what a run that stops between two lines goes back to
        self._position: dict[str, Any] = {}

    def write(self, row: Mapping[str, Any] | str, file: int = 0) -> None:
        """Append a JSON line, or a line of text as it stands, to one of the files."""
        line = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
        with _explained(self.targets[file]):
            self._files[file].write(line.encode("utf-8") + b"\n")

    def advance(self, items: int = 1) -> None:
        """Count input items as done: all that they give has been written. Saves the position now and then."""
        self.done += items
        self._position = self._now()
        if time.monotonic() - self._saved > COMMIT_SECONDS:
            self.commit()

    def afterwards(self, action: Callable[[], object]) -> None:
        """Do this when the files have their names; a run that is stopped in between does it when it is made again."""
        self._after.append(action)

    def commit(self) -> None:
        """Make everything written so far survive a kill or a power cut."""
        self._position = self._now()
        self._save()

    def _save(self) -> None:
        for target, file in zip(self.targets, self._files, strict=True):
            with _explained(target):
                file.flush()
                os.fsync(file.fileno())
        self._note(False)
        self._saved = time.monotonic()

    # ---- opening and finishing

    def _now(self) -> dict[str, Any]:
        sizes = [file.tell() for file in self._files]
        return {"done": self.done, "sizes": sizes, "state": json.loads(json.dumps(self.state))}

    def _note(self, finished: bool) -> None:
        note = {"made_by": self.made_by, **self._position, "finished": finished}
        with _explained(self.targets[0]):
            write_json(note_path(self.targets[0]), note)

    def _open(self, note: Mapping[str, Any] | None) -> None:
        for target in self.targets:
            with _explained(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                self._files.append(_locked(target))
        if note:
            self.done, self.state = note["done"], note["state"]
        else:
            note_path(self.targets[0]).unlink(missing_ok=True)  # before the parts that it speaks of are cut
        for target, file, size in zip(self.targets, self._files, _sizes(note, self.targets), strict=True):
            if file.tell() < size:
                raise DataError(f"'{part_path(target)}' is shorter than it was; begin anew with --overwrite")
            with _explained(target):
                file.truncate(size)
        self.commit()

    def _finish(self) -> None:
        if not self.finished:
            self.commit()
            self._note(True)
        with _explained(self.targets[0]):
            _rename(self.targets)
            for action in self._after:
                action()
            note_path(self.targets[0]).unlink(missing_ok=True)

    def _stop(self) -> None:
        """Keep what is done; leave nothing behind where that is nothing."""
        if self._position["done"]:
            self._save()
            return
        for path in (note_path(self.targets[0]), *map(part_path, self.targets)):
            path.unlink(missing_ok=True)

    def _close(self) -> None:
        for file in self._files:
            file.close()


def part_path(target: Path) -> Path:
    """Where a file grows."""
    return target.with_name(f"{target.name}.part")


def note_path(target: Path) -> Path:
    """Where the position is kept."""
    return target.with_name(f"{target.name}.part.json")


@contextmanager
def resumable(
    targets: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    made_by: Mapping[str, Any],
    overwrite: bool = False,
) -> Iterator[Output]:
    """Open output files, new ones or where an earlier run stopped; they get their names when the block ends well.

    Where an earlier run stopped between that and its end, the block runs with all input items done.

    Args:
        targets: a file, or several that are finished together.
        made_by: whatever decides the content, as JSON: arguments, and `identity(path)` of every input.
        overwrite: begin anew, and replace files that are there.

    Example:
        >>> with resumable("out.jsonl", {"inputs": identity("in.jsonl"), "k": 3}) as out:
        ...     for item in islice(items, out.done, None):
        ...         out.write({"item": item})
        ...         out.advance()

    Raises:
        DataError: a target exists, or was begun with other inputs or arguments, or cannot be written.
    """
    named = [targets] if isinstance(targets, str | os.PathLike) else targets
    output = Output([Path(target) for target in named], made_by)
    note = None if overwrite else _begun(output)
    try:
        if note and note["finished"]:
            output.done, output.state, output.finished = note["done"], note["state"], True
            yield output
        else:
            output._open(note)
            yield from _saved_when_stopped(output)
        output._finish()
    finally:
        output._close()


def _saved_when_stopped(output: Output) -> Iterator[Output]:
    """Give the output; whatever stops the work, all items done until then are kept."""
    try:
        yield output
    except KeyboardInterrupt:
        output._stop()
        raise KeyboardInterrupt("the same command goes on where this one stopped") from None
    except Exception:
        output._stop()
        raise


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write '{target}': {error.strerror or error}") from error


def _locked(target: Path) -> BinaryIO:
    """Open a part for this process alone."""
    file = open(part_path(target), "ab")  # noqa: SIM115 (it stays open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise DataError(f"another process is writing '{part_path(target)}'") from None
    return file


def _sizes(note: Mapping[str, Any] | None, targets: Sequence[Path]) -> list[int]:
    return list(note["sizes"]) if note else [0] * len(targets)


def identity(path: str | os.PathLike[str]) -> list[Any]:
    """Return what an input is known by: path, size and time of its last change (the content may be gigabytes)."""
    found = os.stat(path)
    return [os.path.abspath(path), found.st_size, found.st_mtime_ns]


def _begun(output: Output) -> dict[str, Any] | None:
    """Return the note of an earlier run that has done something, if it fits."""
    path = note_path(output.targets[0])
    try:
        note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        begun = bool(note) and bool(note["done"] or note["finished"])
        same = begun and note["made_by"] == output.made_by and len(note["sizes"]) == len(output.targets)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"'{path}' is damaged; begin anew with --overwrite") from error
    if begun and note["finished"] and not _complete(note, output.targets):
        begun = same = False  # its files were moved away or replaced since
    if same:
        return note
    if begun:
        other = [key for key in output.made_by if note["made_by"].get(key) != output.made_by[key]]
        what = ", ".join(other) or "set of arguments"
        raise DataError(
            f"'{path}' says that '{output.targets[0]}' was begun with another {what}: "
            "give the same again to go on, or begin anew with --overwrite"
        )
    for target in output.targets:
        if target.exists():
            raise DataError(_exists(target))
    return None


def _complete(note: Mapping[str, Any], targets: Sequence[Path]) -> bool:
    """Whether all files of a finished run are there, under their names or not yet."""
    found = [next((p for p in (part_path(target), target) if p.exists()), None) for target in targets]
    sizes = [path.stat().st_size if path else 0 for path in found]  # an empty file may have been left out
    return sizes == list(note["sizes"])


def _exists(target: Path) -> str:
    return f"'{target}' exists: name another output, or replace it with --overwrite"


def _rename(targets: Sequence[Path]) -> None:
    for target in targets:
        if part_path(target).exists():
            os.replace(part_path(target), target)
            sync_directory(target.parent)
