"""The stages of `ten_million.py`, each a function that runs in a process of its own and gives what it found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from encode import small_model
from shared_vectors import with_another_query_side
from ten_million_data import DIM, FILTER, WORDS_OF_A_QUERY, Best, Corpus, id_of, passes, passing

#: Hits of a search; the exact best are kept deeper, for some of them are deleted later.
K, DEPTH = 10, 30
#: Passages after which the build notes how far it is.
TOLD = 250_000
#: Which hundredth is written how: versions of texts and vectors are numbered.
UPSERTED, DELETED, CRASHED = 50, 51, 52
#: Blocks that are acknowledged before the kill.
ACKNOWLEDGED = 3


@dataclass(frozen=True)
class Place:
    """Where the index lies, and what it is of."""

    folder: Path
    corpus: Corpus
    count: int

    @cached_property
    def encoder(self) -> Any:
        """The model that searches and swaps use."""
        from ultrarag import Encoder

        return Encoder.load(small_model(), "bge", device="cpu")

    @cached_property
    def queries(self) -> np.ndarray:
        """(count, DIM) float32."""
        return self.corpus.vectors(self.count, 9)

    @cached_property
    def words(self) -> list[str]:
        """The texts of as many queries."""
        return self.corpus.texts(self.count, WORDS_OF_A_QUERY, 9)

    @contextmanager
    def opened(self, steps: dict[str, Any]) -> Iterator[Any]:
        """The index, opened and closed; both are timed."""
        from ultrarag.retrieve import LiveIndex

        encoder = self.encoder
        live = timed(steps, "open", lambda: LiveIndex.open(self.folder / "index", encoder))
        try:
            yield live
        finally:
            timed(steps, "close", live.close)


def timed(steps: dict[str, Any], name: str, act: Callable[[], Any]) -> Any:
    """Note the wall and processor seconds of a step, those of processes that it started included."""
    wall, spent = time.perf_counter(), sum(os.times()[:4])
    result = act()
    steps[name] = {
        "wall s": round(time.perf_counter() - wall, 2),
        "processor s": round(sum(os.times()[:4]) - spent, 2),
    }
    print(f"{name}: {steps[name]}", file=sys.stderr, flush=True)
    return result


def build(place: Place) -> dict[str, Any]:
    """Fill an empty index, BLOCK passages a call; after a kill it goes on where it noted last how far it was."""
    from ultrarag.retrieve import LiveIndex

    corpus, encoder, far = place.corpus, place.encoder, Far.read(place)
    own = sampled_vectors(place)
    best = known(place) if far.rows else {name: Best(place.queries, DEPTH) for name in ("all", "filter")}
    steps, spent, apart = far.steps, time.process_time(), 0.0
    if (place.folder / "index").exists():
        live = timed(steps, f"open at {far.rows}", lambda: LiveIndex.open(place.folder / "index", encoder))
    else:
        live = LiveIndex.create(place.folder / "index", encoder, backend="ivf")
    for rows in corpus.blocks(far.rows):
        began = time.thread_time()
        vectors = corpus.vectors(len(rows), rows.start + 77)
        for row in corpus.sampled.intersection(rows):
            vectors[row - rows.start] = own[row]
        numbers = np.arange(rows.start, rows.stop)
        best["all"].add(numbers, vectors)
        best["filter"].add(numbers[kept := passing(rows)], vectors[kept])
        passages = corpus.passages(rows)
        apart += time.thread_time() - began
        live.add(passages, embeddings=embeddings(vectors), fingerprint=encoder.fingerprint)
        if rows.start // TOLD != rows.stop // TOLD or rows.stop == corpus.size:
            np.savez(place.folder / "best.npz", **{name: found.kept for name, found in best.items()})
            passed = time.process_time() - spent
            Far(rows.stop, far.spent + passed - apart, far.apart + apart, steps).write(place)
    timed(steps, "close", live.close)
    spent = far.spent + time.process_time() - spent - apart
    return {
        "core minutes": round(spent / 60, 2),
        "processor microseconds a passage": round(1e6 * spent / corpus.size, 1),
        "making the data, processor seconds": round(far.apart + apart, 1),
        "steps": steps,
    }


@dataclass(frozen=True)
class Far:
    """How far the build is: rows, processor seconds of it and of what is not it, and the steps that were timed."""

    rows: int
    spent: float
    apart: float
    steps: dict[str, Any]

    @classmethod
    def read(cls, place: Place) -> Far:
        """What `write` wrote; nothing before that."""
        path = place.folder / "far.json"
        return cls(**json.loads(path.read_text())) if path.exists() else cls(0, 0.0, 0.0, {})

    def write(self, place: Place) -> None:
        """Keep it, and say it."""
        (place.folder / "far.json").write_text(json.dumps(asdict(self)))
        told = f"{self.rows} passages, {self.spent:.0f} s of a processor, and {self.apart:.0f} s for the data"
        print(f"{told}", file=sys.stderr, flush=True)


def sampled_vectors(place: Place) -> dict[int, np.ndarray]:
    """The encoder's own vectors of the passages that a swap looks at."""
    texts = {}
    for rows in place.corpus.blocks():
        if wanted := place.corpus.sampled.intersection(rows):
            passages = place.corpus.passages(rows)
            texts |= {row: passages[row - rows.start].content for row in wanted}
    dense = place.encoder.encode(list(texts.values()), "passage", progress=False).dense
    return dict(zip(texts, dense, strict=True))


