"""The tiny model of each built-in adapter, on which the conformance kit runs it when none is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ultrarag.errors import UsageError
from ultrarag.testing.tiny import (
    tiny_bert,
    tiny_cross_encoder,
    tiny_decoder,
    tiny_layerwise,
    tiny_m3,
    tiny_minicpm,
    tiny_static,
    tiny_yes_reranker,
)
from ultrarag.testing.tiny_causal import tiny_causal_reranker
from ultrarag.testing.tiny_colbert import tiny_colbert

#: Writes a model that the adapter can load into a folder.
ExampleModel = Callable[[Path], None]

#: One line per built-in adapter. A third party's plugin has an attribute `example_model` instead.
EXAMPLES: dict[str, ExampleModel] = {
    "bge": tiny_bert,
    "bge-reranker": tiny_cross_encoder,
    "bge-reranker-gemma": tiny_yes_reranker,
    "bge-reranker-minicpm-layerwise": tiny_layerwise,
    "bgem3": tiny_m3,
    "colbert": tiny_colbert,
    "causal-reranker": tiny_causal_reranker,
    "icl": tiny_decoder,
    "minicpm-embedding": tiny_minicpm,
    "sentence-transformers": tiny_bert,
    "static": tiny_static,
}


def write_example(name: str, plugin: Any, folder: Path) -> None:
    """Write the example model of an adapter into `folder`.

    Raises:
        UsageError: when there is none.
    """
    make = getattr(plugin, "example_model", None) or EXAMPLES.get(name)
    if make is None:
        raise UsageError(
            f"adapter '{name}' has no example model: name a model with --path (check_adapter(name, path) in Python), "
            "or give the plugin a function `example_model(folder)` that writes a tiny one"
        )
    make(folder)
