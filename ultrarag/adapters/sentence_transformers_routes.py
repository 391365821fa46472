"""The ways that texts take through the modules of sentence-transformers: one for all, or a Router's for each kind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ultrarag.errors import CheckpointError
from ultrarag.types import Kind

#: What a Router calls our kinds; a text of a symmetric task takes its default route.
TASKS: dict[str, str | None] = {"query": "query", "passage": "document", "text": None}
#: The modules of a route that read texts by a table, without special tokens: a weight, or a vector, for each token.
WEIGHTS, VECTORS = "SparseStaticEmbedding", "StaticEmbedding"
#: A tokenizer without a real limit says some 1e30.
_NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Reader:
    """What reads the texts of a kind: as much of a model as tokenizing needs."""

    #: a transformers tokenizer; where a table reads, one that adds no special tokens
    tokenizer: Any
    #: the configuration of the transformers model that reads, which says how many tokens it takes; None for a table
    config: Any
    #: the first module of the route
    body: nn.Module
    #: tokens of the longest text, special ones included; None where nothing limits it
    max_length: int | None
    #: what torch.compile compiles
    backbone: nn.Module


def reader_of(library_model: Any, kind: str, folder: Path | str) -> Reader:
    """What reads the texts of a kind.

    Raises:
        CheckpointError: a tokenizer that is not transformers', or whose special tokens cannot be left out.
    """
    backbone = library_model[0]
    body = backbone.sub_modules[route_of(backbone, kind)][0] if is_router(backbone) else backbone
    owned = getattr(body, "auto_model", None)
    if type(body).__name__ in (WEIGHTS, VECTORS):
        tokenizer, length = plain_tokenizer(body.tokenizer, folder)
        length = body.max_seq_length if type(body).__name__ == WEIGHTS else length
    else:
        tokenizer, length = body.tokenizer, body.max_seq_length
    limit = int(length) if length and length < _NO_LIMIT else None
    return Reader(tokenizer, getattr(owned, "config", None), body, limit, backbone)


def plain_tokenizer(tokenizer: Any, folder: Path | str) -> tuple[Any, int | None]:
    """A tokenizer that adds no special tokens, and the length to which its file cuts texts.

    Args:
        tokenizer: transformers', or that of the library `tokenizers`.

    Raises:
        CheckpointError: it is neither.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"{folder}: queries or documents are read by a table of tokens, whose tokenizer is a "
            f"{type(tokenizer).__name__}: only tokenizers of the library 'tokenizers' (tokenizer.json) are read there"
        )
    content = json.loads(backend.to_str())
    length = (content.get("truncation") or {}).get("max_length")
    padding = getattr(tokenizer, "pad_token", None) or _padding_token(content, backend)
    bare = Tokenizer.from_str(json.dumps({**content, "post_processor": None, "padding": None, "truncation": None}))
    more = {} if isinstance(tokenizer, Tokenizer) else {"model_max_length": tokenizer.model_max_length}
    return PreTrainedTokenizerFast(tokenizer_object=bare, pad_token=padding, **more), length


def _padding_token(content: dict[str, Any], backend: Any) -> str:
    """The padding token of a tokenizer.json; where it names none, one that is usual, or the first of its tokens."""
    named = (content.get("padding") or {}).get("pad_token")
    known = [token for token in (named, "[PAD]", "<pad>") if token and backend.token_to_id(token) is not None]
    return str(known[0] if known else backend.id_to_token(0))


def without_empty(ids: Tensor, mask: Tensor, padding: int) -> Tensor:
    """A mask, (batch, tokens), that also hides the one padding token as which a text without tokens comes."""
    empty = mask.sum(1, keepdim=True).eq(1) & (ids.ne(padding) * mask).sum(1, keepdim=True).eq(0)
    return mask * ~empty


def as_bags(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Padded ids, (batch, tokens), as StaticEmbedding reads them: flat `input_ids`, and the `offsets` of each text."""
    counts = mask.sum(1)
    return {"input_ids": ids[mask.bool()], "offsets": torch.cumsum(counts, 0) - counts}


def is_router(module: Any) -> bool:
    """Whether a module sends queries and passages different ways."""
    return hasattr(module, "sub_modules") and hasattr(module, "default_route")


def route_of(router: Any, kind: str) -> str:
    """The route of texts of a kind."""
    task = TASKS[kind]
    return str(router.default_route if task is None else router.route_mappings.get((task, None), task))


def modules_of(library_model: Any) -> list[Any]:
    """The modules in order, those of a Router's routes in its place: queries' first, passages' last."""
    found: list[Any] = []
    for module in library_model:
        if not is_router(module):
            found.append(module)
            continue
        last = route_of(module, "passage")
        for name in sorted(module.sub_modules, key=lambda name: name == last):
            found.extend(module.sub_modules[name])
    return found


def transformers_of(library_model: Any) -> list[Any]:
    """The modules that run a transformers model, the passages' last."""
    return [module for module in modules_of(library_model) if getattr(module, "auto_model", None) is not None]


def first_modules(library_model: Any) -> list[Any]:
    """What reads texts: the first module, or that of each route."""
    first = library_model[0]
    return [route[0] for route in first.sub_modules.values()] if is_router(first) else [first]


def check_router(router: Any, sparse: bool, folder: Path) -> None:
    """Refuse a Router that does not tell queries from documents alone.

    Raises:
        CheckpointError: a route is missing, goes by modality or holds a Router; or the lexical weights of the routes
            are of different tokens.
    """
    missing = [route for kind in ("query", "passage") if (route := route_of(router, kind)) not in router.sub_modules]
    if missing:
        raise CheckpointError(
            f"{folder}: its Router has the routes {', '.join(router.sub_modules)}, and none called '{missing[0]}': "
            "queries and passages take the routes 'query' and 'document'"
        )
    if any(modality is not None for _, modality in router.route_mappings):
        raise CheckpointError(f"{folder}: its Router goes by modality, and only texts are read here")
    if any(is_router(module) for route in router.sub_modules.values() for module in route):
        raise CheckpointError(f"{folder}: a Router within a Router is not supported")
    tokenizers = [found for route in router.sub_modules.values() if (found := getattr(route[0], "tokenizer", None))]
    if sparse and any(found.get_vocab() != tokenizers[0].get_vocab() for found in tokenizers[1:]):
        raise CheckpointError(
            f"{folder}: the routes of its Router have different tokenizers, so that the weights of queries and of "
            "documents are of different tokens"
        )


def kinds_of(library_model: Any) -> tuple[Kind, ...]:
    """Our kinds that the model reads; texts of a symmetric task only where a Router has a route for them."""
    first = library_model[0]
    routed = is_router(first) and first.default_route is None
    return ("query", "passage") if routed else ("query", "passage", "text")
