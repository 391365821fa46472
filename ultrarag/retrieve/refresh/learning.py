"""The part of a refresh that learns: the rung that was asked for, or a climb from rung to rung."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.errors import GateError, TrainingError, UsageError
from ultrarag.evaluation import MAIN_METRIC
from ultrarag.io import link_tree, publish_directory, staged_directory
from ultrarag.retrieve.core import REFRESHING
from ultrarag.retrieve.export import corpus_vectors
from ultrarag.retrieve.refresh.apart import JUDGE, STOP, stopping_rows
from ultrarag.retrieve.refresh.child import finetune_apart
from ultrarag.retrieve.refresh.judging import questions
from ultrarag.retrieve.refresh.ladder import AUTO, FULL, Guard, Judge, climb
from ultrarag.retrieve.refresh.plan import Plan
from ultrarag.retrieve.refresh.progress import Refreshing
from ultrarag.retrieve.refresh.rates import PATIENT, STOPPED, described, find_rate, named, stopping
from ultrarag.retrieve.refresh.report import STATE_FILE, RefreshState
from ultrarag.types import Passage

if TYPE_CHECKING:
    from ultrarag.encode import CorpusVectors
    from ultrarag.encoder import Encoder


class Learning:
    """The fine-tuning of one refresh."""

    def __init__(self, plan: Plan, state: RefreshState, refreshing: Refreshing) -> None:
        self.plan, self.state, self.refreshing = plan, state, refreshing
        self.core, self.output, self.terms = plan.core, plan.output, plan.terms

    def learn(self) -> dict[str, Any]:
        """Fine-tune the live generation's own copy of its checkpoint; returns what came of it."""
        plan = self.plan
        try:
            trained = self._climb() if plan.effort == AUTO else self.train(plan.effort, self.output, None)
        except (TrainingError, UsageError):
            if not plan.worth_keeping(self.state):
                self._leave_nothing()
            raise
        trained["notes"] += self._remarks()
        return trained

    def _leave_nothing(self) -> None:
        """Take away what a refresh that could not train has written, so that another may use the folder."""
        shutil.rmtree(self.plan.ladder, ignore_errors=True)
        (self.output / STATE_FILE).unlink(missing_ok=True)
        with suppress(OSError):  # it holds what others have put there
            self.output.rmdir()
        self.core.store.set_meta(**{REFRESHING: ""})

    def train(self, rung: str, folder: Path, steps: int | None) -> dict[str, Any]:
        """Fine-tune by one rung of the ladder into a folder, for so many steps at most."""
        from ultrarag.finetune import NoMap

        if rung != FULL:
            self._corpus()
        given = self.plan.for_finetune(rung, folder, steps)
        try:
            if rung in STOPPED and self.plan.apart is not None and self.plan.apart.count(STOP):
                given = self._stopping(rung, given, steps)
            result = self._finetune(folder, given)
        except NoMap as error:
            advice = "" if self.plan.effort == AUTO else ": give another effort, such as 'query' or 'auto'"
            raise TrainingError(f"{error.reason}{advice}") from error
        found = {name: getattr(result, name) for name in ("fingerprint", "steps", "loss", "metrics", "overlap")}
        return {**found, "notes": list(result.notes)}

    def _rows(self) -> Any:
        """The rows to train on."""
        return self.plan.train_data if self.plan.apart is None else self.plan.apart.write(self.plan.ladder / "rows")

    def _stopping(self, rung: str, given: dict[str, Any], steps: int | None) -> dict[str, Any]:
        """The arguments of a run that is judged by held-out rows: at a rate that was found, and ended in time."""
        assert self.plan.apart is not None
        given = {**given, "eval_data": stopping_rows(self.plan.apart, self.core.store)}
        if "learning_rate" not in self.plan.said:
            given["learning_rate"] = self._rate(rung, given)
        if steps is not None:
            return {**given, "eval_strategy": "no"}
        patience = {name: value for name, value in self.plan.arguments.items() if name == PATIENT}
        return stopping({**given, **patience}, self.plan.steps(rung), self.plan.said)

    def _rate(self, rung: str, given: Mapping[str, Any]) -> float:
        """The learning rate of a rung, searched for once; what was tried before a refresh was killed is kept."""
        found = self.state.rates.setdefault(rung, {"tried": {}})
        if "learning_rate" not in found:
            usual = self.plan.settings.training.learning_rate
            found |= find_rate(usual, self.plan.steps(rung), partial(self._tried, rung, given))
            self.save()
        rate: float = found["learning_rate"]
        return rate

    def _tried(self, rung: str, given: Mapping[str, Any], rate: float, steps: int) -> float:
        tried, name = self.state.rates[rung]["tried"], named(rate)
        if name not in tried:
            checked = {"skip_data_check": True} if tried else {}  # the first trial has looked at the rows
            tried[name] = self._slice(rung, {**given, **checked}, rate, steps)
            self.save()
        worth: float = tried[name]
        return worth

    def _slice(self, rung: str, given: Mapping[str, Any], rate: float, steps: int) -> float:
        """What held-out rows say after a few steps; no checkpoint is written: it costs as much as five of them."""
        folder = self.plan.ladder / f"{rung}-rate"
        part = {"learning_rate": rate, "max_steps": steps, "eval_strategy": "no", "save_strategy": "no"}
        part |= {"report_to": "none"}  # a few steps, to choose a rate by: no run that anybody wants to see
        part |= {"resume_from_checkpoint": False, "overwrite_output_dir": True}
        whole = ("save_steps", "save_on_epoch_end", "merge_with", "merge_weight")
        kept = {name: value for name, value in given.items() if name not in whole}
        found = self._finetune(folder, {**kept, **part}, trial=True)
        shutil.rmtree(folder, ignore_errors=True)
        return float(found.metrics["after"][MAIN_METRIC])

    def _finetune(self, folder: Path, given: dict[str, Any], trial: bool = False) -> Any:
        """Fine-tune the live generation's own copy into a folder, or try to: in this process, or in one of its own."""
        asked = self.plan.parent_checkpoint(), self._rows(), folder
        if self.refreshing.isolate:
            return finetune_apart(self.refreshing, *asked, given, trial)
        from ultrarag.finetune import finetune, finetune_trial, watching

        with watching(self.refreshing.step):
            return (finetune_trial if trial else finetune)(*asked, **given)

    def _remarks(self) -> list[str]:
        """What was held out of the training rows, and found by it."""
        parts = {JUDGE: "to choose by", STOP: "to say when a query side has learned enough"}
        apart = self.plan.apart
        held = [
            f"{apart.count(name)} of {apart.total} training rows, with their documents, were held out {why}"
            for name, why in parts.items()
            if apart is not None and apart.count(name)
        ]
        rates = [(rung, found) for rung, found in self.state.rates.items() if "learning_rate" in found]
        return [*held, *(f"{rung}: {described(found)}" for rung, found in rates)]

    def _climb(self) -> dict[str, Any]:
        """Try rung after rung; the checkpoint of the one that is taken is published in the output folder."""
        assert self.plan.asked is not None
        corpus, parent = self._corpus(), self.load(Path(self.plan.parent_checkpoint()))
        judge = Judge(self.plan.asked, corpus, parent, self.terms.metric, self.plan.ignoring)
        taken = climb(self, self.state.ladder, self.plan.ladder, judge, self._guard(corpus, parent))
        with staged_directory(self.output) as stage:
            link_tree(self.plan.ladder / taken.rung, stage)
            publish_directory(stage, self.output, lambda name: name in (STATE_FILE, self.plan.ladder.name))
        return taken.trained

    def _guard(self, corpus: CorpusVectors, parent: Encoder) -> Guard | None:
        if (given := self.plan.arguments.get("guard_data")) is None:
            return None
        asked = questions(self.core.store, True, given)
        assert asked is not None
        if asked.corpus is not None:
            from ultrarag.retrieve.refresh.guarding import guard_vectors

            passages = [Passage(id, text) for id, text in asked.corpus.items()]
            corpus = guard_vectors(self.core.layout.root, parent, passages)
        judge = Judge(asked, corpus, parent, self.terms.metric, self.plan.ignoring)
        return Guard(judge, self.plan.settings.incremental.max_forgetting)

    def check_guard(self) -> None:
        """Raise GateError when what was trained forgot more of the guard than it may.

        A rung of a climb was judged by it before it was taken.
        """
        if (
            self.plan.arguments.get("guard_data") is None
            or self.terms.force
            or (self.plan.effort == AUTO and not self._full)
        ):
            return
        if self._full:
            assert self.state.trained is not None
            found = self.state.trained["metrics"]
            fell = found["guard_before"][MAIN_METRIC] - found["guard_after"][MAIN_METRIC]
            limit = self.plan.settings.incremental.max_forgetting
            told = f"{MAIN_METRIC} falls by {fell:.4f}"
            if fell <= limit + 1e-9:
                return
        else:
            parent = self.load(Path(self.plan.parent_checkpoint()))
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
        return self.plan.effort == FULL or any(step.taken and step.rung == FULL for step in self.state.ladder)

    def _corpus(self) -> CorpusVectors:
        """The live generation's vectors, written into a folder once."""
        from ultrarag.encode import INFO, CorpusVectors

        folder = self.plan.ladder / "corpus"
        if (folder / INFO).is_file():
            return CorpusVectors.open(folder)
        return corpus_vectors(self.core, folder, None)

    def load(self, folder: Path) -> Encoder:
        """Load a checkpoint as the live one is loaded."""
        from ultrarag.encoder import Encoder

        options: dict[str, Any] = {"device": self.core.device, "precision": self.plan.parent.precision}
        return Encoder.load(folder, **options, trust_remote_code=self.plan.trusted)

    def texts(self, ids: Sequence[str]) -> dict[str, str]:
        """The contents of passages of the index."""
        return {id: passage.content for id, passage in self.core.store.get(list(ids)).items()}

    def save(self) -> None:
        """Keep durably how far it has come."""
        self.state.save(self.output)
