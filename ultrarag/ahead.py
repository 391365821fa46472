"""Working ahead: the next item is begun before the last one's result is waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def one_ahead(
    start: Callable[[_Item], Callable[[], _Result]], items: Iterable[_Item]
) -> Iterator[tuple[_Item, _Result]]:
    """Yield each item with its result, in order, after the next one was started.

    Args:
        start: begins an item, and returns what waits for its result.
    """
    waiting: tuple[_Item, Callable[[], _Result]] | None = None
    for item in items:
        started = (item, start(item))
        if waiting:
            yield waiting[0], waiting[1]()
        waiting = started
    if waiting:
        yield waiting[0], waiting[1]()


def in_background(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """Yield the function's results; the next one is made in a thread while one is used.

    Items are drawn in the calling thread: they may come from a database or another thing that belongs to it.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ultrarag-ahead") as pool:
        for _, result in one_ahead(lambda item: pool.submit(function, item).result, items):
            yield result
