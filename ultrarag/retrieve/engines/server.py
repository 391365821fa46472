"""What engines behind a network share: a directory that names the collection, one client per server, retries.

The directory holds the schema and the collection's name, so that a generation is a directory whatever its engine is;
the vectors are in the server. A collection has a name of its own, never used before or after.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from ultrarag.errors import IndexStateError
from ultrarag.io import OwnerLock, resource_error, write_bytes
from ultrarag.retrieve.engines.address import Address, parse_uri
from ultrarag.retrieve.engines.base import Schema, write_schema

COLLECTION_FILE = "collection.json"
#: Floats sent to a server in one request: 4 MB, some three times that as JSON, below every server's limit.
REQUEST_FLOATS = 1_000_000
#: Points sent or asked for in one request.
REQUEST_POINTS = 256
#: Of quantised vectors, how many of the best codes for each hit are compared anew by the vectors themselves.
OVERSAMPLING = {"int8": 4.0, "binary": 16.0}
#: Pause after the first failed try, and the longest, in seconds.
PAUSE, LONGEST_PAUSE = 0.1, 5.0

logger = logging.getLogger("ultrarag")

_Result = TypeVar("_Result")
_Item = TypeVar("_Item")


class ServerError(IndexStateError):
    """A server does not answer, or refuses what it was asked; names it, and says what it said."""


class Clients:
    """Connections shared by the collections of one process: one for each address, closed with its last user."""

    def __init__(self, connect: Callable[[Address], Any]) -> None:
        self._connect, self._mutex = connect, threading.Lock()
        self._held: dict[Address, list[Any]] = {}  # client, number of users

    def acquire(self, address: Address) -> Any:
        """Return the client of an address; `release` ends its use."""
        with self._mutex:
            if address not in self._held:
                self._held[address] = [self._connect(address), 0]
            self._held[address][1] += 1
            return self._held[address][0]

    def release(self, address: Address) -> None:
        """Release what `acquire` returned."""
        with self._mutex:
            entry = self._held[address]
            entry[1] -= 1
            if not entry[1]:
                del self._held[address]
                entry[0].close()


def retrying(work: Callable[[], _Result], pause_after: Callable[[Exception], float | None], patience: float) -> _Result:
    """Return what `work` does, trying again while its errors are such that pass and there is time.

    This is the back-pressure too: a server that is busy says so, and whoever writes to it waits here.

    Args:
        pause_after: the seconds that the server asked for after this error, 0 for no wish, None for one that stays.
    """
    deadline, pause = time.monotonic() + patience, PAUSE
    while True:
        try:
            return work()
        except Exception as error:
            wish = pause_after(error)
            left = deadline - time.monotonic()
            if wish is None or left <= 0:
                raise
            logger.debug("trying again: %s", error)
            time.sleep(min(left, max(wish, pause * random.uniform(0.5, 1))))
            pause = min(LONGEST_PAUSE, 2 * pause)


def uninterrupted(work: Callable[[], _Result], patience: float) -> _Result:
    """Return what `work` does; the main thread has another one do it, which Ctrl-C does not reach.

    A KeyboardInterrupt within grpc leaves one of its locks held: every later request of the process, such as that which
    releases the lease, then waits for ever. The request in flight ends before the interrupt goes on, so that nothing of
    it arrives later.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    outcome: Future[_Result] = Future()
    thread = threading.Thread(target=_into, args=(outcome, work), daemon=True)
    try:
        thread.start()
        return outcome.result()
    finally:
        with suppress(RuntimeError):  # it was interrupted before it began
            thread.join(patience)


def _into(outcome: Future[_Result], work: Callable[[], _Result]) -> None:
    try:
        outcome.set_result(work())
    except BaseException as error:
        outcome.set_exception(error)


