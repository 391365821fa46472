"""GradCache: the loss and gradients of a big batch in the memory of a small one.

Source:
    Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (Gao et al., 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ultrarag.hookspecs import Features
from ultrarag.transfer import on_host, remember_host
from ultrarag.types import Embeddings

#: Encodes a list of feature batches, each into Embeddings, in one call of the wrapped module.
Encode = Callable[[Sequence[Features]], list[Embeddings]]
#: Rows of a side, and their features, no wider than the longest of their texts.
Part = tuple["slice | Tensor", Features]
#: Cuts a side of a batch into chunks, each row in one of them.
Cut = Callable[[Features], list[Part]]
#: Differentiates a chunk's scalar; the second argument says whether it is the last one of the step.
Push = Callable[[Tensor, bool], None]


@dataclass
class _Chunk:
    """Some rows of one side of the batch, and the random state with which they were encoded."""

    side: int
    rows: slice | Tensor
    features: Features
    state: _RandomState


class _RandomState:
    """The random generators' state, so that a chunk's dropout is the same when it is encoded again."""

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(item) for item in self.devices]

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in zip(self.devices, self.cuda, strict=True):
            torch.cuda.set_rng_state(state, device)


def cached_step(
    sides: Sequence[Features],
    encode: Encode,
    loss: Callable[[list[Embeddings]], Tensor],
    backward: Callable[[Tensor], None],
    cut: Cut,
    no_sync: Callable[[], AbstractContextManager[Any]],
    push: Push | None = None,
    rounds: Callable[[int], int] | None = None,
) -> Tensor:
    """Accumulate the gradients of `loss(encode(sides))`, encoding a chunk of the texts at a time.

    Three passes: encode without graph; the loss and its gradient with respect to the embeddings; encode again,
    with graph, and push that gradient through. The result is that of the plain step.

    Args:
        sides: the batch's features, such as [queries, passages].
        loss: the scalar loss of the sides' Embeddings.
        backward: how a loss is differentiated (scaled for mixed precision, say).
        cut: how a side is cut into chunks: `by_texts` or `by_tokens`.
        no_sync: context in which gradients are not yet exchanged between ranks.
        push: how the scalar of one chunk is differentiated, and whether it is the last one; default: by autograd.
        rounds: given this rank's number of chunks, the number of all ranks that must encode equally often, as where
            weights are gathered in each forward; a rank with fewer encodes one again and adds nothing.

    Returns:
        The loss, detached.
    """
    cuts = [cut(side) for side in sides]
    own = sum(map(len, cuts))
    idle = rounds(own) - own if rounds else 0  # asked before the first forward, in which ranks may meet as well
    chunks, embeddings = _encode_without_graph(cuts, encode)
    _encode_idly(encode, chunks[-1], idle)
    leaves = [_leaf(side) for side in embeddings]
    value = loss(leaves)
    backward(value)
    done = _RandomState(chunks[0].features["input_ids"].device)
    push = push or _by_autograd
    for _ in range(idle):
        with no_sync():
            push(_nothing(encode([chunks[-1].features])[0]), False)
    for number, chunk in enumerate(chunks):
        chunk.state.restore()
        last = number + 1 == len(chunks)
        with nullcontext() if last else no_sync():
            _push(encode([chunk.features])[0], leaves[chunk.side], chunk.rows, push, last)
    done.restore()
    return value.detach()


def _encode_without_graph(cuts: Sequence[list[Part]], encode: Encode) -> tuple[list[_Chunk], list[Embeddings]]:
    chunks, embeddings = [], []
    for number, cut in enumerate(cuts):
        parts = []
        for rows, features in cut:
            chunks.append(_Chunk(number, rows, features, _RandomState(features["input_ids"].device)))
            with torch.no_grad():
                parts.append(encode([features])[0])
        embeddings.append(_in_order(Embeddings.cat(parts), [rows for rows, _ in cut]))
    return chunks, embeddings


def _in_order(embeddings: Embeddings, rows: Sequence[slice | Tensor]) -> Embeddings:
    """The embeddings of chunks, one after another, in the order of their rows in the batch."""
    if isinstance(rows[0], slice):
        return embeddings
    return embeddings[torch.cat([part for part in rows if isinstance(part, Tensor)]).argsort()]


def _encode_idly(encode: Encode, chunk: _Chunk, times: int) -> None:
    """Encode without use, and without drawing random numbers."""
    state = _RandomState(chunk.features["input_ids"].device)
    for _ in range(times):
        with torch.no_grad():
            encode([chunk.features])
    state.restore()


def by_texts(size: int) -> Cut:
    """At most `size` neighbouring texts at a time: as the batch has them."""

    def cut(features: Features) -> list[Part]:
        mask = on_host(features["attention_mask"])
        return [_part(features, mask, slice(start, start + size)) for start in range(0, len(mask), size)]

    return cut


def by_tokens(size: int) -> Cut:
    """Texts of similar length at a time, as many as have `size` tokens with their padding, and at least one."""

    def cut(features: Features) -> list[Part]:
        mask = on_host(features["attention_mask"])
        lengths = mask.sum(1)
        order = lengths.argsort(descending=True, stable=True)
        found, start = [], 0
        while start < len(order):
            texts = max(1, size // max(1, int(lengths[order[start]])))
            found.append(_part(features, mask, order[start : start + texts].sort().values))
            start += texts
        return found

    return cut


def _part(features: Features, mask: Tensor, rows: slice | Tensor) -> Part:
    used = mask[rows].any(0).nonzero()
    columns = slice(int(used.min()), int(used.max()) + 1)
    found = {name: value[rows, columns] if isinstance(value, Tensor) else value for name, value in features.items()}
    remember_host(cast(Tensor, found["attention_mask"]), mask[rows, columns])
    return rows, cast(Features, found)


def _leaf(embeddings: Embeddings) -> Embeddings:
    return embeddings.map(
        lambda tensor: tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor.detach()
    )


def _push(chunk: Embeddings, leaves: Embeddings, rows: slice | Tensor, push: Push, last: bool) -> None:
    """Backpropagate the cached gradient of these rows through the chunk's graph."""
    total = None
    for tensor, leaf in zip(chunk.arrays(), leaves.arrays(), strict=True):
        if not tensor.requires_grad or leaf.grad is None:
            continue
        gradient = leaf.grad[rows]
        if tensor.ndim > 1:
            gradient = gradient[:, : tensor.shape[1]]
        part = (tensor * gradient).sum()
        total = part if total is None else total + part
    if total is not None:
        push(total, last)


def _nothing(chunk: Embeddings) -> Tensor:
    """A scalar that depends on a chunk, with a gradient of zero."""
    return sum((tensor * 0).sum() for tensor in chunk.arrays() if tensor.requires_grad)


def _by_autograd(total: Tensor, last: bool) -> None:
    total.backward()
