"""What async programs await of a live index: its own threads do the work, searches apart from writes."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ultrarag.errors import IndexStateError
from ultrarag.retrieve.searches import Searches

if TYPE_CHECKING:
    from ultrarag.retrieve.passages import OnExisting, Written
    from ultrarag.retrieve.search import Hits
    from ultrarag.types import Embeddings, Passage

_Result = TypeVar("_Result")

#: Threads of each kind at most, made when they are needed. A search mostly waits for the encoder, which takes what many
#: ask in one forward; writes take turns anyway, and a long one lets others in after each batch.
THREADS = {"search": 64, "write": 4}


class Waiting:
    """Threads of an index for what async programs ask of it; those of asyncio's default pool are left to others."""

    def __init__(self) -> None:
        self._mutex, self._closed = threading.Lock(), False
        self._pools: dict[str, ThreadPoolExecutor] = {}

    async def run(self, kind: str, function: Callable[..., _Result], *args: Any, **options: Any) -> _Result:
        """Run a function in a thread, in the caller's context.

        Cancelled while it waits for a thread, it is not begun; once begun it goes on to its end, which nobody sees.
        """
        work = partial(contextvars.copy_context().run, function, *args, **options)
        return await asyncio.wrap_future(self._pool(kind, work))

    def _pool(self, kind: str, work: Callable[[], _Result]) -> Any:
        with self._mutex:
            if self._closed:
                raise IndexStateError("the index was closed; open it again")
            if kind not in self._pools:
                self._pools[kind] = ThreadPoolExecutor(THREADS[kind], thread_name_prefix=f"ultrarag-{kind}")
            return self._pools[kind].submit(work)

    def close(self) -> None:
        """Take nothing more; the threads end after what they were given."""
        with self._mutex:
            self._closed = True
            for pool in self._pools.values():
                pool.shutdown(wait=False)


class AsyncMethods(Searches):
    """What `LiveIndex` has for async programs.

    Cancelling one (a timeout, a client that hung up) leaves the index sound: a search that waits for a thread is never
    begun, and so is a write; a write that has begun is finished as if it had been waited for, batch by batch.
    """

    if TYPE_CHECKING:

        @property
        def _waiting(self) -> Waiting: ...
        def add(
            self,
            passages: Iterable[Passage | Mapping[str, Any]],
            *,
            on_existing: OnExisting = "replace",
            embeddings: Embeddings | None = None,
            fingerprint: str | None = None,
        ) -> Written: ...

    async def asearch(self, query: str, k: int = 10, **options: Any) -> Hits:
        """`search`, for async programs: up to 64 at a time, whose queries are encoded together."""
        if not options.pop("log", False):
            return await self._waiting.run("search", self.search, query, k, **options)
        return (await self.asearch_many([query], k, log=True, **options))[0]

    async def asearch_many(self, queries: Sequence[str], k: int = 10, **options: Any) -> list[Hits]:
        """`search_many`, for async programs; one that was cancelled is not remembered, for nobody has seen the hits."""
        log, client = options.pop("log", False), options.pop("client", None)
        if log:
            self._core.check_writable()
        found = await self._waiting.run("search", self.search_many, queries, k, **options)
        if log:
            await self._waiting.run("search", self._remember, list(queries), found, {"k": k, **options}, client)
        return found

    async def aget(self, id: str) -> Passage | None:
        """`get`, for async programs."""
        return await self._waiting.run("search", self.get, id)

    async def aadd(self, passages: Iterable[Passage | Mapping[str, Any]], **options: Any) -> Written:
        """`add`, for async programs; what is iterated over is iterated over in a thread."""
        return await self._waiting.run("write", self.add, passages, **options)

    async def adelete(self, ids: Iterable[str] | None = None, **options: Any) -> int:
        """`delete`, for async programs."""
        return await self._waiting.run("write", self.delete, ids, **options)

    async def arun(self, function: Callable[..., _Result], /, *args: Any, **options: Any) -> _Result:
        """Run a function that asks this index for something in the threads of its searches, for async programs.

        It is for what has no async form here, such as `passages` or several calls at once.
        """
        return await self._waiting.run("search", function, *args, **options)
