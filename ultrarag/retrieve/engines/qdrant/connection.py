"""A connection to a Qdrant server, and what its errors mean."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import httpx
from qdrant_client import QdrantClient
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

from ultrarag.retrieve.engines.address import Address
from ultrarag.retrieve.engines.server import Clients, Connection

#: Statuses of HTTP after which the same request may succeed.
_PASSING = (429, 502, 503, 504)
#: The local mode is not made for several threads.
_ONE_THREAD = threading.RLock()

_Result = TypeVar("_Result")


def connect(address: Address) -> QdrantClient:
    """Make a client; nothing is sent yet."""
    if address.folder is not None:
        return QdrantClient(path=str(address.folder), force_disable_check_same_thread=True)
    return QdrantClient(
        url=address.url,
        api_key=address.secret(),
        https=address.tls,
        timeout=max(1, int(address.timeout)),
        check_compatibility=False,  # one request more, and a warning where the server is away
    )


class QdrantConnection(Connection):
    """A client of Qdrant, which of its errors pass, and what the others are to say."""

    clients = Clients(connect)

    def _call(self, work: Callable[[Any], _Result]) -> _Result:
        with _ONE_THREAD if self.address.folder is not None else nullcontext():
            return super()._call(work)

    def _pause_after(self, error: Exception) -> float | None:
        if isinstance(error, ResourceExhaustedResponse):
            return float(error.retry_after_s)
        if isinstance(error, UnexpectedResponse) and error.status_code in _PASSING:
            return 0.0
        broken = isinstance(error, ResponseHandlingException) and isinstance(error.source, httpx.TransportError)
        return 0.0 if broken else None

    def _named(self, error: Exception) -> Exception:
        if isinstance(error, UnexpectedResponse):
            return self._say(_reason(error))
        if isinstance(error, ResponseHandlingException):
            return self._say(
                f"no answer within {self.address.timeout:g} s ({error.source or type(error.source).__name__})"
            )
        if isinstance(error, ApiException | ResourceExhaustedResponse | RuntimeError | OSError):
            return self._say(error)
        return error


def _reason(error: UnexpectedResponse) -> str:
    """What the server said; a key that is wrong is said to be."""
    if error.status_code in (401, 403):
        return f"the server refuses the API key ({error.status_code}); set QDRANT_API_KEY, or key_env in the URI"
    try:
        told = json.loads(error.content)["status"]["error"]
    except (ValueError, KeyError, TypeError):
        told = error.content.decode(errors="replace")
    return f"HTTP {error.status_code} {error.reason_phrase}: {told}"
