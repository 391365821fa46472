"""MiningSearch: the best texts of a pool for a chunk of queries, by one head or several, and any text's score."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrarag.encoder import Cuts
from ultrarag.errors import UsageError
from ultrarag.evaluation import best_columns, top_k
from ultrarag.io import CHUNK_TEXTS, Vectors, only
from ultrarag.retrieve.bm25 import BM25
from ultrarag.types import Embeddings

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder

BM25_HEAD = "bm25"
#: Heads that can search all texts; where ColBERT stands alone, the first of them finds its candidates.
SEARCHABLE = ("dense", "sparse", BM25_HEAD)
#: Queries whose lexical weights are compared with a chunk of texts at a time.
_CHUNK_QUERIES = 256
#: Texts whose vectors are fetched for one query at a time: of ColBERT, 128 texts of 512 tokens take 256 MiB.
_CHUNK_TEXTS = 128

Top = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Asked:
    """A query to find texts for."""

    query: str
    #: instruction of this query, in place of the encoder's
    prompt: str | None
    #: numbers of its positives, (positives,)
    positives: np.ndarray


@dataclass(frozen=True)
class Found:
    """What was found for a query, best first."""

    #: (n,) numbers of texts of the pool
    numbers: np.ndarray
    #: (n,)
    scores: np.ndarray
    #: (positives,)
    positive_scores: np.ndarray


class MiningSearch:
    """Searches the first `pool` of numbered texts."""

    def __init__(
        self,
        weights: Mapping[str, float],
        pool: int,
        encoder: Encoder | None,
        vectors: Vectors | None,
        words: BM25 | None,
        fusion: str = "raw",
        gpu: bool = False,
    ) -> None:
        self.heads = tuple(head for head, weight in weights.items() if weight)
        self.weights, self.pool, self.fusion, self.gpu = weights, pool, fusion, gpu
        self.encoder, self.vectors, self.words = encoder, vectors, words
        #: seconds of encoding queries, and of searching
        self.seconds: dict[str, float] = defaultdict(float)
        self.cuts = Cuts()
        self._check_gpu()

    def find(self, asked: Sequence[Asked], depth: int) -> list[Found]:
        """Return the `depth` best texts for each query, and the scores of its positives; equal scores by number.

        With several heads, candidates are the `depth` best of each, all scored by all heads.
        """
        started = time.perf_counter()
        queries = self._encoded(asked)
        encoded = time.perf_counter()
        lists = self._lists(asked, queries, min(depth, self.pool))
        found = [self._found(row, asked, queries, lists, depth) for row in range(len(asked))]
        self.seconds["encode"] += encoded - started
        self.seconds["search"] += time.perf_counter() - encoded
        return found

    def _check_gpu(self) -> None:
        if not self.gpu:
            return
        import torch

        if not torch.cuda.is_available():
            raise UsageError("use_gpu_for_searching: there is no CUDA device here; leave it out")

    @property
    def _encoded_heads(self) -> tuple[str, ...]:
        return tuple(head for head in (*self.heads, *self._sources()) if head != BM25_HEAD)

    def _sources(self) -> tuple[str, ...]:
        """The heads that name candidates."""
        own = tuple(head for head in SEARCHABLE if head in self.heads)
        return own or candidate_heads(self.heads, self.encoder)

    def _encoded(self, asked: Sequence[Asked]) -> Embeddings | None:
        """The queries' vectors, each under its own prompt."""
        heads = tuple(dict.fromkeys(self._encoded_heads))
        if not heads or self.encoder is None:
            return None
        by_prompt: dict[str | None, list[int]] = {}
        for row, one in enumerate(asked):
            by_prompt.setdefault(one.prompt, []).append(row)
        options: dict[str, Any] = {"heads": heads, "progress": False, "cuts": self.cuts}
        parts = [
            self.encoder.encode([asked[row].query for row in rows], "query", instruction=prompt, **options)
            for prompt, rows in by_prompt.items()
        ]
        order = np.argsort([row for rows in by_prompt.values() for row in rows])
        return Embeddings.cat(parts)[order]

    def _lists(self, asked: Sequence[Asked], queries: Embeddings | None, depth: int) -> dict[str, list[Top]]:
        """The best texts by each head that can search: per query (scores, numbers)."""
        sources, lists = self._sources(), {}
        if queries is not None and self.vectors is not None:
            for head, (scores, numbers) in self._searched(queries, sources, depth).items():
                lists[head] = list(zip(scores, numbers, strict=True))
        if BM25_HEAD in sources:
            lists[BM25_HEAD] = [self._by_words(one.query, depth) for one in asked]
        return lists

    def _searched(self, queries: Embeddings, sources: Sequence[str], depth: int) -> dict[str, Top]:
        assert self.vectors is not None
        best: dict[str, Top] = {}
        for start, chunk in self.vectors.chunks(self.pool):
            for head in sources:
                if head != BM25_HEAD:
                    scores, rows = self._best(head, queries, chunk, depth)
                    best[head] = _merged(best.get(head), (scores, rows + start), depth)
        return best

    def _best(self, head: str, queries: Embeddings, chunk: Embeddings, depth: int) -> Top:
        if head == "sparse":
            return _best_sparse(queries, chunk, depth)
        if self.gpu:
            return _best_on_gpu(queries.dense, chunk.dense, depth)
        return top_k(queries.dense, chunk.dense, depth, CHUNK_TEXTS)

    def _by_words(self, query: str, depth: int) -> Top:
        """Texts outside the pool are indexed too, for their scores: they are left out here."""
        assert self.words is not None
        hits = [(int(id), score) for id, score in self.words.search(query, 2 * depth) if int(id) < self.pool][:depth]
        return np.array([score for _, score in hits], np.float64), np.array([number for number, _ in hits], np.int64)

    def _found(
        self,
        row: int,
        asked: Sequence[Asked],
        queries: Embeddings | None,
        lists: Mapping[str, list[Top]],
        depth: int,
    ) -> Found:
        one = asked[row]
        query = None if queries is None else queries[row : row + 1]
        held = {head: _that_match(head, *tops[row]) for head, tops in lists.items()}
        if len(self.heads) == 1 and self.heads[0] in held:  # it has scored its own candidates
            scores, numbers = held[self.heads[0]]
            of_positives = self._score(self.heads[0], one.query, query, one.positives)
        else:
            numbers = np.unique(np.concatenate([numbers for _, numbers in held.values()]))
            everything = np.concatenate([numbers, one.positives])
            total = self._fused(lambda head: self._score(head, one.query, query, everything))
            scores, of_positives = total[: len(numbers)], total[len(numbers) :]
        order = np.lexsort((numbers, -scores))[:depth]
        return Found(numbers[order], scores[order], of_positives)

    def _fused(self, score: Callable[[str], np.ndarray]) -> np.ndarray:
        parts = [(self.weights[head], score(head)) for head in self.heads]
        if self.fusion == "minmax" and len(parts) > 1:
            parts = [(weight, _minmax(scores)) for weight, scores in parts]
        return np.asarray(sum(weight * scores for weight, scores in parts), np.float64)

    def _score(self, head: str, text: str, query: Embeddings | None, numbers: np.ndarray) -> np.ndarray:
        """The scores of given texts by one head, (n,)."""
        if not len(numbers):
            return np.zeros(0)
        if head == BM25_HEAD:
            assert self.words is not None
            return self.words.score(text, [str(number) for number in numbers])
        assert self.vectors is not None
        assert query is not None
        starts = range(0, len(numbers), _CHUNK_TEXTS)
        parts = (self.vectors.gather(numbers[start : start + _CHUNK_TEXTS], head) for start in starts)
        return np.concatenate([_head_score(head, query, part) for part in parts])


