"""The bridge: a new encoder serves from the old generation's vectors while its own are still being made.

After a full fine-tune the passages' vectors are all old, and the queries could be new. A linear map, old -> new passage
vectors, is fitted to a sample that is encoded first; the transposed map on the query finds candidates among the old
vectors, and these are scored by their new vectors where there are any (the sample's, and those of the passages that
searches have met, which are encoded in the background and kept), else by their mapped ones: one scale, one ranking.
Nothing is served so that did not gain significantly on held-out queries of this index.

Maps from new queries to the old space serve worse, and are not made; benchmarks/bridge.py measures what is.
"""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrarag.errors import IndexStateError, UsageError
from ultrarag.evaluation import Qrels, Verdict
from ultrarag.io import write_json
from ultrarag.maps import LinearMap, fit_ridge
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.engines import Backend
from ultrarag.retrieve.generation import Generation, Serving, VectorSet, load_encoder
from ultrarag.retrieve.passages import Store
from ultrarag.retrieve.ranking import Scored, ranked
from ultrarag.retrieve.search import Filter, Searcher
from ultrarag.retrieve.swap import compare
from ultrarag.rows import text_key
from ultrarag.types import Embeddings, Passage

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder

logger = logging.getLogger("ultrarag")

#: Passages that the map is fitted to; candidates of a search that are scored anew; and passages that may be encoded to
#: measure what searches will find once their candidates have new vectors.
SAMPLE, CANDIDATES, MEASURED = 1000, 50, 5000
#: Passages waiting to be encoded at most, and how many are encoded at a time.
WAITING, CHUNK_TEXTS = 2000, 16
#: Of the file below the index.
FORMAT = 1
FILE, KEPT = "bridge.json", "vectors.sqlite"
#: Passages that a map can be fitted to at least.
FEWEST = 50


@dataclass(frozen=True)
class BridgeTerms:
    """What a bridge is judged by."""

    queries: Mapping[str, str]
    qrels: Qrels
    metric: str = "nDCG@10"
    #: options of `LiveIndex.search`
    search: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class BridgeReport:
    """What was measured, and what serves now."""

    generation: int
    #: "raw" (new queries, old vectors) or "mapped"; None: the old encoder serves on
    mode: str | None
    #: each way to serve -> the comparison with the old one, as `Verdict.to_dict`; "encoded": mapped, once all
    #: candidates of the queries have new vectors
    measured: dict[str, dict[str, Any]]
    #: passages encoded so far
    encoded: int
    seconds: float
    #: mean squared distance to the new vectors on held-out passages: of the mapped vectors, and of the old ones
    error: float
    error_before: float


