"""The feedback of a live index: searches that are remembered, what people did with their hits, rows to learn from."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ultrarag.errors import UsageError
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.feedback import (
    FILE,
    FeedbackLog,
    Position,
    Rules,
    Schedule,
    TrainingRows,
    Watch,
    estimate,
    freeze,
    training_rows,
    watch,
)
from ultrarag.retrieve.search import Hits

#: What a refresh takes in place of training data: the rows that feedback gives.
FROM_FEEDBACK = "feedback"
#: Seconds between two looks for what is too old to be kept.
EXPIRY = 3600.0


class Signals:
    """What `LiveIndex` offers of feedback (docs/feedback.md)."""

    #: where the log lies; None: in the index. The workers of a service, with a mirror each, share that of the first
    feedback_folder: Path | None = None
    #: opened when it is first used; an index that remembers nothing has no such file
    _log: FeedbackLog | None = None
    _log_lock: threading.Lock
    #: when what is too old was last looked for (time.monotonic)
    _looked: float

    @property
    def _core(self) -> Core:
        raise NotImplementedError

    @property
    def feedback_log(self) -> FeedbackLog:
        """Queries and events beside the index, made when it is first used.

        What is too old is deleted then, and once an hour.

        Raises:
            IndexStateError: the index is closed, or can only be read.
        """
        _ = self._core.live  # says that the index was closed
        self._core.check_writable()
        with self._log_lock:
            if self._log is None:
                self._log, self._looked = FeedbackLog(self._feedback_root / FILE), -math.inf
            if time.monotonic() - self._looked > EXPIRY:
                self._looked = time.monotonic()
                self._log.expire()
            return self._log

    @property
    def _feedback_root(self) -> Path:
        return self._core.layout.root if self.feedback_folder is None else self.feedback_folder

    @property
    def has_feedback(self) -> bool:
        """Whether anything was ever remembered; looking makes no file."""
        return (self._feedback_root / FILE).exists()

    def feedback(
        self,
        query_id: str,
        passage_id: str | None = None,
        action: str = "",
        *,
        client: str | None = None,
        event_id: str | None = None,
        at: float | None = None,
    ) -> None:
        """Remember what somebody did with the hits of a search; durable when it returns.

        Args:
            query_id: `Hits.query_id` of a search with `log=True`.
            passage_id: the passage it is about; None where it is about the whole answer.
            action: "click", "cite" (an answer used it), "relevant", "not_relevant", "unsure" (takes a vote back);
                "answer_up", "answer_down".
            client: who did it; default: whoever searched. Kept as a keyed hash.
            event_id: an event that is sent again with the same id changes nothing.
            at: seconds since 1970; default: now.

        Raises:
            UsageError: for an unknown action or query, and a click or citation of what was not shown.
        """
        self.feedback_log.add(query_id, action, passage_id, client=client, event_id=event_id, at=at)

    def training_rows(self, since: float | None = None, rules: Rules | None = None, verify: Any = None) -> TrainingRows:
        """What the feedback teaches, by rules that doubt (docs/feedback.md): rows, held-out labels, and a report.

        Args:
            since: only searches, or events, since then (seconds since 1970).
            rules: thresholds; default: Rules(). Where eta is None, it is estimated from the whole log.
            verify: called with (query, text) pairs of citations that nothing else confirms; says of each whether it is
                relevant. Default: these are not used.
        """
        log, rules, told = self.feedback_log, Rules() if rules is None else rules, {}
        if isinstance(rules, Rules) and rules.eta is None:
            found = self.position_bias(rules)
            rules = replace(rules, eta=found.eta)
            told = {"clicks that tell the position bias": found.clicks}
        made = training_rows(log.queries(since), self._core.store.get, rules, verify)
        made.report |= {"position bias": round(float(rules.eta or 0.0), 2), **told}
        return made

    def position_bias(self, rules: Rules | None = None) -> Position:
        """How fast examinations fall with the rank, by what one query found at several ranks; 1 until that tells it."""
        log, rules = self.feedback_log, rules or Rules()
        return estimate(log.queries(clicked=True), log.clicked(), rules.most_per_client)

    def schedule(self, every: str = "daily", **thresholds: int) -> Schedule:
        """Decides when a refresh from feedback may begin; see `ultrarag.retrieve.feedback.Schedule`."""
        return Schedule(self.feedback_log, self.training_rows, every, **thresholds)

    def watch(self, now: float | None = None) -> Watch | None:
        """Compare what people do with the hits since the last swap with the week before it (docs/feedback.md).

        Args:
            now: seconds since 1970; default: now.

        Returns:
            None where nothing was swapped within a day, or an earlier version of this library did it.
        """
        _ = self._core.live  # says that the index was closed
        since, previous = self._core.catalog.live_since(), self._core.catalog.in_state("previous")
        if since is None or not previous:
            return None
        log = self.feedback_log if self.has_feedback and not self._core.reading else None
        now = time.time() if now is None else now
        return watch(log, self._core.catalog.live().id, previous[0].id, since, now)

    def _remember(
        self, queries: Sequence[str], found: Sequence[Hits], options: Mapping[str, Any], client: str | None
    ) -> None:
        asked = [
            (hits.query_id, query, [(hit.id, hit.score) for hit in hits])
            for query, hits in zip(queries, found, strict=True)
            if query.strip()
        ]
        if asked:
            answered, log = found[0], self.feedback_log
            log.remember(
                asked,
                fingerprint=answered.fingerprint,
                generation=answered.generation,
                options=options,
                client=client,
            )

    def _from_feedback(self, output: Path, gate: Any, eval_data: Any, arguments: dict[str, Any]) -> tuple[Any, Any]:
        """(training data, gate) of a refresh from feedback; its arguments get what such rows need."""
        from ultrarag.retrieve.refresh import is_begun

        begun = is_begun(output) and not arguments.get("overwrite_output_dir")
        rows, judged = freeze(self._feedback_root, output, begun, self.training_rows)
        return self._judged(str(rows), judged, gate, eval_data, arguments)

    @staticmethod
    def _judged(rows: Any, judged: Any, gate: Any, eval_data: Any, arguments: dict[str, Any]) -> tuple[Any, Any]:
        """(training data, gate), judged by held-out votes where nothing else was given."""
        if gate is True and eval_data is None:
            if not judged[1]:
                raise UsageError(
                    "no held-out query has votes ('relevant', 'not_relevant') to judge the refresh by: label some "
                    "(a fifth of all queries is held out), or give eval_data, gate=(queries, qrels), or gate=False"
                )
            gate = judged
        # old rows come again with the new ones; held-out queries are apart by query, and may share documents
        arguments.setdefault("allow_seen_data", True)
        arguments.setdefault("shared_eval_data", "warn")
        return rows, gate

    def _close_log(self) -> None:
        with self._log_lock:
            if self._log is not None:
                self._log.close()
                self._log = None
