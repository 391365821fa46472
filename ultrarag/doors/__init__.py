"""Doors: the library inside the frameworks that people already use, a room for each.

A framework's own calls come in; calls of `ultrarag.retrieve` and `ultrarag.encoder` go out. Each room needs its
framework, which is an extra of the same name (docs/doors.md); none is imported before its door is named.
Haystack's door lies in `haystack_integrations`, beside this package: it loads components from that namespace alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.doors.opening import Source, default_heads, opened
else:
    __getattr__, __dir__, __all__ = exports(__name__)
