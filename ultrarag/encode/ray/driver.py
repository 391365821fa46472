"""EncodeOnRay: the process of a build as the driver of a Ray pipeline, in which workers encode and write."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

from ultrarag import errors
from ultrarag.encode import Ledger
from ultrarag.encode.ray.pipeline import RayJob
from ultrarag.encode.ray.worker import Order
from ultrarag.errors import IndexStateError, UltraragError
from ultrarag.io import progress_bar
from ultrarag.retrieve.engines import COLLECTION_FILE, SCHEMA_FILE, collection_of
from ultrarag.retrieve.generation import Draft

LEDGER_FILE = "confirmed.txt"
#: How often blocks that the server turns out to lack are encoded, the first time included.
PASSES = 3
#: Seconds between two notes of how far it is.
TELL_EVERY = 2.0


class EncodeOnRay:
    """A strategy for `ultrarag.retrieve.build`: the workers of a Ray cluster encode, and write to a server.

    Its own notes in the build's progress: passages confirmed by an earlier start ("resumed") and by this one ("taken").
    """

    def __init__(self, job: RayJob) -> None:
        self.job = job

    def fill(self, draft: Draft, encode: Callable[..., Any], progress: bool | None) -> None:
        """Have all passages encoded that were written before the build began, and see that the server has them."""
        path, done = draft.directory / LEDGER_FILE, draft.progress
        if not draft.begun:  # the collection is new
            path.unlink(missing_ok=True)
            draft.commit()  # from here on a start that follows keeps the collection
        first, last = done.row, draft.store.last_row()
        collection = collection_of(draft.layout.vectors(draft.directory))
        with closing(Ledger(path, collection, first, last, self.job.pool.block)) as ledger:
            done.own = {"taken": 0, "resumed": ledger.passages}
            if last > first:
                Driver(draft, self.job, ledger, progress).run()
            done.row, done.encoded, done.ahead = max(first, last), done.encoded + ledger.passages, 0
        draft.commit()
        path.unlink()


class Driver:
    """Has the blocks encoded that a ledger lacks, until the server holds them all."""

    def __init__(self, draft: Draft, job: RayJob, ledger: Ledger, progress: bool | None) -> None:
        self.draft, self.job, self.ledger, self.progress = draft, job, ledger, progress

    def run(self) -> None:
        """Encode, count, and encode again what the server has lost.

        Raises:
            IndexStateError: when the server keeps losing what it confirmed.
        """
        for _ in range(PASSES):
            if self.ledger.missing():
                self._encode_blocks()
            if not (lost := self._lost()):
                return
            self.ledger.forget(lost)
        raise IndexStateError(
            f"'{self.draft.generation.backend}' lacks passages of {len(lost)} blocks that it confirmed {PASSES} times; "
            f"nothing was swapped: see the server's log, then build again"
        )

    def _encode_blocks(self) -> None:
        draft, done, ledger = self.draft, self.draft.progress, self.ledger
        started = noted = time.monotonic()
        spent = done.seconds
        done.ahead = ledger.passages
        bar = progress_bar(draft.total(), f"build generation {draft.generation.id} on Ray", "passage", self.progress)
        with bar, closing(self._confirmations()) as confirmations:
            bar.update(done.held)
            for found in confirmations:
                self._check(found)
                ledger.confirm(found["block"], found["passages"])
                done.ahead = ledger.passages
                done.own["taken"] += found["passages"]
                bar.update(found["passages"])
                done.seconds = spent + time.monotonic() - started
                if time.monotonic() - noted > TELL_EVERY:
                    draft.note()  # for whoever asks; what counts is the ledger
                    noted = time.monotonic()

    def _confirmations(self) -> Generator[dict[str, Any]]:
        from ultrarag.encode.ray.pipeline import confirmations, ray_failed, session, workers_of

        pool, root = self.job.pool, str(self.draft.layout.root.absolute())
        with session(pool) as ray:
            order = self._order("cuda" if workers_of(ray, pool)[1] else "cpu")
            try:
                yield from confirmations(ray, pool, order, self.ledger, root, self.draft.generation.base_seq)
            except (ray.exceptions.RayError, ray.exceptions.UserCodeException) as error:
                raise ray_failed(error) from error

    def _order(self, device: str) -> Order:
        draft, pool = self.draft, self.job.pool
        folder = draft.layout.vectors(draft.directory)
        return Order(
            checkpoint=self.job.checkpoint,
            adapter=self.job.adapter,
            fingerprint=draft.generation.fingerprint,
            precision=draft.generation.precision,
            heads=draft.generation.heads,
            device=device,
            threads=pool.cpus,
            batch_tokens=pool.batch_tokens,
            vectors={name: (folder / name).read_bytes() for name in (SCHEMA_FILE, COLLECTION_FILE)},
            trust_remote_code=self.job.trust_remote_code,
        )

    def _check(self, found: dict[str, Any]) -> None:
        """Raise what a worker has told, and count the texts that it cut."""
        if found["error"]:
            told = json.loads(found["error"])
            kind: type[UltraragError] = getattr(errors, told["kind"])
            raise kind(f"{told['message']} (what was confirmed is kept: build the same checkpoint again to go on)")
        for what, limit, cut, total in json.loads(found["cuts"]):
            self.draft.cuts.add(cut, total, what, limit)
        self.draft.progress.unencoded |= json.loads(found["unencoded"])

    def _lost(self) -> set[int]:
        """The blocks with passages that the server does not have.

        It may well have more than was confirmed: what a worker wrote that then died, and what was deleted or changed
        before its block was taken again. Replaying the log sets that right.
        """
        draft, ledger = self.draft, self.ledger
        unencoded = draft.progress.unencoded
        if draft.backend.count() == draft.progress.encoded + ledger.passages - len(unencoded):
            return set()
        held, row, lost = set(draft.backend.ids()), ledger.first, set()
        while chunk := draft.store.scan(row, ledger.chunk_texts, draft.generation.base_seq):
            lost |= {ledger.block_of(at) for at, passage in chunk if passage.id not in held | unencoded.keys()}
            row = chunk[-1][0]
        return lost
