"""The one body of fine-tuning, under the command lines and under `finetune()`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ultrarag.checkpoint import Training
from ultrarag.encoder import Encoder
from ultrarag.errors import TrainingError, UsageError
from ultrarag.finetune.arguments import FinetuneArguments
from ultrarag.finetune.batches import BatchPlan
from ultrarag.finetune.collator import Collator, PairCollator
from ultrarag.finetune.data import TrainData
from ultrarag.finetune.distributed import rank, world_size
from ultrarag.finetune.evaluation import Evaluator, read_evaluator
from ultrarag.finetune.loader import make_loader
from ultrarag.finetune.lora import Lora, add_lora
from ultrarag.finetune.output import check_same_order, claim_output_dir, find_resume, kept_in_output
from ultrarag.finetune.pairs import (
    PairLengths,
    check_groups,
    pair_collator,
    refuse_for_pairs,
    refuse_without_pairs,
    set_up_pairs,
)
from ultrarag.finetune.rerank_evaluation import RerankEvaluator, read_rerank_evaluator
from ultrarag.finetune.trainable import choose_heads, freeze
from ultrarag.finetune.trainer import EmbeddingTrainer
from ultrarag.fingerprint import fingerprint
from ultrarag.hookspecs import LoadOptions
from ultrarag.plugins import registry
from ultrarag.publish import largest_difference, probe_vectors, publish
from ultrarag.types import Embeddings


@dataclass
class FinetuneResult:
    """What a fine-tuning run gives back."""

    #: the finished checkpoint's directory
    checkpoint: str
    #: the model it was trained from
    parent: str
    #: identity of the finished model
    fingerprint: str
    steps: int
    #: mean training loss
    loss: float | None
    #: seconds of training, without loading and evaluation
    seconds: float
    #: "before" and "after": metric -> value; empty without eval_data
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    #: what was translated, dropped or changed, one line each
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"checkpoint  {self.checkpoint}", f"steps       {self.steps}"]
        if self.loss is not None:
            lines.append(f"loss        {self.loss:.4f}")
        for name, before in self.metrics.get("before", {}).items():
            lines.append(f"{name:<11} {before:.4f} -> {self.metrics['after'][name]:.4f}")
        return "\n".join(lines)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: the run stopped after a whole step and saved a checkpoint to resume from."""


def run(arguments: FinetuneArguments) -> FinetuneResult | None:
    """Fine-tune as `arguments` say; the result on the first rank, None on the others.

    Raises:
        UltraragError: what is wrong and what to do.
        Interrupted: after Ctrl-C.
    """
    _refuse_unsupported(arguments)
    pairs = registry().adapter(arguments.adapter).declared.pair_input
    (refuse_for_pairs if pairs else refuse_without_pairs)(arguments)
    notes = _Notes(arguments.notes)
    _use_one_gpu(arguments, notes)
    output = Path(str(arguments.training.output_dir))
    resume = find_resume(arguments, notes.add)
    if rank() == 0 and resume is None:
        claim_output_dir(output, arguments.overwrite_output_dir, notes.add)
    data = _read_data(arguments, notes)
    plan = _plan(arguments, data)
    if pairs:
        check_groups(plan)
    for note in [*data.notes, *plan.notes]:
        notes.add(note)
    encoder = _load_encoder(arguments, notes)
    heads = choose_heads(encoder, arguments.loss.unified_finetuning)
    freeze(encoder, heads, arguments.model.fix_encoder, arguments.model.fix_position_embedding)
    start = _Start(encoder.fingerprint, probe_vectors(encoder))
    lora = add_lora(encoder, arguments.lora) if arguments.lora.use_lora else None
    evaluator = _evaluator(arguments, pairs)
    metrics = {"before": evaluator(encoder, heads)} if evaluator else {}
    record = _record(arguments, data, start.fingerprint)
    if resume:
        check_same_order(resume, record)
    trainer = _trainer(arguments, encoder, heads, plan, record, evaluator, lora)
    seconds, loss = _train(trainer, str(resume) if resume else None)
    if evaluator:
        metrics["after"] = evaluator(encoder, heads)
        _warn_if_worse(metrics, notes)
    record = replace(record, metrics=metrics, steps=trainer.state.global_step, loss=loss)
    identity = _publish(trainer, encoder, start, record, output)
    if rank() != 0:
        return None
    parent = arguments.model.model_name_or_path
    steps = trainer.state.global_step
    return FinetuneResult(str(output), parent, identity, steps, loss, seconds, metrics, notes.lines)


@dataclass
class _Start:
    """The model before training, to see afterwards whether it moved."""

    fingerprint: str
    probes: Embeddings


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


