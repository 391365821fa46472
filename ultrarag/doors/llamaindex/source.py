"""What the parts of the door are made over: a live index that is open, or the folder of one."""

from __future__ import annotations

import os
from typing import TypeAlias

from ultrarag.errors import UsageError
from ultrarag.retrieve import LiveIndex

Source: TypeAlias = "LiveIndex | str | os.PathLike[str]"


def opened(source: Source) -> LiveIndex:
    """The index itself, or that of a folder, which is shared with whoever opens it so in this process."""
    if isinstance(source, LiveIndex):
        return source
    if isinstance(source, str | os.PathLike):
        return LiveIndex.open(source, share=True)
    raise UsageError(f"a LiveIndex or the folder of one is needed, not {type(source).__name__}")
