"""Scores of queries against passages, one function per head; each is exact and none builds a giant tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ultrarag.types import Embeddings, Sparse

#: Elements of the largest temporary that MaxSim may build (float32: 256 MiB).
MAXSIM_BUDGET = 1 << 26
#: Rows x columns of passages' weights that sparse scoring spreads out at a time (float32: 256 MiB).
SPARSE_BUDGET = 1 << 26


def dense_scores(query: Tensor, passage: Tensor) -> Tensor:
    """Inner products.

    Args:
        query: (queries, dim).
        passage: (passages, dim).

    Returns:
        (queries, passages).
    """
    return query @ passage.T


def sparse_scores(query: Sparse, passage: Sparse) -> Tensor:
    """Inner products of lexical weights, computed on the union of the queries' token ids.

    A token id that no query holds cannot contribute, so thousands of columns give what the whole vocabulary
    would (250,002 columns for bge-m3), exactly, with the same gradients.

    Args:
        query: ids and weights, each (queries, tokens).
        passage: ids and weights, each (passages, tokens).

    Returns:
        (queries, passages).
    """
    union = torch.unique(query.ids[query.ids >= 0])
    if union.numel() == 0:
        return query.weights.sum(-1, keepdim=True) * 0 + passage.weights.sum(-1) * 0
    left = _spread(query.ids, query.weights, union)
    rows = max(1, SPARSE_BUDGET // union.numel())
    columns = [
        left @ _spread(ids, weights, union).T
        for ids, weights in zip(passage.ids.split(rows), passage.weights.split(rows), strict=True)
    ]
    return torch.cat(columns, dim=1)


def greatest(sparse: Sparse, most: int) -> Sparse:
    """The `most` greatest weights of each text, (batch, tokens), which keep the ascending order of their ids."""
    if sparse.weights.shape[1] <= most:
        return sparse
    chosen = sparse.weights.topk(most, dim=1).indices.sort(dim=1).values  # padding weighs nothing and stands last
    return Sparse(sparse.ids.gather(1, chosen), sparse.weights.gather(1, chosen))


def _spread(ids: Tensor, weights: Tensor, union: Tensor) -> Tensor:
    """Weights on the columns of `union`, (batch, len(union)); ids outside it are left out."""
    column = torch.searchsorted(union, ids.clamp(min=0)).clamp(max=union.numel() - 1)
    present = (union[column] == ids) & (ids >= 0)
    spread = weights.new_zeros(ids.shape[0], union.numel())
    return spread.scatter_add(1, column, torch.where(present, weights, weights.new_zeros(())))


def colbert_scores(query: Tensor, query_mask: Tensor, passage: Tensor, passage_mask: Tensor) -> Tensor:
    """MaxSim: the mean over a query's tokens of the best inner product with any of the passage's tokens.

    Padding on either side never counts. A query without tokens scores 0 everywhere, and a passage without
    tokens scores 0 for every query.

    Args:
        query: (queries, query tokens, dim); `query_mask`: (queries, query tokens).
        passage: (passages, passage tokens, dim); `passage_mask`: (passages, passage tokens).

    Returns:
        (queries, passages).

    Source:
        ColBERT (Khattab and Zaharia, 2020), with the mean over query tokens of bge-m3 (Chen et al., 2024).
    """
    best: Tensor = _MaxSim.apply(query, passage, query_mask.bool(), passage_mask.bool())
    count = query_mask.sum(-1, keepdim=True).clamp(min=1)
    return best / count.to(best.dtype)


class _MaxSim(torch.autograd.Function):
    """Sum over query tokens of the maximum over passage tokens, in chunks of passages.

    Only the position of each maximum is kept for backward, so the (queries, tokens, passages, tokens) matrix
    never stands in memory, in either direction.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, passage: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
        queries = query.shape[0]
        rows = query[query_mask]  # (valid query tokens, dim)
        owner = query_mask.nonzero()[:, 0]
        position = torch.empty(rows.shape[0], passage.shape[0], dtype=torch.int32, device=query.device)
        scores = query.new_zeros(queries, passage.shape[0])
        for start, stop in _chunks(rows.shape[0] * passage.shape[1], passage.shape[0]):
            best, where = _best(rows, passage[start:stop], passage_mask[start:stop])
            position[:, start:stop] = where
            scores[:, start:stop] = best.new_zeros(queries, stop - start).index_add_(0, owner, best)
        ctx.save_for_backward(query, passage, query_mask, passage_mask, position)
        return scores

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, passage, query_mask, passage_mask, position = ctx.saved_tensors
        tokens, dim = passage.shape[1:]
        rows = query[query_mask]
        weight = gradients[0][query_mask.nonzero()[:, 0]] * passage_mask.any(-1)  # (valid query tokens, passages)
        row_gradient = torch.zeros_like(rows)
        passage_gradient = torch.zeros_like(passage)
        for start, stop in _chunks(rows.shape[0] * dim, passage.shape[0]):
            flat = position[:, start:stop].long() + torch.arange(stop - start, device=rows.device) * tokens
            chosen = passage[start:stop].reshape(-1, dim)[flat]  # (valid query tokens, chunk, dim)
            share = weight[:, start:stop]
            row_gradient += torch.einsum("np,npd->nd", share, chosen)
            passage_gradient[start:stop].view(-1, dim).index_add_(
                0, flat.reshape(-1), (share[:, :, None] * rows[:, None, :]).reshape(-1, dim)
            )
        query_gradient = torch.zeros_like(query)
        query_gradient[query_mask] = row_gradient
        return query_gradient, passage_gradient, None, None


def _best(rows: Tensor, passage: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's best inner product in each passage and its position, both (rows, passages)."""
    chunk, tokens, dim = passage.shape
    similarity = (rows @ passage.reshape(-1, dim).T).view(-1, chunk, tokens)
    similarity.masked_fill_(~mask, -torch.inf)
    best, where = similarity.max(-1)
    return best.masked_fill(~mask.any(-1), 0), where.int()


def _chunks(per_passage: int, passages: int) -> list[tuple[int, int]]:
    size = max(1, MAXSIM_BUDGET // max(1, per_passage))
    return [(start, min(start + size, passages)) for start in range(0, passages, size)]


def head_scores(query: Embeddings, passage: Embeddings) -> dict[str, Tensor]:
    """The score matrix, (queries, passages), of each head that both sides have, in float32 or wider."""
    scores: dict[str, Tensor] = {}
    if query.dense is not None and passage.dense is not None:
        scores["dense"] = dense_scores(_wide(query.dense), _wide(passage.dense))
    if query.sparse is not None and passage.sparse is not None:
        left, right = (Sparse(s.ids, _wide(s.weights)) for s in (query.sparse, passage.sparse))
        scores["sparse"] = sparse_scores(left, right)
    if query.colbert is not None and passage.colbert is not None:
        vectors = _wide(query.colbert), _wide(passage.colbert)
        scores["colbert"] = colbert_scores(vectors[0], query.mask, vectors[1], passage.mask)
    return scores


def _wide(tensor: Tensor) -> Tensor:
    """Half precision is widened: a score divided by temperature 0.02 needs more than 8 bits."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