def candidate_heads(heads: Sequence[str], encoder: Encoder | None) -> tuple[str, ...]:
    """The head that finds candidates for ColBERT alone, which cannot search all texts."""
    if tuple(heads) != ("colbert",):
        return ()
    known = () if encoder is None else encoder.heads
    return (next((head for head in ("dense", "sparse") if head in known), BM25_HEAD),)


def _that_match(head: str, scores: np.ndarray, numbers: np.ndarray) -> Top:
    """Without a common token two texts have nothing to do with each other, lexically; vectors always compare."""
    kept = slice(None) if head == "dense" else scores > 0
    return scores[kept], numbers[kept]


def _merged(old: Top | None, new: Top, depth: int) -> Top:
    """Keep the best of both; what came earlier has the lower numbers and wins among equals."""
    if old is None:
        return new
    scores, numbers = (np.concatenate(pair, axis=1) for pair in zip(old, new, strict=True))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(numbers, order, 1)


def _best_sparse(queries: Embeddings, chunk: Embeddings, depth: int) -> Top:
    parts = []
    for start in range(0, len(queries), _CHUNK_QUERIES):
        scores = _matrix("sparse", only(queries[start : start + _CHUNK_QUERIES], ("sparse",)), chunk)
        columns = np.array(best_columns(scores, depth))
        values = np.take_along_axis(scores, columns, 1)
        order = np.argsort(-values, axis=1, kind="stable")
        parts.append((np.take_along_axis(values, order, 1), np.take_along_axis(columns, order, 1)))
    return np.concatenate([scores for scores, _ in parts]), np.concatenate([columns for _, columns in parts])


def _best_on_gpu(queries: np.ndarray, passages: np.ndarray, depth: int) -> Top:
    """The same on the GPU, where equal scores come in no order."""
    import torch

    left, right = (torch.as_tensor(vectors, device="cuda") for vectors in (queries, passages))
    scores, rows = (left @ right.T).topk(min(depth, len(passages)))
    return scores.cpu().numpy(), rows.cpu().numpy()


def _matrix(head: str, queries: Embeddings, passages: Embeddings) -> np.ndarray:
    import torch

    from ultrarag.scores import head_scores

    with torch.inference_mode():
        return head_scores(queries.map(torch.as_tensor), passages.map(torch.as_tensor))[head].numpy()


def _head_score(head: str, query: Embeddings, passages: Embeddings) -> np.ndarray:
    return _matrix(head, only(query, (head,)), passages)[0]


def _minmax(scores: np.ndarray) -> np.ndarray:
    low, high = (scores.min(), scores.max()) if len(scores) else (0.0, 0.0)
    return (scores - low) / (high - low) if high > low else np.ones_like(scores)
