"""GradCache: the loss and gradients of a big batch in the memory of a small one.

Source:
    Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (Gao et al., 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ultrarag.hookspecs import Features
from ultrarag.transfer import on_host, remember_host
from ultrarag.types import Embeddings

#: Encodes a list of feature batches, each into Embeddings, in one call of the wrapped module.
Encode = Callable[[Sequence[Features]], list[Embeddings]]
#: Differentiates a chunk's scalar; the second argument says whether it is the last one of the step.
Push = Callable[[Tensor, bool], None]


@dataclass
class _Chunk:
    """Some rows of one side of the batch, and the random state with which they were encoded."""

    side: int
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
    chunk_texts: int,
    no_sync: Callable[[], AbstractContextManager[Any]],
    push: Push | None = None,
    rounds: Callable[[int], int] | None = None,
) -> Tensor:
    """Accumulate the gradients of `loss(encode(sides))`, encoding `chunk_texts` texts at a time.

    Three passes: encode without graph; the loss and its gradient with respect to the embeddings; encode again,
    with graph, and push that gradient through. The result is that of the plain step.

    Args:
        sides: the batch's features, such as [queries, passages].
        loss: the scalar loss of the sides' Embeddings.
        backward: how a loss is differentiated (scaled for mixed precision, say).
        no_sync: context in which gradients are not yet exchanged between ranks.
        push: how the scalar of one chunk is differentiated, and whether it is the last one; default: by autograd.
        rounds: given this rank's number of chunks, the number of all ranks that must encode equally often, as where
            weights are gathered in each forward; a rank with fewer encodes one again and adds nothing.

    Returns:
        The loss, detached.
    """
    own = sum(-(-side["input_ids"].shape[0] // chunk_texts) for side in sides)
    idle = rounds(own) - own if rounds else 0  # asked before the first forward, in which ranks may meet as well
    chunks, embeddings = _encode_without_graph(sides, encode, chunk_texts)
    _encode_idly(encode, chunks[-1], idle)
    leaves = [_leaf(side) for side in embeddings]
    value = loss(leaves)
    backward(value)
    done = _RandomState(chunks[0].features["input_ids"].device)
    push = push or _by_autograd
    for _ in range(idle):
        with no_sync():
            push(_nothing(encode([chunks[-1].features])[0]), False)
    starts = [0] * len(sides)
    for number, chunk in enumerate(chunks):
        rows = slice(starts[chunk.side], starts[chunk.side] + chunk.features["input_ids"].shape[0])
        starts[chunk.side] = rows.stop
        chunk.state.restore()
        if number + 1 < len(chunks):
            with no_sync():
                _push(encode([chunk.features])[0], leaves[chunk.side], rows, push, last=False)
        else:
            _push(encode([chunk.features])[0], leaves[chunk.side], rows, push, last=True)
    done.restore()
    return value.detach()


def _encode_without_graph(
    sides: Sequence[Features], encode: Encode, chunk_texts: int
) -> tuple[list[_Chunk], list[Embeddings]]:
    chunks, embeddings = [], []
    for number, side in enumerate(sides):
        parts = []
        for features in split(side, chunk_texts):
            chunks.append(_Chunk(number, features, _RandomState(features["input_ids"].device)))
            with torch.no_grad():
                parts.append(encode([features])[0])
        embeddings.append(Embeddings.cat(parts))
    return chunks, embeddings


def _encode_idly(encode: Encode, chunk: _Chunk, times: int) -> None:
    """Encode without use, and without drawing random numbers."""
    state = _RandomState(chunk.features["input_ids"].device)
    for _ in range(times):
        with torch.no_grad():
            encode([chunk.features])
    state.restore()


def split(features: Features, size: int) -> list[Features]:
    """Cut a batch into batches of at most `size` texts, each no wider than its longest text."""
    mask = on_host(features["attention_mask"])
    return [_trimmed(features, mask, slice(start, start + size)) for start in range(0, len(mask), size)]


def _trimmed(features: Features, mask: Tensor, rows: slice) -> Features:
    used = mask[rows].any(0).nonzero()
    columns = slice(int(used.min()), int(used.max()) + 1)
    found = {name: value[rows, columns] if isinstance(value, Tensor) else value for name, value in features.items()}
    remember_host(cast(Tensor, found["attention_mask"]), mask[rows, columns])
    return cast(Features, found)


def _leaf(embeddings: Embeddings) -> Embeddings:
    return embeddings.map(
        lambda tensor: tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor.detach()
    )


def _push(chunk: Embeddings, leaves: Embeddings, rows: slice, push: Push, last: bool) -> None:
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
