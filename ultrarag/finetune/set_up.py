"""What a run is made of, from its settings: data, plan, model, evaluators, record, trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ultrarag.checkpoint import Training
from ultrarag.encoder import Encoder
from ultrarag.finetune.batches import (
    SEED_OF_OLD,
    BatchPlan,
    Collator,
    DatasetInfo,
    PairCollator,
    Plan,
    ReplayPlan,
    TrainData,
    make_loader,
)
from ultrarag.finetune.evaluate import AnyEvaluator, read_evaluator, read_rerank_evaluator
from ultrarag.finetune.flags import EVERY_DATASET, FinetuneArguments
from ultrarag.finetune.incremental import record_of
from ultrarag.finetune.merging import Other, read_other
from ultrarag.finetune.output import Start
from ultrarag.finetune.pairs import PairLengths, pair_collator, set_up_pairs
from ultrarag.finetune.step import (
    EmbeddingTrainer,
    FalseNegatives,
    Guide,
    Lora,
    check_honoured,
    guide_adapter,
    load_models_whole,
    rank,
    world_size,
)
from ultrarag.hookspecs import LoadOptions
from ultrarag.plugins import registry


def read_data(arguments: FinetuneArguments, replay: bool = False) -> TrainData:
    """The rows to train on, or those of earlier runs, read as the run's flags say."""
    data = arguments.data
    # names speak of train_data; a replayed file whose own name says it takes no negatives from its batch either
    named = tuple(name for name in data.no_in_batch_neg if name == EVERY_DATASET or not replay)
    with arguments.training.main_process_first(desc="reading the training data"):
        return TrainData.load(
            arguments.incremental.replay_data if replay else data.train_data,
            cache_path=data.cache_path,
            on_bad_rows=data.on_bad_rows,
            max_example_num_per_dataset=data.max_example_num_per_dataset,
            teacher=data.knowledge_distillation,
            no_in_batch_neg=named,
            same_dataset_within_batch=data.same_dataset_within_batch,
            small_threshold=data.small_threshold,
            drop_threshold=data.drop_threshold,
            seed=arguments.training.seed,
        )


def make_plan(arguments: FinetuneArguments, data: TrainData) -> Plan:
    """Which batch comes when."""
    seed = arguments.training.data_seed if arguments.training.data_seed is not None else arguments.training.seed
    plan = _batches(arguments, data, seed)
    if not arguments.incremental.replay_data:
        return plan
    old = _batches(arguments, read_data(arguments, replay=True), seed + SEED_OF_OLD)
    return ReplayPlan(plan, old, arguments.incremental.replay_ratio or 0.0)


def _batches(arguments: FinetuneArguments, data: TrainData, seed: int) -> BatchPlan:
    training = arguments.training
    return BatchPlan(
        data,
        per_device_batch_size=training.per_device_train_batch_size,
        world_size=world_size(),
        seed=seed,
        train_group_size=arguments.data.train_group_size,
        same_dataset_within_batch=arguments.data.same_dataset_within_batch,
        drop_last=training.dataloader_drop_last,
        shuffle_ratio=arguments.data.shuffle_ratio,
        negatives_cross_device=arguments.loss.negatives_cross_device,
        knowledge_distillation=arguments.data.knowledge_distillation,
        group_by_length=training.train_sampling_strategy == "group_by_length",
    )


def load_encoder(arguments: FinetuneArguments, note: Callable[[str], None]) -> Encoder:
    """The model to train, with the run's instructions and lengths."""
    from transformers import set_seed

    load_models_whole()
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
        set_up_pairs(encoder, data, note)
        return encoder
    encoder.max_length("query", data.query_max_len)  # refused here if the model has fewer positions
    encoder.max_length("passage", data.passage_max_len)
    return encoder


def evaluators(arguments: FinetuneArguments, pairs: bool) -> tuple[AnyEvaluator | None, AnyEvaluator | None]:
    """What measures the domain, and what measures the guard."""
    domain, guard = arguments.evaluation.eval_data, arguments.incremental.guard_data
    return _evaluator(arguments, pairs, "eval_data", domain), _evaluator(arguments, pairs, "guard_data", guard)


