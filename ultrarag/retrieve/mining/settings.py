"""`from ultrarag.retrieve.mining.settings import MiningSettings`; the settings live in `ultrarag.mining`."""

from ultrarag.mining import MiningSettings

__all__ = ["MiningSettings"]
