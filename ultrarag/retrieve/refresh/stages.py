"""Refreshing a live index: fine-tune its encoder, build, gate and swap, in one call that a crash only interrupts."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.checkpoint import MANIFEST, read_manifest
from ultrarag.errors import DataError, GateError, IndexStateError, TrainingError, UsageError
from ultrarag.evaluation import MAIN_METRIC, Measured, Verdict
from ultrarag.finetune import read_measured
from ultrarag.io import link_tree, publish_directory, staged_directory
from ultrarag.retrieve.bridge import BridgeTerms, read_report
from ultrarag.retrieve.build import build_generation
from ultrarag.retrieve.core import REFRESHING, Core
from ultrarag.retrieve.export import corpus_vectors
from ultrarag.retrieve.generation import Generation
from ultrarag.retrieve.refresh.apart import JUDGE, STOP, Apart, held_out, stopping_rows
from ultrarag.retrieve.refresh.judging import Questions, compare_encoders, leak_checks, measured, questions
from ultrarag.retrieve.refresh.ladder import AUTO, FEWEST, FULL, RUNGS, Guard, Judge, checked_effort, climb, of_effort
from ultrarag.retrieve.refresh.rates import STOPPED, described, find_rate, stopping
from ultrarag.retrieve.refresh.report import (
    JSON_FILE,
    STATE_FILE,
    RefreshReport,
    RefreshState,
    Request,
    digest,
    write_report,
)
from ultrarag.retrieve.swap import Gate, SwapTerms, swap
from ultrarag.rows.checks import Overlap
from ultrarag.types import Passage

if TYPE_CHECKING:
    from ultrarag.encode import CorpusVectors
    from ultrarag.encoder import Encoder

#: Arguments of `finetune` that a refresh decides itself.
_OWN = (
    *("model_name_or_path", "model", "adapter", "resume_from_checkpoint"),
    *("train_side", "query_map", "passage_map", "corpus"),
)
#: Arguments of `finetune` about measuring, which is done here for all rungs but the last.
_EVALUATION = (
    *("eval_data", "guard_data", "eval_strategy", "evaluation_strategy", "eval_steps", "metric_for_best_model"),
    *("load_best_model_at_end", "greater_is_better", "ignore_identical_ids"),
)
#: Arguments of `finetune` about maps: of a climb's rungs, those with a map take them.
_OF_MAPS = ("map_learning_rate", "map_regularization", "map_steps", "map_rank")
#: How a run is stored, and nothing of what it computes: these may differ when a refresh is taken up again.
_INCIDENTAL = ("overwrite_output_dir", "cache_path", "disable_tqdm", "allow_seen_data", "shared_eval_data")

logger = logging.getLogger("ultrarag")


@dataclass(frozen=True)
class RefreshTerms:
    """On which terms the new generation goes live."""

    gate: bool | Gate = True
    force: bool = False
    metric: str = "nDCG@10"
    #: options of `LiveIndex.evaluate` and `search` for the gate
    search: Mapping[str, Any] | None = None
    #: one of `ultrarag.retrieve.refresh.ladder.EFFORTS`
    effort: str = FULL
    #: serve by the new encoder while its vectors are made; see `ultrarag.retrieve.bridge`
    bridge: bool = False


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
    core.store.set_meta(**{REFRESHING: str(work.output.absolute())})
    work.begin()
    try:
        work.learn()
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
        self.effort = checked_effort(terms.effort)
        self._check_arguments()
        shaping = {name: value for name, value in arguments.items() if name not in _INCIDENTAL}
        self.asked = questions(self.core.store, terms.gate, eval_data)
        #: rows held out of the training data, for what needs them
        self.apart = self._hold_out()
        if self.effort != FULL:  # left out where it is what every refresh was, so that those can be taken up again
            shaping["effort"] = self.effort
        if self.effort == AUTO and self.asked is not None:  # rungs judged by different queries cannot be compared
            shaping["judged_by"] = digest([dict(self.asked.queries), dict(self.asked.qrels), terms.metric])
        self.request = Request.of(train_data, eval_data, shaping)
        self.search = self._search_options()
        self._check_effort()

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
            overlap = self._look_for_leaks()
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
        shutil.rmtree(self.ladder, ignore_errors=True)  # vectors and rungs of a refresh that was asked for differently
        self.state = RefreshState(self.request, self.parent.fingerprint, self.parent.id, overlap=overlap)
        self.save()

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

    def _look_for_leaks(self) -> dict[str, Any] | None:
        """Count what the rows share with the gate's queries, their answers and the documents of these.

        Raises:
            DataError: it is too much, and `shared_eval_data="refuse"` is given.
        """
        if self.asked is None:
            return None
        if self.apart is not None and (queries := self.apart.count(JUDGE)):
            return Overlap("by document", queries, 0, {}, self.apart.total, self.apart.total).to_dict()
        from ultrarag.finetune import looked_for, read_data, refuse_shared

        overlap = looked_for(leak_checks(self.asked, self.core.store), read_data(self.settings))
        refuse_shared(overlap, self.settings)
        if self.effort == AUTO and overlap.too_much and "shared_eval_data" not in self.arguments:
            raise DataError(
                f"effort='auto' is chosen by the held-out queries, and these promise what no new query sees, for "
                f"training shares their documents: {overlap}. Hold out by document (ultrarag data split), or name an "
                f"effort (shared_eval_data='warn' goes on all the same)"
            )
        if overlap.too_much:
            logger.warning("training and evaluation are not apart: %s", overlap)
        return overlap.to_dict()

    def learn(self) -> None:
        """Fine-tune the live generation's own copy of its checkpoint as the effort says; what was cut off goes on."""
        if self.state.trained is not None:
            return
        with self._timed("finetune"):
            try:
                self.state.trained = (
                    self._climb() if self.effort == AUTO else self.train(self.effort, self.output, None)
                )
            except (TrainingError, UsageError):
                if not self._worth_keeping(self.state):
                    self._leave_nothing()
                raise
        self.state.trained["notes"] += self._remarks()
        self.save()

    def _leave_nothing(self) -> None:
        """Take away what a refresh that could not train has written, so that another may use the folder."""
        shutil.rmtree(self.ladder, ignore_errors=True)
        (self.output / STATE_FILE).unlink(missing_ok=True)
        with suppress(OSError):  # it holds what others have put there
            self.output.rmdir()
        self.core.store.set_meta(**{REFRESHING: ""})

    def train(self, rung: str, folder: Path, steps: int | None) -> dict[str, Any]:
        """Fine-tune by one rung of the ladder into a folder, for so many steps at most."""
        from ultrarag.finetune import NoMap, finetune

        if rung != FULL:
            self._corpus()
        given = self._for_finetune(rung, folder, steps)
        if rung in STOPPED and self.apart is not None and self.apart.count(STOP):
            given = self._stopping(rung, given, steps)
        try:
            result = finetune(self._parent_checkpoint(), self._rows(), folder, **given)
        except NoMap as error:
            advice = "" if self.effort == AUTO else ": give another effort, such as 'query' or 'auto'"
            raise TrainingError(f"{error.reason}{advice}") from error
        found = {name: getattr(result, name) for name in ("fingerprint", "steps", "loss", "metrics", "overlap")}
        return {**found, "notes": list(result.notes)}

    def _hold_out(self) -> Apart | None:
        """Hold out rows, where no queries are given to choose by, and where a query side may stop early."""
        judge = self.effort == AUTO and self.asked is None and self.terms.gate is True
        stops = self.effort in (AUTO, *STOPPED) and self.arguments.get("eval_strategy") != "no"
        found = held_out(self.train_data, judge, stops)
        if judge and found is not None:
            self.asked = found.questions(self.core.store)
        return found

    def _rows(self) -> Any:
        """The rows to train on."""
        return self.train_data if self.apart is None else self.apart.write(self.ladder / "rows")

    def _stopping(self, rung: str, given: dict[str, Any], steps: int | None) -> dict[str, Any]:
        """The arguments of a run that is judged by held-out rows: at a rate that was found, and ended in time."""
        assert self.apart is not None
        given = {**given, "eval_data": stopping_rows(self.apart, self.core.store)}
        if "learning_rate" not in self.arguments:
            if rung not in self.state.rates:
                self.state.rates[rung] = find_rate(
                    self.settings.training.learning_rate, self._steps(), partial(self._slice, rung, given)
                )
                self.save()
            given["learning_rate"] = self.state.rates[rung]["learning_rate"]
        return stopping(given, self._steps()) if steps is None else {**given, "eval_strategy": "no"}

    def _slice(self, rung: str, given: Mapping[str, Any], rate: float, steps: int) -> dict[str, float]:
        from ultrarag.finetune import finetune

        folder = self.ladder / f"{rung}-rate"
        part = {"learning_rate": rate, "max_steps": steps, "eval_strategy": "no", "save_strategy": "no"}
        part |= {"resume_from_checkpoint": False, "overwrite_output_dir": True}
        kept = {name: value for name, value in given.items() if name not in ("save_steps", "early_stopping_patience")}
        found = finetune(self._parent_checkpoint(), self._rows(), folder, **{**kept, **part})
        shutil.rmtree(folder, ignore_errors=True)
        return found.metrics["after"]

    def _remarks(self) -> list[str]:
        """What was held out of the training rows, and found by it."""
        parts = {JUDGE: "to choose by", STOP: "to say when a query side has learned enough"}
        held = [
            f"{self.apart.count(name)} of {self.apart.total} training rows, with their documents, were held out {why}"
            for name, why in parts.items()
            if self.apart is not None and self.apart.count(name)
        ]
        return [*held, *(f"{rung}: {described(found)}" for rung, found in self.state.rates.items())]

    def _climb(self) -> dict[str, Any]:
        """Try rung after rung; the checkpoint of the one that is taken is published in the output folder."""
        assert self.asked is not None
        corpus, parent = self._corpus(), self.load(Path(self._parent_checkpoint()))
        judge = Judge(self.asked, corpus, parent, self.terms.metric, self._ignoring)
        taken = climb(self, self.state.ladder, self.ladder, judge, self._guard(corpus, parent))
        with staged_directory(self.output) as stage:
            link_tree(self.ladder / taken.rung, stage)
            publish_directory(stage, self.output, lambda name: name in (STATE_FILE, self.ladder.name))
        return taken.trained

    def _guard(self, corpus: CorpusVectors, parent: Encoder) -> Guard | None:
        if (given := self.arguments.get("guard_data")) is None:
            return None
        asked = questions(self.core.store, True, given)
        assert asked is not None
        if asked.corpus is not None:
            from ultrarag.retrieve.refresh.guarding import guard_vectors

            passages = [Passage(id, text) for id, text in asked.corpus.items()]
            corpus = guard_vectors(self.core.layout.root, parent, passages)
        judge = Judge(asked, corpus, parent, self.terms.metric, self._ignoring)
        return Guard(judge, self.settings.incremental.max_forgetting)

    def _check_guard(self) -> None:
        """Raise GateError when what was trained forgot more of the guard than it may.

        A rung of a climb was judged by it before it was taken.
        """
        if self.arguments.get("guard_data") is None or self.terms.force or (self.effort == AUTO and not self._full):
            return
        if self._full:
            assert self.state.trained is not None
            found = self.state.trained["metrics"]
            fell = found["guard_before"][MAIN_METRIC] - found["guard_after"][MAIN_METRIC]
            limit = self.settings.incremental.max_forgetting
            told = f"{MAIN_METRIC} falls by {fell:.4f}"
            if fell <= limit + 1e-9:
                return
        else:
            parent = self.load(Path(self._parent_checkpoint()))
            guard = self._guard(self._corpus(), parent)
            assert guard is not None
            compared = guard.compare(self.load(self.output))
            limit, told = guard.max_forgetting, str(compared)
            if guard.holds(compared):
                return
        raise GateError(
            f"the model forgets more of the guard data than max_forgetting={limit:g}: {told}; the live generation "
            f"stays (force=True swaps all the same)"
        )

    @property
    def _full(self) -> bool:
        """What was trained is a full fine-tune."""
        return self.effort == FULL or any(step.taken and step.rung == FULL for step in self.state.ladder)

    @property
    def _ignoring(self) -> bool:
        return bool(self.search.get("ignore_identical_ids", False))

    def _corpus(self) -> CorpusVectors:
        """The live generation's vectors, written into a folder once."""
        from ultrarag.encode import INFO, CorpusVectors

        folder = self.ladder / "corpus"
        if (folder / INFO).is_file():
            return CorpusVectors.open(folder)
        return corpus_vectors(self.core, folder, None)

    def load(self, folder: Path) -> Encoder:
        """Load a checkpoint as the live one is loaded."""
        from ultrarag.encoder import Encoder

        options: dict[str, Any] = {"device": self.core.device, "precision": self.parent.precision}
        return Encoder.load(folder, **options, trust_remote_code=self._trusted)

    def texts(self, ids: Sequence[str]) -> dict[str, str]:
        """The contents of passages of the index."""
        return {id: passage.content for id, passage in self.core.store.get(list(ids)).items()}

    def save(self) -> None:
        """Keep durably how far it has come."""
        self.state.save(self.output)

    def build(self) -> None:
        """Build the shadow generation; a build that was cut off goes on."""
        if self.state.generation is not None and self._generation().state != "retired":
            return
        with self._timed("build"):
            built = build_generation(
                self.core, self.output, trust_remote_code=self._trusted, bridge=self._bridge_terms()
            )
            self.state.generation = built.id
            self.state.bridge = read_report(self.core.layout.directory(built.id)) if self.terms.bridge else None
        self.save()

    def _bridge_terms(self) -> BridgeTerms | None:
        if not self.terms.bridge or self.asked is None:
            return None
        search = {name: value for name, value in self.search.items() if name != "ignore_identical_ids"}
        return BridgeTerms(self.asked.queries, self.asked.qrels, self.terms.metric, search)

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
        if refused is not None:
            raise GateError(f"{refused}; see '{report.html}'") from refused
        shutil.rmtree(self.ladder, ignore_errors=True)
        (self.output / STATE_FILE).unlink(missing_ok=True)
        return report

    def _go_live(self, generation: Generation) -> None:
        gate: Gate | None = None
        if self.asked is not None and self.asked.corpus is None:
            gate = (self.asked.queries, self.asked.qrels)
        elif self.asked is not None:
            gate = self._compare_encoders(self.asked)
        terms = self.terms
        self._check_guard()
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
        self.save()

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

        folders = [self.output, *self.ladder.glob("*/")]
        return found.trained is not None or bool(found.ladder) or any(map(checkpoints_in, folders))

    def _check_arguments(self) -> None:
        """Refuse what `finetune` would refuse, before anything is written."""
        for name in _OWN:
            if name in self.arguments:
                raise UsageError(
                    f"'{name}' cannot be given: a refresh trains the live encoder, and goes on by itself after a crash"
                )
        if self.effort != FULL and self.arguments.get("merge_with"):
            raise UsageError(
                f"effort='{self.effort}' trains against stored vectors, and what came of that cannot be merged: leave "
                "merge_with out, or give effort='full'"
            )
        from ultrarag.finetune import adapter_defaults
        from ultrarag.finetune.flags import from_keywords, refuse_unsupported

        adapter = self.core.live.encoder.adapter.name
        known = self._parent_checkpoint(), self.train_data, self.output, adapter, adapter_defaults(adapter)
        settled = FULL if self.effort == AUTO else self.effort
        self.settings = from_keywords(*known, **self._for_finetune(settled, self.output, None))
        for rung in RUNGS if self.effort == AUTO else (self.effort,):
            try:
                refuse_unsupported(from_keywords(*known, **self._for_finetune(rung, self.output, None)), False)
            except UsageError as error:
                raise UsageError(f"effort='{self.effort}': {of_effort(rung, str(error))}") from error

    def _check_effort(self) -> None:
        """Refuse an effort that the index or the evaluation data cannot carry.

        Raises:
            UsageError: see above.
        """
        if self.terms.bridge and (self.asked is None or self.asked.corpus is not None):
            raise UsageError(
                "bridge=True measures on queries about the passages of this index: give eval_data, a BEIR folder, or "
                "gate=(queries, qrels), and no gate=False (--no_gate)"
            )
        if self.effort == FULL:
            return
        if "dense" not in self.parent.heads:
            raise UsageError(
                f"effort='{self.effort}' learns by the stored dense vectors, and the live generation has "
                f"{', '.join(self.parent.heads)}: give effort='full'"
            )
        if missing := [head for head in self.core.live.encoder.heads if head not in self.parent.heads]:
            raise UsageError(
                f"effort='{self.effort}' trains against the stored vectors of all the model's heads, and the live "
                f"generation has none of {', '.join(missing)}: give effort='full'"
            )
        if self.effort != AUTO:
            return
        needs = (
            "effort='auto' chooses by held-out queries about passages of this index: give eval_data (a BEIR folder), "
            "gate=(queries, qrels), or more training rows whose positives are passages of the index, of which it holds "
            "out documents itself; or name an effort"
        )
        if self.asked is None:
            raise UsageError(needs)
        if self.asked.corpus is not None:
            raise UsageError(f"{needs}; the passages of the eval_data given are not those of the index")
        if len(self.asked.qrels) < FEWEST:
            raise UsageError(f"{needs}; {len(self.asked.qrels)} queries tell no gain from chance, {FEWEST} are needed")

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

    def _for_finetune(self, rung: str, folder: Path, steps: int | None) -> dict[str, Any]:
        """The arguments given, and ours."""
        from ultrarag.finetune import UNMERGED, checkpoints_in

        given = {**({"trust_remote_code": True} if self._trusted else {}), **self.arguments}
        if rung == FULL and steps is None:
            if self.eval_data is not None:
                held_out = self.eval_data
                given["eval_data"] = os.fspath(held_out) if isinstance(held_out, os.PathLike) else held_out
                if (self.terms.search or {}).get("ignore_identical_ids"):
                    given["ignore_identical_ids"] = True
        else:  # judged here, from stored vectors: the fine-tuning would encode the evaluation's corpus
            given = {name: value for name, value in given.items() if name not in _EVALUATION}
        if rung != FULL:
            given |= {**RUNGS[rung], "corpus": str(self.ladder / "corpus")}
        if self.effort == AUTO and not {"query_map", "passage_map"} & RUNGS[rung].keys():
            given = {name: value for name, value in given.items() if name not in _OF_MAPS}
        if steps is not None and self._steps() > steps:
            given["max_steps"] = steps
        # the folder is ours by its state file: where nothing can be resumed, what lies there is written anew
        left = bool(checkpoints_in(folder)) or (folder / UNMERGED).is_dir()
        return {**given, "resume_from_checkpoint": left, "overwrite_output_dir": True}

    def _steps(self) -> int:
        """How many steps a fine-tune takes, about."""
        from ultrarag.finetune import read_data

        trainer = self.settings.training
        if trainer.max_steps > 0:
            return trainer.max_steps
        batch = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
        return math.ceil(len(read_data(self.settings)) / batch * trainer.num_train_epochs)

    @property
    def ladder(self) -> Path:
        """Where the rungs, and what they need, lie while a refresh is under way."""
        return self.output / "ladder"

    def _generation(self) -> Generation:
        assert self.state.generation is not None
        return self.core.catalog.get(self.state.generation)

    def _parent_checkpoint(self) -> str:
        layout = self.core.layout
        return str(layout.checkpoint(layout.directory(self.parent.id)))

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.state.seconds[stage] = round(time.monotonic() - started, 3)
