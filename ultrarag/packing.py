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
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from ultrarag.errors import UsageError
from ultrarag.packed_attention import Layout, packed_attention
from ultrarag.products import by_onednn
from ultrarag.transfer import on_host

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ultrarag.hookspecs import Features

logger = logging.getLogger("ultrarag")

#: Our attention's name in transformers' AttentionInterface; never written to a saved config.
NAME = "ultrarag_packed"
#: Attribute of a module that stands for another (ultrarag.encoder.device), whose verdict is its own
ORIGINAL = "_ultrarag_original"
#: What a backbone is given; everything else in the features is for the heads.
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
#: Padding below this share of the batch is computed: packing costs about as much as it saves.
MIN_PADDING = 0.02
_lock = threading.RLock()
#: which compute dtypes of a backbone passed (True) or failed (False) the comparison with its padded forward
_verdicts: WeakKeyDictionary[nn.Module, dict[torch.dtype, bool]] = WeakKeyDictionary()
_logged: set[tuple[str, str]] = set()
#: models whose attention modules say what their configuration says of causality
_settled: WeakSet[nn.Module] = WeakSet()


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
    if stock is None or torch.compiler.is_compiling():
        return cast(Tensor, backbone(**inputs, return_dict=True).last_hidden_state)
    mask = on_host(inputs["attention_mask"])
    if getattr(backbone, "_compiled_call_impl", None) is not None:  # each layout would be compiled anew
        return _padded(backbone, stock, inputs, mask)
    # Compared before looking at the padding, which differs between ranks: a sharded model's forward is collective.
    if _switched_on(packing) and _verified(backbone, stock, inputs) and _padding(mask) >= MIN_PADDING:
        return _packed(backbone, stock, inputs, _layout(mask, stock.dtype, inputs["input_ids"].device))
    return _padded(backbone, stock, inputs, mask)


def _layout(mask: Tensor, dtype: torch.dtype, device: torch.device) -> Layout:
    """With a round number of tokens where oneDNN multiplies: in half precision on a CPU, in float32 on some."""
    half = dtype is not torch.float32 or torch.is_autocast_enabled("cpu")
    return Layout.of(mask, device, device.type == "cpu" and (half or by_onednn()))


def _packed(backbone: nn.Module, stock: PreTrainedModel, inputs: dict[str, Tensor], layout: Layout) -> Tensor:
    ids = inputs["input_ids"]
    gathered = {name: layout.packed(inputs[name]) for name in ("input_ids", "token_type_ids") if name in inputs}
    positions = _positions(stock, ids, inputs["attention_mask"], inputs.get("position_ids"))
    # A mask of four dimensions is handed on as it is, so that none is made; a packed call does not look at it.
    no_mask = ids.new_ones((1, 1, 1, 1), dtype=torch.bool)
    hidden = backbone(
        **gathered,
        position_ids=layout.packed(positions),
        attention_mask=no_mask,
        ultrarag_layout=layout,
        **_forward_options(stock),
    ).last_hidden_state[0, : len(layout.index)]
    padded = hidden.new_zeros((ids.numel(), hidden.shape[1])).index_copy(0, layout.index, hidden)
    return padded.view(*ids.shape, -1)


def _padded(backbone: nn.Module, stock: PreTrainedModel, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
    if "position_ids" in _parameters(type(stock).forward) and not mask[:, 0].all():
        positions = _positions(stock, inputs["input_ids"], inputs["attention_mask"], inputs.get("position_ids"))
        inputs = {**inputs, "position_ids": positions}
    return cast(Tensor, backbone(**inputs, **_forward_options(stock)).last_hidden_state)


def _positions(stock: PreTrainedModel, ids: Tensor, mask: Tensor, given: Tensor | None) -> Tensor:
    """Position ids, (batch, tokens): those given, or RoBERTa's own, or the count from a row's first token."""
    if given is not None:
        return given.expand_as(ids)
    embeddings: Any = getattr(stock, "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_input_ids"):
        return cast(Tensor, embeddings.create_position_ids_from_input_ids(ids, embeddings.padding_idx))
    first = mask.to(torch.int8).argmax(dim=1, keepdim=True)
    return (torch.arange(ids.shape[1], device=ids.device) - first).clamp(min=0)


def _forward_options(stock: PreTrainedModel) -> dict[str, Any]:
    """No key-value cache, which a decoder would fill for nothing."""
    return {"return_dict": True, **({"use_cache": False} if "use_cache" in _parameters(type(stock).forward) else {})}


@cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _stock(backbone: nn.Module) -> PreTrainedModel | None:
    """The transformers model that the backbone is, or that a wrapper (PEFT, FSDP) holds.

    A decoder whose configuration says `is_causal: false` is made so: its attention modules still say that they are
    causal, and SDPA believes them wherever a batch has no padding.
    """
    from transformers import PreTrainedModel

    _register()
    stock = next((module for module in backbone.modules() if isinstance(module, PreTrainedModel)), None)
    if stock is not None and stock not in _settled:
        if getattr(stock.config, "is_causal", None) is False:
            for module in stock.modules():
                if getattr(module, "is_causal", False) is True:
                    module.is_causal = False  # type: ignore[assignment]
        _settled.add(stock)
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
    backbone, stock = (module.__dict__.get(ORIGINAL, module) for module in (backbone, stock))
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
    stock.config._attn_implementation = NAME
    return True


@cache
def _register() -> None:
    """Make our attention known to transformers; a model unpickled in another process may already name it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _unsuitable(backbone: nn.Module, stock: PreTrainedModel) -> str | None:
    if hasattr(backbone, "_orig_mod"):
        return "it is compiled"
    if stock.config._attn_implementation not in ("sdpa", NAME):
        return f"its attention is '{stock.config._attn_implementation}', not 'sdpa'"
    if not getattr(stock, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    if "position_ids" not in _parameters(type(stock).forward):
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
        difference, dtype = _difference(backbone, stock, _probe(stock, inputs), autocast)
        allowed = _tolerance(autocast or dtype, inputs["input_ids"].device)
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
) -> tuple[float, torch.dtype]:
    """The largest difference at real tokens, absolute for small values and relative for large ones; their dtype.

    Autocast must not cache: weights cast here, without gradient, would serve the training step around this call.
    """
    mask, device = probe["attention_mask"].cpu(), probe["input_ids"].device
    with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None, cache_enabled=False):
        expected = _padded(backbone, stock, probe, mask)
        found = _packed(backbone, stock, probe, _layout(mask, stock.dtype, device))
    difference = (found.double() - expected.double()).abs() / (1 + expected.double().abs())
    return float(difference[probe["attention_mask"].bool()].max()), expected.dtype


def _tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """1e-4, or the rounding of the format that matrices are multiplied in (TensorFloat-32 has 10 bits)."""
    rounding = 2**-10 if device.type == "cuda" and dtype is torch.float32 else torch.finfo(dtype).eps
    return max(1e-4, 16 * rounding)


def _probe(stock: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Four rows, right-padded, out of the batch's own tokens; one is longer than a (small) sliding window."""
    window = getattr(stock.config, "sliding_window", None) or 0
    lengths = [2 * window + 9 if window <= 256 else 9, 6, 6, 3]
    lengths[0] = max(7, min(lengths[0], (getattr(stock.config, "max_position_embeddings", None) or 512) - 8))
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
