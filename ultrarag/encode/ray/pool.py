"""RayPool: where Ray runs, and what its workers may use; nothing here imports Ray."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ultrarag.errors import UsageError
from ultrarag.optional import install
from ultrarag.retrieve.engines import is_uri, parse_uri

#: A Ray of our own on this machine, for the time of the build.
LOCAL = "local"


@dataclass(frozen=True)
class RayPool:
    """The workers of a build on Ray.

    Example:
        >>> from ultrarag.retrieve.on_ray import RayPool
        >>> RayPool("auto", workers=8, gpus=1).workers
        8
    """

    #: "local" (this machine, started and ended with the build), "auto" (the cluster that this machine is part of), or
    #: HOST:PORT of the cluster's head
    address: str = LOCAL
    #: default: one for each GPU of the cluster, or for each `cpus` CPUs where it has none
    workers: int | None = None
    #: of a worker; more than one may share a GPU: 0.5. Default: 1 where the cluster has GPUs
    gpus: float | None = None
    #: CPUs, and so threads, of a worker without a GPU
    cpus: int = 1
    #: padded tokens per forward; default: the encoder's own for its device
    batch_tokens: int | None = None
    #: passages between two confirmations of a worker: what is encoded again, at most, for each worker that dies
    block: int = 2048

    def __post_init__(self) -> None:
        for name in ("workers", "cpus", "batch_tokens", "block"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} of a Ray pool is {value}; it must be 1 or more")
        if self.gpus is not None and self.gpus < 0:
            raise UsageError(f"gpus of a Ray pool is {self.gpus}; it must be 0 or more")
        if self.address.startswith("ray://"):
            raise UsageError(
                f"'{self.address}' is the address of a Ray client, which is no part of the cluster: run the build on a "
                f"machine of the cluster, with 'auto' or HOST:PORT"
            )


@dataclass(frozen=True)
class RayJob:
    """A pool and what it is to encode with; plain values, on their way to the builder's process."""

    pool: RayPool
    #: a path that every node has, or a name on the Hub
    checkpoint: str
    adapter: str | None = None

    @classmethod
    def of(cls, pool: RayPool, checkpoint: Any, adapter: str | None, backend: str) -> RayJob:
        """Check what can be checked before anything is begun.

        Raises:
            UsageError: when Ray is not installed, the vectors would lie in the index, or the encoder is in memory.
        """
        if importlib.util.find_spec("ray") is None:
            raise UsageError(f"a build on Ray needs ray: {install('ray[data]')}")
        if not isinstance(checkpoint, str | os.PathLike):
            raise UsageError("a build on Ray takes a checkpoint folder that all nodes see: save the encoder first")
        if not is_uri(backend):
            raise UsageError(
                f"Ray's workers write to a vector server, and '{backend}' is in the index directory: name one with "
                f"backend='qdrant://HOST' or 'milvus://HOST', or encode into files with torchrun (docs/distributed.md)"
            )
        if parse_uri(backend).folder is not None:
            raise UsageError(f"'{backend}' is a folder that one process can open; Ray's workers need a server")
        folder = Path(checkpoint).expanduser()
        return cls(pool, str(folder.absolute()) if folder.exists() else str(checkpoint), adapter)

    def to_json(self) -> str:
        """As the builder's command line has it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RayJob:
        """Read what `to_json` wrote."""
        found = json.loads(text)
        return cls(RayPool(**found.pop("pool")), **found)
