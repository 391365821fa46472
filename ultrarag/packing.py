"""The forward of a stock transformers backbone: from token features to hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from ultrarag.hookspecs import Features

#: What a backbone is given; everything else in the features is for the heads.
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def hidden_states(backbone: nn.Module, features: Features) -> Tensor:
    """Return the last hidden states, (batch, tokens, hidden)."""
    inputs = {name: features[name] for name in _INPUTS if name in features}  # type: ignore[literal-required]
    return cast(Tensor, backbone(**inputs, return_dict=True).last_hidden_state)
