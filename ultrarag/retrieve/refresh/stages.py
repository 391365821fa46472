"""Refreshing a live index: fine-tune its encoder, build, gate and swap, in one call that a crash only interrupts."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ultrarag.checkpoint import MANIFEST, read_manifest
from ultrarag.errors import DataError, GateError, IndexStateError, UsageError
from ultrarag.evaluation import Measured, Verdict
from ultrarag.finetune import read_measured
from ultrarag.retrieve.build import build_generation
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.generation import Generation
from ultrarag.retrieve.refresh.judging import Questions, compare_encoders, measured, questions
from ultrarag.retrieve.refresh.report import JSON_FILE, STATE_FILE, RefreshReport, RefreshState, Request, write_report
from ultrarag.retrieve.swap import Gate, SwapTerms, swap

#: Arguments of `finetune` that a refresh decides itself.
_OWN = ("model_name_or_path", "model", "adapter", "resume_from_checkpoint")
#: How a run is stored, and nothing of what it computes: these may differ when a refresh is taken up again.
_INCIDENTAL = ("overwrite_output_dir", "cache_path", "disable_tqdm", "allow_seen_data")

logger = logging.getLogger("ultrarag")


@dataclass(frozen=True)
class RefreshTerms:
    """On which terms the new generation goes live."""

    gate: bool | Gate = True
    force: bool = False
    metric: str = "nDCG@10"
    #: options of `LiveIndex.evaluate` and `search` for the gate
    search: Mapping[str, Any] | None = None


def refresh(
    core: Core,
    train_data: Any,
    eval_data: Any,
    output_dir: str | os.PathLike[str],
    terms: RefreshTerms,
    arguments: dict[str, Any],
) -> RefreshReport:
    """See `LiveIndex.refresh`."""
    work = _Refresh(core, train_data, eval_data, Path(output_dir), terms, arguments)
    if (done := work.finished()) is not None:
        return done
    work.begin()
    try:
        work.train()
        work.build()
        return work.swap()
    except KeyboardInterrupt as stop:
        from ultrarag.finetune import Interrupted

        raise Interrupted(
            f"stopped, and all that was done is kept in '{work.output}': refresh again with the same arguments to go on"
        ) from stop


class _Refresh:
    """One refresh, from where it stands."""

    state: RefreshState

    def __init__(
        self,
        core: Core,
        train_data: Any,
        eval_data: Any,
        output: Path,
        terms: RefreshTerms,
        arguments: dict[str, Any],
    ) -> None:
        """Check all that can be checked before hours of training."""
        self.core, self.output, self.terms = core, output, terms
        self.train_data, self.eval_data, self.arguments = train_data, eval_data, arguments
        self.parent = core.live.generation
        self._check_arguments()
        self.request = Request.of(
            train_data, eval_data, {name: value for name, value in arguments.items() if name not in _INCIDENTAL}
        )
        self.asked = questions(self.core.store, terms.gate, eval_data)
        self.search = self._search_options()

    def finished(self) -> RefreshReport | None:
        """Return the report when this very refresh was carried through, and its generation is live."""
        path = self.output / JSON_FILE
        if (self.output / STATE_FILE).exists() or not path.exists() or self.arguments.get("overwrite_output_dir"):
            return None
        report = RefreshReport.read(path)
        if report.request != asdict(self.request):
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

        overwrite = found is not None or bool(self.arguments.get("overwrite_output_dir"))
        if overwrite or not (self.output / MANIFEST).exists():  # else the folder is the first thing to say
            self._refuse_seen()
        claim_output_dir(self.output, overwrite, logger.info)
        for name in (JSON_FILE, STATE_FILE):
            (self.output / name).unlink(missing_ok=True)
        self.state = RefreshState(self.request, self.parent.fingerprint, self.parent.id)
        self._save()

    def _refuse_seen(self) -> None:
        """Refuse rows that the live encoder, or one before it, was trained on.

        Raises:
            DataError: they are too many, and `allow_seen_data` is not given.
        """
        from ultrarag.finetune import read_data, seen_before

        manifest = read_manifest(Path(self._parent_checkpoint()))
        parent = manifest.training if manifest else None
        if parent is None or self.settings.incremental.allow_seen_data:
            return
        seen = seen_before(read_data(self.settings), parent)
        if seen and seen.too_many:
            raise DataError(
                f"{seen}: give the new rows alone as train_data and the old ones as replay_data, or say "
                "allow_seen_data=True (--allow_seen_data)"
            )

    def train(self) -> None:
        """Fine-tune the live generation's own copy of its checkpoint; a run that was cut off goes on."""
        if self.state.trained is not None:
            return
        from ultrarag.finetune import finetune

        with self._timed("finetune"):
            result = finetune(self._parent_checkpoint(), self.train_data, self.output, **self._for_finetune())
        self.state.trained = {name: getattr(result, name) for name in ("fingerprint", "steps", "loss", "metrics")}
        self.state.trained["notes"] = list(result.notes)
        self._save()

    def build(self) -> None:
        """Build the shadow generation; a build that was cut off goes on."""
        if self.state.generation is not None and self._generation().state != "retired":
            return
        with self._timed("build"):
            self.state.generation = build_generation(self.core, self.output, trust_remote_code=self._trusted).id
        self._save()

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
        if refused is not None:
            raise GateError(f"{refused}; see '{report.html}'") from refused
        (self.output / STATE_FILE).unlink(missing_ok=True)
        return report

    def _go_live(self, generation: Generation) -> None:
        gate: Gate | None = None
        if self.asked is not None and self.asked.corpus is None:
            gate = (self.asked.queries, self.asked.qrels)
        elif self.asked is not None:
            gate = self._compare_encoders(self.asked)
        terms = self.terms
        swap(self.core, generation.id, SwapTerms(gate, terms.force, terms.metric, self.search, self._note))

    def _compare_encoders(self, asked: Questions) -> Verdict:
        precision, device = self.parent.precision, self.core.device
        ignore = bool(self.search.get("ignore_identical_ids", False))
        folders = Path(self._parent_checkpoint()), self.output
        return compare_encoders(*folders, asked, self.terms.metric, precision, device, ignore, self._trusted)

    @property
    def _trusted(self) -> bool:
        """Whether code that comes with the live encoder, and so with the one trained from it, may be run."""
        return self.core.live.encoder.trust_remote_code

    def _note(self, verdict: Verdict) -> None:
        """Keep what was measured before the flip: after a crash behind it, the old side can no longer be asked."""
        assert self.asked is not None
        self.state.measured = measured(verdict, self.asked, self.core.store).to_dict()
        self._save()

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
        if self.arguments.get("overwrite_output_dir"):
            return found.request == self.request and self._same_parent(found)
        if different := self.request.differences(found.request):
            if not self._worth_keeping(found):
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

    def _worth_keeping(self, found: RefreshState) -> bool:
        from ultrarag.finetune import checkpoints_in

        return found.trained is not None or bool(checkpoints_in(self.output))

    def _check_arguments(self) -> None:
        """Refuse what `finetune` would refuse, before anything is written."""
        for name in _OWN:
            if name in self.arguments:
                raise UsageError(
                    f"'{name}' cannot be given: a refresh trains the live encoder, and goes on by itself after a crash"
                )
        from ultrarag.finetune import adapter_defaults
        from ultrarag.finetune.flags import from_keywords

        adapter = self.core.live.encoder.adapter.name
        self.settings = from_keywords(
            self._parent_checkpoint(),
            self.train_data,
            self.output,
            adapter,
            adapter_defaults(adapter),
            **self._for_finetune(),
        )

    def _search_options(self) -> dict[str, Any]:
        """The options for the gate's searches, tried out now; with several heads and no options, dense alone."""
        options = dict(self.terms.search or {})
        if not options and len(self.parent.heads) > 1:
            options = {"heads": [self.parent.heads[0]]}
        if self.asked is not None and self.asked.corpus is None:
            tried = {name: value for name, value in options.items() if name != "ignore_identical_ids"}
            with self.core.searching() as searcher:
                searcher.search_many(["try"], k=1, **tried)
        return options

    def _for_finetune(self) -> dict[str, Any]:
        """The arguments given, and ours."""
        from ultrarag.finetune import UNMERGED, checkpoints_in

        given = {**({"trust_remote_code": True} if self._trusted else {}), **self.arguments}
        if self.eval_data is not None:
            given["eval_data"] = (
                os.fspath(self.eval_data) if isinstance(self.eval_data, os.PathLike) else self.eval_data
            )
        # the folder is ours by its state file: where nothing can be resumed, what lies there is written anew
        left = bool(checkpoints_in(self.output)) or (self.output / UNMERGED).is_dir()
        return {**given, "resume_from_checkpoint": left, "overwrite_output_dir": True}

    def _generation(self) -> Generation:
        assert self.state.generation is not None
        return self.core.catalog.get(self.state.generation)

    def _parent_checkpoint(self) -> str:
        layout = self.core.layout
        return str(layout.checkpoint(layout.directory(self.parent.id)))

    def _save(self) -> None:
        self.state.save(self.output)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.state.seconds[stage] = round(time.monotonic() - started, 3)
