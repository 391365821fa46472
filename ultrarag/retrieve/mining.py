"""The name that scripts know: `from ultrarag.retrieve.mining.settings import MiningSettings`; see `ultrarag.mining`."""

from __future__ import annotations

import sys

from ultrarag.mining import MiningSettings

#: The module that holds the settings, also found by `import ultrarag.retrieve.mining.settings`.
settings = sys.modules[f"{__name__}.settings"] = sys.modules[MiningSettings.__module__]
