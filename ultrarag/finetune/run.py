"""FinetuneRun: from checked settings to a published checkpoint, under the command lines and `finetune()`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ultrarag.checkpoint import Training
from ultrarag.encoder import Encoder, LowRank
from ultrarag.errors import TrainingError, UsageError
from ultrarag.finetune.against import Against, two_sides
from ultrarag.finetune.batches import (
    AnyPlan,
    DatasetInfo,
    ReplayPlan,
    TrainData,
    make_collator,
    make_loader,
    make_plan,
    read_data,
)
from ultrarag.finetune.check import RenderedBatch, check_rows, looked_for, refuse_shared, rendered_batch
from ultrarag.finetune.evaluate import Measures
from ultrarag.finetune.flags import FinetuneArguments, refuse_unsupported
from ultrarag.finetune.incremental import (
    Other,
    averages,
    averages_of_low_rank,
    merge_weights,
    read_other,
    record_of,
    warn_of_seen_rows,
)
from ultrarag.finetune.memory import choose_sizes
from ultrarag.finetune.output import (
    UNMERGED,
    Start,
    asked_to_resume,
    check_output_dir,
    claim_output_dir,
    find_resume,
    find_trained,
    merge_adapters,
    remove_left,
    write_finished,
)
from ultrarag.finetune.report import HTML_FILE, FinetuneResult, read_history, write_report
from ultrarag.finetune.resume import continued, total_steps
from ultrarag.finetune.step import (
    EmbeddingTrainer,
    FalseNegatives,
    Interrupted,
    Learner,
    Lora,
    add_lora,
    check_regularized,
    choose_heads,
    freeze,
    layers_of,
    load_encoder,
    rank,
    world_size,
)
from ultrarag.finetune.tracking import own_run, run_figures, send, tensorboard_folder
from ultrarag.io import print_error, remove_stale_stages
from ultrarag.plugins import registry
from ultrarag.rows.checks import LeakChecks, Overlap


def run(arguments: FinetuneArguments) -> FinetuneResult | None:
    """Fine-tune as `arguments` say; the result on the first rank, None on the others.

    Raises:
        UltraragError: what is wrong and what to do.
        Interrupted: after Ctrl-C.
    """
    if arguments.dry_run:
        raise UsageError("dry_run is for the command line; in Python call ultrarag.finetune.dry_run")
    return FinetuneRun(arguments).finetune()


def trial(arguments: FinetuneArguments) -> FinetuneResult:
    """Fine-tune as `arguments` say and measure what came of it; no checkpoint and no report are written.

    Raises:
        UltraragError, Interrupted: as `run` does.
    """
    return FinetuneRun(arguments).trial()


def dry_run(arguments: FinetuneArguments) -> RenderedBatch | None:
    """Render a run's first batch; None on all ranks but the first. Nothing is written, not even the cache of rows.

    Raises:
        UltraragError: whatever the run itself would refuse before it trains.
    """
    with tempfile.TemporaryDirectory(prefix="ultrarag-") as cache:
        return FinetuneRun(replace(arguments, data=replace(arguments.data, cache_path=cache))).preview()


class FinetuneRun:
    """One fine-tuning run, stage by stage: until all that can be refused is refused, nothing is written.

    Each attribute is set by the stage that stands above it.
    """

    # claim
    resume: Path | None
    # read
    data: TrainData
    measures: Measures
    # load
    #: the model as it is before training; the same object as `encoder`, unless one side is trained
    parent: Encoder
    encoder: Encoder
    heads: tuple[str, ...]
    # plan_batches
    plan: AnyPlan
    # set_up
    start: Start
    other: Other | None
    masking: FalseNegatives | None
    lora: Lora | None
    against: Against | None
    # check
    overlap: Overlap | None
    record: Training
    # train
    trainer: EmbeddingTrainer
    trained: Trained
    # merge
    merged: dict[str, Any] | None

    def __init__(self, arguments: FinetuneArguments) -> None:
        self.arguments = arguments
        self.pairs = registry().adapter(arguments.adapter).declared.pair_input
        self.output = Path(str(arguments.training.output_dir))
        self.notes = Notes()

    def finetune(self) -> FinetuneResult | None:
        """Carry the run through; the result on the first rank, None on the others."""
        self.prepare()
        self.begin()
        self.stand()
        self.measure("before")
        with own_run(self.arguments.training.report_to):
            self.train()
            self.measure("after")
            self.merge()
            return self.publish()

    def trial(self) -> FinetuneResult:
        """Train and measure, and write nothing of it: what the held-out data say afterwards is all that is wanted."""
        self.prepare()
        self.begin()
        self.stand()
        self.train()
        self.measure("after")
        trained, parent = self.trained, self.arguments.model.model_name_or_path
        found = self.measures.metrics, self.notes.lines
        return FinetuneResult("", parent, "", trained.steps, trained.loss, trained.seconds, *found)

    def preview(self) -> RenderedBatch | None:
        """Stop before anything is written or trained, and show the first batch; None on all ranks but the first."""
        self.prepare()
        collator = make_collator(self.arguments.data, self.encoder)
        return rendered_batch(self.encoder, self.plan, collator) if rank() == 0 else None

    def prepare(self) -> None:
        """All that a run refuses before it trains."""
        self.claim()
        self.read()
        self.load()
        self.plan_batches()
        self.set_up()
        self.check()

    # ---- what is asked for, and may it be done

    def claim(self) -> None:
        """Refuse flags that do not go together, and an output directory that is not ours to write into."""
        refuse_unsupported(self.arguments, self.pairs)
        for line in self.arguments.notes:
            self.notes.add(line)
        _use_one_gpu(self.arguments, self.notes.add)
        self.resume = find_resume(self.arguments, self.notes.add)
        if rank() == 0 and self.resume is None:
            check_output_dir(self.output, self.arguments.overwrite_output_dir)

    def read(self) -> None:
        """Read the rows to train on, and the held-out data."""
        self.data = read_data(self.arguments)
        self.measures = Measures.of(self.arguments, self.pairs)

    def load(self) -> None:
        """Load the model, as it is before training."""
        self.parent = load_encoder(self.arguments, self.notes.add)
        self.heads = choose_heads(self.parent, self.arguments.loss.unified_finetuning)
        check_regularized(self.heads, self.arguments.loss)
        self.encoder = two_sides(self.parent, self.arguments)
        warn_of_seen_rows(self.data, self.parent, self.arguments.incremental, self.notes.add)

    def plan_batches(self) -> None:
        """Choose the sizes that are left open, and which batch comes when."""
        choose_sizes(self.arguments, self.encoder, self.heads, len(self.data), self.resume, self.notes.add)
        self.plan = make_plan(self.arguments, self.data, self.pairs)
        for note in [*self.data.notes, *self.plan.notes]:
            self.notes.add(note)

    def set_up(self) -> None:
        """Choose what of the model is trained, and what it is compared with."""
        model = self.arguments.model
        frozen, trained = self.arguments.sides.frozen, self.arguments.sides.train_side
        fixed = model.fix_encoder, model.fix_position_embedding
        freeze(self.encoder, self.heads, *fixed, frozen, model.freeze_layers)
        if model.freeze_layers:
            total = layers_of(self.parent.model)[1]
            self.notes.add(f"the first {model.freeze_layers} of {total} layers, and the embeddings, stay as they are")
        self.start = Start.of(self.parent)
        self.other = read_other(self.arguments, self.encoder, self.start.fingerprint, self.notes.add)
        self.masking = FalseNegatives.of(self.arguments, self.encoder, self.heads)
        side, lora, name = None if frozen is None else trained, self.arguments.lora, model.model_name_or_path
        folder = str(Path(name).resolve()) if Path(name).is_dir() else name
        base = None if self.parent.asymmetric else folder  # matrices of one side are no model of the whole
        self.lora = add_lora(self.encoder, lora, side, base) if lora.use_lora else None
        parts = [self.data, self.plan.old.data] if isinstance(self.plan, ReplayPlan) else [self.data]
        self.against = Against.of(self.arguments, self.parent, self.heads, parts, self.notes.add)

    def check(self) -> None:
        """Look for faults in the rows; a resumed run must take the steps that the first would have taken."""
        self.record = self._record()
        leaks = self._look_for_leaks()
        if self.resume:
            self.record = continued(self.resume, self.record, self._steps(), self.notes.add)
        elif rank() == 0 and not self.arguments.skip_data_check:
            check_rows(self.arguments, self.data, self.encoder, leaks, self.notes.add)

    def _look_for_leaks(self) -> LeakChecks | None:
        """Look for the evaluation data in the rows; a resumed run does so too, for its report."""
        self.overlap, domain = None, self.measures.domain
        asked = self.arguments.evaluation.shared_eval_data == "refuse"
        if domain is None or rank() != 0 or (self.arguments.skip_data_check and not asked):
            return None
        leaks = LeakChecks.of(domain, "warning")
        self.overlap = looked_for(leaks, self.data)
        refuse_shared(self.overlap, self.arguments)
        return leaks

    def _steps(self) -> int:
        training = self.arguments.training
        limits = training.num_train_epochs, training.max_steps
        return total_steps(self.plan.steps_per_epoch, training.gradient_accumulation_steps, *limits)

    def _record(self) -> Training:
        """What the manifest says of this run, as far as it is known before training."""
        rows = [_data_record(item, self.data) for item in self.data.datasets]
        if isinstance(self.plan, ReplayPlan):
            old = self.plan.old.data
            rows += [{**_data_record(item, old), "replay": True} for item in old.datasets]
        described = {**self.arguments.to_dict(), "world_size": world_size()}
        if self.against:
            described["sides"] = self.against.describe()
        ancestors = self.parent.manifest.lineage() if self.parent.manifest else []
        name = self.arguments.model.model_name_or_path
        return Training(self.start.fingerprint, name, rows, described, ancestors=ancestors)

    # ---- the work

    def begin(self) -> None:
        """Clear the output directory of what an earlier run left there; record which rows are trained on."""
        if rank() != 0:
            return
        remove_stale_stages(self.output.parent)  # of a run that was killed when it was about to publish
        if self.resume is None:
            claim_output_dir(self.output, self.arguments.overwrite_output_dir, self.notes.add)
            if not asked_to_resume(self.arguments):
                remove_left(self.output)
        parts = [self.data, self.plan.old.data] if isinstance(self.plan, ReplayPlan) else [self.data]
        self.record = replace(self.record, seen=record_of(parts))

    def stand(self) -> None:
        """Encode once what a frozen side has to, and choose a map's settings; without either there is nothing to do."""
        if self.against is None:
            return
        try:
            self.against.prepare(self.encoder, self.resume)
        except KeyboardInterrupt as stop:
            raise Interrupted("stopped before the first step; the same command begins anew") from stop
        described = {**self.record.arguments, "sides": self.against.describe()}
        self.record = replace(self.record, arguments=described)
        if self.against.keeps_passages:
            self.measures.keep_passages(self.against.stored)

    def measure(self, stage: str) -> None:
        """Evaluate the model as it is now."""
        self.measures.take(stage, self.encoder, self.heads)

    def train(self) -> None:
        """Train, or take the weights of the same run, which was stopped when it was about to merge them."""
        if self.arguments.sides.maps_alone:
            self._learn_maps()
            return
        masks = self.masking.features if self.masking else None
        negatives = self.against.negatives if self.against else None
        collator = make_collator(self.arguments.data, self.encoder, masks, negatives)
        loader = make_loader(self.plan, collator, rank(), self.arguments.training)
        learner = Learner(self.encoder, self.heads, self.lora, self.masking)
        if self.against and negatives:
            learner.corpus = negatives
            learner.mine = partial(self.against.mine, self.encoder)
            learner.map_rate = self.against.map_rate
        self.trainer = EmbeddingTrainer(learner, self.arguments, loader, self.record, self.measures.domain)
        merging = self.other is not None and asked_to_resume(self.arguments)
        earlier = find_trained(self.output, self.record) if merging else None
        if earlier:
            self.notes.add(f"the model was trained already: going on from {self.output / UNMERGED}")
            self.trainer.load_weights(str(self.output / UNMERGED))
            self.trained = Trained(earlier.steps, earlier.loss, restored=True)
        else:
            self.trained = _train(self.trainer, self.resume)

    def _learn_maps(self) -> None:
        """Learn maps of stored vectors, on the first rank: it takes seconds, and a run that is killed begins anew."""
        assert self.against is not None
        started = time.perf_counter()
        try:
            self.encoder, loss = self.against.learn_maps()
        except KeyboardInterrupt as stop:
            raise Interrupted("stopped while a map was learned; the same command begins anew") from stop
        choice = self.against.choice
        steps = choice.settings.steps if choice else 0
        self.trained = Trained(steps, loss, time.perf_counter() - started)

    def merge(self) -> None:
        """Average the trained weights with the other model's, where there is one; as trained they are kept beside.

        Of one side they are not: of a run that is killed here the last steps are taken again.
        """
        self.merged, low_rank = None, None
        if self.lora and self.arguments.sides.train_side == "query" and not self.parent.asymmetric:
            low_rank = self.lora.low_rank()
            merge_adapters(self.trainer)
            self.encoder = Encoder.of_sides(self.parent, low_rank=low_rank)
        if self.other:
            self._average(self.other, low_rank)
        self.measures.warn(self.arguments.incremental.max_forgetting, self.notes.add)

    def _average(self, other: Other, low_rank: LowRank | None) -> None:
        kept = self.arguments.sides.train_side == "both"
        if kept and not self.trained.restored:
            self._write(self.output / UNMERGED)
        merge_adapters(self.trainer)
        at = averages_of_low_rank(self.parent, low_rank) if low_rank else averages(self.encoder, other)
        rest = other, self.arguments.incremental, self.measures, self.notes.add
        try:
            self.encoder, self.merged = merge_weights(at, self.heads, *rest)
        except TrainingError as error:
            where = f"; the weights as trained are in the folder '{UNMERGED}' of the output" if kept else ""
            raise TrainingError(f"{error}{where}") from error
        except KeyboardInterrupt as stop:
            left = "the trained ones" if kept else "the checkpoints of training"
            raise Interrupted(
                f"stopped while weights were merged; {left} are kept: continue with --resume_from_checkpoint True"
            ) from stop

    def publish(self) -> FinetuneResult | None:
        """Write the checkpoint, unless training changed nothing, and the report beside it."""
        identity, record = self._write(self.output)
        if rank() != 0:
            return None
        result = FinetuneResult(
            str(self.output),
            self.arguments.model.model_name_or_path,
            identity,
            self.trained.steps,
            self.trained.loss,
            self.trained.seconds,
            self.measures.metrics,
            self.notes.lines,
            self.merged,
            str(self.output / HTML_FILE),
            self.overlap.to_dict() if self.overlap else None,
        )
        domain, found = self.measures.domain, self.measures.found
        measured = domain.measured(found["before"], found["after"]) if domain else None
        write_report(self.output, result, record, self.trained.history or read_history(self.output), measured)
        self._track(result)
        return result

    def _track(self, result: FinetuneResult) -> None:
        """Send what it came to where its steps were sent."""
        callbacks = [] if self.arguments.sides.maps_alone else self.trainer.callback_handler.callbacks
        folder = tensorboard_folder(self.output, callbacks)
        figures = run_figures(result, self.measures.found)
        training = self.arguments.training
        send(training.report_to, figures, folder, training.run_name, result.steps)

    def _write(self, folder: Path) -> tuple[str, Training]:
        """Write a checkpoint of the model as it is now; its identity (empty on other ranks), and what it records."""
        record = replace(
            self.record,
            metrics=self.measures.metrics,
            steps=self.trained.steps,
            loss=self.trained.loss,
            merge=self.merged,
        )
        trainer = None if self.arguments.sides.maps_alone else self.trainer
        return write_finished(trainer, self.encoder, self.start, record, folder), record


