"""The bridge: a new encoder serves from the old generation's vectors while its own are still being made.

An open index, a generation that is to be built and judged queries come in; what serves meanwhile, and why, goes out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.retrieve.bridge.ahead import KeptAhead
    from ultrarag.retrieve.bridge.crossing import cross, drop, resume
    from ultrarag.retrieve.bridge.state import BridgeReport, BridgeTerms, described, read_report, read_state
else:
    __getattr__, __dir__, __all__ = exports(__name__)
