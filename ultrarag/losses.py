"""Losses: pure functions of `Embeddings` that know nothing of processes, devices or micro-batches.

Rows are laid out as everywhere in training: query i's candidates are passages i*G to i*G+G-1, the positive
first; passages after the last candidate (other devices') are negatives for every query.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ultrarag.errors import UsageError
from ultrarag.loss_arguments import LossArguments
from ultrarag.scores import head_scores
from ultrarag.types import Embeddings, Sparse

#: Weight of each head's own loss, and of its scores in the ensemble, in bge-m3's unified fine-tuning.
LOSS_WEIGHTS = {"dense": 1.0, "sparse": 0.1, "colbert": 1.0}
ENSEMBLE_WEIGHTS = {"dense": 1.0, "sparse": 0.3, "colbert": 1.0}


def contrastive(scores: Tensor, group_size: int = 1) -> Tensor:
    """Cross-entropy of each query's positive among all passages (InfoNCE).

    Args:
        scores: (queries, passages), already divided by the temperature.
        group_size: passages per query; query i's positive is passage i * group_size.

    Source:
        Contrastive Predictive Coding (van den Oord et al., 2018).
    """
    return F.cross_entropy(scores, _positives(scores, group_size))


def distillation_kl(group_scores: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of the student's distribution over each row against the teacher's.

    Args:
        group_scores: (queries, candidates) of the student, divided by the temperature.
        teacher: (queries, candidates) probabilities.
    """
    return -(teacher * F.log_softmax(group_scores, dim=-1)).sum(-1).mean()


def distillation_m3(scores: Tensor, teacher: Tensor, group_size: int) -> Tensor:
    """bge-m3's distillation: each candidate in turn is the positive, weighted by the teacher.

    Candidate j of a group is scored against all passages except the group's candidates before j.

    Args:
        scores: (queries, passages), divided by the temperature.
        teacher: (queries, group_size) probabilities.

    Source:
        The `m3_kd_loss` of FlagEmbedding's command line.
    """
    first = _positives(scores, group_size)
    total = scores.new_zeros(())
    for candidate in range(group_size):
        target = first + candidate
        total = total + (teacher[:, candidate] * F.cross_entropy(scores, target, reduction="none")).mean()
        scores = scores.scatter(1, target[:, None], torch.finfo(scores.dtype).min)
    return total


def group_scores(scores: Tensor, group_size: int) -> Tensor:
    """The scores of each query's own candidates, (queries, group_size)."""
    columns = _positives(scores, group_size)[:, None] + torch.arange(group_size, device=scores.device)
    return scores.gather(1, columns)


def hide(scores: Tensor, false_negatives: Tensor | None) -> Tensor:
    """Scores so low that the masked passages have no share in a softmax and get no gradient.

    Args:
        scores: (queries, passages); `false_negatives`: (queries, passages) bool, or None to hide nothing.
    """
    if false_negatives is None:
        return scores
    # not -inf: a distillation loss multiplies the logarithm of a share with a target of 0
    return scores.masked_fill(false_negatives, torch.finfo(scores.dtype).min)


def adjusted(scores: Tensor, args: LossArguments) -> Tensor:
    """Scores as a softmax takes them: what each passage stands for is added, and false negatives are hidden.

    With log(1 / q) added to a passage that was drawn with probability q, the sum over a sample is, on average, that
    over the whole corpus.

    Args:
        scores: (queries, passages), divided by the temperature.

    Source:
        Adaptive importance sampling (Bengio and Senecal, 2008); the logQ correction of Yi et al. (2019).
    """
    return hide(scores if args.score_offsets is None else scores + args.score_offsets, args.false_negatives)


def combined_scores(query: Embeddings, passage: Embeddings) -> Tensor:
    """The scores of the one head that both sides have, or the ensemble of several: (queries, passages)."""
    scores = head_scores(query, passage)
    return _weighted(scores, ENSEMBLE_WEIGHTS) if len(scores) > 1 else next(iter(scores.values()))


def _positives(scores: Tensor, group_size: int) -> Tensor:
    return torch.arange(scores.shape[0], device=scores.device) * group_size


