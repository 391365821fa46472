"""Pool: threads for what blocks, with an end to how much may wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from ultrarag.service.faults import Fault

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


class Pool:
    """Some threads, and a queue that is sent away when it is full: who waits too long has left anyway."""

    def __init__(self, name: str, threads: int, most: int) -> None:
        """Start no thread yet.

        Args:
            most: calls that run or wait at a time.
        """
        self.name, self.most, self.pending = name, most, 0
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=f"ultrarag-{name}")

    async def run(
        self, function: Callable[_Parameters, _Result], *args: _Parameters.args, **options: _Parameters.kwargs
    ) -> _Result:
        """Call a function in a thread; a client that goes away does not make room before the thread is done.

        Raises:
            Fault: 503, too many are waiting.
        """
        if self.pending >= self.most:
            raise Fault(
                503, f"{self.pending} requests wait for the {self.name} already; ask again later", headers=_LATER
            )
        self.pending += 1
        loop = asyncio.get_running_loop()
        future = self._threads.submit(function, *args, **options)
        future.add_done_callback(lambda _: self._done(loop))
        return await asyncio.wrap_future(future)

    def _done(self, loop: asyncio.AbstractEventLoop) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._leave)

    def _leave(self) -> None:
        self.pending -= 1

    def submit(self, function: Callable[..., _Result], *args: Any) -> Future[_Result]:
        """Call a function in a thread, for nobody that waits."""
        return self._threads.submit(function, *args)

    def close(self) -> None:
        """Let what runs finish, and start nothing more."""
        self._threads.shutdown(wait=True, cancel_futures=True)


_LATER = {"Retry-After": "1"}
