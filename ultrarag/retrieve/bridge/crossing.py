"""Crossing: what serves while a generation is built, decided on judged queries of this index.

After a full fine-tune the passages' vectors are all old, and the queries could be new. A linear map, old -> new passage
vectors, is fitted to a sample that is encoded first; the transposed map on the query finds candidates among the old
vectors, and these are scored by their new vectors where there are any, else by their mapped ones: one scale, one
ranking. Nothing is served so that did not gain significantly.

Maps from new queries to the old space serve worse, and are not made; benchmarks/bridge.py measures what is.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ultrarag.errors import UsageError
from ultrarag.evaluation import Verdict
from ultrarag.io import write_json
from ultrarag.maps import LinearMap, fit_ridge
from ultrarag.retrieve.bridge.ahead import Predicted, write_order
from ultrarag.retrieve.bridge.kept import KEPT, Kept, count_kept, fill
from ultrarag.retrieve.bridge.serving import CANDIDATES, CHUNK_TEXTS, Bridge
from ultrarag.retrieve.bridge.state import FILE, FORMAT, BridgeReport, BridgeTerms, described, read_state
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.generation import Generation, load_encoder
from ultrarag.retrieve.search import Searcher
from ultrarag.retrieve.swap import compare
from ultrarag.types import Passage

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder

logger = logging.getLogger("ultrarag")

#: Passages that the map is fitted to; and passages that may be encoded to measure what searches will find once their
#: candidates have new vectors.
SAMPLE, MEASURED = 1000, 5000
#: Passages that a map can be fitted to at least.
FEWEST = 50


def cross(core: Core, generation: Generation, terms: BridgeTerms) -> BridgeReport:
    """Encode a sample, fit the map, measure, and serve by the new encoder where that is significantly better.

    What was decided is written beside the generation too, and stays there.

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
    old, new = _encoded_sample(core, generation.id, encoder, folder)
    unit = encoder.settings.normalize is not False
    fit = fit_ridge(old, new, normalize=unit)
    maps = {"raw": LinearMap.identity(old.shape[1], unit), "mapped": fit.map}
    found = _judged(core, generation, encoder, maps, terms, folder)
    mode, encoded = _chosen(found), count_kept(folder)
    measured = {name: verdict.to_dict() for name, verdict in found.items()}
    seconds = round(time.monotonic() - started, 3)
    counts = encoded, core.store.count()
    report = BridgeReport(generation.id, mode, measured, *counts, seconds, fit.error, fit.identity_error)
    write_json(core.layout.directory(generation.id) / FILE, asdict(report))
    if mode is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        maps[mode].save(folder / "map")
        bridge = Bridge(core, generation, encoder, maps[mode], folder)
        state = {"format": FORMAT, "over": bridge.over, "fingerprint": encoder.fingerprint, **asdict(report)}
        write_json(folder / FILE, state)
        _enter(core, bridge)
        write_order(core, Predicted.of(old, new, maps[mode]), folder)
    logger.info("%s", described(asdict(report)))
    return report


def _encoded_sample(core: Core, id: int, encoder: Encoder, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The old and the new vectors of the sample, (n, d) each; the new ones are kept."""
    old, sample = _old_vectors(core)
    found = encoder.encode([passage.encodable for passage in sample], "passage", heads=("dense",), progress=False)
    new = np.asarray(found.numpy().dense)
    if new.shape != old.shape:
        raise UsageError(
            f"the vectors of generation {id} are {new.shape[1]} wide, the live ones {old.shape[1]}: no bridge"
        )
    kept = Kept(folder / KEPT)
    kept.add(sample, new)
    kept.close()
    return old, new


def _judged(
    core: Core,
    generation: Generation,
    encoder: Encoder,
    maps: Mapping[str, LinearMap],
    terms: BridgeTerms,
    folder: Path,
) -> dict[str, Verdict]:
    """Each way to serve against the old encoder; with further vectors only where none of the others gains."""
    found: dict[str, Verdict] = {}
    for name, item in maps.items():
        with closing(Bridge(core, generation, encoder, item, folder)) as bridge:
            found[name] = _measure(core, bridge, terms)
            if name == "mapped" and not any(_gains(verdict) for verdict in found.values()):
                found["encoded"] = _measure_encoded(core, bridge, terms)
    return found


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
        passages = list(core.store.get(ids[start : start + CHUNK_TEXTS]).values())
        fill(bridge.kept, passages, bridge.serving.encode_passages)
    return _measure(core, bridge, replace(terms, qrels=asked))


def _chosen(found: Mapping[str, Verdict]) -> str | None:
    """What serves: the better of raw and mapped that gains significantly now; or mapped that will, and does no harm."""
    if now := [name for name in ("mapped", "raw") if _gains(found[name])]:
        return max(now, key=lambda name: found[name].new)
    will = "encoded" in found and _gains(found["encoded"]) and not found["mapped"].worse
    return "mapped" if will else None


def _gains(verdict: Verdict) -> bool:
    return verdict.change.significant and verdict.change.difference > 0
