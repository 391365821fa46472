"""RayBuild: the builder's process as the driver of a Ray pipeline; what follows the encoding is that of any build."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from ultrarag import errors
from ultrarag.encode import Ledger
from ultrarag.encode.ray.pool import RayJob
from ultrarag.encode.ray.worker import Order
from ultrarag.errors import IndexStateError, UltraragError
from ultrarag.io import progress_bar, write_json
from ultrarag.retrieve.build import Build, read_progress
from ultrarag.retrieve.engines import COLLECTION_FILE, SCHEMA_FILE, collection_of
from ultrarag.retrieve.generation import Generation

LEDGER_FILE = "confirmed.txt"
#: How often blocks that the server turns out to lack are encoded, the first time included.
PASSES = 3
#: Seconds between two notes of how far it is.
TELL_EVERY = 2.0


class RayBuild(Build):
    """The building of one generation by the workers of a Ray cluster, from where it stands."""

    def __init__(self, root: Path, generation: Generation, device: str | None, job: RayJob) -> None:
        super().__init__(root, generation, device)
        self.root, self.job = root, job
        self._ledger_path = self.directory / LEDGER_FILE
        if read_progress(self.directory) is None:  # the collection is new
            self._ledger_path.unlink(missing_ok=True)
            self._commit()  # from here on a start that follows keeps the collection

    def _fill(self, progress: bool | None) -> None:
        """Have all passages encoded that were written before the build began, and see that the server has them."""
        first, last, before = self.state["row"], self.store.last_row(), self.state["encoded"]
        self.state["taken"] = 0
        vectors = self.layout.vectors(self.directory)
        with closing(Ledger(self._ledger_path, collection_of(vectors), first, last, self.job.pool.block)) as ledger:
            self.state["resumed"] = ledger.passages
            if last > first:
                self._until_all_are_there(ledger, before, progress)
            self.state["row"], self.state["encoded"] = max(first, last), before + ledger.passages
        self._commit()
        self._ledger_path.unlink()

    def _until_all_are_there(self, ledger: Ledger, before: int, progress: bool | None) -> None:
        for _ in range(PASSES):
            if ledger.missing():
                self._encode_blocks(ledger, before, progress)
            if not (lost := self._lost(ledger, before)):
                return
            ledger.forget(lost)
        raise IndexStateError(
            f"'{self.generation.backend}' lacks passages of {len(lost)} blocks that it confirmed {PASSES} times; "
            f"nothing was swapped: see the server's log, then build again"
        )

    def _encode_blocks(self, ledger: Ledger, before: int, progress: bool | None) -> None:
        started = told = time.monotonic()
        spent = float(self.state["seconds"])
        label = f"build generation {self.generation.id} on Ray"
        bar = progress_bar(self._total(), label, "passage", progress)
        with bar, closing(self._confirmations(ledger)) as confirmations:
            bar.update(before + ledger.passages)
            for found in confirmations:
                self._check(found)
                ledger.confirm(found["block"], found["passages"])
                self.state["taken"] += found["passages"]
                bar.update(found["passages"])
                self.state["seconds"] = spent + time.monotonic() - started
                if time.monotonic() - told > TELL_EVERY:
                    self._tell(before, ledger.passages)
                    told = time.monotonic()

    def _confirmations(self, ledger: Ledger) -> Generator[dict[str, Any]]:
        from ultrarag.encode.ray.pipeline import confirmations, ray_failed, session, workers_of

        pool = self.job.pool
        with session(pool) as ray:
            order = self._order("cuda" if workers_of(ray, pool)[1] else "cpu")
            try:
                yield from confirmations(ray, pool, order, ledger, str(self.root.absolute()), self.generation.base_seq)
            except (ray.exceptions.RayError, ray.exceptions.UserCodeException) as error:
                raise ray_failed(error) from error

    def _order(self, device: str) -> Order:
        folder, pool = self.layout.vectors(self.directory), self.job.pool
        return Order(
            checkpoint=self.job.checkpoint,
            adapter=self.job.adapter,
            fingerprint=self.generation.fingerprint,
            precision=self.generation.precision,
            heads=self.generation.heads,
            device=device,
            threads=pool.cpus,
            batch_tokens=pool.batch_tokens,
            vectors={name: (folder / name).read_bytes() for name in (SCHEMA_FILE, COLLECTION_FILE)},
        )

    def _check(self, found: dict[str, Any]) -> None:
        """Raise what a worker has told, and count the texts that it cut."""
        if found["error"]:
            told = json.loads(found["error"])
            kind: type[UltraragError] = getattr(errors, told["kind"])
            raise kind(f"{told['message']} (what was confirmed is kept: build the same checkpoint again to go on)")
        for what, limit, cut, total in json.loads(found["cuts"]):
            self.cuts.add(cut, total, what, limit)

    def _tell(self, before: int, encoded: int) -> None:
        """Note how far it is, for whoever asks; what counts is the ledger."""
        note = {**self.state, "encoded": before + encoded, "up_to_row": before, "total": self._total()}
        write_json(self.layout.progress(self.directory), note)

    def _lost(self, ledger: Ledger, before: int) -> set[int]:
        """The blocks with passages that the server does not have.

        It may well have more than was confirmed: what a worker wrote that then died, and what was deleted or changed
        before its block was taken again. Replaying the log sets that right.
        """
        if self.backend.count() == before + ledger.passages:
            return set()
        held, row, lost = set(self.backend.ids()), ledger.first, set()
        while chunk := self.store.scan(row, self.chunk, self.generation.base_seq):
            lost |= {ledger.block_of(at) for at, passage in chunk if passage.id not in held}
            row = chunk[-1][0]
        return lost
