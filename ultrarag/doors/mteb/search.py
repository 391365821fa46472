"""A live index as MTEB's SearchProtocol: dense, sparse, late-interaction, BM25, any sum of them, and reranked."""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from ultrarag.doors.mteb.encoder import loaded
from ultrarag.doors.mteb.framework import Dataset, ModelMeta
from ultrarag.doors.mteb.meta import search_meta
from ultrarag.doors.mteb.texts import passages_of, queries_of
from ultrarag.encoder import Encoder
from ultrarag.errors import UsageError
from ultrarag.retrieve import LiveIndex, rerank
from ultrarag.types import Hit, Passage

log = logging.getLogger(__name__)

#: Queries searched at a time, as `ultrarag.evaluation.evaluate` does.
CHUNK_QUERIES = 256


class MtebSearch:
    """A model of MTEB that indexes a corpus and searches it.

    Example:
        >>> from ultrarag.doors.mteb import MtebSearch
        >>> hybrid = MtebSearch(encoder, weights={"dense": 1, "bm25": 0.3}, candidates=100)
        >>> mteb.evaluate(hybrid, mteb.get_tasks(["SciFact"]), cache=None)
    """

    def __init__(
        self,
        model: Encoder | LiveIndex | str | PathLike[str],
        *,
        reranker: Encoder | str | PathLike[str] | None = None,
        depth: int = 100,
        rerank_weight: float | None = None,
        backend: str | None = None,
        name: str | None = None,
        **search: Any,
    ) -> None:
        """Take an encoder, whose index gets one corpus after the other and goes with this object, or an open index.

        Args:
            model: a live index must hold exactly the corpus of the task.
            reranker: orders the best `depth` hits of each query; the others are left out.
            rerank_weight: of its scores beside the hits' own; see `ultrarag.retrieve.rerank`.
            backend: of the indexes that are made; see `LiveIndex.create`.
            name: in MTEB's results, with an organisation, such as "me/model".
            search: options of `LiveIndex.search`, such as `weights`. MTEB asks for 1000 hits of a query; sums of
                several heads depend on `candidates`, whose default is four times that.
        """
        self._given = isinstance(model, LiveIndex)
        self._live: LiveIndex | None = model if isinstance(model, LiveIndex) else None
        self.encoder = model.encoder if isinstance(model, LiveIndex) else loaded(model, None, None, {})
        self.reranker = None if reranker is None else loaded(reranker, None, None, {})
        self.depth, self.rerank_weight, self.backend, self.search_options = depth, rerank_weight, backend, search
        self._meta = search_meta(self.encoder, name, self._setting())

    def _setting(self) -> dict[str, Any]:
        """What tells this search from others of the same encoder."""
        found = dict(self.search_options)
        if self.reranker is not None:
            found |= {"reranker": self.reranker.fingerprint[:12], "depth": self.depth}
            found |= {} if self.rerank_weight is None else {"rerank_weight": self.rerank_weight}
        return found

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """What MTEB records."""
        return self._meta

    def index(self, corpus: Dataset, **kwargs: Any) -> None:
        """Make an index of the corpus, or compare it with the one that was given.

        Documents without a visible character can be found by nobody: they are left out, and counted in a warning.
        """
        passages = passages_of(corpus)
        kept = [passage for passage in passages if not passage.blank]
        if len(kept) < len(passages):
            log.warning("%d blank documents of %d are left out", len(passages) - len(kept), len(passages))
        if self._given:
            self._compare(kept)
        else:
            self._build(kept)

    def _build(self, passages: Sequence[Passage]) -> None:
        if self._live is None:
            folder = tempfile.TemporaryDirectory(prefix="ultrarag-mteb-")
            place = f"{folder.name}/index"
            self._live = LiveIndex.create(place, self.encoder, backend=self.backend, **self._stored())
            weakref.finalize(self, _remove, self._live, folder)  # MTEB tells nobody when it has done
        else:
            self._live.clear()
        self._live.add(passages)

    def _stored(self) -> dict[str, Any]:
        """The heads that the searches need: no other is computed."""
        options = self.search_options
        named = options.get("heads") or [head for head, weight in (options.get("weights") or {}).items() if weight]
        named = [named] if isinstance(named, str) else list(named)
        heads = [head for head in named if head in self.encoder.heads]
        # ColBERT alone takes its candidates from another head; an index stores at least one
        return {"heads": heads if heads and heads != ["colbert"] else None, "bm25": "bm25" in named}

    def _compare(self, passages: Sequence[Passage]) -> None:
        assert self._live is not None
        if self._live.fingerprint != self._meta.revision:
            raise UsageError("another encoder went live meanwhile: make a new MtebSearch of the index")
        ids = {passage.id: passage.content for passage in passages}
        found = self._live.get_many(list(ids))
        other = [id for id, content in ids.items() if id not in found or found[id].content != content]
        if other or len(self._live) != len(ids):
            which = f"'{other[0]}' of the corpus is not there, or has another text" if other else "it holds more"
            raise UsageError(
                f"the index at '{self._live.path}' does not hold the task's corpus of {len(ids)} documents ({which}): "
                "give MtebSearch the encoder, and it indexes the corpus"
            )

    def search(
        self,
        queries: Dataset,
        *,
        task_metadata: Any,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        num_proc: int | None = None,
        **kwargs: Any,
    ) -> dict[str, dict[str, float]]:
        """Return the best documents of each query, or the candidates that a reranking task gives it, each scored."""
        if self._live is None:
            raise UsageError("MtebSearch.search comes after MtebSearch.index: there is nothing to search")
        texts = queries_of(queries, task_metadata, num_proc)
        hits = self._searched(texts, top_k) if top_ranked is None else self._scored(texts, top_ranked)
        return {id: told_apart({hit.id: hit.score for hit in self._ranked(texts[id], hits[id])}) for id in texts}

    def _searched(self, texts: Mapping[str, str], top_k: int) -> dict[str, Sequence[Hit]]:
        assert self._live is not None
        k = top_k if self.reranker is None else min(top_k, self.depth)
        found: dict[str, Sequence[Hit]] = {}
        ids = list(texts)
        for start in range(0, len(ids), CHUNK_QUERIES):
            part = ids[start : start + CHUNK_QUERIES]
            hits = self._live.search_many([texts[id] for id in part], k=k, **self.search_options)
            found.update(zip(part, hits, strict=True))
        return found

    def _scored(self, texts: Mapping[str, str], top_ranked: Mapping[str, Sequence[str]]) -> dict[str, Sequence[Hit]]:
        """All candidates of each query, by the same fusion as a search."""
        assert self._live is not None
        options = {name: value for name, value in self.search_options.items() if name not in ("candidates", "exact")}
        if options.get("fusion") != "rrf":
            options.setdefault("normalize", "minmax")  # a search's default; `score` has another one
        return {id: self._live.score(texts[id], top_ranked.get(id, ()), **options) for id in texts}

    def _ranked(self, query: str, hits: Sequence[Hit]) -> Sequence[Hit]:
        return hits if self.reranker is None else rerank(self.reranker, query, hits, weight=self.rerank_weight)


def _remove(live: LiveIndex, folder: tempfile.TemporaryDirectory[str]) -> None:
    live.close()
    folder.cleanup()


def told_apart(scores: dict[str, float]) -> dict[str, float]:
    """Scores whose order survives in float32, where pytrec_eval compares them: what it sees as equal it orders by id.

    Sums of heads are float64. One that differs from its better neighbour by less than float32 can hold is lowered to
    the next number that does; equal ones stay equal.
    """
    order = sorted(scores, key=lambda id: (scores[id], id), reverse=True)
    found: dict[str, float] = {}
    last, before = None, np.float32(np.inf)
    for id in order:
        if last is None or scores[id] != last:
            last, before = scores[id], min(np.float32(scores[id]), np.nextafter(before, np.float32(-np.inf)))
        found[id] = float(before)
    return found
