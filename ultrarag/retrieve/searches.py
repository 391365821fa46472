"""The searches of a live index: by text or by vectors, of given passages, and of judged queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ultrarag.errors import UsageError
from ultrarag.evaluation import DEFAULT_METRICS, Evaluation, Qrels, evaluate
from ultrarag.retrieve.collection import Collection
from ultrarag.retrieve.search import Encoding, Hits
from ultrarag.retrieve.signals import Signals
from ultrarag.types import Embeddings


class Searches(Collection, Signals):
    """What `LiveIndex` offers of searching, all of it in the live generation."""

    def search(self, query: str, k: int = 10, **options: Any) -> Hits:
        """Return the k best passages, best first; fewer where fewer match.

        The list says which generation answered (`generation`, `fingerprint`), and has a `query_id` of its own.

        Args:
            query: an empty one finds nothing.
            k: may be larger than the corpus.
            weights: weight of each head ("dense", "sparse", "colbert", "bm25"), such as {"dense": 1, "bm25": 0.5}.
                Heads named here are searched. Required when several heads are summed: no default suits all data.
            heads: the heads to search; default: those with a weight, else all that the encoder has.
            filter: a condition on the metadata, applied before the k best are chosen; see
                `ultrarag.retrieve.search.filters`.
            fusion: "weighted" sum, or "rrf" (reciprocal rank fusion, which needs no weights).
            normalize: "minmax" maps each head's scores to 0..1 before they are weighted, "raw" takes them as they
                are. With one head the scores are always its own.
            candidates: hits asked of each head before fusion; default: max(4 k, 100). ColBERT scores the candidates
                of the others; alone, those of dense, sparse or bm25, the first that is stored.
            exact: compare the dense vector with all passages, not through the approximate graph.
            ids: search these passages alone, each of them compared; unknown ones are ignored. With a filter, those of
                them that pass it. "minmax" then maps the scores of these.
            min_scores: what a hit must have at least from a head that is searched, such as {"dense": 0.3}, whatever
                its fused score is: a fused score has no absolute meaning. Each hit's `scores` then has that head's.
            mmr: choose the k out of `candidates` hits by maximal marginal relevance, so that they differ: from 1 (like
                the query) to 0 (unlike each other), by the cosines of the dense vectors. They keep their scores, and
                come in the order in which they were chosen.
            log: remember the search in the feedback log (docs/feedback.md), so that `feedback` can refer to it.
            client: who asks, for the log; kept as a keyed hash.

        Raises:
            UsageError: for arguments that cannot be used; names them and what can.
            IndexStateError: with `log`, when the index is open for reading, or the log is damaged.
        """
        return self.search_many([query], k=k, **options)[0]

    def search_many(
        self, queries: Sequence[str], k: int = 10, *, log: bool = False, client: str | None = None, **options: Any
    ) -> list[Hits]:
        """Search several queries, encoded together, on one generation; options as for `search`."""
        if isinstance(queries, str):
            raise UsageError("search_many takes several queries; use search for one")
        if log:
            self._core.check_writable()  # before the search
        with self._core.searching() as searcher:
            found = searcher.search_many(list(queries), k=k, **options)
        if log:
            self._remember(queries, found, {"k": k, **options}, client)
        return found

    def search_embeddings(self, embeddings: Embeddings, fingerprint: str, k: int = 10, **options: Any) -> list[Hits]:
        """Search with query vectors made elsewhere; options as for `search`.

        Args:
            options: also `texts`, the queries' texts, for the head "bm25" beside those of the vectors.

        Raises:
            FingerprintError: when `fingerprint` is not that of the live encoder.
        """
        with self._core.searching() as searcher:
            return searcher.search_embeddings(embeddings, fingerprint, k=k, **options)

    @contextmanager
    def encoding(self) -> Iterator[Encoding]:
        """Lend the encoder of the searches, to encode texts that are not passages here; it stays the same in the block.

        Example:
            >>> with live.encoding() as lent:
            ...     vectors = lent.encode(["what is milvus?"], "query").dense
            ...     vectors.shape, lent.fingerprint == live.fingerprint
            ((1, 384), True)
        """
        with self._core.searching() as searcher:
            yield searcher.encoding()

    def score(self, query: str, ids: Sequence[str], weights: Mapping[str, float] | None = None, **options: Any) -> Hits:
        """Score given passages for a query, and return all of them, best first.

        A search with `ids` finds those that a head finds; this ranks the others as well, such as passages without a
        word of the query at BM25's 0. Left out are ids that do not exist, and passages that a head has no vectors of
        (`status()["live"]["unencoded"]`).

        Args:
            query: an empty one scores none.
            weights: as for `search`; scores are summed as they are, unless `normalize` or `fusion` say otherwise.
            options: others of `search`, such as `heads`, `filter` and `min_scores`.
        """
        with self._core.searching() as searcher:
            return searcher.score(query, ids, weights=weights, **options)

    def evaluate(
        self,
        queries: Mapping[str, str],
        qrels: Qrels,
        metrics: Sequence[str] = DEFAULT_METRICS,
        k: int | None = None,
        *,
        ignore_identical_ids: bool = False,
        **search: Any,
    ) -> Evaluation:
        """Search judged queries and measure; see `ultrarag.retrieve.evaluate`. None of them is remembered."""
        return evaluate(self, queries, qrels, metrics, k, ignore_identical_ids=ignore_identical_ids, **search)