def _data_record(item: DatasetInfo, data: TrainData) -> dict[str, Any]:
    return {"name": item.name, "rows": item.stop - item.start, "sha256": data.digest}


@dataclass
class Trained:
    """What came of the training itself."""

    steps: int
    #: mean training loss
    loss: float | None
    seconds: float = 0.0
    #: the trainer's log
    history: list[dict[str, Any]] = field(default_factory=list)
    #: the weights are those of the same run, which was stopped after training
    restored: bool = False


class Notes:
    """Remarks for the user, printed once, by the first rank, on stderr."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        """Print a remark, unless it was printed before."""
        if line not in self.lines:
            self.lines.append(line)
            if rank() == 0:
                print_error(f"note: {line}")


def _use_one_gpu(arguments: FinetuneArguments, note: Callable[[str], None]) -> None:
    """Keep the Trainer from spreading one process over several GPUs by DataParallel, which splits the batch."""
    training = arguments.training
    if training.n_gpu > 1:
        note(
            f"{training.n_gpu} GPUs are visible and one process uses one: start with torchrun --nproc_per_node "
            f"{training.n_gpu} to use all"
        )
        training._n_gpu = 1


def _train(trainer: EmbeddingTrainer, resume: Path | None) -> Trained:
    started = time.perf_counter()
    try:
        output = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        trainer.interrupt.restore()
    if trainer.interrupt.stopped and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped after step {trainer.state.global_step}; continue with --resume_from_checkpoint True"
        )
    history: list[dict[str, Any]] = trainer.state.log_history
    seconds = time.perf_counter() - started
    return Trained(trainer.state.global_step, _mean_loss(history, output.training_loss), seconds, history)


def _mean_loss(history: list[dict[str, float]], otherwise: float) -> float:
    """The mean over all logged steps, those before a resume included; `otherwise` where nothing was logged."""
    logged = [(int(entry["step"]), entry["loss"]) for entry in history if "loss" in entry]
    total = last = 0.0
    for step, loss in logged:
        total, last = total + loss * (step - last), step
    return total / last if last else otherwise
