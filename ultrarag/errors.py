"""The errors that ultrarag raises: every message names the thing, whose it is, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UltraragError(Exception):
    """Base of all errors raised on purpose; the command line prints its message without a traceback."""


class UsageError(UltraragError, ValueError):
    """An argument or flag has a value that cannot be used."""


class DataError(UltraragError, ValueError):
    """Input rows, corpora or qrels cannot be used; names file and line."""


class ExistsError(DataError):
    """A passage that was to be new is in the index already; names it."""


class PluginError(UltraragError):
    """A plugin is missing, broken, incomplete, or answered wrongly; names plugin and hook."""


class CheckpointError(UltraragError):
    """A checkpoint is incomplete, damaged, or does not give the vectors it should."""


class TrainingError(UltraragError):
    """Training had to stop: a non-finite loss, a model that did not move, an impossible set-up."""


class FingerprintError(UltraragError):
    """A query vector and an index come from different models."""


class IndexStateError(UltraragError):
    """A live index cannot do what was asked in the state it is in (locked, damaged, no such generation)."""


class ResourceError(IndexStateError):
    """The machine does not allow it now: a full disk, a folder that is read-only, too few descriptors; no damage."""

    #: the system's number of the condition
    errno = 0


class StoppedError(UltraragError):
    """What ran was ended on request; what it had done is kept, and it can be taken up again."""


class GateError(UltraragError):
    """A new generation was refused because it is worse or fails a sanity check; carries the numbers."""


def kind_of(error: Exception) -> str:
    """The name in this module under which another process is to raise an error; IndexStateError for one of others."""
    names = (kind.__name__ for kind in type(error).__mro__ if kind.__module__ == __name__)
    return next(names, IndexStateError.__name__)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
