"""Running forwards side by side on a CPU: a thread per share of the cores, rather than all cores at one operation.

Measured with all-MiniLM-L6-v2 on two cores (AMD EPYC 7003): two forwards at a time with a thread each take 0.88 of the
time of one after the other with two threads each, for the many small operations of a forward do not divide well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

#: Forwards at a time: with more, the interpreter lock becomes the limit.
MOST = 4

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


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
