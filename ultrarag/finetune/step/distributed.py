"""Sharing Embeddings between ranks, with gradient, so that every rank's passages are everybody's negatives."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultrarag.types import Embeddings, Sparse, pad_tokens


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(embeddings: Embeddings) -> Embeddings:
    """Return all ranks' rows, this rank's first, then the others' in order of rank.

    Token dimensions are padded to the longest of any rank; ranks may hold different numbers of rows. Backward
    adds up what every rank's loss says about this rank's rows: with DDP's averaging of the per-rank gradients,
    that is exactly the gradient of the mean of the per-rank losses.
    """
    if world_size() == 1:
        return embeddings
    shapes = _all_shapes(embeddings)
    rows = [shape[0] for shape in shapes]
    tokens = {name: max(shape[1 + i] for shape in shapes) for i, name in enumerate(("sparse", "colbert"))}
    widened = _widened(embeddings, tokens)
    everyone = iter(_all_own_first(list(widened.arrays()), rows))
    return widened.map(lambda array: next(everyone))


def gather_rows(tensor: Tensor) -> Tensor:
    """Return all ranks' rows of a tensor in the order of `gather`; the other dimensions are the same on all."""
    if world_size() == 1:
        return tensor
    mine = torch.tensor([tensor.shape[0]], device=tensor.device)
    counts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(counts, mine)
    return _own_first(tensor, [int(count) for count in counts])


def mean_weight(queries: int, device: torch.device) -> float:
    """What this rank's mean loss counts for, so that the ranks' average is the mean over all queries.

    1 where every rank has the same number of queries, which is every batch but an uneven last one.
    """
    if world_size() == 1:
        return 1.0
    count = torch.tensor([queries], dtype=torch.float64, device=device)
    dist.all_reduce(count)
    return queries * world_size() / count.item()


def most(number: int) -> int:
    """The largest of the ranks' numbers."""
    return _agreed(number, dist.ReduceOp.MAX)


def least(number: int) -> int:
    """The smallest of the ranks' numbers."""
    return _agreed(number, dist.ReduceOp.MIN)


def _agreed(number: int, operation: Any) -> int:
    if world_size() == 1:
        return number
    found = torch.tensor([number], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(found, op=operation)
    return int(found)


def _all_shapes(embeddings: Embeddings) -> list[list[int]]:
    """(rows, sparse tokens, ColBERT tokens) of every rank."""
    first = next(embeddings.arrays())
    sparse = 0 if embeddings.sparse is None else embeddings.sparse.ids.shape[1]
    colbert = 0 if embeddings.colbert is None else embeddings.colbert.shape[1]
    mine = torch.tensor([len(embeddings), sparse, colbert], device=first.device)
    shapes = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(shapes, mine)
    return [shape.tolist() for shape in shapes]


def _widened(embeddings: Embeddings, tokens: dict[str, int]) -> Embeddings:
    sparse = embeddings.sparse
    if sparse is not None:
        sparse = Sparse(
            pad_tokens(sparse.ids, tokens["sparse"], Sparse.PAD_ID), pad_tokens(sparse.weights, tokens["sparse"], 0)
        )
    colbert, mask = embeddings.colbert, embeddings.mask
    if colbert is not None:
        colbert, mask = pad_tokens(colbert, tokens["colbert"], 0), pad_tokens(mask, tokens["colbert"], 0)
    return Embeddings(embeddings.dense, sparse, colbert, mask, embeddings.scores)


def _all_own_first(arrays: list[Tensor], rows: list[int]) -> list[Tensor]:
    """`_own_first` of each array, those of one dtype in one exchange: few large messages instead of many small ones."""
    found: list[Tensor | None] = [None] * len(arrays)
    for dtype in dict.fromkeys(array.dtype for array in arrays):
        places = [place for place, array in enumerate(arrays) if array.dtype == dtype]
        flat = [arrays[place].flatten(1) if arrays[place].ndim > 1 else arrays[place][:, None] for place in places]
        parts = _own_first(torch.cat(flat, dim=1), rows).split([part.shape[1] for part in flat], dim=1)
        for place, part in zip(places, parts, strict=True):
            found[place] = part.reshape(part.shape[0], *arrays[place].shape[1:])
    return [array for array in found if array is not None]


def _own_first(array: Tensor, rows: list[int]) -> Tensor:
    longest = max(rows)
    if array.shape[0] < longest:
        array = torch.cat([array, array.new_zeros(longest - array.shape[0], *array.shape[1:])])
    everyone: Tensor = _AllGather.apply(array.contiguous())  # (ranks, longest, ...)
    order = [rank(), *(other for other in range(world_size()) if other != rank())]
    return torch.cat([everyone[number, : rows[number]] for number in order])


class _AllGather(torch.autograd.Function):
    """All ranks' tensors, stacked; backward gives each rank the sum of all ranks' gradients for its own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        if dist.get_backend() == "nccl":
            own = torch.empty_like(total[0])
            dist.reduce_scatter_tensor(own, total)
            return own
        dist.all_reduce(total)
        return total[rank()]
