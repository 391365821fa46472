"""How far a refresh has come: one small file in its output folder, by which a crash is carried on from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ultrarag.errors import DataError, IndexStateError
from ultrarag.io import sha256_of, write_json

STATE_FILE = "refresh.state.json"
FORMAT = 1


@dataclass(frozen=True)
class Request:
    """What was asked for, by content: the same request goes on where an earlier one was cut off."""

    train_data: str
    eval_data: str | None
    arguments: dict[str, Any]

    @classmethod
    def of(cls, train_data: Any, eval_data: Any, arguments: Mapping[str, Any]) -> Request:
        """Digest the data; paths count by what the files hold."""
        plain = json.loads(json.dumps(dict(arguments), default=str, sort_keys=True))
        return cls(digest(train_data), None if eval_data is None else digest(eval_data), plain)

    def differences(self, other: Request) -> list[str]:
        """The names of what another request asks for differently."""
        names = sorted(self.arguments.keys() | other.arguments.keys())
        changed = [name for name in names if self.arguments.get(name) != other.arguments.get(name)]
        data = [name for name in ("train_data", "eval_data") if getattr(self, name) != getattr(other, name)]
        return data + changed


@dataclass
class State:
    """What is done so far; a stage is done when its result is here."""

    request: Request
    #: fingerprint of the live encoder that is trained further
    parent: str
    #: generation of that encoder
    parent_generation: int
    #: result of the fine-tuning: fingerprint, steps, loss, metrics, notes
    trained: dict[str, Any] | None = None
    #: the generation built from it
    generation: int | None = None
    #: what was measured before the swap; see `ultrarag.evaluation.results`
    measured: dict[str, Any] | None = None
    #: stage -> seconds
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the state durably."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / STATE_FILE, {"format": FORMAT, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> State | None:
        """Read the state of a refresh that was begun in `folder`, or None.

        Raises:
            IndexStateError: when the file is damaged or of a newer version.
        """
        path = folder / STATE_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") > FORMAT:
                raise IndexStateError(f"'{path}' was written by a newer ultrarag: upgrade ultrarag to go on with it")
            return cls(**{**values, "request": Request(**values["request"])})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IndexStateError(
                f"'{path}' cannot be read ({type(error).__name__}: {error}); give another output_dir, or delete it"
            ) from error


def digest(data: Any) -> str:
    """SHA-256 of training or evaluation data: of the rows, or of the files behind the paths.

    Raises:
        DataError: for a path that does not exist, or rows that are not JSON.
    """
    if isinstance(data, str | os.PathLike):
        return _of_paths([data])
    if not isinstance(data, Sequence):
        raise DataError("give the data as a path, a list of paths, or a list of rows: it is read more than once")
    if data and all(isinstance(item, str | os.PathLike) for item in data):
        return _of_paths(data)
    try:
        rows = json.dumps(list(data), sort_keys=True, ensure_ascii=True)
    except (TypeError, ValueError) as error:
        raise DataError(f"the rows given are not JSON: {error}") from error
    return hashlib.sha256(rows.encode()).hexdigest()


def _of_paths(paths: Sequence[str | os.PathLike[str]]) -> str:
    """Contents in their order, with the names below each path, and never the path itself: it may be moved."""
    found = hashlib.sha256()
    for given in paths:
        path = Path(given)
        if not path.exists():
            raise DataError(f"'{path}' does not exist")
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            found.update(f"{file.relative_to(path) if file != path else ''}\0{sha256_of(file)}\n".encode())
    return found.hexdigest()
