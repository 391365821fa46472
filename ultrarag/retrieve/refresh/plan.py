"""What a refresh was asked, checked before hours of training, and what the fine-tune of each rung is given."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.checkpoint import read_manifest
from ultrarag.encoder.engines import is_int8
from ultrarag.errors import DataError, UsageError
from ultrarag.evaluation import MAIN_METRIC
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.refresh.apart import JUDGE, STOP, Apart, held_out
from ultrarag.retrieve.refresh.judging import leak_checks, questions
from ultrarag.retrieve.refresh.ladder import AUTO, FEWEST, FULL, RUNGS, checked_effort, of_effort
from ultrarag.retrieve.refresh.rates import AVERAGED, DEFAULTS, FROZEN, KEPT, PATIENT, STOPPED, is_on
from ultrarag.retrieve.refresh.report import RefreshState, Request, digest
from ultrarag.retrieve.swap import Gate
from ultrarag.rows.checks import Overlap

if TYPE_CHECKING:
    from ultrarag.finetune import FinetuneArguments, Seen

#: Arguments of `finetune` that a refresh decides itself.
_OWN = (
    *("model_name_or_path", "model", "adapter", "resume_from_checkpoint"),
    *("train_side", "query_map", "passage_map", "corpus"),
)
#: Arguments of `finetune` that no rung below the last can follow: it looks at the held-out rows by its own measure.
_UNFOLLOWED = ("metric_for_best_model", "load_best_model_at_end", "greater_is_better")
#: Those and others about measuring, which is done here for all rungs but the last.
_EVALUATION = (
    *("eval_data", "guard_data", "eval_strategy", "evaluation_strategy", "eval_steps", "ignore_identical_ids"),
    *_UNFOLLOWED,
)
#: Arguments of `finetune` about looking at held-out rows, of rungs that do.
_LOOKING = ("eval_strategy", "eval_steps", PATIENT)
#: Arguments of `finetune` about maps: of a climb's rungs, those with a map take them.
_OF_MAPS = ("map_learning_rate", "map_regularization", "map_steps", "map_rank", "require_map")
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


class Plan:
    """One refresh as it was asked for."""

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

    def _check_arguments(self) -> None:
        """Refuse what `finetune` would refuse, before anything is written."""
        for name in _OWN:
            if name in self.arguments:
                raise UsageError(
                    f"'{name}' cannot be given: a refresh trains the live encoder, and goes on by itself after a crash"
                )
        if self.effort != FULL and self.arguments.get("merge_with"):
            raise UsageError(
                f"effort='{self.effort}' trains against stored vectors, and what came of that has an average with the "
                "live query side alone (merge_weight, of the rung 'query'): leave merge_with out, or give effort='full'"
            )
        self._check_weight()
        self._check_measuring()
        from ultrarag.finetune import adapter_defaults
        from ultrarag.finetune.flags import from_keywords, refuse_unsupported

        adapter = self.core.live.encoder.adapter.name
        known = self.parent_checkpoint(), self.train_data, self.output, adapter, adapter_defaults(adapter)
        settled = FULL if self.effort == AUTO else self.effort
        self.settings = from_keywords(*known, **self.for_finetune(settled, self.output, None))
        #: rung -> its settings
        self._of_rung: dict[str, FinetuneArguments] = {}
        for rung in RUNGS if self.effort == AUTO else (self.effort,):
            try:
                self._of_rung[rung] = from_keywords(*known, **self.for_finetune(rung, self.output, None))
                refuse_unsupported(self._of_rung[rung], False)
            except UsageError as error:
                raise UsageError(f"effort='{self.effort}': {of_effort(rung, str(error))}") from error

    def _check_weight(self) -> None:
        """Refuse a weight of an average that is not made, and a search for one that nothing is measured for."""
        weight = self.arguments.get("merge_weight")
        if weight is None or self.effort == FULL:
            return
        if self.effort not in (AUTO, AVERAGED):
            raise UsageError(
                f"effort='{self.effort}' averages no weights: leave merge_weight out; of the efforts below 'full', "
                f"'{AVERAGED}' has an average"
            )
        if weight == "auto":
            raise UsageError(
                f"merge_weight='auto' is measured by a fine-tune of both sides; what the rung '{AVERAGED}' keeps is a "
                f"number above 0 and at most 1 ({KEPT:g} where none is given)"
            )

    def _check_measuring(self) -> None:
        """Refuse what an effort below 'full' would not follow of how a run is measured."""
        if self.effort in (AUTO, FULL):
            return
        looks = self.effort in STOPPED
        refused = [
            name for name in (*_UNFOLLOWED, *(() if looks else _LOOKING)) if self.said.get(name) not in (None, "no")
        ]
        how = (
            f"keeps the checkpoint with the best {MAIN_METRIC} of rows held out here" if looks else "fits a map at once"
        )
        if refused:
            raise UsageError(f"effort='{self.effort}' {how}: leave {', '.join(refused)} out, or give effort='full'")
        saves = {self.said.get(name) for name in ("eval_strategy", "save_strategy")} & {"steps", "epoch"}
        if looks and len(saves) > 1:
            raise UsageError(f"effort='{self.effort}' {how}: give eval_strategy and save_strategy alike")

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
        if self.effort != FULL and is_int8(self.parent.precision):
            raise UsageError(
                f"effort='{self.effort}' learns by the stored vectors, and makes a model of two sides, which is not "
                f"quantised: the live generation is in {self.parent.precision}; give effort='full'"
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

    def _hold_out(self) -> Apart | None:
        """Hold out rows, where no queries are given to choose by, and where a query side may stop early.

        Raises:
            UsageError: `early_stopping_patience` is given for rows that cannot be held out.
        """
        judge = self.effort == AUTO and self.asked is None and self.terms.gate is True
        stops = self.effort in (AUTO, *STOPPED) and self.said.get("eval_strategy") != "no"
        found = held_out(self.train_data, judge, stops)
        if judge and found is not None:
            self.asked = found.questions(self.core.store)
        if self.effort in STOPPED and PATIENT in self.arguments and not (found and found.count(STOP)):
            raise UsageError(
                f"{PATIENT} is for a run that looks at held-out rows, and none are held out (too few have documents of "
                "their own, or eval_strategy is 'no'): leave it out"
            )
        return found

    def for_finetune(self, rung: str, folder: Path, steps: int | None) -> dict[str, Any]:
        """The arguments given, and ours."""
        from ultrarag.finetune import UNMERGED, checkpoints_in, layers_of

        given: dict[str, Any] = {**({"trust_remote_code": True} if self.trusted else {}), **self.arguments}
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
        if rung in STOPPED:
            given |= {name: value for name, value in DEFAULTS.items() if name not in self.said}
        if rung in STOPPED or (self.effort == AUTO and "eval_data" not in given):
            given.pop(PATIENT, None)  # it is for the rows held out here
        otherwise = is_on(given.get("fix_encoder")) or is_on(given.get("use_lora"))
        if rung in STOPPED and "freeze_layers" not in given and not otherwise:
            given["freeze_layers"] = layers_of(self.core.live.encoder.side("query").model)[1] // FROZEN
        if rung == AVERAGED:
            given |= {"merge_with": "parent", "merge_weight": given.get("merge_weight", KEPT)}
        elif self.effort == AUTO:
            given.pop("merge_weight", None)
        if self.effort == AUTO and "passage_map" in RUNGS[rung]:  # without a map it is the rung below, which was tried
            given["require_map"] = True
        if self.effort == AUTO and not {"query_map", "passage_map"} & RUNGS[rung].keys():
            given = {name: value for name, value in given.items() if name not in _OF_MAPS}
        if steps is not None and self.steps(rung) > steps:
            given["max_steps"] = steps
        if given.get("report_to") not in (None, "none"):
            given["run_name"] = f"{given.get('run_name', self.output.name)} {rung}{'' if steps is None else ' pilot'}"
        # the folder is ours by its state file: where nothing can be resumed, what lies there is written anew
        left = bool(checkpoints_in(folder)) or (folder / UNMERGED).is_dir()
        return {**given, "resume_from_checkpoint": left, "overwrite_output_dir": True}

    @property
    def said(self) -> dict[str, Any]:
        """The arguments given, by our names."""
        from ultrarag.finetune.flags import own_name

        return {own_name(name): value for name, value in self.arguments.items()}

    def steps(self, rung: str | None = None) -> int:
        """How many steps a fine-tune by a rung takes, about; default: by the one asked for, of a climb the last."""
        from ultrarag.finetune import read_data

        trainer = (self.settings if rung is None else self._of_rung[rung]).training
        if trainer.max_steps > 0:
            return trainer.max_steps
        batch = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
        return math.ceil(len(read_data(self.settings)) / batch * trainer.num_train_epochs)

    def seen(self) -> Seen | None:
        """How many of the rows the live encoder, or one before it, was trained on; None where none are known."""
        from ultrarag.finetune import read_data, seen_before

        manifest = read_manifest(Path(self.parent_checkpoint()))
        if manifest is None or manifest.training is None:
            return None
        return seen_before(read_data(self.settings), manifest.training)

    def refuse_seen(self) -> None:
        """Refuse rows that the live encoder, or one before it, was trained on.

        Raises:
            DataError: they are too many, and `allow_seen_data` is not given.
        """
        if self.settings.incremental.allow_seen_data:
            return
        seen = self.seen()
        if seen and seen.too_many:
            raise DataError(
                f"{seen}: give the new rows alone as train_data and the old ones as replay_data, or say "
                "allow_seen_data=True (--allow_seen_data)"
            )

    def look_for_leaks(self) -> dict[str, Any] | None:
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

    @property
    def ladder(self) -> Path:
        """Where the rungs, and what they need, lie while a refresh is under way."""
        return self.output / "ladder"

    def parent_checkpoint(self) -> str:
        layout = self.core.layout
        return str(layout.checkpoint(layout.directory(self.parent.id)))

    @property
    def trusted(self) -> bool:
        """Whether code that comes with the live encoder, and so with the one trained from it, may be run."""
        return self.core.live.encoder.trust_remote_code

    @property
    def ignoring(self) -> bool:
        return bool(self.search.get("ignore_identical_ids", False))

    def worth_keeping(self, found: RefreshState) -> bool:
        from ultrarag.finetune import checkpoints_in

        folders = [self.output, *self.ladder.glob("*/")]
        return found.trained is not None or bool(found.ladder) or any(map(checkpoints_in, folders))