def _evaluator(arguments: FinetuneArguments, pairs: bool, name: str, source: Any) -> AnyEvaluator | None:
    if source is None:
        return None
    data = arguments.data
    if pairs:
        lengths = PairLengths.of(data)
        return read_rerank_evaluator(source, lengths.query, lengths.pair, name)
    found = read_evaluator(source, data.query_max_len, data.passage_max_len, name)
    found.keep_tokens = arguments.incremental.merge_with is not None
    return found


def other_model(
    arguments: FinetuneArguments, encoder: Encoder, start: Start, note: Callable[[str], None]
) -> Other | None:
    """The model whose weights the trained ones are averaged with; None without `merge_with`."""
    name = arguments.incremental.merge_with
    if name is None:
        return None
    return read_other(name, encoder, arguments.model.model_name_or_path, start.fingerprint, note)


def make_masking(arguments: FinetuneArguments, encoder: Encoder, heads: tuple[str, ...]) -> FalseNegatives | None:
    """What finds false negatives; None where none are looked for."""
    asked, data = arguments.false_negatives, arguments.data
    if asked.false_negative_mask == "none":
        return None
    check_honoured(encoder.adapter, encoder, heads)
    if asked.guide_model is None:
        return FalseNegatives(asked)
    lengths = (data.query_max_len, data.passage_max_len)
    adapter = asked.guide_adapter or guide_adapter(asked.guide_model, encoder.adapter.name)
    guide = Guide.load(asked.guide_model, adapter, lengths, encoder.device, arguments.model.chunk)
    return FalseNegatives(asked, guide)


def make_record(arguments: FinetuneArguments, data: TrainData, plan: Plan, encoder: Encoder, parent: str) -> Training:
    """What the manifest will say of this run, as far as it is known before training."""
    old = plan.old.data if isinstance(plan, ReplayPlan) else None
    rows = [_row(item, data) for item in data.datasets]
    if old:
        rows += [{**_row(item, old), "replay": True} for item in old.datasets]
    described = {**arguments.to_dict(), "world_size": world_size()}
    ancestors = encoder.manifest.lineage() if encoder.manifest else []
    seen = record_of([data, old] if old else [data]) if rank() == 0 else None
    return Training(parent, arguments.model.model_name_or_path, rows, described, seen=seen, ancestors=ancestors)


def _row(item: DatasetInfo, data: TrainData) -> dict[str, Any]:
    return {"name": item.name, "rows": item.stop - item.start, "sha256": data.digest}


def make_collator(
    arguments: FinetuneArguments, encoder: Encoder, masking: FalseNegatives | None = None
) -> Collator | PairCollator:
    """What makes features of a batch."""
    data = arguments.data
    if encoder.adapter.declared.pair_input:
        return pair_collator(encoder, data)
    lengths = (data.query_max_len, data.passage_max_len, data.pad_to_multiple_of)
    return Collator(encoder.tokenizer, encoder.settings, *lengths, masking.features if masking else None)


def make_trainer(
    arguments: FinetuneArguments,
    encoder: Encoder,
    heads: tuple[str, ...],
    plan: Plan,
    record: Training,
    evaluator: AnyEvaluator | None,
    lora: Lora | None,
    masking: FalseNegatives | None,
) -> EmbeddingTrainer:
    """The trainer of the run."""
    from transformers import EarlyStoppingCallback

    collator = make_collator(arguments, encoder, masking)
    patience = arguments.evaluation.early_stopping_patience
    return EmbeddingTrainer(
        encoder,
        heads,
        arguments.training,
        make_loader(plan, collator, rank(), arguments.training),
        arguments.loss,
        arguments.model.chunk,
        record,
        evaluator,
        [EarlyStoppingCallback(patience)] if patience else [],
        lora,
        masking,
        arguments.model.peak_tflops,
    )
