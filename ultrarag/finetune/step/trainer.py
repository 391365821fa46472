"""EmbeddingTrainer: transformers' Trainer with one forward, one loss, atomic saves and an exact resume."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback

from ultrarag.checkpoint import Training, write_checkpoint
from ultrarag.encoder import Encoder
from ultrarag.errors import CheckpointError, TrainingError
from ultrarag.finetune.batches import PlannedLoader, TrainingBatch
from ultrarag.finetune.corpus import CorpusNegatives, Nearest
from ultrarag.finetune.step.best import Best
from ultrarag.finetune.step.callbacks import StderrProgress, StopOnInterrupt, Throughput
from ultrarag.finetune.step.distributed import (
    Weights,
    fsdp_on_cpu,
    gather,
    gather_rows,
    load_models_whole,
    load_sharded,
    mean_weight,
    most,
    uses_engine,
    wait,
    world_size,
)
from ultrarag.finetune.step.gradcache import by_texts, by_tokens, cached_step
from ultrarag.finetune.step.lora import Lora
from ultrarag.finetune.step.masking import FalseNegatives
from ultrarag.finetune.step.trainable import Trainable, still_modules
from ultrarag.hookspecs import Features, LoadOptions
from ultrarag.io import named_when_full, quiet_progress, sync_directory, sync_tree
from ultrarag.losses import regularizer_share, sparsity
from ultrarag.transfer import remember_host
from ultrarag.types import Embeddings
from ultrarag.untrusted import only_tensors

if TYPE_CHECKING:
    from ultrarag.finetune.flags import FinetuneArguments

#: Measures an encoder with some of its heads: metric -> value.
Measure = Callable[[Encoder, tuple[str, ...]], dict[str, float]]


@dataclass
class Learner:
    """What is trained: an encoder by some of its heads, whole or by low-rank adapters."""

    encoder: Encoder
    heads: tuple[str, ...]
    lora: Lora | None = None
    #: finds what is left out of the negatives
    masking: FalseNegatives | None = None
    #: the passages of the corpus that stand against the queries, and the side that is frozen
    corpus: CorpusNegatives | None = None
    #: mines, with the encoder as it is, the passages nearest to each query
    mine: Callable[[], Nearest] | None = None
    #: learning rate of a map of stored vectors
    map_rate: float = 0.0


class EmbeddingTrainer(Trainer):
    """Trains an `Encoder` on planned batches; the order of data, the saves and the resume are ours."""

    def __init__(
        self,
        learner: Learner,
        arguments: FinetuneArguments,
        loader: PlannedLoader,
        record: Training,
        measure: Measure | None = None,
    ) -> None:
        """Prepare the training of a learner.

        Args:
            loader: this rank's batches.
            record: what the manifests of checkpoints say of the run.
            measure: measures the encoder on held-out data, between steps.
        """
        args, patience = arguments.training, arguments.evaluation.early_stopping_patience
        self.trained = Weights(learner.encoder, uses_engine(args))
        super().__init__(
            model=Trainable(learner.encoder, learner.heads, self.trained.model),
            args=args,
            train_dataset=loader.dataset,
            eval_dataset=loader.dataset if measure else None,  # the Trainer insists on one; `evaluate` is ours
            data_collator=loader.collate_fn,
            callbacks=[EarlyStoppingCallback(patience)] if patience else [],
        )
        load_models_whole()
        self.encoder, self.heads = learner.encoder, learner.heads
        self.lora, self.masking = learner.lora, learner.masking
        self.corpus, self.mine, self.map_rate = learner.corpus, learner.mine, learner.map_rate
        self.loader = loader
        self.loss_arguments = arguments.loss
        texts, tokens = arguments.model.chunk_texts, arguments.model.sub_batch_tokens
        #: how GradCache cuts a side of the batch; None: the step is taken in one piece
        self.cut = by_tokens(tokens) if tokens else by_texts(texts) if texts else None
        #: modules in which nothing is trained, and nothing dropped out
        self.still = still_modules(learner.encoder.model, arguments.model.freeze_layers, arguments.sides.frozen)
        self.record = record
        self.measure = measure
        self.best = Best(arguments.evaluation.save_min_seconds)
        half, peak_tflops = args.bf16 or args.fp16, arguments.model.peak_tflops
        self.throughput = Throughput(self.trained.model, args.device, half, peak_tflops)
        self.interrupt = StopOnInterrupt()
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)
        self.add_callback(StderrProgress())
        self.add_callback(self.interrupt)

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers does it, and FSDP where it is asked for."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            fsdp_on_cpu(self)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it; a map of stored vectors has a learning rate of its own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh and self.corpus and self.corpus.map is not None:
            own = list(self.corpus.map.parameters())
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if all(p is not other for other in own)]
            optimizer.add_param_group({"params": own, "lr": self.map_rate, "weight_decay": 0.0})
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; afterwards the encoder has the weights."""
        output = super().train(*args, **kwargs)
        self.trained.finish()
        return output

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *checkpoint: Any
    ) -> tuple[int, int]:
        """As transformers does it, which in the middle of an epoch would make one step more than asked for."""
        begin: tuple[int, int] = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, *checkpoint
        )
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begin

    # ---- data

    def get_train_dataloader(self) -> PlannedLoader:
        """This rank's planned batches (accelerate must not shard them again)."""
        return self.loader

    def num_examples(self, dataloader: Any) -> int:
        """Rows per epoch."""
        return len(self.loader.dataset)  # type: ignore[arg-type]

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted here."""
        return 0

    # ---- the step

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Encode, gather, loss, backward; in chunks of `sub_batch_size` or `sub_batch_tokens`."""
        self._mine_again()
        model.train()
        for module in self.still:
            module.eval()
        given = _sides(inputs)
        self.throughput.count(given)
        batch: TrainingBatch = self._prepare_inputs(inputs)  # type: ignore[assignment]
        sides = _sides(batch)
        for side, before in zip(sides, given, strict=True):
            remember_host(side["attention_mask"], before["attention_mask"])
        share = 1 / self.current_gradient_accumulation_steps
        if self.cut:
            value = cached_step(
                sides,
                functools.partial(self._encode, model),
                lambda embeddings: self._loss(batch, embeddings) * share,
                Tensor.backward if self.is_deepspeed_enabled else self.accelerator.backward,
                self.cut,
                functools.partial(self.accelerator.no_sync, model=model),
                self._push if self.is_deepspeed_enabled else None,
                most if self.trained.engine else None,
            )
            self._share_map_gradient()
            return value
        loss = self._loss(batch, self._encode(model, sides)) * share
        if self.is_deepspeed_enabled:
            self._push(loss, last=True)
        else:
            self.accelerator.backward(loss)
        self._share_map_gradient()
        return loss.detach()

    def _mine_again(self) -> None:
        """Take hard negatives anew when an epoch begins."""
        if self.corpus is None or self.mine is None:
            return
        every = max(1, -(-len(self.loader) // self.args.gradient_accumulation_steps))
        step, folder = self.state.global_step, Path(str(self.args.output_dir))
        self.corpus.refresh(step, every, folder, self.mine, self.args.should_save)

    def _share_map_gradient(self) -> None:
        """Average the ranks' gradients of a map of stored vectors, which no forward of the wrapped module has."""
        if self.corpus is None or self.corpus.map is None or world_size() == 1:
            return
        if self.accelerator.sync_gradients:
            for parameter in self.corpus.map.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size()

    def _push(self, loss: Tensor, last: bool) -> None:
        """Backward through DeepSpeed's engine; it steps after the last one, where the Trainer does."""
        steps = last and self.accelerator.sync_gradients
        self.accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=steps, scale_wrt_gas=False)

    def _encode(self, model: nn.Module, sides: Sequence[Features]) -> list[Embeddings]:
        with self.compute_loss_context_manager():
            result: list[Embeddings] = model(sides)
        return result

    def _corpus_loss(self, corpus: CorpusNegatives, batch: TrainingBatch, embeddings: list[Embeddings]) -> Tensor:
        """The loss against the passages of the corpus; `embeddings` are those of the sides in training."""
        features, teacher, step = batch["corpus"], batch["teacher"], self.state.global_step
        assert features is not None
        given = iter(embeddings)
        query = corpus.query(features) if corpus.frozen == "query" else next(given)
        fresh = None if corpus.frozen == "passage" else next(given)
        keys, group_size = features["keys"].passages, batch["group_size"]
        if fresh is not None and self.loss_arguments.negatives_cross_device:
            fresh, keys = gather(fresh), _gathered(keys, corpus.bank.device)
        nearest = corpus.nearest_to(features) if corpus.count is None else self._all_nearest(corpus, features)
        columns = corpus.columns(step, nearest)
        found = corpus.opponents(features, fresh, keys, columns, group_size, teacher is not None)
        if self.masking and self.masking.arguments.false_negative_mask == "margin":
            found.mask |= self.masking(features, query, found.passage, group_size, teacher is not None)
        arguments = replace(
            self.loss_arguments,
            group_size=group_size,
            in_batch_negatives=True,
            false_negatives=found.mask,
            score_offsets=found.offsets,
        )
        loss = self.encoder.adapter.loss(self.trained.model, query, found.passage, teacher, step, arguments)
        trained = None if corpus.frozen == "query" else query
        return self._regularized(loss, trained, fresh) + corpus.penalty()

    def _regularized(self, loss: Tensor, query: Embeddings | None, passage: Embeddings | None) -> Tensor:
        """The loss, and what keeps the sides in training sparse where that is asked for."""
        if not self.loss_arguments.regularized:
            return loss
        share = regularizer_share(self.state.global_step, self.state.max_steps, self.loss_arguments)
        return loss + sparsity(query, passage, self.loss_arguments, share).to(loss)

    def _all_nearest(self, corpus: CorpusNegatives, features: dict[str, Any]) -> np.ndarray:
        return _gathered(corpus.nearest_to(features), corpus.bank.device)

    def _loss(self, batch: TrainingBatch, embeddings: list[Embeddings]) -> Tensor:
        if self.corpus:
            loss, queries = self._corpus_loss(self.corpus, batch, embeddings), len(batch["sources"])
            if not torch.isfinite(loss):
                raise TrainingError(_not_finite(loss, self.state.global_step, batch))
            return loss * mean_weight(queries, loss.device)
        query, passage = embeddings if len(embeddings) == 2 else (None, embeddings[0])
        queries = len(passage) // batch["group_size"]
        across = query is not None and self.loss_arguments.negatives_cross_device and batch["in_batch_negatives"]
        if across:
            passage = gather(passage)
        step, teacher, mask = self.state.global_step, batch["teacher"], None
        if self.masking and query is not None and batch["masking"] is not None:
            groups = (batch["group_size"], teacher is not None, across)
            mask = self.masking(batch["masking"], query, passage, *groups)
        arguments = replace(
            self.loss_arguments,
            group_size=batch["group_size"],
            in_batch_negatives=batch["in_batch_negatives"],
            false_negatives=mask,
        )
        loss = self.encoder.adapter.loss(self.trained.model, query, passage, teacher, step, arguments)
        loss = self._regularized(loss, query, passage)
        if not torch.isfinite(loss):
            raise TrainingError(_not_finite(loss, step, batch))
        return loss * mean_weight(queries, loss.device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what was measured, what this process achieved, and how many passages were left out as false negatives."""
        if "loss" in logs:
            logs |= self.throughput.entries()
        if self.loss_arguments.regularized and "loss" in logs:
            share = regularizer_share(max(0, self.state.global_step - 1), self.state.max_steps, self.loss_arguments)
            logs["regularizer_share"] = round(share, 4)
        if self.masking and "loss" in logs:
            logs["false_negatives"] = round(self.masking.share(), 4)
        super().log(logs, *args, **kwargs)

    # ---- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure retrieval on the held-out data."""
        assert self.measure is not None
        with self.trained.whole():
            found = self.measure(self.encoder, self.heads)
        metrics = {f"{metric_key_prefix}_{name.lower()}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the encoder as it is now."""
        with self.trained.whole():
            self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        record = replace(self.record, steps=self.state.global_step)
        with torch.random.fork_rng():  # loading it again for the comparison draws random numbers
            if self.lora:
                matrices = self.lora.matrices()
                with self.lora.merged():
                    more = functools.partial(self.lora.save, matrices=matrices)
                    write_checkpoint(self.encoder, folder, self.encoder.model.state_dict(), record, more)
            else:
                write_checkpoint(self.encoder, folder, self.encoder.model.state_dict(), record)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write checkpoint-N beside, then rename it: a reader, and a resume, see all of it or nothing."""
        if self._put_off():
            return
        final = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        stage = final.with_name(f".{final.name}.tmp")
        with named_when_full(final):
            try:
                self._fill(stage)
                self._publish(stage, final)
            except BaseException:
                if self.args.should_save:  # what fills the disk would stay there
                    shutil.rmtree(stage, ignore_errors=True)
                raise
        self.wait()

    def _put_off(self) -> bool:
        """Whether the last checkpoint is too near; the weights are kept in memory then, where they are the best."""
        if not self.best.early or self.interrupt.stopped or self.trained.engine or world_size() > 1:
            return False
        if self.state.best_global_step == self.state.global_step:
            self.best.keep(self.encoder.model)
            self.state.best_model_checkpoint = str(self.args.output_dir)  # says that there is one
        return True

    def _fill(self, stage: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir(parents=True)
        self.wait()
        self.store_flos()
        self.save_model(str(stage), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(stage))
            self._save_scaler(str(stage))
            self._save_rng_state(str(stage))

    def _publish(self, stage: Path, final: Path) -> None:
        self.best.written(stage, self.state.best_global_step == self.state.global_step)
        if self.state.best_global_step and not self.best:
            best = final.with_name(f"checkpoint-{self.state.best_global_step}")
            self.state.best_model_checkpoint = str(best)
        self.wait()
        if self.args.should_save:
            _write_state(self, stage)
            sync_tree(stage)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(stage, final)
            sync_directory(final.parent)
            _remove_old(final, self.state.best_model_checkpoint, self.args.save_total_limit)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As transformers does it; under FSDP without the weights, which `save_model` has written."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def wait(self) -> None:
        """Let every rank come here."""
        wait()

    # ---- loading

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with only_tensors(checkpoint or ""):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.lr_scheduler is not None:
            _set_rates(getattr(self.lr_scheduler, "scheduler", self.lr_scheduler))  # accelerate wraps it

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with only_tensors(checkpoint or ""):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Put a checkpoint's weights into the model, every one of them, or raise."""
        self.best.read(Path(resume_from_checkpoint))
        if model is None:
            self.load_weights(resume_from_checkpoint)
        else:
            load_sharded(model, _read_weights(self.encoder, resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.best:
            self.best.restore(self.encoder.model)
            self.trained.keep()
        else:
            self.load_weights(str(self.state.best_model_checkpoint))

    def load_weights(self, folder: str) -> None:
        """Put a checkpoint's weights into the encoder."""
        weights = _read_weights(self.encoder, folder)
        if self.lora:
            self.lora.restore(Path(folder), weights)
            return
        try:
            self.encoder.model.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            raise CheckpointError(f"{folder} does not fit the model that is trained: {error}") from error
        self.trained.keep()


def _set_rates(scheduler: Any) -> None:
    """Let the next step have the rate of a schedule of the length given now; the optimizer was saved with another's."""
    if isinstance(scheduler, LambdaLR):
        lambdas = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        rates = [rate * share(scheduler.last_epoch) for rate, share in lambdas]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates


def _sides(batch: TrainingBatch) -> list[Features]:
    """What of a batch is encoded: queries and passages, or the pairs that stand in place of both."""
    return [side for side in (batch["queries"], batch["passages"]) if side is not None]


def _gathered(numbers: np.ndarray, device: torch.device) -> np.ndarray:
    """All ranks' rows of whole numbers, this rank's first."""
    return gather_rows(torch.from_numpy(np.ascontiguousarray(numbers)).to(device)).cpu().numpy()


def _not_finite(loss: Tensor, step: int, batch: TrainingBatch) -> str:
    rows = ", ".join(batch["sources"][:8]) + (" ..." if len(batch["sources"]) > 8 else "")
    return (
        f"the loss is {loss.item()} at step {step}, dataset '{batch['dataset']}', rows {rows}; nothing was saved from "
        "this step. Usual causes: fp16 overflow (use --bf16), a learning rate that is too high, a temperature that is "
        "too low, or damaged teacher scores in these rows"
    )


def _write_state(trainer: Trainer, folder: Path) -> None:
    """The Trainer's counters, with those of its callbacks (early stopping)."""
    saved: dict[str, Any] = trainer.state.stateful_callbacks  # type: ignore[assignment]
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            saved[type(callback).__name__] = callback.state()
    trainer.state.save_to_json(str(folder / "trainer_state.json"))


def _remove_old(newest: Path, best: str | None, limit: int | None) -> None:
    """Keep `limit` checkpoints beside the newest: that one, and the best one always."""
    if not limit or limit <= 0:
        return
    found = sorted(newest.parent.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]))
    kept = {newest, Path(best or newest)}
    removable = [path for path in found if path not in kept]
    for path in removable[: max(0, len(found) - max(limit, len(kept)))]:
        shutil.rmtree(path)


def _read_weights(encoder: Encoder, folder: str) -> dict[str, Tensor]:
    """The weights of a checkpoint of the same model."""
    settings = encoder.settings
    options = LoadOptions(heads=encoder.heads, pooling=settings.pooling, normalize=settings.normalize)
    with quiet_progress():
        found: dict[str, Tensor] = encoder.adapter.load(folder, options).state_dict()
    return found