def requests(items: Sequence[_Item], floats: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    """Cut what is to be sent into requests of bounded size; an item alone may be larger."""
    part: list[_Item] = []
    size = 0
    for item in items:
        if part and (len(part) == REQUEST_POINTS or size + floats(item) > REQUEST_FLOATS):
            yield part
            part, size = [], 0
        part.append(item)
        size += floats(item)
    if part:
        yield part


class Connection:
    """A shared client of one server, asked with retries; subclasses know its errors."""

    clients: Clients

    def __init__(self, address: Address, collection: str, place: str) -> None:
        """Connect; `place` is what an error calls this once it was closed."""
        self.address, self.collection, self._place = address, collection, place
        self._closing = threading.Lock()
        self._client: Any = None
        try:
            self._client = self.clients.acquire(address)
        except Exception as error:
            if (named := self._named(error)) is not error:
                raise named from error
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the connection; the collection stays; closing twice is harmless."""
        with self._closing:
            if self._client is not None:
                self._client = None
                self.clients.release(self.address)
                self._closed()

    def _closed(self) -> None:
        """What else ends with the connection."""

    def _open(self) -> Any:
        client = self._client
        if client is None:
            raise IndexStateError(f"'{self._place}' was closed; open it again")
        return client

    def _call(self, work: Callable[[Any], _Result]) -> _Result:
        """Ask the server, with retries; an error names it."""
        client = self._open()
        try:
            return self._run(lambda: retrying(lambda: work(client), self._pause_after, self.address.timeout))
        except Exception as error:
            if (named := self._named(error)) is not error:
                raise named from error
            raise

    def _run(self, work: Callable[[], _Result]) -> _Result:
        """Do what speaks to the server."""
        return work()

    def _say(self, error: object) -> ServerError:
        return ServerError(f"'{self.address.uri}', collection '{self.collection}': {str(error).strip()[:500]}")

    def _pause_after(self, error: Exception) -> float | None:
        raise NotImplementedError

    def _named(self, error: Exception) -> Exception:
        raise NotImplementedError


class ServerBackend(Connection):
    """The local half of an engine in a server: directory, owner, connection; subclasses speak to the server."""

    def __init__(
        self, directory: Path, schema: Schema, address: Address, collection: str, read_only: bool = False
    ) -> None:
        self.directory, self.schema = directory, schema
        self._lock = OwnerLock(directory, read_only=read_only)
        try:
            super().__init__(address, collection, str(directory))
        except BaseException:
            self._lock.release()
            raise

    @classmethod
    def create_at(cls, directory: Path, schema: Schema, uri: str) -> Any:
        """Make a new collection, and a directory that names it."""
        address = parse_uri(uri)
        write_schema(directory, uri, schema)
        collection = f"{address.name}_{uuid.uuid4().hex[:12]}"
        name_collection(directory, collection)  # first: a collection without a note stays for ever
        backend = cls(directory, schema, address, collection)
        with backend._released_on_error():
            backend._create_whole()
        return backend

    @classmethod
    def open_at(cls, directory: Path, schema: Schema, uri: str, read_only: bool = False) -> Any:
        """Connect to the collection that a directory names."""
        backend = cls(directory, schema, parse_uri(uri), collection_of(directory), read_only)
        with backend._released_on_error():
            if not backend._exists():
                raise IndexStateError(
                    f"'{uri}' has no collection '{backend.collection}', which '{directory}' names: it was deleted there"
                )
        return backend

    @classmethod
    def drop_at(cls, directory: Path, schema: Schema, uri: str) -> None:
        """Delete the collection that a directory names, if it is there."""
        backend = cls(directory, schema, parse_uri(uri), collection_of(directory))
        with backend._released_on_error():
            backend._drop()
        backend.close()

    def flush(self) -> None:
        """Nothing is left to do: a write was confirmed by the server, which keeps it in its own log."""
        self._open()

    def _closed(self) -> None:
        self._lock.release()

    def _released_on_error(self) -> _Releasing:
        return _Releasing(self)

    def _create_whole(self) -> None:
        """Create the collection; what a refusal leaves of it is deleted."""
        try:
            self._create()
        except Exception as error:
            away = isinstance(error.__cause__, Exception) and self._pause_after(error.__cause__) is not None
            if not away:
                with suppress(Exception):
                    self._drop()
            raise

    def _create(self) -> None:
        raise NotImplementedError

    def _exists(self) -> bool:
        raise NotImplementedError

    def _drop(self) -> None:
        raise NotImplementedError


class _Releasing:
    """Closes a backend when the block fails."""

    def __init__(self, backend: ServerBackend) -> None:
        self._backend = backend

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._backend.close()


def name_collection(directory: Path, collection: str) -> None:
    """Write which collection a directory stands for."""
    write_bytes(directory / COLLECTION_FILE, json.dumps({"collection": collection}).encode())


def collection_of(directory: Path) -> str:
    """The name of the collection that a directory stands for."""
    path = directory / COLLECTION_FILE
    try:
        name = json.loads(path.read_bytes())["collection"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if found := resource_error(error, path):
            raise found from error
        raise IndexStateError(f"'{path}' is missing or damaged ({error}); rebuild the vectors") from None
    return str(name)
