"""Service: the open index with what serves it: threads, counters, jobs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrarag.errors import FingerprintError, UltraragError
from ultrarag.retrieve import Encoding, Hits, LiveIndex
from ultrarag.service.allocator import give_back
from ultrarag.service.faults import Fault, fault_of
from ultrarag.service.habit import Habit
from ultrarag.service.jobs import Job, Jobs
from ultrarag.service.load import Load
from ultrarag.service.metrics import Metrics
from ultrarag.service.pool import Pool
from ultrarag.service.settings import Settings
from ultrarag.service.watching import Watching

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder

logger = logging.getLogger("ultrarag.service")

#: Threads that search: they wait for the encoder most of the time, which takes them together.
SEARCH_THREADS = 32
#: Threads that write, list and swap; writes take turns anyway.
WRITE_THREADS = 8
#: Characters of a fingerprint that are enough to name it.
FEWEST_OF_FINGERPRINT = 12


class Service:
    """One index in service."""

    def __init__(self, live: LiveIndex, settings: Settings, reranker: Encoder | None = None) -> None:
        """Serve an index that is open; `close` leaves it open."""
        self.live, self.settings, self.reranker = live, settings, reranker
        if settings.feedback_dir is not None:
            live.feedback_folder = Path(settings.feedback_dir)
        self.started, self.stopping = time.time(), False
        self.searches = Pool("searches", SEARCH_THREADS, settings.limits.waiting)
        self.writes = Pool("writes", WRITE_THREADS, settings.limits.waiting)
        pools = (self.searches, self.writes)
        self.load = Load()
        self.watching = Watching(live, self.load)
        self.metrics = Metrics(live.status, lambda: {pool.name: pool.pending for pool in pools}, self.watching.look)
        self.jobs = Jobs(live, settings.work / "jobs", self._count, settings.report_to)
        self.habit = self._habit()
        self._reranking = threading.Lock()  # one forward at a time, as of the index's encoder

    async def search(self, queries: Sequence[str], options: Mapping[str, Any]) -> list[Hits]:
        """Search queries together, on one generation, with the service's weights where none are given."""
        chosen = {name: value for name, value in options.items() if value is not None}
        self.check_most("k", chosen.get("k", 10), self.settings.limits.k)
        self.check_most("candidates", chosen.get("candidates", 0), 100 * self.settings.limits.k)
        self.check_most("queries", len(queries), self.settings.limits.queries)
        if self.settings.weights is not None and not {"weights", "heads"} & set(chosen):
            chosen["weights"] = self.settings.weights
        found = await self._timed(list(queries), chosen)
        for hits in found:
            self.metrics.answers.labels(str(hits.generation)).inc()
            self.metrics.hits.inc(len(hits))
        return found

    async def _timed(self, queries: list[str], options: Mapping[str, Any]) -> list[Hits]:
        began = time.perf_counter()
        try:
            found = await self.searches.run(self.live.search_many, queries, **options)
        except Exception as error:
            if fault_of(error, self.stopping).status >= 500:
                self.load.failed(time.perf_counter() - began)
            raise
        if found:
            self.load.answered(found[0].generation, len(found), time.perf_counter() - began)
        return found

    @property
    def remembers(self) -> bool:
        """Whether searches can be remembered: not in an index open for reading alone, nor with a damaged log."""
        if self.live.status()["read_only"]:
            return False
        try:
            return bool(self.live.feedback_log)
        except UltraragError as error:  # who only searches is answered all the same
            logger.warning("searches are not remembered: %s", error)
            return False

    def check_most(self, what: str, asked: int, most: int) -> None:
        """Refuse more than the limits allow."""
        if asked > most:
            raise Fault(413, f"{what}: {asked:,} asked for, and this service takes at most {most:,} at a time")

    def check_model(self, name: str, fingerprint: str) -> None:
        """Refuse a request that names another model than the live one.

        Raises:
            FingerprintError: it names another fingerprint.
            Fault: 404, it names something else.
        """
        wanted = name.strip()
        if wanted in ("", "default", "ultrarag", *self.settings.model_names):
            return
        lowered = wanted.lower()
        if len(lowered) >= FEWEST_OF_FINGERPRINT and all(c in "0123456789abcdef" for c in lowered):
            if fingerprint.startswith(lowered):
                return
            raise FingerprintError(
                f"the request names the model {lowered[:12]}, and the live one is {fingerprint[:12]}: vectors of the "
                "two cannot be compared; encode what you keep anew under the live model's fingerprint"
            )
        known = ", ".join(["default", *self.settings.model_names, fingerprint[:12]])
        raise Fault(404, f"there is no model '{wanted[:100]}'; known: {known}")

    def relevance(
        self, query: str, texts: Sequence[str], model: str = "", raw: bool = False
    ) -> tuple[np.ndarray, str, int]:
        """Score texts for a query, by the reranker where there is one.

        Returns:
            (texts,) float32: of a cross-encoder from 0 to 1, or its logits where `raw`; else the encoder's similarity;
            the fingerprint of what scored; and the tokens read.
        """
        if self.reranker is not None:
            self.check_model(model, self.reranker.fingerprint)
            with self._reranking:
                pairs = [(query, text) for text in texts]
                scores = self.reranker.score(pairs, normalize=not raw, progress=False)
            read = sum(len(ids) for ids in self.reranker.tokenize_pairs(pairs).ids)
            return scores, self.reranker.fingerprint, read
        with self.live.encoding() as lent:
            self.check_model(model, lent.fingerprint)
            asked, held = lent.encode([query], "query"), lent.encode(texts, "passage")
            return lent.similarity(asked, held)[0], lent.fingerprint, tokens(lent, [query, *texts])

    def _count(self, job: Job) -> None:
        self.metrics.jobs.labels(job.kind, job.state).inc()
        give_back()  # a second model was loaded meanwhile
        if job.state == "done":
            self.metrics.swaps.labels("refresh").inc()
        if self.habit is not None:
            self.habit.ended(job)

    def _habit(self) -> Habit | None:
        if self.settings.learn is None:
            return None
        search = None if self.settings.weights is None else {"weights": dict(self.settings.weights)}
        return Habit(self.live, self.jobs, self.settings.learn, search)

    def stop(self) -> None:
        """Refuse new requests and stop jobs, which can be taken up again, while what has begun goes on."""
        self.stopping = True
        self.jobs.stop()

    def close(self) -> None:
        """Stop, and let jobs and threads finish; the index stays open."""
        self.stop()
        if self.habit is not None:
            self.habit.close()
        self.jobs.close()
        self.searches.close()
        self.writes.close()


def tokens(lent: Encoding, texts: Sequence[str]) -> int:
    """The tokens that an encoder reads of texts."""
    return sum(len(ids) for ids in lent.tokenize(texts).ids)
