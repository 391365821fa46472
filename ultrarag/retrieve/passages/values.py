"""Metadata from Python's values: what JSON and the filters can hold of them, and nothing that would be lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from datetime import date, time
from enum import Enum
from pathlib import PurePath
from typing import Any
from uuid import UUID

import numpy as np

from ultrarag.errors import DataError


def jsonable(value: Any) -> Any:
    """Return a value as JSON can hold it, for the metadata of passages; JSON values stay as they are.

    | given | becomes |
    |---|---|
    | `datetime`, `date`, `time`, `numpy.datetime64` | its ISO form, which range filters order; NaT becomes None |
    | `UUID`, a path | its text |
    | a numpy number, `numpy.bool_`, `numpy.str_` | the number, truth value or text of Python |
    | a numpy array, a tuple | a list |
    | a set | a list, sorted where its items can be |
    | a member of an `Enum` | its value |
    | a mapping | an object, each value of which is treated in this way |

    Raises:
        DataError: for a NaN or an infinity, a key that is no string, bytes, and any other class; names the place. For
            what holds itself, or is nested too deeply to be written.

    Example:
        >>> jsonable({"seen": date(2024, 5, 1), "path": Path("a/b"), "score": np.float32(0.5)})
        {'seen': '2024-05-01', 'path': 'a/b', 'score': 0.5}
    """
    try:
        return _converted(value, "")
    except RecursionError:
        raise DataError("metadata: it holds itself, or is nested too deeply; it must be JSON") from None


def _converted(value: Any, place: str) -> Any:
    if isinstance(value, Enum):
        return _converted(value.value, place)
    if isinstance(value, np.datetime64):
        return _converted(value.astype("datetime64[us]").item(), place)
    if isinstance(value, np.generic | np.ndarray):
        return _converted(value.tolist(), place)
    if value is None or isinstance(value, str | bool):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise _refused(place, f"{value}: leave it out, or write None", "a finite number")
        return value
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, UUID | PurePath):
        return str(value)
    if isinstance(value, Mapping):
        below = f"{place}." if place else ""
        return {_key(key, place): _converted(item, f"{below}{key}") for key, item in value.items()}
    if isinstance(value, Set):
        value = _sorted(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_converted(item, f"{place}[{number}]") for number, item in enumerate(value)]
    raise _refused(place, f"{type(value).__module__}.{type(value).__qualname__}", "JSON: convert it yourself")


def _key(key: Any, place: str) -> str:
    if not isinstance(key, str):
        raise _refused(place, f"an object with the key {key!r}", "an object whose keys are strings")
    return str(key)


def _sorted(values: Set[Any]) -> list[Any]:
    try:
        return sorted(values)
    except TypeError:
        return list(values)


def _refused(place: str, found: str, wanted: str) -> DataError:
    return DataError(f"metadata: '{place}' is {found}; it must be {wanted}")
