"""The adapter contract: four hooks. This screen is the whole of it.

A plugin is an object (usually a module or an instance) whose functions are marked `@hookimpl`. An adapter
implements all four hooks and is registered under the entry-point group `ultrarag.adapters`; an extension
implements none of `load`, wraps hooks of every adapter with `@hookimpl(wrapper=True)`, and is registered under
`ultrarag.extensions`. An adapter may also declare plain data: see `ultrarag.plugins.Declared`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ultrarag.loss_arguments import LossArguments
    from ultrarag.types import Embeddings, Kind

#: Raised when a hook's meaning changes. A plugin of a newer contract is refused; one that declares no `contract` was
#: written for the first. The second: `features` says of what kind the texts are.
CONTRACT = 2

hookspec = pluggy.HookspecMarker("ultrarag")
hookimpl = pluggy.HookimplMarker("ultrarag")


@dataclass(frozen=True)
class LoadOptions:
    """How a model is to be loaded; None means: as the checkpoint declares."""

    heads: tuple[str, ...] | None = None
    pooling: str | None = None
    normalize: bool | None = None
    colbert_dim: int | None = None
    #: True allows fresh (seeded) weights for heads that the checkpoint lacks
    training: bool = False
    trust_remote_code: bool = False
    config_name: str | None = None
    tokenizer_name: str | None = None
    use_fast_tokenizer: bool = True
    cache_dir: str | None = None
    token: str | None = None


class Features(TypedDict, total=False):
    """One tokenized batch."""

    #: (batch, tokens) int64
    input_ids: Tensor
    #: (batch, tokens) int64: 1 for text, 0 for padding
    attention_mask: Tensor
    #: (batch, tokens) int64, for models that tell two segments apart
    token_type_ids: Tensor
    #: the heads to compute; absent: all that the model has
    heads: tuple[str, ...]
    #: what the texts are: query, passage, or text (of a symmetric task); absent for pairs, and in contract 1
    kind: Kind


class Hooks:
    """The hooks; each returns the result of the one adapter that was named."""

    @hookspec(firstresult=True)
    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Return the model at `path` in float32, with its `.config` and `.tokenizer`."""

    @hookspec(firstresult=True)
    def encode(self, model: nn.Module, features: Features) -> Embeddings:
        """Return the batch's Embeddings, differentiable; the same code trains and serves."""

    @hookspec(firstresult=True)
    def loss(
        self,
        model: nn.Module,
        query: Embeddings | None,
        passage: Embeddings,
        teacher: Tensor | None,
        step: int,
        args: LossArguments,
    ) -> Tensor:
        """Return the scalar loss; query i's candidates are passages i*G to i*G+G-1, the positive first.

        `passage` may hold more rows than queries x G: those after the candidates (other devices') are negatives.
        `teacher` is (queries, G) raw teacher scores or None; `step` counts optimizer steps from 0; `query` is
        None for an adapter that reads (query, passage) pairs.
        """

    @hookspec(firstresult=True)
    def save(self, model: nn.Module, path: str, state_dict: Mapping[str, Any]) -> None:
        """Write weights, tokenizer and whatever other tools need to load them into the directory `path`."""
