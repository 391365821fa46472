"""Habit: a service that learns from its feedback by itself, when there is enough, and never past the gate."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from ultrarag.errors import UltraragError

if TYPE_CHECKING:
    from ultrarag.retrieve import LiveIndex
    from ultrarag.service.jobs import Job, Jobs

logger = logging.getLogger("ultrarag.service")

#: Seconds between two looks whether there is enough.
LOOK = 600.0


class Habit:
    """Begins a refresh from feedback when the schedule of the index says so (docs/feedback.md)."""

    def __init__(
        self, live: LiveIndex, jobs: Jobs, every: str, search: dict[str, Any] | None, look: float = LOOK
    ) -> None:
        """Nothing is begun before `start`.

        Args:
            every: hourly, daily or weekly.
            search: options of the gate's searches.
        """
        self._jobs, self._search, self._look = jobs, search, look
        self.schedule = live.schedule(every)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ultrarag-habit", daemon=True)
        self._mutex = threading.Lock()

    def start(self) -> None:
        """Look now and then, in a thread."""
        self._thread.start()

    def close(self) -> None:
        """Begin nothing more; a job that runs is not stopped here."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> bool:
        """Begin a refresh if one is due and none runs; return whether it was begun."""
        found = self.schedule.due()
        if not found.ready or found.rows is None or self._jobs.running is not None:
            logger.info("learning: %s", "a job is running" if found.ready else found.reason)
            return False
        with self._mutex:  # it may end before its beginning is noted
            job = self._jobs.start({"train_data": "feedback", "effort": "auto", "search": self._search}, {})
            self.schedule.begun(found.rows, job=job.id)
        logger.info("learning: job %s begins; %s", job.id, found.reason)
        return True

    def ended(self, job: Job) -> None:
        """Remember how a job of ours ended: what was learned is not new any more; a refusal asks for twice as much.

        It may have begun before a restart, or in another worker.
        """
        with self._mutex:
            if job.state in ("done", "refused") and job.id == self.schedule.state()["job"]:
                self.schedule.ended(job.state == "done")

    def _run(self) -> None:
        while not self._stopped.wait(self._look):
            try:
                self.look()
            except UltraragError as error:
                logger.warning("learning: %s", error)
            except Exception:
                logger.exception("learning failed; it is tried again in %d s", self._look)