class Kept:
    """New vectors by passage, durably; each belongs to one text, so that a passage that changed has none."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, check_same_thread=False)
        self._mutex = threading.Lock()
        with self._mutex, self._db:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("CREATE TABLE IF NOT EXISTS kept (id TEXT PRIMARY KEY, text INTEGER, vector BLOB)")

    def add(self, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        """Keep the vectors, (n, d), of passages as they are now."""
        rows = [
            (passage.id, text_key(passage.content), vector.astype("<f4").tobytes())
            for passage, vector in zip(passages, vectors, strict=True)
        ]
        with self._mutex, self._db:
            self._db.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?, ?)", rows)

    def of(self, passages: Sequence[Passage]) -> dict[str, np.ndarray]:
        """The vectors of those passages that have one."""
        found: dict[str, np.ndarray] = {}
        texts = {passage.id: text_key(passage.content) for passage in passages}
        with self._mutex:
            for id, text, vector in self._rows(list(texts)):
                if texts[id] == text:
                    found[id] = np.frombuffer(vector, "<f4")
        return found

    def _rows(self, ids: list[str]) -> Iterator[tuple[str, int, bytes]]:
        for start in range(0, len(ids), 500):  # SQLite's limit on parameters
            part = ids[start : start + 500]
            marks = ",".join("?" * len(part))
            yield from self._db.execute(f"SELECT id, text, vector FROM kept WHERE id IN ({marks})", part)

    def __len__(self) -> int:
        with self._mutex:
            return int(self._db.execute("SELECT COUNT(*) FROM kept").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        with self._mutex:
            self._db.close()


class BridgedVectors:
    """The old generation's engine, seen through a map by the new encoder's queries; writes go to the old one."""

    def __init__(self, old: VectorSet, item: LinearMap, kept: Kept, store: Store, fingerprint: str) -> None:
        """Use vectors that were joined; `close` leaves them."""
        self._old, self._map, self._kept, self._store = old, item, kept, store
        self.directory = old.backend.directory
        self.schema = replace(old.backend.schema, fingerprint=fingerprint)
        #: told the ids of candidates without a new vector
        self.missed: Callable[[Sequence[str]], object] = lambda ids: None

    def search_dense(self, vector: np.ndarray, k: int, filter: Filter = None, exact: bool = False) -> list[Scored]:
        """The k best of the candidates that the transposed map finds."""
        query, _ = self._map.transposed(vector)
        depth = min(max(k, CANDIDATES), max(1, self._old.backend.count()))
        found = self._old.backend.search_dense(query, depth, filter, exact)
        ids = [id for id, _ in found]
        scores = self.score_dense(vector, ids)
        held = np.flatnonzero(~np.isnan(scores))
        return ranked([ids[place] for place in held], scores[held], k)

    def score_dense(self, vector: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """Inner products with given passages, (len(ids),); NaN for an id that is not stored."""
        scores = np.full(len(ids), np.nan, np.float32)
        if not len(ids):
            return scores
        held = [place for place, score in enumerate(self._old.backend.score_dense(vector, ids)) if not np.isnan(score)]
        if held:
            scores[held] = self.dense([ids[place] for place in held]) @ vector
        return scores

    def dense(self, ids: Sequence[str]) -> np.ndarray:
        """New vectors where they are kept, else mapped ones, (len(ids), d)."""
        vectors = self._map.apply(self._old.backend.vectors(ids).dense)
        passages = self._store.get(ids)
        kept = self._kept.of(list(passages.values()))
        for place, id in enumerate(ids):
            if id in kept:
                vectors[place] = kept[id]
        self.missed([id for id in ids if id not in kept])
        return vectors

    def vectors(self, ids: Sequence[str]) -> Embeddings:
        """What passages are scored by."""
        return Embeddings(dense=self.dense(ids))

    def count(self) -> int:
        """Of the old generation."""
        return self._old.backend.count()

    def ids(self) -> Iterator[str]:
        """Of the old generation."""
        return self._old.backend.ids()

    def close(self) -> None:
        """Close what was kept, and leave the old vectors."""
        self._kept.close()
        self._old.leave()


class Filler:
    """A thread that encodes, with the new encoder, the passages that searches have met, the latest first."""

    def __init__(self, serving: Serving, store: Store, kept: Kept) -> None:
        self._serving, self._store, self._kept = serving, store, kept
        self._waiting: OrderedDict[str, None] = OrderedDict()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="ultrarag-bridge", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def want(self, ids: Sequence[str]) -> None:
        """Encode these soon; the oldest wishes are forgotten when there are too many."""
        with self._changed:
            for id in ids:
                self._waiting[id] = None
                self._waiting.move_to_end(id)
            while len(self._waiting) > WAITING:
                self._waiting.popitem(last=False)
            self._changed.notify()

    def stop(self) -> None:
        """End after what is being encoded."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while (ids := self._next()) is not None:
            try:
                fill(self._serving, self._store, self._kept, ids)
            except Exception as error:  # the searches go on by mapped vectors
                logger.warning("the bridge encodes no further passages: %s", error)
                return

    def _next(self) -> list[str] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._waiting)
            if self._stopped:
                return None
            return [self._waiting.popitem()[0] for _ in range(min(CHUNK_TEXTS, len(self._waiting)))]


def fill(serving: Serving, store: Store, kept: Kept, ids: Sequence[str]) -> int:
    """Encode passages with the new encoder, unless their new vectors are kept; returns how many."""
    passages = list(store.get(list(ids)).values())
    held = kept.of(passages)
    missing = [passage for passage in passages if passage.id not in held]
    if missing:
        found = serving.encode_passages([passage.encodable for passage in missing])
        kept.add(missing, np.asarray(found.dense))
    return len(missing)


