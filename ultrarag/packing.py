"""The forward of a stock transformers backbone, on the texts' tokens alone: no padding is computed.

The rows' tokens are concatenated into one row of (1, total) and the backbone runs as it is; only its attention,
registered with transformers under `NAME`, keeps texts apart. How the tokens lie (a `Layout`) travels as a keyword
argument of the model's forward, not in global state: threads may share a model, and gradient checkpointing gets it
again in backward. Calls without a layout get transformers' own SDPA, so a switched backbone serves other callers too.

`ULTRARAG_PACKING=off` switches it off. A backbone is packed only after its packed and padded hidden states agreed.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultrarag.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ultrarag.hookspecs import Features

logger = logging.getLogger("ultrarag")

#: Our attention's name in transformers' AttentionInterface; never written to a saved config.
NAME = "ultrarag_packed"
#: What a backbone is given; everything else in the features is for the heads.
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
#: Padding below this share of the batch is computed: packing costs about as much as it saves.
MIN_PADDING = 0.02
#: Arguments that change what attention computes, in ways that a packed call does not follow.
_NOT_FOLLOWED = ("softcap", "position_bias", "s_aux", "cache", "head_mask", "output_attentions")

_lock = threading.RLock()
#: which compute dtypes of a backbone passed (True) or failed (False) the comparison with its padded forward
_verdicts: WeakKeyDictionary[nn.Module, dict[torch.dtype, bool]] = WeakKeyDictionary()
_logged: set[tuple[str, str]] = set()


def hidden_states(backbone: nn.Module, features: Features, packing: bool | None = None) -> Tensor:
    """Return the last hidden states, (batch, tokens, hidden).

    Values at padding are zero when the batch was packed, and meaningless when it was not: mask them. Positions
    count from a row's first real token, whatever the padding side.

    Args:
        packing: False computes the padding too; default: the environment variable ULTRARAG_PACKING (on or off).
            Either way, a backbone or batch that packing does not suit runs padded.
    """
    inputs = {name: features[name] for name in _INPUTS if name in features}  # type: ignore[literal-required]
    stock = _stock(backbone)
    if stock is None:
        return cast(Tensor, backbone(**inputs, return_dict=True).last_hidden_state)
    mask = inputs["attention_mask"].cpu()
    if _switched_on(packing) and _padding(mask) >= MIN_PADDING and _verified(backbone, stock, inputs):
        return _packed(backbone, stock, inputs, Layout.of(mask, inputs["input_ids"].device))
    return _padded(backbone, stock, inputs, mask)


@dataclass(frozen=True)
class Layout:
    """Where the texts of a batch lie among its packed tokens: longest text first."""

    #: (total,) int64: the place in the padded batch, row by row, of each packed token
    index: Tensor
    #: (texts, length) of each run of texts of equal length
    runs: tuple[tuple[int, int], ...]
    #: (texts + 1,) int32: where each text begins, and the total
    offsets: Tensor
    #: masks of sliding windows by (length, window, causal), shared by the layers
    bands: dict[tuple[int, int, bool], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, mask: Tensor, device: torch.device) -> Layout:
        """Lay out a mask, (batch, tokens), that lies on the CPU."""
        mask = mask.bool()
        lengths, order = mask.sum(1).sort(descending=True, stable=True)
        row, column = mask[order].nonzero(as_tuple=True)
        index = order[row] * mask.shape[1] + column
        lengths = lengths[lengths > 0]
        offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        values, counts = torch.unique_consecutive(lengths, return_counts=True)
        runs = tuple(zip(counts.tolist(), values.tolist(), strict=True))
        return cls(index.to(device, non_blocking=True), runs, offsets.to(device, non_blocking=True))

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.runs[0][1]

    def band(self, length: int, window: int, causal: bool, device: torch.device) -> Tensor:
        """Return which keys a query sees in a sliding window, (length, length) bool."""
        key = (length, window, causal)
        if key not in self.bands:
            place = torch.arange(length, device=device)
            distance = place[:, None] - place[None, :]
            self.bands[key] = (distance < window) & (distance >= 0 if causal else distance > -window)
        return self.bands[key]


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
    """
    if ultrarag_layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return cast(
            tuple[Tensor, None],
            sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **options),
        )
    for name in _NOT_FOLLOWED:
        if options.get(name) is not None and options[name] is not False:
            raise NotImplementedError(f"its attention uses '{name}'")
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    attend = _kernel(query, dropout, sliding_window)
    return attend(query, key, value, ultrarag_layout, dropout, scaling, causal, sliding_window)[None], None


def _kernel(query: Tensor, dropout: float, window: int | None) -> Any:
    """The attention over packed (total, heads, dim) that this device and dtype are fastest with."""
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        if dropout == 0:
            return _varlen
        if window is None:  # varlen_attn has no dropout
            return _nested
    return _by_runs


