"""Names of a room that load when they are first used, so that importing a room imports nothing heavy."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ultrarag.packages import refuse_shared_files

# Every room imports this file first, also where another distribution has put its own __init__ into the place of ours.
refuse_shared_files(os.path.dirname(os.path.dirname(__file__)))


def exports(room: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package for the names that it imports under TYPE_CHECKING.

    That block is the one list of a room's public names: mypy reads it as it stands, this function reads its source.
    """
    homes = _homes(room)

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{room}' has no attribute '{name}'")
        module, original = homes[name]
        return getattr(import_module(module), original)

    return get, lambda: sorted({*vars(sys.modules[room]), *homes}), sorted(homes)


def _homes(room: str) -> dict[str, tuple[str, str]]:
    """The module and the name there of each public name."""
    spec = sys.modules[room].__spec__
    source = spec.loader.get_source(room) if spec and spec.loader else None  # type: ignore[attr-defined]
    if source is None:
        raise ImportError(f"the source of '{room}' is needed to find its names: it was installed without it")
    blocks = [node.body for node in ast.parse(source).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block if isinstance(node, ast.ImportFrom)]
    return {
        alias.asname or alias.name: (node.module, alias.name) for node in imports if node.module for alias in node.names
    }
