"""The one body of fine-tuning, under the command lines and under `finetune()`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ultrarag.checkpoint import Training, probe_vectors
from ultrarag.errors import UsageError
from ultrarag.finetune.check import check_run
from ultrarag.finetune.evaluate import Measures
from ultrarag.finetune.flags import FinetuneArguments, refuse_unsupported
from ultrarag.finetune.incremental import Interrupted, find_trained, merge_weights, tell_seen
from ultrarag.finetune.memory import settle_sizes, wants_probe
from ultrarag.finetune.output import (
    UNMERGED,
    Start,
    asked_to_resume,
    check_same_order,
    claim_output_dir,
    find_resume,
    merge_adapters,
    remove_left,
    write_finished,
)
from ultrarag.finetune.pairs import check_groups, refuse_for_pairs, refuse_without_pairs
from ultrarag.finetune.report import HTML_FILE, FinetuneResult, read_history, write_report
from ultrarag.finetune.set_up import (
    evaluators,
    load_encoder,
    make_masking,
    make_plan,
    make_record,
    make_trainer,
    other_model,
    read_data,
)
from ultrarag.finetune.step import EmbeddingTrainer, add_lora, choose_heads, freeze, rank
from ultrarag.plugins import registry


def run(arguments: FinetuneArguments) -> FinetuneResult | None:
    """Fine-tune as `arguments` say; the result on the first rank, None on the others.

    Raises:
        UltraragError: what is wrong and what to do.
        Interrupted: after Ctrl-C.
    """
    if arguments.dry_run:
        raise UsageError("dry_run is for the command line; in Python call ultrarag.finetune.preview.dry_run")
    refuse_unsupported(arguments)
    pairs = registry().adapter(arguments.adapter).declared.pair_input
    (refuse_for_pairs if pairs else refuse_without_pairs)(arguments)
    notes = _Notes(arguments.notes)
    _use_one_gpu(arguments, notes)
    output = Path(str(arguments.training.output_dir))
    resume = find_resume(arguments, notes.add)
    if rank() == 0 and resume is None:
        claim_output_dir(output, arguments.overwrite_output_dir, notes.add)
        if not asked_to_resume(arguments):
            remove_left(output)
    data = read_data(arguments)
    loaded = load_encoder(arguments, notes.add) if wants_probe(arguments) else None
    if loaded:
        heads = choose_heads(loaded, arguments.loss.unified_finetuning)
        settle_sizes(arguments, loaded, heads, len(data), resume, notes.add)
    plan = make_plan(arguments, data)
    if pairs:
        check_groups(plan)
    for note in [*data.notes, *plan.notes]:
        notes.add(note)
    encoder = loaded or load_encoder(arguments, notes.add)
    tell_seen(data, encoder, arguments.incremental, notes.add)
    heads = choose_heads(encoder, arguments.loss.unified_finetuning)
    freeze(encoder, heads, arguments.model.fix_encoder, arguments.model.fix_position_embedding)
    start = Start(encoder.fingerprint, probe_vectors(encoder))
    other = other_model(arguments, encoder, start, notes.add)
    masking = make_masking(arguments, encoder, heads)
    lora = add_lora(encoder, arguments.lora) if arguments.lora.use_lora else None
    measures = Measures(*evaluators(arguments, pairs))
    if resume is None:
        check_run(arguments, data, encoder, measures.domain, notes.add)
    measures.take("before", encoder, heads)
    record = make_record(arguments, data, plan, encoder, start.fingerprint)
    if resume:
        check_same_order(resume, record)
    trainer = make_trainer(arguments, encoder, heads, plan, record, measures.domain, lora, masking)
    trained = find_trained(output, record) if other and asked_to_resume(arguments) else None
    done = _restore(trainer, trained, output, notes) if trained else _train(trainer, str(resume) if resume else None)
    measures.take("after", encoder, heads)
    record = replace(record, metrics=measures.metrics, steps=done.steps, loss=done.loss)
    if other:
        if trained is None:
            write_finished(trainer, encoder, start, record, output / UNMERGED)
        merge_adapters(trainer)
        merge = merge_weights(encoder, heads, other, arguments.incremental, measures, notes.add)
        record = replace(record, metrics=measures.metrics, merge=merge)
    measures.warn(arguments.incremental.max_forgetting, notes.add)
    identity = write_finished(trainer, encoder, start, record, output)
    if rank() != 0:
        return None
    result = FinetuneResult(
        str(output),
        arguments.model.model_name_or_path,
        identity,
        done.steps,
        done.loss,
        done.seconds,
        measures.metrics,
        notes.lines,
        record.merge,
        str(output / HTML_FILE),
    )
    write_report(output, result, record, done.history or read_history(output), measures.measured())
    return result


@dataclass
class _Done:
    """The training itself."""

    steps: int
    #: mean training loss
    loss: float | None
    seconds: float
    #: the trainer's log
    history: list[dict[str, Any]]


class _Notes:
    """Remarks for the user, printed once, by the first rank, on stderr."""

    def __init__(self, lines: list[str]) -> None:
        self.lines: list[str] = []
        for line in lines:
            self.add(line)

    def add(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)
            if rank() == 0:
                print(f"note: {line}", file=sys.stderr, flush=True)


def _use_one_gpu(arguments: FinetuneArguments, notes: _Notes) -> None:
    """Keep the Trainer from spreading one process over several GPUs by DataParallel, which splits the batch."""
    training = arguments.training
    if training.n_gpu > 1:
        notes.add(
            f"{training.n_gpu} GPUs are visible and one process uses one: start with torchrun --nproc_per_node "
            f"{training.n_gpu} to use all"
        )
        training._n_gpu = 1


def _restore(trainer: EmbeddingTrainer, trained: Training, output: Path, notes: _Notes) -> _Done:
    """Take the trained weights of the same run, which was stopped when it was about to merge them."""
    notes.add(f"the model was trained already: going on from {output / UNMERGED}")
    trainer._load_weights(str(output / UNMERGED))
    return _Done(trained.steps, trained.loss, 0.0, [])


def _train(trainer: EmbeddingTrainer, resume: str | None) -> _Done:
    started = time.perf_counter()
    try:
        output = trainer.train(resume_from_checkpoint=resume)
    finally:
        trainer.interrupt.restore()
    if trainer.interrupt.stopped and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped after step {trainer.state.global_step}; continue with --resume_from_checkpoint True"
        )
    history: list[dict[str, Any]] = trainer.state.log_history
    seconds = time.perf_counter() - started
    return _Done(trainer.state.global_step, _mean_loss(history, output.training_loss), seconds, history)


def _mean_loss(history: list[dict[str, float]], otherwise: float) -> float:
    """The mean over all logged steps, those before a resume included; `otherwise` where nothing was logged."""
    logged = [(int(entry["step"]), entry["loss"]) for entry in history if "loss" in entry]
    total = last = 0.0
    for step, loss in logged:
        total, last = total + loss * (step - last), step
    return total / last if last else otherwise