class Bridge:
    """The new encoder in service over the old generation's vectors."""

    def __init__(self, core: Core, generation: Generation, encoder: Encoder, item: LinearMap, folder: Path) -> None:
        old = core.live
        if not old.vectors.join():
            raise IndexStateError(f"generation {old.generation.id} was exchanged; begin again")
        self.over, self.folder = old.generation.id, folder
        try:
            self.kept = Kept(folder / KEPT)
            backend = BridgedVectors(old.vectors, item, self.kept, core.store, encoder.passage_fingerprint)
            vectors = VectorSet(_as_backend(backend), old.unencoded)
            vectors.join()
            entry = replace(generation, heads=("dense",), fingerprint=encoder.fingerprint)
            self.serving = Serving(entry, encoder, vectors)
        except BaseException:
            old.vectors.leave()
            raise
        self.backend = backend
        self.filler = Filler(self.serving, core.store, self.kept)

    @property
    def generation(self) -> int:
        """The generation whose encoder it is."""
        return self.serving.generation.id

    def open(self) -> None:
        """Encode in the background what searches meet."""
        self.backend.missed = self.filler.want
        self.filler.start()

    def close(self) -> None:
        """End it after the searches that are inside."""
        self.backend.missed = lambda ids: None
        self.filler.stop()
        self.serving.retire()


def _as_backend(bridged: BridgedVectors) -> Backend:
    """What a search needs of an engine is there; what a writer needs is not."""
    return bridged  # type: ignore[return-value]


def cross(core: Core, generation: Generation, terms: BridgeTerms) -> BridgeReport:
    """Encode a sample, fit the map, measure, and serve by the new encoder where that is significantly better.

    Raises:
        UsageError: the generation has other heads than dense, or another width, or there are too few passages.
    """
    started = time.monotonic()
    _check(core, generation)
    folder = _folder(core)
    drop(core)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    encoder = load_encoder(core.layout.directory(generation.id), generation, core.device)
    old, sample = _old_vectors(core)
    width = old.shape[1]
    unit = encoder.settings.normalize is not False
    raw = Bridge(core, generation, encoder, LinearMap.identity(width, unit), folder)
    try:
        new = np.asarray(raw.serving.encode_passages([passage.encodable for passage in sample]).dense)
        if new.shape != old.shape:
            raise UsageError(
                f"the vectors of generation {generation.id} are {new.shape[1]} wide, the live ones {width}: no bridge"
            )
        raw.kept.add(sample, new)
        fit = fit_ridge(old, new, normalize=unit)
        found = {"raw": _measure(core, raw, terms)}
    finally:
        raw.close()
    bridge = Bridge(core, generation, encoder, fit.map, folder)
    try:
        found["mapped"] = _measure(core, bridge, terms)
        found["encoded"] = _measure_encoded(core, bridge, terms)
        mode = _chosen(found)
        measured = {name: verdict.to_dict() for name, verdict in found.items()}
        report = BridgeReport(generation.id, mode, measured, len(bridge.kept), 0.0, fit.error, fit.identity_error)
    except BaseException:
        bridge.close()
        raise
    if mode != "mapped":
        bridge.close()
    item = fit.map if mode == "mapped" else LinearMap.identity(width, unit)
    report = replace(report, seconds=round(time.monotonic() - started, 3))
    if mode is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        item.save(folder / "map")
        serve = bridge if mode == "mapped" else Bridge(core, generation, encoder, item, folder)
        state = {"format": FORMAT, "over": serve.over, "fingerprint": encoder.fingerprint, **asdict(report)}
        write_json(folder / FILE, state)
        _enter(core, serve)
    logger.info("%s", described(report))
    return report


def described(report: BridgeReport) -> str:
    """One line for people."""
    parts = [
        f"{name} {found['metric']} {found['old']:.4f} -> {found['new']:.4f} (p = {found['change']['p_value']:.4f})"
        for name, found in report.measured.items()
    ]
    serves = "the old encoder serves on" if report.mode is None else f"it serves from the old vectors, {report.mode}"
    return f"bridge to generation {report.generation}: {serves}; {', '.join(parts)}"


def resume(core: Core) -> None:
    """Serve by the bridge that was up when the index was closed, or killed; one that does not fit is removed."""
    folder = _folder(core)
    state = read_state(core.layout.root)
    if state is None:
        if folder.exists() and not core.reading:
            shutil.rmtree(folder, ignore_errors=True)
        return
    live = core.live.generation
    found = next((g for g in core.catalog.all() if g.id == state["generation"]), None)
    fits = found is not None and found.state in ("building", "ready") and found.fingerprint == state["fingerprint"]
    if not fits or state["over"] != live.id or found is None:
        if not core.reading:
            shutil.rmtree(folder, ignore_errors=True)
        return
    encoder = load_encoder(core.layout.directory(found.id), found, core.device)
    _enter(core, Bridge(core, found, encoder, LinearMap.load(folder / "map"), folder))


