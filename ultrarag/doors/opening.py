"""The live index behind a part of any framework: opened by its path or shared; what is searched where none says."""

from __future__ import annotations

import os
from typing import TypeAlias

from ultrarag.errors import UsageError
from ultrarag.retrieve import LiveIndex

Source: TypeAlias = "LiveIndex | str | os.PathLike[str]"


def opened(index: Source) -> LiveIndex:
    """A live index as it is; of a path, a handle that other parts of this process may share."""
    if isinstance(index, LiveIndex):
        return index
    if isinstance(index, str | os.PathLike):
        return LiveIndex.open(index, share=True)
    given = type(index).__name__
    raise UsageError(
        f"index is {given}: give a LiveIndex (that of a store is store.index in LangChain, store.client in LlamaIndex) "
        f"or the path of one, not {given}"
    )


def default_heads(live: LiveIndex) -> list[str] | None:
    """What frameworks mean by a search that names no heads: the dense one, where it is stored; None leaves it open."""
    with live.encoding() as lent:
        return ["dense"] if "dense" in lent.heads else None