def embeddings(vectors: np.ndarray) -> Any:
    """Vectors as they are given to an index."""
    from ultrarag.types import Embeddings

    return Embeddings(dense=vectors)


def search(place: Place) -> dict[str, Any]:
    """Ask another process's question, open, and search in every way."""
    from ultrarag.retrieve import read_status

    steps: dict[str, Any] = {}
    started = time.perf_counter()
    status = read_status(place.folder / "index")
    asked = time.perf_counter() - started
    assert status["passages"] == place.corpus.size
    with place.opened(steps) as live:
        found = searches(live, place, known(place), words=True)
    return {
        "status ms": round(1000 * asked, 1),
        "open seconds": steps["open"]["wall s"],
        "searches": found,
        "steps": steps,
    }


def known(place: Place) -> dict[str, Best]:
    """The exact best of what was built, of all passages and of those that pass the filter."""
    kept = np.load(place.folder / "best.npz")
    return {name: Best(place.queries, DEPTH, kept[name]) for name in kept}


def searches(live: Any, place: Place, best: dict[str, Best] | None, words: bool = False) -> dict[str, Any]:
    """Latencies of each kind of search, and recall where the best are known."""
    fingerprint = live.fingerprint
    wanted = {name: None if best is None else best[name].rows(K) for name in ("all", "filter")}

    def dense(number: int, **options: Any) -> list[Any]:
        return live.search_embeddings(embeddings(place.queries[number : number + 1]), fingerprint, k=K, **options)[0]

    kinds: dict[str, tuple[Callable[[int], Any], np.ndarray | None]] = {
        "dense": (dense, wanted["all"]),
        "dense, a filter of 1 %": (lambda number: dense(number, filter=FILTER), wanted["filter"]),
    }
    if words:
        both = {"dense": 1.0, "bm25": 1.0}
        kinds |= {
            "BM25": (lambda number: live.search(place.words[number], K, heads=["bm25"]), None),
            "BM25, a filter of 1 %": (
                lambda number: live.search(place.words[number], K, heads=["bm25"], filter=FILTER),
                None,
            ),
            "dense and BM25": (lambda number: dense(number, texts=[place.words[number]], weights=both), None),
        }
    return {kind: latency(ask, place.count, wanted) for kind, (ask, wanted) in kinds.items()}


def latency(ask: Callable[[int], Any], count: int, best: np.ndarray | None) -> dict[str, float]:
    """Milliseconds a query, after a few that warm up, and the share of the exact ten best that are found."""
    for number in range(min(10, count)):
        ask(number)
    wall, spent, shares = [], [], []
    for number in range(count):
        began, used = time.perf_counter(), time.process_time()
        hits = ask(number)
        wall.append(1000 * (time.perf_counter() - began))
        spent.append(1000 * (time.process_time() - used))
        if best is not None:
            shares.append(len({hit.id for hit in hits} & {id_of(int(row)) for row in best[number]}) / K)
    found = {f"p{share} ms": round(float(np.percentile(wall, share)), 2) for share in (50, 99)}
    found |= {f"processor p{share} ms": round(float(np.percentile(spent, share)), 2) for share in (50, 99)}
    return found | ({"recall@10": round(float(np.mean(shares)), 4)} if shares else {})


def upsert(live: Any, place: Place, digit: int, told: Callable[[Sequence[int]], None] = lambda rows: None) -> int:
    """Write a hundredth of the passages anew, with other texts and vectors; `told` of each block when it is durable."""
    count = 0
    for rows in place.corpus.hundredth(digit):
        vectors = new_vectors(place, rows)
        written = live.add(
            place.corpus.passages(rows, version=1), embeddings=embeddings(vectors), fingerprint=live.fingerprint
        )
        assert written.changed + written.unchanged == len(rows), written  # these: by an earlier start that was cut off
        count += len(rows)
        told(rows)
    return count


def new_vectors(place: Place, rows: Sequence[int]) -> np.ndarray:
    """Those of the second version of some rows."""
    return place.corpus.vectors(len(rows), rows[0] + 78)


def write(place: Place) -> dict[str, Any]:
    """Upsert a hundredth, delete a hundredth, and search again."""
    steps: dict[str, Any] = {}
    corpus = place.corpus
    with place.opened(steps) as live:
        count = timed(steps, "upsert", lambda: upsert(live, place, UPSERTED))
        gone = [id_of(row) for rows in corpus.hundredth(DELETED) for row in rows]
        assert timed(steps, "delete", lambda: live.delete(gone)) == len(gone)
        assert len(live) == corpus.size - len(gone)
        after = searches(live, place, best_after(place))
    for step, many in (("upsert", count), ("delete", len(gone))):
        steps[step]["passages"], spent = many, steps[step]["processor s"]
        steps[step]["processor microseconds a passage"] = round(1e6 * spent / max(1, many), 1)
    return {"searches": after, "steps": steps}