def _refuse_unsupported(arguments: FinetuneArguments) -> None:
    """Flags of transformers that could not do here what they say."""
    training = arguments.training
    refused = {
        "auto_find_batch_size": "use --sub_batch_size, which changes memory but not the loss",
        "label_smoothing_factor": "the contrastive loss has no smoothed labels",
        "include_num_input_tokens_seen": "token counts are not kept",
        "neftune_noise_alpha": "noise on embeddings would change the loss that is compared with the peers'",
    }
    for name, why in refused.items():
        if getattr(training, name, None) not in (None, False, 0, 0.0, "no"):
            raise UsageError(f"--{name} is not supported by this trainer: {why}")
    if getattr(training, "train_sampling_strategy", "random") not in ("random",):
        raise UsageError(
            f"--train_sampling_strategy {training.train_sampling_strategy} (group_by_length) is not supported: "
            "the order of rows is a function of the seed and the epoch alone"
        )
    if arguments.lora.use_lora:
        _refuse_with_lora(arguments)
    if arguments.model.sub_batch_size and training.deepspeed:
        raise UsageError(
            "--sub_batch_size does not work with --deepspeed, whose engine allows one backward per step; "
            "leave one of them out (plain DDP works with --sub_batch_size)"
        )


def _use_one_gpu(arguments: FinetuneArguments, notes: _Notes) -> None:
    """Keep the Trainer from spreading one process over several GPUs by DataParallel, which splits the batch."""
    training = arguments.training
    if training.n_gpu > 1:
        notes.add(
            f"{training.n_gpu} GPUs are visible and one process uses one: start with torchrun --nproc_per_node "
            f"{training.n_gpu} to use all"
        )
        training._n_gpu = 1


def _refuse_with_lora(arguments: FinetuneArguments) -> None:
    """Sharded weights cannot be merged with their adapters on the way to a checkpoint."""
    if arguments.model.fix_encoder:
        raise UsageError("--use_lora adapts the backbone that --fix_encoder freezes; leave one of them out")
    if arguments.training.fsdp or arguments.training.deepspeed:
        raise UsageError("--use_lora does not work with --fsdp or --deepspeed; leave them out (plain DDP works)")


def _read_data(arguments: FinetuneArguments, notes: _Notes) -> TrainData:
    data = arguments.data
    with arguments.training.main_process_first(desc="reading the training data"):
        return TrainData.load(
            data.train_data,
            cache_path=data.cache_path,
            on_bad_rows=data.on_bad_rows,
            max_example_num_per_dataset=data.max_example_num_per_dataset,
            teacher=data.knowledge_distillation,
            no_in_batch_neg=data.no_in_batch_neg,
            same_dataset_within_batch=data.same_dataset_within_batch,
            small_threshold=data.small_threshold,
            drop_threshold=data.drop_threshold,
            seed=arguments.training.seed,
        )


def _plan(arguments: FinetuneArguments, data: TrainData) -> BatchPlan:
    training = arguments.training
    return BatchPlan(
        data,
        per_device_batch_size=training.per_device_train_batch_size,
        world_size=world_size(),
        seed=training.data_seed if training.data_seed is not None else training.seed,
        train_group_size=arguments.data.train_group_size,
        same_dataset_within_batch=arguments.data.same_dataset_within_batch,
        drop_last=training.dataloader_drop_last,
        shuffle_ratio=arguments.data.shuffle_ratio,
        negatives_cross_device=arguments.loss.negatives_cross_device,
        knowledge_distillation=arguments.data.knowledge_distillation,
    )


def _load_encoder(arguments: FinetuneArguments, notes: _Notes) -> Encoder:
    from transformers import set_seed

    set_seed(arguments.training.seed)  # fresh heads are drawn from the run's seed, the same on every rank
    model, data = arguments.model, arguments.data
    pairs = registry().adapter(arguments.adapter).declared.pair_input
    options = LoadOptions(
        heads=model.heads,
        pooling=model.sentence_pooling_method,
        normalize=None if pairs else arguments.loss.normalize_embeddings,
        colbert_dim=model.colbert_dim if model.colbert_dim > 0 else None,
        training=pairs or arguments.loss.unified_finetuning,
        trust_remote_code=model.trust_remote_code,
        config_name=model.config_name,
        tokenizer_name=model.tokenizer_name,
        use_fast_tokenizer=model.use_fast_tokenizer,
        cache_dir=model.cache_dir,
        token=model.token,
    )
    with arguments.training.main_process_first(desc="loading the model"):
        encoder = Encoder.load(
            model.model_name_or_path,
            arguments.adapter,
            device=arguments.training.device,
            options=options,
            query_instruction=data.query_instruction_for_retrieval,
            query_format=data.query_instruction_format if data.query_instruction_for_retrieval else None,
            passage_instruction=data.passage_instruction_for_retrieval,
            passage_format=data.passage_instruction_format if data.passage_instruction_for_retrieval else None,
        )
    if pairs:
        set_up_pairs(encoder, data, notes.add)
        return encoder
    encoder.max_length("query", data.query_max_len)  # refused here if the model has fewer positions
    encoder.max_length("passage", data.passage_max_len)
    return encoder


