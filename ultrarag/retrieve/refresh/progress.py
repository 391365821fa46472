"""A refresh that runs: how far it is, told to whoever asks, and ended by another thread."""

from __future__ import annotations

import logging
import math
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ultrarag.errors import StoppedError
from ultrarag.retrieve.build import end_build
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.generation import Progress

logger = logging.getLogger("ultrarag")

#: Seconds between two calls of `on_progress`.
INTERVAL = 1.0
#: Told what `LiveIndex.status()["refresh"]` says.
OnProgress = Callable[[dict[str, Any]], object]


class Refreshing:
    """One call of `LiveIndex.refresh`, while it runs."""

    def __init__(self, core: Core, output: Path, isolate: bool = False, on_progress: OnProgress | None = None) -> None:
        self.isolate, self.cancelled = isolate, False
        self._core, self._output, self._on_progress = core, output, on_progress
        self._mutex, self._done = threading.Lock(), threading.Event()
        self._began = self._stage_began = time.monotonic()
        self._stage, self._step, self._steps = "prepare", 0, 0
        #: step and time at which the run of steps that goes on was first heard of
        self._first: tuple[int, float] | None = None
        #: step and value of the loss that was logged last in this run of steps
        self._loss: tuple[int, float] | None = None
        self._child: subprocess.Popen[str] | None = None

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell `on_progress` for a block, from a thread of its own: once a second, where something is new."""
        thread = threading.Thread(target=self._tell, name="ultrarag-refresh-progress", daemon=True)
        if self._on_progress is not None:
            thread.start()
        try:
            yield
        finally:
            self._done.set()
            if thread.is_alive():
                thread.join()

    def enter(self, stage: str) -> None:
        """Say that a stage begins; StoppedError where it must not, for the refresh was cancelled."""
        with self._mutex:
            if self.cancelled:
                raise self.stopped()
            self._stage, self._step, self._steps, self._first, self._loss = stage, 0, 0, None, None
            self._stage_began = time.monotonic()

    def step(self, step: int, steps: int, loss: float | None = None) -> bool:
        """Say how far the training is; whether it is to end. A run begins anew where the number of steps falls."""
        now = time.monotonic()
        if self._first is None or step < self._step or steps != self._steps:
            self._first, self._loss = (step, now), None
        if loss is not None and math.isfinite(loss):  # no JSON holds others
            self._loss = step, loss
        self._step, self._steps = step, steps
        return self.cancelled

    @contextmanager
    def training(self, child: subprocess.Popen[str]) -> Iterator[None]:
        """Say which process trains."""
        with self._mutex:
            self._child = child
            if self.cancelled:
                child.send_signal(signal.SIGINT)
        try:
            yield
        finally:
            self._child = None

    def cancel(self) -> bool:
        """Ask for the end; False where it is too late, for the new generation goes live now."""
        with self._mutex:
            if self._stage == "swap" or self._done.is_set():
                return False
            self.cancelled = True
            if (child := self._child) is not None:
                with suppress(ProcessLookupError):
                    child.send_signal(signal.SIGINT)  # a second one ends it at once
            building = self._stage == "build"
        if building:
            end_build(self._core)
        return True

    def stopped(self) -> StoppedError:
        """The error that ends it."""
        return StoppedError(
            f"the refresh was cancelled, and all that was done is kept in '{self._output}': refresh again with the "
            f"same arguments to go on"
        )

    def describe(self) -> dict[str, Any]:
        """Plain JSON values: stage, step, total, the loss that was logged last and at which step, seconds in the stage,
        seconds left of it; None where unknown.
        """
        step, steps, left = self._step, self._steps, None
        loss_step, loss = self._loss or (None, None)
        now = time.monotonic()
        if self._stage == "build":
            step, steps, left = self._built()
        elif (first := self._first) is not None and step > first[0]:
            left = (now - first[1]) / (step - first[0]) * (steps - step)
        return {
            "stage": self._stage,
            "step": step,
            "total": steps,
            "loss": loss,
            "loss_step": loss_step,
            "seconds": round(now - self._stage_began, 1),
            "seconds_left": None if left is None else round(left, 1),
            "seconds_in_all": round(now - self._began, 1),
            "output_dir": str(self._output),
            "isolated": self.isolate,
            "cancelled": self.cancelled,
        }

    def _built(self) -> tuple[int, int, float | None]:
        """Passages encoded, of how many, and the seconds that are left."""
        for generation in self._core.catalog.in_state("building"):
            found = Progress.read(self._core.layout.directory(generation.id)) or Progress()
            held, total = found.held, found.total
            left = found.seconds / held * (total - held) if held and total else None
            return held, total or 0, left
        return 0, 0, None

    def _tell(self) -> None:
        assert self._on_progress is not None
        told: tuple[Any, ...] = ()
        while True:
            done = self._done.wait(INTERVAL if told else 0)
            try:
                found = self.describe()
                if (new := (found["stage"], found["step"], found["loss_step"], found["cancelled"])) != told:
                    told = new
                    self._on_progress(found)
            except Exception as error:  # of the caller's function, or of an index that is closed meanwhile
                logger.warning("the progress of the refresh could not be told: %s: %s", type(error).__name__, error)
            if done:
                return
