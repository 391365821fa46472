"""A connection to a Milvus server, and what its errors mean."""

from __future__ import annotations

import logging
from typing import Any

from grpc import RpcError
from pymilvus import MilvusClient, MilvusException
from pymilvus.exceptions import ErrorCode

from ultrarag.retrieve.engines.address import Address
from ultrarag.retrieve.engines.server import Clients, Connection

#: What pymilvus says when the server is away.
_AWAY = ("UNAVAILABLE", "Connection refused", "server unavailable", "StatusCode.CANCELLED")
#: The code of a collection that has to be loaded, as after its server was started again.
_NOT_LOADED = 101
#: Every read sees every write before it.
STRONG: dict[str, Any] = {"consistency_level": "Strong"}

logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it prints every error, with its trace, before raising it


def connect(address: Address) -> MilvusClient:
    """Connect; the server must answer."""
    return MilvusClient(
        uri=address.url,
        token=address.secret() or "",
        db_name=address.database,
        timeout=address.timeout,
        dedicated=True,
        grpc_options={"grpc.keepalive_time_ms": 300_000},  # every 10 s, its default, makes servers hang up on it
    )


class MilvusConnection(Connection):
    """A client of Milvus, which of its errors pass, and what the others are to say."""

    clients = Clients(connect)

    @property
    def _time(self) -> dict[str, float]:
        """What a single try may take; pymilvus tries again by itself within it."""
        return {"timeout": self.address.timeout}

    def _load(self) -> None:
        self._call(lambda client: client.load_collection(self.collection, **self._time))

    def _pause_after(self, error: Exception) -> float | None:
        if isinstance(error, MilvusException) and error.code == _NOT_LOADED:
            self._load()
            return 0.0
        limited = isinstance(error, MilvusException) and error.code == ErrorCode.RATE_LIMIT
        return 0.0 if limited or _unavailable(error) else None

    def _named(self, error: Exception) -> Exception:
        if isinstance(error, MilvusException | RpcError):
            return self._say(getattr(error, "message", None) or error)
        return error


def _unavailable(error: Exception) -> bool:
    """Tell whether the server is away; pymilvus closes the channel under other threads while it connects again."""
    if isinstance(error, ValueError):
        return "closed channel" in str(error)
    text = str(error)
    return isinstance(error, MilvusException | RpcError) and any(part in text for part in _AWAY)