def ranking_loss(scores: Tensor, teacher: Tensor | None, args: LossArguments, group_size: int) -> Tensor:
    """The loss of one score matrix: contrastive, or distilled from a teacher.

    Args:
        scores: (queries, passages), divided by the temperature.
        teacher: (queries, group_size) probabilities, or None.
    """
    if not args.in_batch_negatives:
        scores = group_scores(scores, group_size)
        return _ranking_loss_in_group(scores, teacher, args)
    if teacher is None:
        return contrastive(scores, group_size)
    if args.kd_loss_type == "m3_kd_loss":
        return distillation_m3(scores, teacher, group_size)
    return distillation_kl(group_scores(scores, group_size), teacher) + contrastive(scores, group_size)


def _ranking_loss_in_group(scores: Tensor, teacher: Tensor | None, args: LossArguments) -> Tensor:
    """The same over each query's own candidates alone: every row's positive is column 0."""
    if teacher is None:
        return contrastive(scores, group_size=0)
    if args.kd_loss_type == "kl_div":
        return distillation_kl(scores, teacher) + contrastive(scores, group_size=0)
    total = scores.new_zeros(())
    for candidate in range(scores.shape[1]):
        remaining = F.log_softmax(scores[:, candidate:], dim=-1)[:, 0]
        total = total - (teacher[:, candidate] * remaining).mean()
    return total


def embedding_loss(
    query: Embeddings, passage: Embeddings, teacher: Tensor | None, step: int, args: LossArguments
) -> Tensor:
    """The loss of a bi-encoder, over whichever of the heads dense, sparse and ColBERT are present.

    One head: its ranking loss (averaged over `mrl_dims` with `use_mrl`). Several heads: each head's loss, that of
    their weighted sum of scores, and, with `use_self_distill`, each head taught by that sum.

    Args:
        teacher: (queries, group) raw scores, or None.
        step: optimizer steps done so far; self-distillation is on while step > self_distill_start_step.

    Raises:
        UsageError: when no head is shared, or the teacher's shape does not fit the batch.

    Source:
        M3-Embedding (Chen et al., 2024), section 3.3; weights as in FlagEmbedding 1.4.2.
    """
    scores = {name: matrix / args.temperature for name, matrix in head_scores(query, passage).items()}
    if not scores:
        raise UsageError(f"queries hold the heads {query.heads} and passages {passage.heads}: none is shared")
    group_size = args.group_size or len(passage) // len(query)
    target = _teacher_probabilities(teacher, len(query), group_size)
    whole, scores = scores, {name: adjusted(matrix, args) for name, matrix in scores.items()}
    losses = {name: ranking_loss(matrix, target, args, group_size) for name, matrix in scores.items()}
    if args.use_mrl and "dense" in losses:
        losses["dense"] = matryoshka(query, passage, target, args, group_size)
    if len(losses) == 1:
        return next(iter(losses.values()))
    ensemble = adjusted(_weighted(whole, ENSEMBLE_WEIGHTS), args)
    parts = _weighted(losses, LOSS_WEIGHTS) + ranking_loss(ensemble, target, args, group_size)
    loss = parts / (len(losses) + 1)
    if args.use_self_distill and step > args.self_distill_start_step:
        loss = (loss + self_distillation(scores, ensemble, args, group_size)) / 2
    return loss


def self_distillation(scores: dict[str, Tensor], ensemble: Tensor, args: LossArguments, group_size: int) -> Tensor:
    """Each head's distance from the ensemble's distribution over the same candidates, averaged over heads."""
    if not args.in_batch_negatives:
        scores = {name: group_scores(matrix, group_size) for name, matrix in scores.items()}
        ensemble = group_scores(ensemble, group_size)
    target = ensemble.detach().softmax(-1)
    distances = {name: distillation_kl(matrix, target) for name, matrix in scores.items()}
    return _weighted(distances, LOSS_WEIGHTS) / len(scores)


