"""Scores per head: exact against the plain formula, gradients included, and never a giant tensor."""

from __future__ import annotations

import pytest
import torch

from ultrarag import scores
from ultrarag.adapters.embedder import distinct_tokens
from ultrarag.types import Embeddings, Sparse

VOCABULARY = 60


def random_sparse(rows: int, tokens: int, seed: int) -> tuple[Sparse, torch.Tensor]:
    """Lexical weights of random token ids, and the weights per position that they are made of."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, tokens), generator=generator)
    weights = torch.rand(rows, tokens, generator=generator, dtype=torch.float64).requires_grad_()
    keep = torch.rand(rows, tokens, generator=generator) > 0.2
    return distinct_tokens(ids, weights, keep), (ids, weights, keep)


def over_vocabulary(ids, weights, keep):
    """What bge-m3's code does: a (batch, tokens, vocabulary) tensor and a maximum over tokens."""
    full = torch.zeros(*ids.shape, VOCABULARY, dtype=weights.dtype)
    return full.scatter(-1, ids[..., None], (weights * keep)[..., None]).max(1).values


def test_sparse_scores_equal_those_over_the_whole_vocabulary():
    (query, query_parts), (passage, passage_parts) = random_sparse(4, 9, 0), random_sparse(6, 20, 1)
    ours = scores.sparse_scores(query, passage)
    plain = over_vocabulary(*query_parts) @ over_vocabulary(*passage_parts).T
    assert torch.allclose(ours, plain, atol=1e-12)
    direction = torch.randn_like(plain)
    mine = torch.autograd.grad((ours * direction).sum(), [query_parts[1], passage_parts[1]], retain_graph=True)
    theirs = torch.autograd.grad((plain * direction).sum(), [query_parts[1], passage_parts[1]])
    for left, right in zip(mine, theirs, strict=True):
        assert torch.allclose(left, right, atol=1e-12)


def test_sparse_scores_in_chunks_are_the_same(monkeypatch):
    (query, _), (passage, _) = random_sparse(4, 9, 0), random_sparse(6, 20, 1)
    whole = scores.sparse_scores(query, passage)
    monkeypatch.setattr(scores, "SPARSE_BUDGET", 1)
    # in what order a sum is taken is the processor's affair
    torch.testing.assert_close(scores.sparse_scores(query, passage), whole, rtol=1e-12, atol=1e-12)


def test_sparse_scores_of_queries_without_tokens_are_zero_and_differentiable():
    ids = torch.full((2, 1), Sparse.PAD_ID)
    query = Sparse(ids, torch.zeros(2, 1, requires_grad=True))
    passage = Sparse(torch.tensor([[3, 5]]), torch.ones(1, 2, requires_grad=True))
    result = scores.sparse_scores(query, passage)
    assert result.shape == (2, 1)
    assert not result.any()
    result.sum().backward()


def test_distinct_tokens_keeps_the_largest_weight_per_id():
    ids = torch.tensor([[7, 3, 7, 0, 3], [1, 1, 1, 1, 9]])
    weights = torch.tensor([[0.5, 0.2, 0.9, 0.4, 0.1], [0.3, 0.8, 0.1, 0.2, 0.7]])
    keep = torch.tensor([[True, True, True, False, True], [True, True, True, True, False]])
    found = distinct_tokens(ids, weights, keep)
    assert found.ids.tolist() == [[3, 7], [1, Sparse.PAD_ID]]
    assert torch.allclose(found.weights, torch.tensor([[0.2, 0.9], [0.8, 0.0]]))
    assert found.to_dicts() == [{3: pytest.approx(0.2), 7: pytest.approx(0.9)}, {1: pytest.approx(0.8)}]


def token_vectors(rows, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rows, tokens, 8, generator=generator, dtype=torch.float64)
    mask = torch.ones(rows, tokens, dtype=torch.int64)
    for row in range(rows):
        mask[row, tokens - row :] = 0
    return (vectors * mask[..., None]).requires_grad_(), mask


def plain_maxsim(query, query_mask, passage, passage_mask):
    similarity = torch.einsum("qin,pjn->qipj", query, passage)
    best = similarity.masked_fill(passage_mask[None, None] == 0, -torch.inf).max(-1).values
    return (best * query_mask[..., None]).sum(1) / query_mask.sum(-1, keepdim=True)


@pytest.mark.parametrize("budget", [1, 100, 1 << 26])
def test_colbert_scores_and_gradients_equal_the_plain_formula(monkeypatch, budget):
    monkeypatch.setattr(scores, "MAXSIM_BUDGET", budget)
    (query, query_mask), (passage, passage_mask) = token_vectors(3, 5, 0), token_vectors(4, 9, 1)
    ours = scores.colbert_scores(query, query_mask, passage, passage_mask)
    plain = plain_maxsim(query, query_mask, passage, passage_mask)
    assert torch.allclose(ours, plain, atol=1e-12)
    direction = torch.randn_like(plain)
    mine = torch.autograd.grad((ours * direction).sum(), [query, passage])
    theirs = torch.autograd.grad((plain * direction).sum(), [query, passage])
    for left, right in zip(mine, theirs, strict=True):
        assert torch.allclose(left, right, atol=1e-12)


def test_colbert_scores_do_not_depend_on_padding():
    """A score that depends on how far a batch was padded is wrong for an index (at the peer it does)."""
    query, query_mask = token_vectors(1, 4, 2)
    passage, passage_mask = token_vectors(2, 6, 3)
    with torch.no_grad():
        passage -= 5 * query.mean() + 3  # many negative similarities: a zero vector would win the maximum
        passage *= passage_mask[..., None]
    wide = torch.nn.functional.pad(passage, (0, 0, 0, 7))
    wide_mask = torch.nn.functional.pad(passage_mask, (0, 7))
    narrow = scores.colbert_scores(query, query_mask, passage, passage_mask)
    assert torch.equal(scores.colbert_scores(query, query_mask, wide, wide_mask), narrow)


def test_colbert_scores_without_tokens_are_zero():
    query, passage = torch.ones(1, 2, 3, requires_grad=True), torch.ones(2, 2, 3, requires_grad=True)
    none, some = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[1, 1], [0, 0]])
    assert not scores.colbert_scores(query, none, passage, some).any()
    result = scores.colbert_scores(query, torch.ones(1, 2, dtype=torch.int64), passage, some)
    assert result.tolist() == [[3.0, 0.0]]
    result.sum().backward()
    assert torch.isfinite(passage.grad).all()


def test_head_scores_widen_half_precision():
    half = Embeddings(dense=torch.ones(1, 4, dtype=torch.bfloat16))
    assert scores.head_scores(half, half)["dense"].dtype == torch.float32
