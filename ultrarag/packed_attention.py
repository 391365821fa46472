"""Attention over packed texts: where each lies, and one kernel per device that keeps them apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultrarag.products import rounded
from ultrarag.transfer import to_device

#: Arguments that change what attention computes, in ways that a packed call does not follow.
_NOT_FOLLOWED = ("softcap", "position_bias", "s_aux", "cache", "head_mask", "output_attentions")


@dataclass(frozen=True)
class Layout:
    """Where the texts of a batch lie among its packed tokens: longest text first, then tokens that belong to none."""

    #: (total,) int64: the place in the padded batch, row by row, of each packed token of a text
    index: Tensor
    #: packed tokens behind the texts', by which their number is a round one
    spare: int
    #: (texts, length) of each run of texts of equal length
    runs: tuple[tuple[int, int], ...]
    #: (texts + 1,) int32: where each text begins, and the total
    offsets: Tensor
    #: masks of sliding windows by (length, window, causal), shared by the layers
    bands: dict[tuple[int, int, bool], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, mask: Tensor, device: torch.device, round_number: bool = False) -> Layout:
        """Lay out a mask, (batch, tokens), that lies on the CPU; `round_number`: of tokens, as `products` has them."""
        mask = mask.bool()
        lengths, order = mask.sum(1).sort(descending=True, stable=True)
        row, column = mask[order].nonzero(as_tuple=True)
        index = order[row] * mask.shape[1] + column
        lengths = lengths[lengths > 0]
        offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        values, counts = torch.unique_consecutive(lengths, return_counts=True)
        runs = tuple(zip(counts.tolist(), values.tolist(), strict=True))
        spare = rounded(len(index)) - len(index) if round_number else 0
        return cls(to_device(index, device), spare, runs, to_device(offsets, device))

    def packed(self, values: Tensor) -> Tensor:
        """Those of (batch, tokens) that are packed, (1, total + spare); the spare ones are again the last one's."""
        index = F.pad(self.index[None], (0, self.spare), mode="replicate")[0] if self.spare else self.index
        return values.flatten()[index][None]

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.runs[0][1]

    def band(self, length: int, terms: Terms, device: torch.device) -> Tensor | None:
        """Which keys a query of a text sees, (length, length) bool; None where a window leaves out none."""
        if terms.window is None or length <= terms.window:
            return None
        key = (length, terms.window, terms.causal)
        if key not in self.bands:
            place = torch.arange(length, device=device)
            distance = place[:, None] - place[None, :]
            self.bands[key] = (distance < terms.window) & (distance >= 0 if terms.causal else distance > -terms.window)
        return self.bands[key]


class Terms(NamedTuple):
    """How the queries of one text attend to its keys."""

    dropout: float
    #: factor of query-key products; None for 1 / sqrt(dim)
    scale: float | None
    causal: bool
    #: keys at this distance or farther are not seen; None for no limit
    window: int | None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    ultrarag_layout: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention within each packed text; without a layout, transformers' SDPA.

    Args:
        query: (1, heads, total, dim); key, value: (1, key heads, total, dim).

    Returns:
        (1, total, heads, dim), and no attention weights.

    Raises:
        NotImplementedError: the model wants something of attention that is not followed here.
    """
    if ultrarag_layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa

        return sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, **options)
    for name in _NOT_FOLLOWED:
        if options.get(name) is not None and options[name] is not False:
            raise NotImplementedError(f"its attention uses '{name}'")
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    terms = Terms(dropout, scaling, causal, sliding_window)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return _kernel(query, terms)(query, key, value, ultrarag_layout, terms)[None], None


def _kernel(query: Tensor, terms: Terms) -> Callable[[Tensor, Tensor, Tensor, Layout, Terms], Tensor]:
    """The attention over packed (total, heads, dim) for this device and dtype."""
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        if terms.dropout == 0:
            return _varlen
        if terms.window is None and _nested_works(query.device, query.dtype):
            return _nested  # varlen_attn has no dropout
    return _by_runs


def _by_runs(query: Tensor, key: Tensor, value: Tensor, layout: Layout, terms: Terms) -> Tensor:
    """One unmasked SDPA call, (texts, heads, length, dim), for each run of texts of equal length."""
    key, value = _repeated(query, key, value)
    sizes = [texts * length for texts, length in layout.runs]
    split = [*sizes, layout.spare]  # one split, whose backward is one concatenation
    parts = []
    for run, *tensors in zip(layout.runs, query.split(split), key.split(split), value.split(split), strict=False):
        q, k, v = (tensor.unflatten(0, run).transpose(1, 2) for tensor in tensors)
        mask = layout.band(run[1], terms, query.device)
        causal = terms.causal and mask is None
        out = F.scaled_dot_product_attention(q, k, v, mask, terms.dropout, causal, scale=terms.scale)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat([*parts, query.new_zeros((layout.spare, *parts[0].shape[1:]))])


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, terms: Terms) -> Tensor:
    """One kernel for all texts, bf16 and fp16 on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if terms.window is None else terms.window - 1
    window = (left, 0 if terms.causal else left)
    gqa = query.shape[1] != key.shape[1]
    starts, longest = layout.offsets, layout.longest
    return varlen_attn(  # type: ignore[return-value]
        query, key, value, starts, starts, longest, longest, scale=terms.scale, window_size=window, enable_gqa=gqa
    )


def _nested(query: Tensor, key: Tensor, value: Tensor, layout: Layout, terms: Terms) -> Tensor:
    """SDPA of jagged tensors: the kernel under varlen_attn, with dropout."""
    key, value = _repeated(query, key, value)
    shortest, offsets = layout.runs[-1][1], layout.offsets.long()
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(
            tensor.contiguous(), offsets, min_seqlen=shortest, max_seqlen=layout.longest
        ).transpose(1, 2)
        for tensor in (query, key, value)
    )
    out = F.scaled_dot_product_attention(q, k, v, None, terms.dropout, terms.causal, scale=terms.scale)
    return out.transpose(1, 2).values()


@cache
def _nested_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether jagged SDPA, a beta feature of torch, agrees with plain SDPA here."""
    layout = Layout.of(torch.arange(7)[None] < torch.tensor([7, 4, 4])[:, None], device)
    tensor = torch.linspace(-1, 1, 15 * 2 * 32, device=device, dtype=dtype).view(15, 2, 32)
    terms = Terms(0.0, None, False, None)
    try:
        difference = _nested(tensor, tensor, tensor, layout, terms) - _by_runs(tensor, tensor, tensor, layout, terms)
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return float(difference.abs().max()) <= 0.02


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values once per query head that shares them."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