def _by_runs(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout,
    dropout: float, scale: float | None, causal: bool, window: int | None,
) -> Tensor:  # fmt: skip
    """One unmasked SDPA call, (texts, heads, length, dim), for each run of texts of equal length."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    sizes = [texts * length for texts, length in layout.runs]  # one split, whose backward is one concatenation
    parts = []
    for run, *tensors in zip(layout.runs, query.split(sizes), key.split(sizes), value.split(sizes), strict=True):
        q, k, v = (tensor.unflatten(0, run).transpose(1, 2) for tensor in tensors)
        length = run[1]
        banded = window is not None and length > window
        mask = layout.band(length, cast(int, window), causal, q.device) if banded else None
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal and mask is None, scale=scale)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout,
    dropout: float, scale: float | None, causal: bool, window: int | None,
) -> Tensor:  # fmt: skip
    from torch.nn.attention.varlen import varlen_attn

    left = window - 1 if window is not None else -1
    right = 0 if causal else left
    starts, longest = layout.offsets, layout.longest
    gqa = query.shape[1] != key.shape[1]
    return cast(
        Tensor,
        varlen_attn(
            query, key, value, starts, starts, longest, longest, scale=scale, window_size=(left, right), enable_gqa=gqa
        ),
    )


def _nested(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout,
    dropout: float, scale: float | None, causal: bool, window: int | None,
) -> Tensor:  # fmt: skip
    """SDPA of jagged tensors, which dispatches to the same kernel as varlen_attn, and has dropout."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    shortest, longest = layout.runs[-1][1], layout.longest
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(
            tensor.contiguous(), layout.offsets.long(), min_seqlen=shortest, max_seqlen=longest
        ).transpose(1, 2)
        for tensor in (query, key, value)
    )
    out = F.scaled_dot_product_attention(q, k, v, None, dropout, causal, scale=scale)
    return cast(Tensor, out.transpose(1, 2).values())


def _packed(backbone: nn.Module, stock: PreTrainedModel, inputs: dict[str, Tensor], layout: Layout) -> Tensor:
    ids = inputs["input_ids"]
    gathered = {
        name: inputs[name].flatten()[layout.index][None] for name in ("input_ids", "token_type_ids") if name in inputs
    }
    positions = _positions(stock, ids, inputs["attention_mask"], inputs.get("position_ids"))
    # A mask of four dimensions is handed on as it is, so that none is made; a packed call does not look at it.
    no_mask = ids.new_ones((1, 1, 1, 1), dtype=torch.bool)
    hidden = backbone(
        **gathered,
        position_ids=positions.flatten()[layout.index][None],
        attention_mask=no_mask,
        ultrarag_layout=layout,
        **_forward_options(stock),
    ).last_hidden_state[0]
    padded = hidden.new_zeros((ids.numel(), hidden.shape[1])).index_copy(0, layout.index, hidden)
    return padded.view(*ids.shape, -1)


