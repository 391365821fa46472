"""Jobs: refreshes that run in the background; what they have done is on the disk, so that a crash only interrupts."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ultrarag.errors import GateError, IndexStateError, StoppedError, UltraragError
from ultrarag.io import OwnerLock, read_owner, write_bytes, write_json
from ultrarag.retrieve import LiveIndex
from ultrarag.service.faults import Fault

logger = logging.getLogger("ultrarag.service")

JOB_FILE, EVENTS_FILE, CANCEL_FILE = "job.json", "events.jsonl", "cancel"
#: States in which nothing more happens by itself; an interrupted or cancelled job can be taken up again.
ENDED = ("done", "refused", "failed", "cancelled", "interrupted")
RESUMABLE = ("cancelled", "interrupted", "failed")
#: Seconds to wait while another worker begins a job.
PATIENCE = 10.0
#: Seconds between two looks at how far a job is.
PULSE = 0.5
#: Seconds between two events within a stage.
BETWEEN = 2.0
#: What an event tells of `LiveIndex.status()["refresh"]`.
PROGRESS = ("stage", "step", "total", "loss", "loss_step", "seconds", "seconds_left", "seconds_in_all")


@dataclass(frozen=True)
class Job:
    """A refresh that was asked for."""

    id: str
    #: running, done, refused (by the gate), failed, cancelled, or interrupted (the service ended)
    state: str
    #: seconds since 1970
    created: float
    #: what was asked, without the rows
    request: dict[str, Any]
    kind: str = "refresh"
    #: seconds since 1970, of the last start
    started: float | None = None
    ended: float | None = None
    #: how far it is: stage, step and steps, seconds left
    progress: dict[str, Any] = field(default_factory=dict)
    #: the report of a refresh
    report: dict[str, Any] | None = None
    error: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Job:
        """Read a job; one that no process works on is interrupted, whatever it said last.

        Raises:
            Fault: 404, there is none.
        """
        try:
            found = cls(**json.loads((folder / JOB_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise Fault(404, f"there is no job '{folder.name}'") from error
        if found.state == "running" and read_owner(folder) is None:
            return replace(found, state="interrupted")
        return found


class Jobs:
    """The jobs of an index, one at a time."""

    def __init__(
        self,
        live: LiveIndex,
        folder: Path,
        on_end: Callable[[Job], None] = lambda job: None,
        report_to: Sequence[str] = (),
    ) -> None:
        """Keep jobs in a folder.

        Args:
            on_end: is told of each job that this process has ended.
            report_to: where the refreshes that begin here report to; a job that goes on reports where it began.
        """
        self._live, self._folder, self._on_end = live, folder, on_end
        self._reporting = {"report_to": list(report_to)} if report_to else {}
        self._mutex = threading.Lock()
        self._thread: threading.Thread | None = None
        self._current: Job | None = None
        self._cancelled = self._closing = False
        self._noted = 0.0

    @property
    def running(self) -> Job | None:
        """The job that this process works on."""
        return self._current

    def folder(self, id: str) -> Path:
        """Where a job keeps what it makes; Fault 404 for what can be no job's id."""
        if not id or not all(c.isalnum() or c == "-" for c in id):
            raise Fault(404, f"there is no job '{id[:100]}'")
        return self._folder / id

    def all(self) -> list[Job]:
        """All jobs, the newest first."""
        found = []
        for folder in self._folder.iterdir() if self._folder.is_dir() else ():
            with suppress(Fault):  # one that was begun when the machine went down, or is a newer version's
                found.append(Job.read(folder))
        return sorted(found, key=lambda job: (job.created, job.id), reverse=True)

    def get(self, id: str) -> Job:
        """One job; Fault 404 where there is none."""
        return Job.read(self.folder(id))

    def start(self, request: Mapping[str, Any], files: Mapping[str, list[Any]]) -> Job:
        """Begin a refresh in the background.

        Args:
            request: keyword arguments of `LiveIndex.refresh`.
            files: rows that came with the request, by the name of the file that they are written to; the request
                names such a file as {"file": NAME}.

        Raises:
            IndexStateError: one is running.
        """
        with self._turn():
            self._refuse_second()
            id = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
            folder = self.folder(id)
            folder.mkdir(parents=True)
            for name, rows in files.items():
                write_bytes(folder / name, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
            return self._begin(Job(id, "running", time.time(), {**request, **self._reporting}))

    def resume(self, id: str) -> Job:
        """Go on with a job that was cut off; what it had done is not done again.

        Raises:
            IndexStateError: it has not been cut off, or another one is running.
        """
        with self._turn():
            return self._resume(id)

    def _resume(self, id: str) -> Job:
        job = self.get(id)
        if job.state not in RESUMABLE:
            raise IndexStateError(f"job '{id}' is {job.state}; only one that was cut off can go on")
        self._refuse_second()
        (self.folder(id) / CANCEL_FILE).unlink(missing_ok=True)
        return self._begin(replace(job, state="running", error=None, ended=None))

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Begin jobs one after another, also with other workers: who looks whether one runs must not be overtaken."""
        with self._mutex:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = OwnerLock(self._folder, patience=PATIENCE)
            try:
                yield
            finally:
                lock.release()

    def force(self, id: str, reason: str) -> Job:
        """Let the generation of a job that the gate refused go live all the same; the reason is kept in the request.

        Raises:
            IndexStateError: the gate has not refused it, or another one is running.
        """
        with self._turn():
            job = self.get(id)
            if job.state != "refused":
                raise IndexStateError(f"job '{id}' is {job.state}; only one that the gate refused can be forced")
            self._refuse_second()
            request = {**job.request, "force": True, "reason": reason}
            return self._begin(replace(job, state="running", error=None, ended=None, request=request))

    def cancel(self, id: str) -> Job:
        """Ask a job to stop; it can be taken up again. Returns it as it is now."""
        job = self.get(id)
        if job.state != "running":
            raise IndexStateError(f"job '{id}' is {job.state}; it does not run")
        (self.folder(id) / CANCEL_FILE).touch()  # it may be another worker's
        return job

    def remove(self, id: str) -> None:
        """Delete a job that has ended, with what it made; a generation that it made stays in the index."""
        job = self.get(id)
        if job.state == "running":
            raise IndexStateError(f"job '{id}' is running; cancel it first")
        shutil.rmtree(self.folder(id))

    def recover(self, resume: bool) -> None:
        """Note what a crash cut off, and go on with the newest of it where that is wanted, and no other worker has."""
        if not self._cut():  # then nothing is written
            return
        with self._turn():
            for job in (cut := self._cut()):
                write_json(self.folder(job.id) / JOB_FILE, asdict(job))
                logger.warning("job %s was cut off; POST /v1/jobs/%s/resume goes on with it", job.id, job.id)
            if cut and resume and all(job.state != "running" for job in self.all()):
                self._resume(cut[0].id)

    def _cut(self) -> list[Job]:
        return [job for job in self.all() if job.state == "interrupted"]

    def stop(self) -> None:
        """Ask the job that runs to end, so that it can be taken up again; a signal may do so."""
        self._closing = True

    def close(self) -> None:
        """Stop the job that runs, and wait until it has."""
        self.stop()
        if (thread := self._thread) is not None:
            thread.join()

    def events(self, id: str, after: int = 0) -> list[dict[str, Any]]:
        """What happened to a job since an event, each with its number."""
        path = self.folder(id) / EVENTS_FILE
        found, lines = [], path.read_bytes().splitlines() if path.exists() else []
        for number, line in enumerate(lines[after:], after + 1):
            with suppress(ValueError):  # of one that a crash cut through
                found.append({"id": number, **json.loads(line)})
        return found

    # ---- the thread

    def _refuse_second(self) -> None:
        for job in self.all():
            if job.state == "running":
                raise IndexStateError(f"job '{job.id}' is running; wait for it, or cancel it")

    def _begin(self, job: Job) -> Job:
        folder = self.folder(job.id)
        lock = OwnerLock(folder)
        self._current, self._cancelled = replace(job, started=time.time(), progress={}), False
        self._save()
        self._tell("started")
        self._thread = threading.Thread(target=self._work, args=(lock,), name=f"ultrarag-job-{job.id}", daemon=True)
        self._thread.start()
        return self._current

    def _work(self, lock: OwnerLock) -> None:
        assert self._current is not None
        job, done = self._current, threading.Event()
        watcher = threading.Thread(target=self._watch, args=(job.id, done), daemon=True)
        watcher.start()
        ended: dict[str, Any]
        try:
            report = self._live.refresh(**self._arguments(job))
            ended = {"state": "done", "report": report.to_dict()}
        except GateError as error:
            ended = {"state": "refused", "error": str(error)}
        except StoppedError as error:
            ended = {"state": "interrupted" if self._closing else "cancelled", "error": str(error)}
        except UltraragError as error:
            ended = {"state": "failed", "error": str(error)}
        except BaseException as error:
            logger.exception("job %s failed", job.id)
            ended = {"state": "failed", "error": f"{type(error).__name__}; see the service's log"}
        done.set()
        watcher.join()
        self._current = replace(self._current, ended=time.time(), **ended)
        self._tell(ended["state"], error=ended.get("error"))  # first: who sees the state has seen all events
        self._save()
        ended_job, self._current = self._current, None
        lock.release()
        self._on_end(ended_job)

    def _arguments(self, job: Job) -> dict[str, Any]:
        """Keyword arguments of `LiveIndex.refresh`, with the job's own files in place of their names."""
        folder = self.folder(job.id)
        found: dict[str, Any] = {
            name: str(folder / value["file"]) if isinstance(value, dict) and set(value) == {"file"} else value
            for name, value in job.request.items()
        }
        if isinstance(found.get("gate"), dict):
            found["gate"] = (found["gate"]["queries"], found["gate"]["qrels"])
        found.pop("reason", None)
        return {**found, "output_dir": str(folder / "model"), "isolate": True, "on_progress": self._note}

    def _watch(self, id: str, done: threading.Event) -> None:
        """Stop the job when it is asked to, by whichever worker, or when the service stops."""
        while not done.wait(PULSE):
            if not self._cancelled and (self._closing or (self.folder(id) / CANCEL_FILE).exists()):
                self._cancelled = self._live.cancel_refresh()

    def _note(self, found: Mapping[str, Any]) -> None:
        """Keep how far the job is: each stage, and in between as often as somebody may want to look."""
        assert self._current is not None
        new = found.get("stage") != self._current.progress.get("stage")
        if new or time.monotonic() - self._noted >= BETWEEN:
            self._noted = time.monotonic()
            self._current = replace(self._current, progress={name: found.get(name) for name in PROGRESS})
            self._save()
            self._tell("progress", **self._current.progress)

    def _save(self) -> None:
        assert self._current is not None
        write_json(self.folder(self._current.id) / JOB_FILE, asdict(self._current))

    def _tell(self, event: str, **values: Any) -> None:
        assert self._current is not None
        entry = {"event": event, "time": round(time.time(), 3), **{k: v for k, v in values.items() if v is not None}}
        with open(self.folder(self._current.id) / EVENTS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def server_sent(events: list[dict[str, Any]]) -> Iterator[str]:
    """Events in the form of text/event-stream."""
    for entry in events:
        yield f"id: {entry['id']}\nevent: {entry['event']}\ndata: {json.dumps(entry)}\n\n"
