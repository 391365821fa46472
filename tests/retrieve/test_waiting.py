"""What async programs await of a live index."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import re
import threading
import time
from pathlib import Path

import pytest

from tests.retrieve.test_live import corpus
from ultrarag.errors import IndexStateError, UsageError
from ultrarag.retrieve import LiveIndex, waiting
from ultrarag.retrieve.passages import Written

SEARCH = {"heads": ["dense"]}


def names(kind: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.rpartition("_")[0] == f"ultrarag-{kind}"]


def test_every_async_method_gives_what_the_other_gives(live: LiveIndex) -> None:
    async def use() -> None:
        assert await live.aadd(corpus(5)) == Written(added=5)
        assert await live.asearch("old castle", k=2, **SEARCH) == live.search("old castle", 2, **SEARCH)
        many = ["old castle", "books"]
        assert await live.asearch_many(many, k=2, **SEARCH) == live.search_many(many, 2, **SEARCH)
        assert await live.aget("p1") == live.get("p1")
        assert await live.adelete(["p1", "p2"]) == 2
        assert await live.aget("p1") is None
        with pytest.raises(UsageError, match="no argument 'kk'"):
            await live.asearch("old castle", kk=2)
        name = await live.arun(lambda: threading.current_thread().name)
        assert name.startswith("ultrarag-search")
        assert await live.arun(live.count, filter={"n": {"gte": 0}}) == live.count({"n": {"gte": 0}})

    asyncio.run(use())
    assert names("search")
    assert names("write")


def test_searches_at_once_are_encoded_together(live: LiveIndex, monkeypatch) -> None:
    live.add(corpus(5))
    encode, rows = live.encoder.encode_tokens, []

    def noting(tokens, *rest):
        rows.append(len(tokens))
        time.sleep(0.05)
        return encode(tokens, *rest)

    async def ask() -> list:
        return await asyncio.gather(*(live.asearch(f"castle {number}", **SEARCH) for number in range(20)))

    monkeypatch.setattr(live.encoder, "encode_tokens", noting)
    assert all(asyncio.run(ask()))
    assert sum(rows) == 20
    assert len(rows) < 10


def test_searches_do_not_wait_behind_writes(live: LiveIndex, monkeypatch) -> None:
    live.add(corpus(5))
    go, begun = threading.Event(), threading.Event()

    def slow():
        begun.set()
        assert go.wait(60)
        yield {"id": "new", "text": "a new one"}

    async def use() -> None:
        writes = [asyncio.create_task(live.aadd(slow())) for _ in range(2 * waiting.THREADS["write"])]
        while not begun.is_set():
            await asyncio.sleep(0.001)
        assert len(await live.asearch("old castle", **SEARCH)) == 5
        assert len(names("write")) == waiting.THREADS["write"]
        go.set()
        assert sum(written.added for written in await asyncio.gather(*writes)) == 1

    asyncio.run(use())


def test_a_cancelled_write_is_done_or_not_begun(live: LiveIndex, monkeypatch) -> None:
    monkeypatch.setitem(waiting.THREADS, "write", 1)
    go, begun = threading.Event(), threading.Event()

    def slow():
        begun.set()
        assert go.wait(60)
        yield from corpus(3)

    async def use() -> None:
        first = asyncio.create_task(live.aadd(slow()))
        second = asyncio.create_task(live.aadd([{"id": "never", "text": "begun"}]))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        first.cancel()
        second.cancel()
        assert [str(type(e)) for e in await asyncio.gather(first, second, return_exceptions=True)] == [
            str(asyncio.CancelledError)
        ] * 2
        go.set()
        await live.adelete(["p0"])  # in the same thread, after it

    asyncio.run(use())
    assert [passage.id for passage in live.passages()] == ["p1", "p2"]


def test_a_search_that_times_out_leaves_the_others(live: LiveIndex, monkeypatch) -> None:
    live.add(corpus(5))
    encode, go, begun = live.encoder.encode_tokens, threading.Event(), threading.Event()

    def slow(*args):
        begun.set()
        assert go.wait(60)
        return encode(*args)

    async def use() -> None:
        tasks = [asyncio.create_task(live.asearch(f"castle {number}", **SEARCH)) for number in range(5)]
        while not begun.is_set():
            await asyncio.sleep(0.001)
        tasks[0].cancel()
        tasks[3].cancel()
        await asyncio.sleep(0)
        go.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(one, list) for one in found] == [False, True, True, False, True]

    monkeypatch.setattr(live.encoder, "encode_tokens", slow)
    asyncio.run(use())


def test_the_threads_end_with_the_index(live: LiveIndex) -> None:
    live.add(corpus(2))
    before = {*names("search"), *names("write"), *names("encode")}

    async def use() -> None:
        await live.aadd(corpus(3))
        await live.asearch("old castle", **SEARCH)
        live.close()
        for call in (live.asearch("old castle"), live.aadd([]), live.aget("p1")):
            with pytest.raises(IndexStateError, match="was closed; open it again"):
                await call

    asyncio.run(use())
    for thread in {*names("search"), *names("write"), *names("encode")} - before:
        thread.join(60)
        assert not thread.is_alive()


def test_a_fork_is_refused(live: LiveIndex, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(IndexStateError, match="is its fork"):
            asyncio.run(live.asearch("old castle"))


def test_a_thread_has_the_context_of_its_caller(live: LiveIndex) -> None:
    known: contextvars.ContextVar[str] = contextvars.ContextVar("known")

    def noting():
        yield {"id": "1", "text": known.get()}

    async def use() -> None:
        known.set("of the request")
        await live.aadd(noting())

    asyncio.run(use())
    assert live.get("1").text == "of the request"


def test_the_page_runs_as_written(live: LiveIndex) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    live.add(corpus(5))
    live.search = functools.partial(live.search, heads=["dense"])  # type: ignore[method-assign]
    live.search_many = functools.partial(live.search_many, heads=["dense"])  # type: ignore[method-assign]
    names = {"live": live, "encoder": live.encoder}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    assert [len(hits) for hits in names["found"]] == [5, 5, 5]
    assert [len(hits) for hits in (names["hits"], *names["many"])] == [3, 3, 3]
    assert names["passage"].id == names["hits"][0].id
    assert len(names["vectors"]) == 1