def matryoshka(
    query: Embeddings, passage: Embeddings, teacher: Tensor | None, args: LossArguments, group_size: int
) -> Tensor:
    """The dense ranking loss averaged over the first `mrl_dims` dimensions.

    Source:
        Matryoshka Representation Learning (Kusupati et al., 2022).
    """
    losses = []
    for dim in args.mrl_dims:
        short = (_truncate(side.dense, dim, args.normalize_embeddings is not False) for side in (query, passage))
        scores = head_scores(*(Embeddings(dense=dense) for dense in short))["dense"] / args.temperature
        losses.append(ranking_loss(adjusted(scores, args), teacher, args, group_size))
    return torch.stack(losses).mean()


def _truncate(dense: Tensor, dim: int, normalize: bool) -> Tensor:
    return F.normalize(dense[:, :dim], dim=-1) if normalize else dense[:, :dim]


def flops(sparse: Sparse, threshold: int | None = None) -> Tensor:
    """The sum over tokens of their mean weight's square: what comparing texts costs, if weights are evenly spread.

    Args:
        sparse: ids and weights, each (batch, tokens).
        threshold: texts with no more weights than this do not count, but for their share of the mean.

    Source:
        Minimizing FLOPs to Learn Efficient Sparse Representations (Paria et al., 2020); the threshold of Geng et al.
        (2025), https://huggingface.co/papers/2504.14839.
    """
    weights, batch = sparse.weights, sparse.weights.shape[0]
    if threshold is not None:
        weights = weights * ((weights != 0).sum(1, keepdim=True) > threshold)
    there = sparse.ids >= 0
    tokens, column = torch.unique(sparse.ids[there], return_inverse=True)
    sums = weights.new_zeros(tokens.numel()).index_add(0, column, weights[there])
    return (sums / batch).square().sum()


def sparsity(query: Embeddings | None, passage: Embeddings | None, args: LossArguments, share: float = 1.0) -> Tensor:
    """What is added to a loss so that lexical weights get fewer: both sides' FLOPS, each times its weight.

    Args:
        query: (queries) with the sparse head; None: not in training. The same for `passage`.
        share: of the weights, which grow at the beginning of a run (`regularizer_share`).

    Source:
        SPLADE v2 (Formal et al., 2021).
    """
    sides = (
        (query, args.query_regularizer_weight, args.query_regularizer_threshold),
        (passage, args.document_regularizer_weight, args.document_regularizer_threshold),
    )
    terms = [
        weight * share * flops(side.sparse, most)
        for side, weight, most in sides
        if side is not None and side.sparse is not None and weight
    ]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def regularizer_share(step: int, steps: int, args: LossArguments) -> float:
    """The share of the regularizer weights that counts at a step of `steps`: quadratic in the warm-up, then 1."""
    if not args.regularizer_warmup_ratio:
        return 1.0
    warmup = max(1, int(steps * args.regularizer_warmup_ratio))
    return float(min(1.0, (step / warmup) ** 2))


def cross_encoder_loss(scores: Tensor, teacher: Tensor | None, args: LossArguments) -> Tensor:
    """Cross-entropy of the positive within its group, plus that of the teacher's distribution where one is given.

    Args:
        scores: (queries * group_size,) logits, each query's positive first.
        teacher: (queries, group_size) raw scores, or None.
    """
    if args.group_size is None:
        raise UsageError("a cross-encoder's loss needs group_size: the number of passages per query")
    grouped = scores.view(-1, args.group_size)
    target = _teacher_probabilities(teacher, grouped.shape[0], args.group_size)
    return _ranking_loss_in_group(grouped, target, replace(args, kd_loss_type="kl_div"))


def _teacher_probabilities(teacher: Tensor | None, queries: int, group_size: int) -> Tensor | None:
    if teacher is None:
        return None
    if teacher.numel() != queries * group_size:
        raise UsageError(
            f"the teacher gave {teacher.numel()} scores for {queries} queries with {group_size} passages each"
        )
    return teacher.detach().reshape(queries, group_size).softmax(-1)


def _weighted(values: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    terms = [weights[name] * value for name, value in values.items()]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]