def drop(core: Core) -> bool:
    """Let the old encoder serve again; False where there is no bridge."""
    with core.writing:
        bridge, core.bridge = core.bridge, None
    if bridge is None:
        return False
    bridge.close()
    shutil.rmtree(bridge.folder, ignore_errors=True)
    return True


def read_state(root: Path) -> dict[str, Any] | None:
    """What serves over the live generation's vectors, from any process; None without a bridge.

    Raises:
        IndexStateError: its file is damaged, or of a newer version.
    """
    path = root / "bridge" / FILE
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if state["format"] > FORMAT:
            raise IndexStateError(f"'{path}' was written by a newer ultrarag: upgrade ultrarag to open this index")
        return state
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise IndexStateError(
            f"'{path}' cannot be read ({error}): delete the folder '{path.parent}', and the old encoder serves"
        ) from error


def _enter(core: Core, bridge: Bridge) -> None:
    bridge.open()
    with core.writing:
        core.bridge = bridge


def _folder(core: Core) -> Path:
    return core.layout.root / "bridge"


def _check(core: Core, generation: Generation) -> None:
    if core.link is not None:
        raise UsageError("a shared index has no bridge: all that share it would need the same")
    heads = {core.live.generation.id: core.live.heads, generation.id: generation.heads}
    for id, held in heads.items():
        if held != ("dense",):
            raise UsageError(f"a bridge is for dense vectors alone, and generation {id} has {', '.join(held)}")


def _old_vectors(core: Core) -> tuple[np.ndarray, list[Passage]]:
    """The sample's stored vectors, (n, d), and its passages."""
    with core.writing:
        core.catch_up()
        unencoded = core.live.unencoded.all()
        sample = [p for p in core.store.sample(SAMPLE, core.vectors.applied) if p.id not in unencoded]
        if len(sample) < FEWEST:
            raise UsageError(f"the index has {len(sample)} passages to fit a map to; a bridge needs {FEWEST}")
        return np.asarray(core.live.backend.vectors([p.id for p in sample]).dense), sample


def _measure(core: Core, bridge: Bridge, terms: BridgeTerms) -> Verdict:
    old = Searcher(core.live, core.store, core.bm25)
    new = Searcher(bridge.serving, core.store, core.bm25)
    return compare(old, new, (terms.queries, terms.qrels), terms.metric, dict(terms.search or {}))


def _measure_encoded(core: Core, bridge: Bridge, terms: BridgeTerms) -> Verdict:
    """Measure what the queries find once their candidates have new vectors; those of as many queries as may be."""
    wanted: dict[str, None] = {}
    bridge.backend.missed = lambda ids: wanted.update(dict.fromkeys(ids))
    searcher = Searcher(bridge.serving, core.store, core.bm25)
    asked: dict[str, dict[str, int]] = {}
    order = np.random.default_rng(0).permutation(sorted(id for id in terms.qrels if id in terms.queries))
    for query_id in map(str, order):
        searcher.search_many([terms.queries[query_id]], k=CANDIDATES, **dict(terms.search or {}))
        asked[query_id] = dict(terms.qrels[query_id])
        if len(wanted) >= MEASURED:
            break
    bridge.backend.missed = lambda ids: None
    ids = list(wanted)
    for start in range(0, len(ids), CHUNK_TEXTS):
        fill(bridge.serving, core.store, bridge.kept, ids[start : start + CHUNK_TEXTS])
    return _measure(core, bridge, replace(terms, qrels=asked))


def _chosen(found: Mapping[str, Verdict]) -> str | None:
    """What serves: the better of raw and mapped that gains significantly now; or mapped that will, and does no harm."""

    def gains(name: str) -> bool:
        return found[name].change.significant and found[name].change.difference > 0

    now = [name for name in ("mapped", "raw") if gains(name)]
    if now:
        return max(now, key=lambda name: found[name].new)
    return "mapped" if gains("encoded") and not found["mapped"].worse else None
