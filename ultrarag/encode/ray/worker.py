"""What runs on the nodes: reading a block where the index is, encoding it where Ray has put a worker, and writing it.

A worker writes its vectors to the server itself: they go neither through Ray's memory nor through the driver. What it
returns is a line that confirms the block, or that says what went wrong, so that the driver can raise it as it was.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrarag.encode import encode_apart, passages_of
from ultrarag.encoder import Cuts
from ultrarag.errors import CheckpointError, IndexStateError, UltraragError, kind_of
from ultrarag.retrieve.engines import open_backend
from ultrarag.retrieve.passages import Store
from ultrarag.types import Embeddings, Passage

#: Passages encoded while those before them are on their way to the server.
CHUNK_TEXTS = 512
#: How often a block is begun before it is given up: its workers died each time.
ATTEMPTS = 4


@dataclass(frozen=True)
class Order:
    """What a worker has to know; the same for all."""

    checkpoint: str
    adapter: str | None
    #: of the encoder of the generation; a worker with another one stops the build
    fingerprint: str
    precision: str
    heads: tuple[str, ...]
    device: str
    threads: int
    batch_tokens: int | None
    #: name -> content of the files that say which collection the vectors are in
    vectors: dict[str, bytes]
    #: Python code that comes with the model may be run
    trust_remote_code: bool = False


class Attempts:
    """Counts how often each block was begun; an actor, for it must outlive the workers that die."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def begin(self, block: int) -> int:
        """Count, and return, the attempts at a block."""
        self._counts[block] = self._counts.get(block, 0) + 1
        return self._counts[block]


def read_block(batch: Any, root: str, first: int, chunk_texts: int, up_to_seq: int) -> Any:
    """Read the passages of one block, on the machine that has the index; a pyarrow table of one row.

    Args:
        first: the last row before the first block.
        up_to_seq: what was written after this entry of the log is left to the builder, which replays the log.
    """
    block = int(batch["block"][0].as_py())
    start = first + block * chunk_texts
    try:
        store = Store.open(Path(root), read_only=True)
        try:
            found = passages_of(store, start, start + chunk_texts, up_to_seq)
        finally:
            store.close()
    except (UltraragError, OSError) as error:
        return _row(block=block, ids=[], titles=[], texts=[], metadata=[], error=_told(error))
    metadata = [json.dumps(passage.metadata) for passage in found]
    titles, texts = [passage.title for passage in found], [passage.text for passage in found]
    ids = [passage.id for passage in found]
    return _row(block=block, ids=ids, titles=titles, texts=texts, metadata=metadata, error="")


class Worker:
    """Loads the checkpoint once, then encodes and writes block after block; one actor of the pool each."""

    def __init__(self, order: Order, attempts: Any) -> None:
        self._order, self._attempts, self._failure = order, attempts, ""
        try:
            self._prepare()
        except (UltraragError, OSError) as error:  # raised here it would reach the driver as the death of an actor
            self._failure = _told(error)

    def __call__(self, batch: Any) -> Any:
        """Confirm the block of a one-row table, or say why it cannot be."""
        row = batch.to_pylist()[0]
        error, cuts, failed = self._failure or row["error"], Cuts(), {}
        if not error and row["ids"]:
            try:
                self._begin(row["block"])
                rows = zip(row["ids"], row["titles"], row["texts"], row["metadata"], strict=True)
                passages = [Passage(id, text, title, json.loads(about)) for id, title, text, about in rows]
                failed = self._take(passages, cuts)
            except (UltraragError, OSError) as problem:
                error = _told(problem)
        counted = [[what, limit, *counts] for (what, limit), counts in cuts.take().items()]
        notes = {"cuts": json.dumps(counted), "unencoded": json.dumps(failed)}
        return _row(block=row["block"], passages=len(row["ids"]), **notes, error=error)

    def _prepare(self) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import torch

        from ultrarag.encoder import Encoder

        order = self._order
        torch.set_num_threads(order.threads)
        options: dict[str, Any] = {"device": order.device, "precision": order.precision}
        options["trust_remote_code"] = order.trust_remote_code
        self._encoder = Encoder.load(order.checkpoint, order.adapter, **options)
        if self._encoder.fingerprint != order.fingerprint:
            raise CheckpointError(
                f"'{order.checkpoint}' is another encoder here than where the build was started (fingerprint "
                f"{self._encoder.fingerprint[:12]} instead of {order.fingerprint[:12]}): give all nodes the same folder"
            )
        folder = Path(tempfile.mkdtemp(prefix="ultrarag-"))
        for name, content in order.vectors.items():
            (folder / name).write_bytes(content)
        self._backend = open_backend(folder, self._encoder.passage_fingerprint)
        self._writer = ThreadPoolExecutor(1, "write")

    def _begin(self, block: int) -> None:
        import ray

        if (attempts := ray.get(self._attempts.begin.remote(block))) > ATTEMPTS:
            raise IndexStateError(
                f"block {block} was begun {attempts - 1} times, and its worker died each time, perhaps for want of "
                f"memory: see Ray's logs; fewer workers per machine, or a smaller batch_tokens, take less"
            )

    def _take(self, passages: Sequence[Passage], cuts: Cuts) -> dict[str, str]:
        """Encode a chunk while the one before it is on its way to the server; return what could not be encoded."""
        order = self._order
        failed: dict[str, str] = {}
        sent: Future[None] | None = None

        def encode(texts: Sequence[str | Passage]) -> Embeddings:
            return self._encoder.encode(
                list(texts), "passage", heads=order.heads, batch_tokens=order.batch_tokens, progress=False, cuts=cuts
            )

        for start in range(0, len(passages), CHUNK_TEXTS):
            found = encode_apart(passages[start : start + CHUNK_TEXTS], encode)
            failed |= found.failed
            if sent is not None:
                sent.result()
            if found.embeddings is not None:
                ids, metadata = [p.id for p in found.passages], [p.metadata for p in found.passages]
                sent = self._writer.submit(self._backend.upsert, ids, found.embeddings, metadata)
        if sent is not None:
            sent.result()
        return failed


def _told(error: Exception) -> str:
    """An error as text, with the machine that it is about."""
    return json.dumps({"kind": kind_of(error), "message": f"on {socket.gethostname()}: {error}"})


def _row(**values: Any) -> Any:
    import pyarrow as pa

    types = {
        "block": pa.int64(),
        "passages": pa.int64(),
        "error": pa.string(),
        "cuts": pa.string(),
        "unencoded": pa.string(),
    }
    columns = {name: pa.array([value], types.get(name, pa.list_(pa.string()))) for name, value in values.items()}
    return pa.table(columns)
