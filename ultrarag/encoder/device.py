"""Working ahead: the next item is begun before the last one's result is waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

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


#: Forwards at a time: with more, the interpreter lock becomes the limit.
MOST = 4


def side_by_side() -> int:
    """How many forwards to run at a time with the threads that torch has."""
    return max(1, min(MOST, torch.get_num_threads()))


def map_side_by_side(
    function: Callable[[_Item], _Result], items: Sequence[_Item], workers: int
) -> Iterator[tuple[_Item, _Result]]:
    """Yield each item with its result, in order; each worker has its share of torch's threads."""
    workers = min(workers, len(items))
    if workers <= 1:
        yield from ((item, function(item)) for item in items)
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ultrarag-forward")
    try:
        _divide(pool, workers, threads)
        futures = [pool.submit(function, item) for item in items]
        for item, future in zip(items, futures, strict=True):
            yield item, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _divide(pool: ThreadPoolExecutor, workers: int, threads: int) -> None:
    """Give each worker its share of the threads, and this thread (and threads to come) what it had.

    `set_num_threads` sets the calling thread's number, and the one that every other thread takes over when it first
    uses torch; so a worker takes it over first.
    """
    all_there = threading.Barrier(workers)

    def settle() -> None:
        torch.get_num_threads()
        torch.set_num_threads(max(1, threads // workers))
        all_there.wait()

    for future in [pool.submit(settle) for _ in range(workers)]:
        future.result()
    torch.set_num_threads(threads)
