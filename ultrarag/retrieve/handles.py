"""Handles of one open index within a process: who opens it again shares it, and who closes it last closes it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ultrarag.errors import FingerprintError, UsageError
from ultrarag.retrieve.core import Core


@dataclass
class Handle:
    """An open index, and how many share it."""

    core: Core
    arguments: Mapping[str, Any]
    #: held by the one refresh that may run
    refreshing: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0


class _Handles:
    """The indexes that this process has open to share, by their place."""

    def __init__(self) -> None:
        self.process, self.mutex = os.getpid(), threading.Lock()
        self.held: dict[str, Handle] = {}
        self.opening: dict[str, threading.Lock] = {}


_handles = _Handles()


def _own() -> _Handles:
    """Those of this process: a fork has none of its parent's, nor its locks."""
    global _handles
    if _handles.process != os.getpid():
        _handles = _Handles()
    return _handles


def join(place: str, arguments: Mapping[str, Any], open_core: Callable[[], Core]) -> Handle:
    """Share what is open at a place, or open it; `leave` ends that.

    Raises:
        UsageError: it is open with other arguments, which are named.
        FingerprintError: with another encoder than the live one.
    """
    handles = _own()
    with handles.mutex:
        turn = handles.opening.setdefault(place, threading.Lock())
    with turn:  # opening takes seconds, in which other places can be opened
        found = handles.held.get(place)
        if found is None:
            found = handles.held[place] = Handle(open_core(), arguments)
        else:
            _check(found, place, arguments)
        found.users += 1
    return found


def leave(handle: Handle, close: Callable[[], None]) -> None:
    """End what `join` began; the last one closes."""
    handles = _own()
    place = next((place for place, held in handles.held.items() if held is handle), None)
    if place is None:
        return
    with handles.opening[place]:
        handle.users -= 1
        if handle.users == 0:
            del handles.held[place]
            close()


def _check(found: Handle, place: str, arguments: Mapping[str, Any]) -> None:
    if arguments["repair"]:
        raise UsageError(f"'{place}' is open in this process, so it cannot be repaired: close it there first")
    encoder, live = arguments["encoder"], found.core.live.fingerprint
    if encoder is not None and encoder.fingerprint != live:
        raise FingerprintError(
            f"'{place}' is open in this process with the encoder {live[:12]}, not with the one given "
            f"({encoder.fingerprint[:12]}): leave the encoder out"
        )
    for name in ("uri", "checkpoints", "device"):
        if (wanted := arguments[name]) != (held := found.arguments[name]):
            raise UsageError(
                f"'{place}' is open in this process with {name}={held!r}, not {wanted!r}: give the same, or close it "
                f"there first"
            )
