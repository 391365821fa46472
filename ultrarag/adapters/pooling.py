"""Pooling: one vector out of a text's hidden states, for right and left padding alike."""

from __future__ import annotations

import torch
from torch import Tensor

from ultrarag.errors import UsageError, did_you_mean


def first_token(mask: Tensor) -> Tensor:
    """The position of each row's first real token, (batch,), from a mask (batch, tokens)."""
    return mask.to(torch.int8).argmax(dim=1)


def last_token(mask: Tensor) -> Tensor:
    """The position of each row's last real token, (batch,), from a mask (batch, tokens)."""
    return mask.shape[1] - 1 - mask.flip(1).to(torch.int8).argmax(dim=1)


def _cls(hidden: Tensor, mask: Tensor) -> Tensor:
    return _at(hidden, first_token(mask))


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return _at(hidden, last_token(mask))


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(hidden.dtype)
    return _weighted(hidden, weights)


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Token i of n weighs i (1-based): sum(i h_i) / sum(i), as in MiniCPM-Embedding and SGPT."""
    weights = (mask.cumsum(dim=1) * mask).to(hidden.dtype)
    return _weighted(hidden, weights)


def _at(hidden: Tensor, position: Tensor) -> Tensor:
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), position]


def _weighted(hidden: Tensor, weights: Tensor) -> Tensor:
    total = torch.einsum("btd,bt->bd", hidden, weights)
    return total / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)


_POOLING = {"cls": _cls, "mean": _mean, "last_token": _last, "weighted_mean": _weighted_mean}
#: The names that --sentence_pooling_method takes.
METHODS = tuple(_POOLING)


def pool(hidden: Tensor, mask: Tensor, method: str) -> Tensor:
    """Return one vector per text.

    Args:
        hidden: (batch, tokens, dim).
        mask: (batch, tokens), 1 for text; every row has at least one token.
        method: cls, mean, last_token or weighted_mean.

    Returns:
        (batch, dim).
    """
    if method not in _POOLING:
        raise UsageError(
            f"pooling '{method}' is unknown{did_you_mean(method, METHODS)} it is one of {', '.join(METHODS)}"
        )
    return _POOLING[method](hidden, mask)
