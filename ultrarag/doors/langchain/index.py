"""The live index behind a part of a chain: opened by its path or shared, and searched as its user said."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ultrarag.doors import default_heads
from ultrarag.doors.langchain.filters import translated
from ultrarag.errors import UsageError
from ultrarag.retrieve import LiveIndex

#: The head that LangChain's "similarity" means, where it is stored.
DENSE = "dense"


def loaded(model: Any, **load: Any) -> Any:
    """An encoder or a live index as it is; what a folder or a name says is loaded."""
    from ultrarag.encoder import Encoder

    if isinstance(model, str | os.PathLike):
        return Encoder.load(model, **load)
    if not isinstance(model, Encoder | LiveIndex):
        raise UsageError(
            f"model is {type(model).__name__}; it must be an Encoder, a LiveIndex, or a checkpoint folder or hub name"
        )
    if load:
        raise UsageError(f"{', '.join(load)}: what is loaded already takes no arguments of Encoder.load")
    return model


def search_options(live: LiveIndex, *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `LiveIndex.search`: what the last layer says counts; where none names heads, the dense one.

    Heads or weights of a layer take the place of both in those before it; None says nothing.
    """
    options: dict[str, Any] = {}
    for layer in layers:
        said = {name: value for name, value in layer.items() if value is not None}
        if said.keys() & {"heads", "weights"}:
            options = {name: value for name, value in options.items() if name not in ("heads", "weights")}
        options |= said
    if "filter" in options:
        options["filter"] = translated(options["filter"])
    if options.keys() & {"heads", "weights"}:
        return options
    return {**options, "heads": default_heads(live)}