def _padded(backbone: nn.Module, stock: PreTrainedModel, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
    if "position_ids" in _parameters(type(stock)) and not mask[:, 0].all():
        positions = _positions(stock, inputs["input_ids"], inputs["attention_mask"], inputs.get("position_ids"))
        inputs = {**inputs, "position_ids": positions}
    return cast(Tensor, backbone(**inputs, **_forward_options(stock)).last_hidden_state)


def _positions(stock: PreTrainedModel, ids: Tensor, mask: Tensor, given: Tensor | None) -> Tensor:
    """Position ids, (batch, tokens): those given, or RoBERTa's own, or the count from a row's first token."""
    if given is not None:
        return given.expand_as(ids)
    embeddings = getattr(stock, "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_input_ids"):
        return cast(Tensor, embeddings.create_position_ids_from_input_ids(ids, embeddings.padding_idx))
    first = mask.to(torch.int8).argmax(dim=1, keepdim=True)
    return (torch.arange(ids.shape[1], device=ids.device) - first).clamp(min=0)


def _forward_options(stock: PreTrainedModel) -> dict[str, Any]:
    """No key-value cache, which a decoder would fill for nothing."""
    return {"return_dict": True, **({"use_cache": False} if "use_cache" in _parameters(type(stock)) else {})}


@lru_cache
def _parameters(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]


def _stock(backbone: nn.Module) -> PreTrainedModel | None:
    """The transformers model that the backbone is, or that a wrapper (PEFT, FSDP) holds.

    A decoder whose configuration says `is_causal: false` is made so: its attention modules still say that they are
    causal, and SDPA believes them wherever a batch has no padding.
    """
    from transformers import PreTrainedModel

    stock = next((module for module in backbone.modules() if isinstance(module, PreTrainedModel)), None)
    if stock is not None and getattr(stock.config, "is_causal", None) is False:
        for module in stock.modules():
            if getattr(module, "is_causal", False) is True:
                module.is_causal = False  # type: ignore[assignment]
    return stock


def _switched_on(packing: bool | None) -> bool:
    if packing is not None:
        return packing
    value = os.environ.get("ULTRARAG_PACKING", "on").lower()
    if value not in ("on", "off"):
        raise UsageError(f"the environment variable ULTRARAG_PACKING is '{value}'; it is on (default) or off")
    return value == "on"


def _padding(mask: Tensor) -> float:
    return 1 - float(mask.sum()) / mask.numel()


def _verified(backbone: nn.Module, stock: PreTrainedModel, inputs: dict[str, Tensor]) -> bool:
    """Whether packing gives this backbone's hidden states: compared at first use, and again under autocast."""
    device = inputs["input_ids"].device.type
    with _lock:
        verdicts = _verdicts.setdefault(backbone, {})
        if stock.dtype not in verdicts:
            verdicts[stock.dtype] = _install(backbone, stock) and _agrees(backbone, stock, inputs, None)
        if torch.is_autocast_enabled(device) and verdicts[stock.dtype]:
            dtype = torch.get_autocast_dtype(device)
            if dtype not in verdicts:
                verdicts[dtype] = _agrees(backbone, stock, inputs, dtype)
        return all(verdicts.values()) and stock.config._attn_implementation == NAME


def _install(backbone: nn.Module, stock: PreTrainedModel) -> bool:
    """Point the backbone at our attention; False where it could not work."""
    reason = _unsuitable(backbone, stock)
    if reason:
        _log_fallback(stock, reason)
        return False
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    stock.config._attn_implementation = NAME
    return True


def _unsuitable(backbone: nn.Module, stock: PreTrainedModel) -> str | None:
    if hasattr(backbone, "_orig_mod") or torch.compiler.is_compiling():
        return "it is compiled"
    if stock.config._attn_implementation not in ("sdpa", NAME):
        return f"its attention is '{stock.config._attn_implementation}', not 'sdpa'"
    if not getattr(stock, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    if "position_ids" not in _parameters(type(stock)):
        return "it takes no position_ids"
    kinds = set(getattr(stock.config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    return f"it has layers of kind '{min(kinds)}'" if kinds else None


def _agrees(
    backbone: nn.Module, stock: PreTrainedModel, inputs: dict[str, Tensor], autocast: torch.dtype | None
) -> bool:
    """Compare packed with padded hidden states of a few rows; go back to SDPA where they differ."""
    training = [module for module in backbone.modules() if module.training]
    try:
        backbone.eval()
        difference = _difference(backbone, stock, _probe(stock, inputs), autocast)
        allowed = _tolerance(autocast or stock.dtype, inputs["input_ids"].device)
        reason = "" if difference <= allowed else f"its hidden states differ by {difference:.1e}"
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error) or type(error).__name__
    finally:
        for module in training:
            module.training = True
    if reason:
        stock.config._attn_implementation = "sdpa"
        _log_fallback(stock, reason)
    return not reason


def _difference(
    backbone: nn.Module, stock: PreTrainedModel, probe: dict[str, Tensor], autocast: torch.dtype | None
) -> float:
    """The largest difference at real tokens, absolute for small values and relative for large ones.

    Autocast must not cache: weights cast here, without gradient, would serve the training step around this call.
    """
    mask, device = probe["attention_mask"].cpu(), probe["input_ids"].device
    with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None, cache_enabled=False):
        expected = _padded(backbone, stock, probe, mask).double()
        found = _packed(backbone, stock, probe, Layout.of(mask, device)).double()
    return float(((found - expected).abs() / (1 + expected.abs()))[probe["attention_mask"].bool()].max())


def _tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """1e-4, or the rounding of the format that matrices are multiplied in (TensorFloat-32 has 10 bits)."""
    rounding = 2**-10 if device.type == "cuda" and dtype is torch.float32 else torch.finfo(dtype).eps
    return max(1e-4, 16 * rounding)


def _probe(stock: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Four rows, right-padded, out of the batch's own tokens; one is longer than a sliding window."""
    window = getattr(stock.config, "sliding_window", None) or 0
    positions = getattr(stock.config, "max_position_embeddings", None) or 512
    lengths = [min(2 * int(window) + 9, positions - 8) if window else 9, 6, 6, 3]
    real = inputs["attention_mask"].bool()
    mask = torch.arange(lengths[0])[None] < torch.tensor(lengths)[:, None]
    mask = mask.to(real.device)
    probe = {"attention_mask": mask.long()}
    for name in ("input_ids", "token_type_ids"):
        if name in inputs:
            tokens = inputs[name][real]
            tokens = tokens.repeat(-(-mask.numel() // len(tokens)))[: mask.numel()]
            pad = getattr(stock.config, "pad_token_id", None) or 0 if name == "input_ids" else 0
            probe[name] = tokens.view(mask.shape).masked_fill(~mask, pad)
    return probe


def _log_fallback(stock: PreTrainedModel, reason: str) -> None:
    kind = type(stock).__name__
    if (kind, reason) not in _logged:
        _logged.add((kind, reason))
        logger.warning("%s runs padded, which is slower: packing does not suit it (%s)", kind, reason)
