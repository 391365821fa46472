"""Refreshing a live index: fine-tune its encoder, build, gate and swap, in one call that a crash only interrupts."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ultrarag.checkpoint import MANIFEST
from ultrarag.errors import GateError, IndexStateError, UsageError
from ultrarag.evaluation import Measured, Verdict
from ultrarag.finetune import read_measured
from ultrarag.retrieve.bridge import BridgeTerms, read_report
from ultrarag.retrieve.build import build_generation
from ultrarag.retrieve.core import REFRESHING, Core
from ultrarag.retrieve.generation import Generation
from ultrarag.retrieve.refresh.judging import Questions, compare_encoders, measured
from ultrarag.retrieve.refresh.learning import Learning
from ultrarag.retrieve.refresh.plan import Plan, RefreshTerms
from ultrarag.retrieve.refresh.progress import Refreshing
from ultrarag.retrieve.refresh.report import (
    JSON_FILE,
    STATE_FILE,
    RefreshReport,
    RefreshState,
    write_report,
)
from ultrarag.retrieve.refresh.tracking import track
from ultrarag.retrieve.swap import Gate, SwapTerms, swap

logger = logging.getLogger("ultrarag")


def refresh(
    core: Core,
    train_data: Any,
    eval_data: Any,
    output_dir: str | os.PathLike[str],
    terms: RefreshTerms,
    arguments: dict[str, Any],
    refreshing: Refreshing | None = None,
) -> RefreshReport:
    """See `LiveIndex.refresh`."""
    refreshing = refreshing or Refreshing(core, Path(output_dir))
    work = _Refresh(Plan(core, train_data, eval_data, Path(output_dir), terms, arguments), refreshing)
    if (done := work.finished()) is not None:
        return done
    core.store.set_meta(**{REFRESHING: str(work.output.absolute())})
    work.begin()
    try:
        work.learn()
        work.build()
        return work.swap()
    except KeyboardInterrupt as stop:
        if refreshing.cancelled:  # the training's own way to end
            raise refreshing.stopped() from stop
        from ultrarag.finetune import Interrupted

        raise Interrupted(
            f"stopped, and all that was done is kept in '{work.output}': refresh again with the same arguments to go on"
        ) from stop


class _Refresh:
    """One refresh, from where it stands."""

    state: RefreshState

    def __init__(self, plan: Plan, refreshing: Refreshing) -> None:
        self.plan, self.refreshing = plan, refreshing
        self.core, self.output, self.terms = plan.core, plan.output, plan.terms

    def finished(self) -> RefreshReport | None:
        """Return the report when this very refresh was carried through, and its generation is live."""
        path = self.output / JSON_FILE
        if (self.output / STATE_FILE).exists() or not path.exists() or self.plan.arguments.get("overwrite_output_dir"):
            return None
        report = RefreshReport.read(path)
        if report.request != asdict(self.plan.request):
            return None  # `begin` says what is in the way
        if report.lineage["fingerprint"] != self.core.live.fingerprint:
            raise IndexStateError(
                f"'{self.output}' holds this refresh, finished: its generation {report.generation} is not the live one "
                f"any more; roll back to it, or give another output_dir to refresh anew"
            )
        logger.info("'%s' holds this refresh, finished; nothing is left to do", self.output)
        return report

    def begin(self) -> None:
        """Take up what was begun in the output folder, or begin."""
        found = RefreshState.read(self.output)
        if found is not None and self._goes_on(found):
            self.state = found
            return
        from ultrarag.finetune import claim_output_dir

        overwrite = found is not None or bool(self.plan.arguments.get("overwrite_output_dir"))
        if overwrite or not (self.output / MANIFEST).exists():  # else the folder is the first thing to say
            self.plan.refuse_seen()
            overlap = self.plan.look_for_leaks()
        else:
            overlap = None
        if not overwrite and (self.output / JSON_FILE).exists():
            raise UsageError(
                f"'{self.output}' holds a finished model of an earlier run, a refresh that was asked for differently: "
                "give another output_dir, or overwrite_output_dir=True (--overwrite_output_dir) to start anew"
            )
        claim_output_dir(self.output, overwrite, logger.info)
        for name in (JSON_FILE, STATE_FILE):
            (self.output / name).unlink(missing_ok=True)
        shutil.rmtree(self.plan.ladder, ignore_errors=True)  # vectors and rungs of one that was asked for differently
        self.state = RefreshState(self.plan.request, self.plan.parent.fingerprint, self.plan.parent.id, overlap=overlap)
        self.state.save(self.output)

    def learn(self) -> None:
        """Fine-tune the live generation's own copy of its checkpoint as the effort says; what was cut off goes on."""
        if self.state.trained is not None:
            return
        with self._timed("finetune"):
            self.state.trained = self._learning.learn()
        self.state.save(self.output)

    @property
    def _learning(self) -> Learning:
        return Learning(self.plan, self.state, self.refreshing)

    def build(self) -> None:
        """Build the shadow generation; a build that was cut off goes on."""
        if self.state.generation is not None and self._generation().state != "retired":
            return
        with self._timed("build"):
            try:
                built = build_generation(
                    self.core, self.output, trust_remote_code=self.plan.trusted, bridge=self._bridge_terms()
                )
            except IndexStateError as error:
                if self.refreshing.cancelled:  # so its builder was ended
                    raise self.refreshing.stopped() from error
                raise
            self.state.generation = built.id
            self.state.bridge = read_report(self.core.layout.directory(built.id)) if self.terms.bridge else None
        self.state.save(self.output)

    def _bridge_terms(self) -> BridgeTerms | None:
        if not self.terms.bridge or self.plan.asked is None:
            return None
        search = {name: value for name, value in self.plan.search.items() if name != "ignore_identical_ids"}
        return BridgeTerms(self.plan.asked.queries, self.plan.asked.qrels, self.terms.metric, search)

    def swap(self) -> RefreshReport:
        """Measure, decide and go live, unless that was done before the crash; then write the report."""
        generation = self._generation()
        refused: GateError | None = None
        if generation.state == "ready":
            try:
                with self._timed("swap"):
                    self._go_live(generation)
            except GateError as error:
                refused = error
        report = self._report(refused)
        write_report(report, self._shown(), self.output)
        self.core.store.set_meta(**{REFRESHING: ""})
        track(report, self.plan.settings.training.report_to, self._generation().encodes)
        if refused is not None:
            raise GateError(f"{refused}; see '{report.html}'") from refused
        shutil.rmtree(self.plan.ladder, ignore_errors=True)
        (self.output / STATE_FILE).unlink(missing_ok=True)
        return report

    def _go_live(self, generation: Generation) -> None:
        gate: Gate | None = None
        if self.plan.asked is not None and self.plan.asked.corpus is None:
            gate = (self.plan.asked.queries, self.plan.asked.qrels)
        elif self.plan.asked is not None:
            gate = self._compare_encoders(self.plan.asked)
        self._learning.check_guard()
        terms = SwapTerms(
            gate,
            self.terms.force,
            self.terms.metric,
            self.plan.search,
            self._note,
            refuse_any_fall=not generation.encodes,
        )
        swap(self.core, generation.id, terms)

    def _compare_encoders(self, asked: Questions) -> Verdict:
        plan = self.plan
        return compare_encoders(
            Path(plan.parent_checkpoint()),
            self.output,
            asked,
            self.terms.metric,
            plan.parent.precision,
            self.core.device,
            plan.ignoring,
            plan.trusted,
        )

    def _note(self, verdict: Verdict) -> None:
        """Keep what was measured before the flip: after a crash behind it, the old side can no longer be asked."""
        assert self.plan.asked is not None
        self.state.measured = measured(verdict, self.plan.asked, self.core.store).to_dict()
        self.state.save(self.output)

    def _report(self, refused: GateError | None) -> RefreshReport:
        assert self.state.trained is not None
        return RefreshReport.of(
            self.state,
            self._generation(),
            self.output,
            self.core.layout.root,
            self.core.store.count(),
            None if refused is None else str(refused),
            self._shown(),
        )

    def _shown(self) -> Measured | None:
        """What the gate measured; without a gate, what the fine-tuning measured on its evaluation data."""
        found = self.state.measured or read_measured(self.output)
        return Measured.from_dict(found) if found else None

    def _goes_on(self, found: RefreshState) -> bool:
        """Whether a state is that of this refresh; False when what is there is worth nothing, an error otherwise."""
        if self.plan.arguments.get("overwrite_output_dir"):
            return found.request == self.plan.request and self._same_parent(found)
        if different := self.plan.request.differences(found.request):
            if not self.plan.worth_keeping(found):
                return False
            raise UsageError(
                f"'{self.output}' holds a refresh that was begun with other {', '.join(different)}: give the same "
                f"to go on, overwrite_output_dir=True to start anew, or another output_dir"
            )
        if not self._same_parent(found):
            raise IndexStateError(
                f"the refresh in '{self.output}' began from the encoder {found.parent[:12]}, and the live one is "
                f"now {self.core.live.fingerprint[:12]}: give overwrite_output_dir=True to start anew, or another "
                "output_dir"
            )
        return True

    def _same_parent(self, found: RefreshState) -> bool:
        swapped = found.trained is not None and found.trained["fingerprint"] == self.core.live.fingerprint
        return swapped or found.parent == self.core.live.fingerprint

    def _generation(self) -> Generation:
        assert self.state.generation is not None
        return self.core.catalog.get(self.state.generation)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        self.refreshing.enter(stage)
        started = time.monotonic()
        try:
            yield
        finally:
            self.state.seconds[stage] = round(time.monotonic() - started, 3)