def _evaluator(arguments: FinetuneArguments, pairs: bool) -> Evaluator | RerankEvaluator | None:
    if arguments.evaluation.eval_data is None:
        return None
    data = arguments.data
    if pairs:
        lengths = PairLengths.of(data)
        return read_rerank_evaluator(arguments.evaluation.eval_data, lengths.query, lengths.pair)
    return read_evaluator(arguments.evaluation.eval_data, data.query_max_len, data.passage_max_len)


def _record(arguments: FinetuneArguments, data: TrainData, parent: str) -> Training:
    rows = [{"name": item.name, "rows": item.stop - item.start, "sha256": data.digest} for item in data.datasets]
    described = {**arguments.to_dict(), "world_size": world_size()}
    return Training(parent, arguments.model.model_name_or_path, rows, described)


def _trainer(
    arguments: FinetuneArguments,
    encoder: Encoder,
    heads: tuple[str, ...],
    plan: BatchPlan,
    record: Training,
    evaluator: Evaluator | RerankEvaluator | None,
    lora: Lora | None,
) -> EmbeddingTrainer:
    from transformers import EarlyStoppingCallback

    data = arguments.data
    lengths = (data.query_max_len, data.passage_max_len, data.pad_to_multiple_of)
    collator: Collator | PairCollator = Collator(encoder.tokenizer, encoder.settings, *lengths)
    if encoder.adapter.declared.pair_input:
        collator = pair_collator(encoder, data)
    patience = arguments.evaluation.early_stopping_patience
    return EmbeddingTrainer(
        encoder,
        heads,
        arguments.training,
        make_loader(plan, collator, rank(), arguments.training),
        arguments.loss,
        arguments.model.sub_batch_size,
        record,
        evaluator,
        [EarlyStoppingCallback(patience)] if patience else [],
        lora,
    )


def _train(trainer: EmbeddingTrainer, resume: str | None) -> tuple[float, float | None]:
    started = time.perf_counter()
    try:
        output = trainer.train(resume_from_checkpoint=resume)
    finally:
        trainer.interrupt.restore()
    if trainer.interrupt.stopped and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped after step {trainer.state.global_step}; continue with --resume_from_checkpoint True"
        )
    return time.perf_counter() - started, _mean_loss(trainer.state.log_history, output.training_loss)


def _mean_loss(history: list[dict[str, float]], otherwise: float) -> float:
    """The mean over all logged steps, those before a resume included; `otherwise` where nothing was logged."""
    logged = [(int(entry["step"]), entry["loss"]) for entry in history if "loss" in entry]
    total = last = 0.0
    for step, loss in logged:
        total, last = total + loss * (step - last), step
    return total / last if last else otherwise


def _publish(trainer: EmbeddingTrainer, encoder: Encoder, start: _Start, record: Training, output: Path) -> str:
    """Write the finished checkpoint, unless training changed nothing."""
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    identity, more = "", None
    if trainer.lora:
        more = partial(trainer.lora.save, matrices=trainer.lora.matrices())
        trainer.lora.remove()
    if rank() == 0:
        weights = encoder.model.state_dict() if trainer.lora else trainer.weights(state_dict)
        identity = fingerprint(encoder.model, encoder.adapter.name, encoder.settings)
        _check_moved(encoder, start, identity)
        publish(encoder, output, weights, record, keep=kept_in_output(output), more=more)
    trainer._wait()
    return identity


def _check_moved(encoder: Encoder, start: _Start, identity: str) -> None:
    remedy = "look at the learning rate, the loss in the log, and what is frozen"
    if identity == start.fingerprint:
        raise TrainingError(f"training changed no weight, so no checkpoint is written; {remedy}")
    probes = probe_vectors(encoder)
    moved = largest_difference(start.probes, probes)
    if not _finite(probes):
        raise TrainingError(f"the trained model gives vectors that are not finite; no checkpoint is written; {remedy}")
    if all(value == 0 for value in moved.values()):
        raise TrainingError(f"the vectors of the probe texts did not move, so no checkpoint is written; {remedy}")


def _finite(embeddings: Embeddings) -> bool:
    import numpy as np

    return all(bool(np.isfinite(array).all()) for array in embeddings.arrays())


def _warn_if_worse(metrics: Mapping[str, Mapping[str, float]], notes: _Notes) -> None:
    before, after = metrics["before"]["nDCG@10"], metrics["after"]["nDCG@10"]
    if after < before:
        notes.add(
            f"the model is worse than before on the evaluation data: nDCG@10 {before:.4f} -> {after:.4f}; "
            "do not deploy it unseen"
        )
