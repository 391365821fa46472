"""Ray itself: its pool and session, and the pipeline read -> encode and write -> confirm."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import secrets
import signal
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ultrarag.encode import Ledger
from ultrarag.encode.ray.worker import Attempts, Order, Worker, read_block
from ultrarag.errors import IndexStateError, UsageError
from ultrarag.packages import install
from ultrarag.retrieve.engines import is_uri, parse_uri

#: Blocks that are read at a time.
READERS = 2
#: How often a Ray of our own is started: its processes have 30 seconds, and a low priority.
STARTS = 3
#: Seconds that the head of a cluster has to answer.
KNOCK = 20.0
#: What Ray's processes find in their environment, unless it is set: no reports to its makers, no copies of the folder
#: that `uv run` was called in, no lines on stderr about what Ray Data does itself, and the priority of the builder,
#: which is low already, where Ray's workers would take the lowest.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_worker_niceness": "0",
}

logger = logging.getLogger("ultrarag")


@contextmanager
def session(pool: RayPool) -> Iterator[Any]:
    """Connect to Ray, or start one here, and yield the module; its workers end with the block.

    Raises:
        IndexStateError: when there is no Ray at the address, or its version or Python is another.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if pool.address == LOCAL and "RAY_AUTH_MODE" not in os.environ:  # its ports are open to the whole network
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
    import ray
    import ray.data

    on_end = signal.getsignal(signal.SIGTERM)  # Ray sets its own
    try:
        _init(ray, pool)
        signal.signal(signal.SIGTERM, on_end)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=r"ray\.")  # advice on tuning, for who wrote the pipeline
        yield ray
    finally:
        ray.shutdown()


def _init(ray: Any, pool: RayPool) -> None:
    own: dict[str, Any] = {}
    if pool.address == LOCAL:
        own = {"include_dashboard": False, "num_cpus": max(os.cpu_count() or 1, (pool.workers or 1) * pool.cpus)}
    for left in reversed(range(STARTS if own else 1)):
        try:
            _knock(pool.address)
            with _no_stderr():
                ray.init(address=pool.address, log_to_driver=False, logging_level=logging.ERROR, **own)
            return
        except Exception as error:
            ray.shutdown()
            if not left:
                raise _no_ray(pool, error) from error


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT; Ray itself would ask for many minutes."""
    if address == "auto":
        note = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")  # stays after a crash
        address = os.environ.get("RAY_ADDRESS") or (note.read_text() if note.is_file() else "")
    host, colon, port = address.strip().rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), KNOCK).close()


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Drop what a library in C++ writes: that it was told to be quiet, among others."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _no_ray(pool: RayPool, error: Exception) -> IndexStateError:
    return IndexStateError(
        f"no connection to Ray at '{pool.address}': {_first_line(error)}; start it with `ray start --head` on one "
        f"machine and `ray start --address=HOST:6379` on the others, or use 'local'"
    )


def workers_of(ray: Any, pool: RayPool) -> tuple[int, float]:
    """How many workers there are to be, and the GPUs of each (0: none).

    Raises:
        IndexStateError: when a Ray of our own could place none of them; a cluster may grow.
    """
    held = ray.cluster_resources()
    gpus = pool.gpus if pool.gpus is not None else float(held.get("GPU", 0) >= 1)
    unit, name = (gpus, "GPU") if gpus else (pool.cpus, "CPU")
    room = math.floor(held.get(name, 0) / unit)
    workers = pool.workers or max(room, 1)
    if workers > room:
        told = f"Ray at '{pool.address}' has {held.get(name, 0):g} {name}s: room for {room} of {workers} workers"
        if pool.address == LOCAL:
            raise IndexStateError(f"{told}; ask for fewer, or less for each")
        logger.warning("%s; the others wait until it grows", told)
    return workers, gpus


def confirmations(
    ray: Any, pool: RayPool, order: Order, ledger: Ledger, root: str, up_to_seq: int
) -> Iterator[dict[str, Any]]:
    """Encode and write the blocks that have no line, and yield what the workers say of each: block, passages, cuts."""
    workers, gpus = workers_of(ray, pool)
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    counter = ray.remote(Attempts).options(num_cpus=0, max_restarts=-1, max_task_retries=-1, label_selector=here)
    missing = ledger.missing()
    blocks = _blocks(ray, missing).map_batches(
        read_block,
        fn_kwargs={"root": root, "first": ledger.first, "chunk_texts": ledger.chunk_texts, "up_to_seq": up_to_seq},
        compute=ray.data.TaskPoolStrategy(size=min(READERS, len(missing))),
        num_cpus=0,  # else they would wait for the CPUs that the workers hold, and these for them
        label_selector=here,
        **_ONE,
    )
    done = blocks.map_batches(
        Worker,
        fn_constructor_args=(order, counter.remote()),
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        **({"num_gpus": gpus} if gpus else {"num_cpus": pool.cpus}),
        **_ONE,
    )
    for batch in done.iter_batches(batch_size=1, prefetch_batches=0, batch_format="pyarrow"):
        yield batch.to_pylist()[0]


#: A block is one row, and a call has one block.
_ONE: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}


def _blocks(ray: Any, numbers: Sequence[int]) -> Any:
    rows = [{"block": number} for number in numbers]
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def ray_failed(error: Exception) -> IndexStateError:
    """What Ray, or a bug on one of its nodes, has ended a build with."""
    return IndexStateError(
        f"Ray ended the build: {_last_line(error)}; the blocks that were confirmed are kept: build the same checkpoint "
        f"again to go on"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _last_line(error: Exception) -> str:
    return next(iter(reversed(str(error).strip().splitlines())), type(error).__name__)


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
    #: Python code that comes with the model may be run
    trust_remote_code: bool = False

    @classmethod
    def of(
        cls, pool: RayPool, checkpoint: Any, adapter: str | None, backend: str, trust_remote_code: bool = False
    ) -> RayJob:
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
        path = str(folder.absolute()) if folder.exists() else str(checkpoint)
        return cls(pool, path, adapter, trust_remote_code)

    def to_json(self) -> str:
        """As the builder's command line has it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RayJob:
        """Read what `to_json` wrote."""
        found = json.loads(text)
        return cls(RayPool(**found.pop("pool")), **found)
