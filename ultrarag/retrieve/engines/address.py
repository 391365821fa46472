"""Addresses of vector servers: `qdrant://host:6333/name?tls=true`, `milvus://host:19530/name`.

A URI is stored in the index and printed in errors, so it never holds a secret: the API key (Milvus: the token, or
user:password) is read from an environment variable when a connection is made.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from ultrarag.errors import UsageError, did_you_mean
from ultrarag.io import secret_in

#: Port, and the environment variable with the API key, of each engine.
PORTS = {"qdrant": 6333, "milvus": 19530}
KEYS = {"qdrant": "QDRANT_API_KEY", "milvus": "MILVUS_TOKEN"}
#: The package that speaks to each.
CLIENTS = {"qdrant": "qdrant-client", "milvus": "pymilvus"}
#: What the query part of a URI may say.
OPTIONS = ("tls", "key_env", "timeout", "database", "quantise")
#: What a server may keep in memory of vectors: a byte or a bit of each dimension. "" is float32.
QUANTISED = ("int8", "binary")
#: How long an operation may wait for its server, tries included, in seconds.
TIMEOUT = 30.0
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")
_TRUTH = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Address:
    """Where a vector server is, and how its collections are to be called."""

    #: as it was given; holds no secret
    uri: str
    engine: str
    host: str
    port: int
    #: what the names of its collections begin with
    name: str
    tls: bool = False
    #: the environment variable that holds the key
    key_env: str = ""
    #: seconds
    timeout: float = TIMEOUT
    #: of Milvus; "" is the default one
    database: str = ""
    #: what is kept in memory of vectors, one of `QUANTISED`; "" is float32. Part of a generation's identity.
    quantise: str = ""
    #: of qdrant-client's local mode, which has no server
    folder: Path | None = None

    @property
    def url(self) -> str:
        """As HTTP has it, which both clients take."""
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}"

    def secret(self) -> str | None:
        """The API key, if the environment has one.

        Raises:
            UsageError: when the URI names a variable that is not set.
        """
        variable = self.key_env or KEYS[self.engine]
        value = os.environ.get(variable)
        if self.key_env and not value:
            raise UsageError(f"'{self.uri}' takes its key from the environment variable {variable}, which is not set")
        return value or None


def is_uri(text: object) -> bool:
    """Tell a server's address from a path or the name of an engine."""
    return isinstance(text, str) and "://" in text


def parse_uri(uri: str) -> Address:
    """Read an address.

    Raises:
        UsageError: naming the part that cannot be used; a password in a URI is refused and not repeated.
    """
    parts = urlsplit(uri)
    engine = parts.scheme
    if secret := secret_in(uri):
        raise UsageError(
            f"a {engine}:// URI holds no {secret.removeprefix('a ').removeprefix('the ')}, for it is stored: set "
            f"{KEYS.get(engine, 'an environment variable')} instead, or name another one with key_env=..."
        )
    if engine not in PORTS:
        raise UsageError(f"'{engine}://' is no vector server{did_you_mean(engine, PORTS)}; known: {', '.join(PORTS)}")
    try:
        host, port = parts.hostname or "", parts.port or PORTS[engine]
    except ValueError as error:
        raise UsageError(f"'{uri}': {error}") from None
    options = _options(uri, parts.query)
    if not host:
        return _local(uri, engine, parts.path, options)
    if ":" in host:
        host = f"[{host}]"
    return Address(uri, engine, host, port, _name(uri, parts.path.strip("/")), **options)


def with_quantise(uri: str, quantise: str) -> str:
    """The same address with another `quantise`; "" leaves it out."""
    if parse_uri(uri).quantise == quantise:
        return uri
    place, _, query = uri.partition("?")
    kept = [part for part in query.split("&") if part and not part.startswith("quantise=")]
    options = "&".join([*kept, *([f"quantise={quantise}"] if quantise else [])])
    return f"{place}?{options}" if options else place


def _local(uri: str, engine: str, path: str, options: dict[str, Any]) -> Address:
    if engine != "qdrant" or not path.strip("/"):
        raise UsageError(f"'{uri}' names no host: write {engine}://HOST:{PORTS[engine]}/NAME")
    if options.get("quantise"):
        raise UsageError(f"'{uri}': the local mode keeps float32 alone; name a Qdrant server, or leave quantise out")
    return Address(uri, engine, "", 0, _name(uri, ""), folder=Path(path), **options)


def _name(uri: str, name: str) -> str:
    name = name or "ultrarag"
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"'{uri}': '{name}' cannot begin the name of a collection; use letters, digits and underscores, a letter "
            f"first, at most 100"
        )
    return name


def _options(uri: str, query: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in OPTIONS:
            raise UsageError(
                f"'{uri}' has no option '{name}'{did_you_mean(name, OPTIONS)}; known: {', '.join(OPTIONS)}"
            )
        found[name] = _value(uri, name, value)
    return found


def _value(uri: str, name: str, value: str) -> Any:
    try:
        found = _TRUTH[value.lower()] if name == "tls" else float(value) if name == "timeout" else value
    except (KeyError, ValueError):
        wanted = "true or false" if name == "tls" else "a number of seconds"
        raise UsageError(f"'{uri}': {name} is '{value}'; it must be {wanted}") from None
    if name == "quantise" and value not in QUANTISED:
        raise UsageError(
            f"'{uri}': quantise is '{value}'; it must be {' or '.join(QUANTISED)}, or left out for float32"
        )
    if name == "timeout" and not 0 < float(found) < 1e6:
        raise UsageError(f"'{uri}': timeout is '{value}'; it must be a number of seconds above 0")
    return found
