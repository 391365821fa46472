"""BM25 of this code, of an older commit and of tantivy: how `bm25.py` builds and searches each, in its own process.

Called as `bm25_contenders.py build|search NAME FOLDER PASSAGES QUERIES`; prints one line of JSON.
Texts are made in the process, block by block, outside the time that is measured.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY, BLOCK, BATCH, K = 50_000, 50_000, 1_000, 10


def texts(count: int, shortest: int, longest: int, seed: int) -> Iterator[list[str]]:
    """Blocks of texts of made-up words, whose shares fall with their rank (Zipf)."""
    share = 1 / (np.arange(VOCABULARY) + 2.7)
    words = np.array([f"w{number}" for number in range(VOCABULARY)])
    for start in range(0, count, BLOCK):
        rng = np.random.default_rng((seed, start))
        lengths = rng.integers(shortest, longest + 1, size=min(BLOCK, count - start))
        drawn = words[rng.choice(VOCABULARY, size=lengths.sum(), p=share / share.sum())]
        ends = lengths.cumsum()
        yield [" ".join(drawn[end - length : end]) for end, length in zip(ends, lengths, strict=True)]


def queries(count: int) -> list[str]:
    """Queries of eight words of the same kind."""
    return [query for block in texts(count, 8, 8, 9) for query in block]


class Ours:
    """BM25 of this ultrarag; its segments are merged in the end, as tantivy's are, which counts to the build."""

    merges = True

    def __init__(self, folder: Path) -> None:
        from ultrarag.retrieve.bm25 import BM25

        self._open, self._folder = BM25, folder / "bm25"

    def build(self) -> tuple[Callable[[list[str], list[str]], None], Callable[[], None]]:
        """What takes ids and texts, and what makes all durable."""
        index = self._open.create(self._folder)

        def end() -> None:
            if self.merges:
                index.vacuum()
            index.close()

        return lambda ids, part: index.upsert(ids, part, [{}] * len(ids)), end

    def search(self) -> Callable[[str], list[str]]:
        """A query to the ids of its K best passages."""
        index = self._open.open(self._folder)
        return lambda query: [id for id, _ in index.search(query, K)]


class Before(Ours):
    """BM25 of the older commit that this process imports."""

    merges = False


class Tantivy:
    """tantivy with frequencies and without positions, one thread; the ids are stored."""

    def __init__(self, folder: Path) -> None:
        import tantivy

        self._library, self._folder = tantivy, folder / "tantivy"
        self._folder.mkdir(exist_ok=True)

    def _index(self) -> Any:
        builder = self._library.SchemaBuilder()
        builder.add_text_field("id", stored=True, tokenizer_name="raw", index_option="basic")
        builder.add_text_field("text", stored=False, tokenizer_name="default", index_option="freq")
        return self._library.Index(builder.build(), path=str(self._folder))

    def build(self) -> tuple[Callable[[list[str], list[str]], None], Callable[[], None]]:
        """What takes ids and texts, and what makes all durable."""
        writer = self._index().writer(heap_size=256_000_000, num_threads=1)

        def add(ids: list[str], part: list[str]) -> None:
            for id, text in zip(ids, part, strict=True):
                writer.add_document(self._library.Document(id=id, text=text))

        def end() -> None:
            writer.commit()
            writer.wait_merging_threads()

        return add, end

    def search(self) -> Callable[[str], list[str]]:
        """A query to the ids of its K best passages."""
        index = self._index()
        index.reload()
        searcher = index.searcher()

        def search(query: str) -> list[str]:
            hits = searcher.search(index.parse_query(query, ["text"]), K).hits
            return [searcher.doc(address)["id"][0] for _, address in hits]

        return search


CONTENDERS: dict[str, Callable[[Path], Any]] = {"ours": Ours, "before": Before, "tantivy": Tantivy}


def build(name: str, folder: Path, size: int) -> dict[str, float]:
    """Seconds of wall and of processor that a build took, without making the texts."""
    add, end = CONTENDERS[name](folder).build()
    wall = processor = 0.0
    for number, block in enumerate(texts(size, 30, 90, 0)):
        started, used = time.perf_counter(), time.process_time()
        for start in range(0, len(block), BATCH):
            part = block[start : start + BATCH]
            first = number * BLOCK + start
            add([f"p{first + i}" for i in range(len(part))], part)
        wall, processor = wall + time.perf_counter() - started, processor + time.process_time() - used
    started, used = time.perf_counter(), time.process_time()
    end()
    wall, processor = wall + time.perf_counter() - started, processor + time.process_time() - used
    place = next(folder / kind for kind in ("bm25", "tantivy") if (folder / kind).exists())
    disk = sum(file.stat().st_blocks * 512 for file in place.rglob("*") if file.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"wall": wall, "processor": processor, "disk": disk / size, "peak MiB": peak}


def search(name: str, folder: Path, count: int) -> dict[str, Any]:
    """Milliseconds of each query, the memory that the index took, and the hits."""
    asked, before = queries(count), resident()
    find = CONTENDERS[name](folder).search()
    for query in asked[:20]:
        find(query)
    took, hits = [], []
    for query in asked:
        started = time.perf_counter()
        hits.append(find(query))
        took.append(1000 * (time.perf_counter() - started))
    return {"ms": took, "MiB": resident() - before, "hits": hits}


def resident() -> float:
    """MiB of memory that this process holds, mapped files included."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    """One task of one contender, on one processor."""
    task, name, folder, size, count = sys.argv[1:]
    os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    found = build(name, Path(folder), int(size)) if task == "build" else search(name, Path(folder), int(count))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
