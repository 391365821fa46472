"""Watching a fine-tune from the program that called it: how far it is, and whether it is to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

#: Told (step, steps in all, None) after each step, where True asks for a clean end, as Ctrl-C does; and once more with
#: the loss in place of None where one was logged.
Watcher = Callable[[int, int, float | None], bool]

_watcher: ContextVar[Watcher | None] = ContextVar("ultrarag_finetune_watcher", default=None)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Let a function be told of the steps of what this thread fine-tunes in the block."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def tell(step: int, steps: int, loss: float | None = None) -> bool:
    """Tell whoever watches; whether it asks for the end."""
    watcher = _watcher.get()
    return watcher is not None and watcher(step, steps, loss)