def best_after(place: Place) -> dict[str, Best]:
    """The exact best after both writes."""
    best = known(place)
    for digit in (UPSERTED, DELETED):
        for rows in place.corpus.hundredth(digit):
            for found in best.values():
                found.without(rows)
    for rows in place.corpus.hundredth(UPSERTED):
        numbers, vectors = np.array(rows), new_vectors(place, rows)
        kept = np.array([passes(row) for row in rows])
        best["all"].add(numbers, vectors)
        best["filter"].add(numbers[kept], vectors[kept])
    return best


def crash(place: Place) -> dict[str, Any]:
    """Kill a process that upserts, open the index again, and look for what it had acknowledged."""
    noted = place.folder / "acknowledged"
    noted.write_text("")
    words = ["--passages", place.corpus.size, "--queries", place.count, "--folder", place.folder, "--work", "killed"]
    script = Path(__file__).with_name("ten_million.py")
    child = subprocess.Popen([sys.executable, str(script), *map(str, words)], stdout=subprocess.DEVNULL)
    wanted = min(ACKNOWLEDGED, len(place.corpus.hundredth(CRASHED)))
    while len(noted.read_text().split()) < wanted and child.poll() is None:
        time.sleep(0.01)
    time.sleep(0.2)  # in the midst of the next block
    assert child.poll() is None, "the process that was to be killed has ended"
    child.send_signal(signal.SIGKILL)
    child.wait()
    acknowledged = noted.read_text().split()
    steps: dict[str, Any] = {}
    with place.opened(steps) as live:
        blocks = place.corpus.hundredth(CRASHED)[: len(acknowledged)]
        lost, others = map(sum, zip(*(lacking(live, place, rows) for rows in blocks), strict=True))
        status = timed(steps, "status", live.status)
        assert len(live) == status["passages"]
    return {
        "open seconds": steps["open"]["wall s"],
        "acknowledged blocks": len(acknowledged),
        "acknowledged passages": sum(map(len, blocks)),
        "lost": lost,
        "whose vectors were encoded again": others,
        "steps": steps,
    }


def lacking(live: Any, place: Place, rows: Sequence[int]) -> tuple[int, int]:
    """How many of some acknowledged passages have not their text or no vector, and how many another vector.

    The log has texts: vectors that were given and not flushed before the kill are the encoder's afterwards.
    """
    wanted = place.corpus.passages(rows, version=1)
    held = live.get_many(passage.id for passage in wanted)
    ids, stored = live.vectors([passage.id for passage in wanted], missing="skip")
    assert ids == [passage.id for passage in wanted], f"{len(wanted) - len(ids)} have no vector"
    found = live.search(wanted[0].text, K, heads=["bm25"])
    assert wanted[0].id in [hit.id for hit in found], "its words are not found"
    others = (stored.dense != new_vectors(place, rows)).any(axis=1)
    return sum(held.get(one.id) != one for one in wanted), int(np.count_nonzero(others))


def killed(place: Place) -> dict[str, Any]:
    """Upsert, and note what was acknowledged, until somebody kills this process."""
    with open(place.folder / "acknowledged", "a", encoding="utf-8") as file:

        def note(rows: Sequence[int]) -> None:
            file.write(f"{rows[0]}\n")
            file.flush()

        with place.opened({}) as live:
            upsert(live, place, CRASHED, note)
            time.sleep(60)  # a small index is done before it is killed
    return {}


def shared(place: Place) -> dict[str, Any]:
    """Build, swap and roll back a generation with the same passage side, which shares the vectors."""
    return exchanged(place, with_another_query_side(place.encoder))


def mapped(place: Place) -> dict[str, Any]:
    """Build, swap and roll back a generation whose vectors are mapped from those that are stored."""
    from ultrarag import Encoder
    from ultrarag.maps import LinearMap

    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(DIM, DIM)))[0]
    turned = LinearMap(turn.astype(np.float32), np.zeros(DIM, np.float32))
    return exchanged(place, Encoder.of_sides(place.encoder, passage_maps=[turned], query_maps=[turned]))


def exchanged(place: Place, encoder: Any) -> dict[str, Any]:
    steps: dict[str, Any] = {}
    with place.opened(steps) as live:
        generation = timed(steps, "build", lambda: live.build(encoder))
        assert not generation.encodes, generation
        waited = 1000 * timed(steps, "swap", lambda: live.swap(generation)).seconds
        timed(steps, "add of one passage", lambda: live.add([{"id": "one more", "text": "written after the swap"}]))
        back = 1000 * timed(steps, "rollback", live.rollback).seconds
        assert live.vectors(["one more"]).dense.shape == (1, DIM)
        found = searches(live, place, None)
    steps["swap"]["writers waited ms"], steps["rollback"]["writers waited ms"] = round(waited), round(back)
    return {"searches": found, "steps": steps}
