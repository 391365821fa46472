"""Files of engines: converted models and results of races, in the user's cache, by content.

A converted model is found by the fingerprint of the encoder, not beside a checkpoint: an index's own copy, a build's
and the original share one file, and a checkpoint that cannot be written to has one too.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ultrarag.errors import IndexStateError
from ultrarag.io import publish_directory, seal, staged_directory, user_cache, verify_seal, write_json

logger = logging.getLogger("ultrarag")

_MODEL = "model.xml"


def kept(
    key: Sequence[str], convert: Callable[[], Any], save: Callable[[Any, str], None], read: Callable[[str], Any]
) -> Any:
    """The model converted before for this key, if its files are sound; else converted now, and kept.

    Where the cache cannot be written to it is converted in every process, which is said.
    """
    file = kept_file("models", key)
    folder = file.parent
    if sound_folder(folder):
        return read(str(file))
    model = convert()
    try:
        with staged_directory(folder) as stage:
            save(model, str(stage / _MODEL))
            seal(stage)
            publish_directory(stage, folder)
    except OSError as error:
        logger.warning("the converted model is not kept, and converted anew by every process: %s", error)
        return model
    return read(str(file))


def kept_file(kind: str, key: Sequence[str], name: str = _MODEL) -> Path:
    """Where a file lies, or would, of what is kept under a key."""
    return _folder(kind) / _name(key) / name


def keep_files(kind: str, key: Sequence[str], texts: Mapping[str, str]) -> None:
    """Keep files by name; where the cache cannot be written to they are not kept."""
    folder = _folder(kind) / _name(key)
    with suppress(OSError), staged_directory(folder) as stage:
        for name, text in texts.items():
            (stage / name).write_text(text, encoding="utf-8")
        seal(stage)
        publish_directory(stage, folder)


def sound_folder(folder: Path, tell: bool = True) -> bool:
    """Whether the files are there as they were written; damaged ones are told of, and replaced by the caller."""
    try:
        return bool(verify_seal(folder, "converted model", "it is made anew"))
    except OSError:
        return False
    except IndexStateError as error:
        if tell:
            logger.warning("%s", error)
        return False


def read_race(key: Sequence[str]) -> dict[str, float] | None:
    """The seconds of each engine in the race that was run for this key."""
    with suppress(OSError, ValueError):
        found = json.loads((_folder("races") / f"{_name(key)}.json").read_text(encoding="utf-8"))
        return {str(name): float(seconds) for name, seconds in found.items()}
    return None


def write_race(key: Sequence[str], seconds: dict[str, float]) -> None:
    """Remember a race; where the cache cannot be written to it is run again."""
    folder = _folder("races")
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{_name(key)}.json", seconds)


def _folder(name: str) -> Path:
    return user_cache("engines") / name


def _name(key: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(key).encode()).hexdigest()[:32]
