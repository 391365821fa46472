"""EmbeddingTrainer: transformers' Trainer with one forward, one loss, atomic saves and an exact resume."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback

from ultrarag.checkpoint import Training
from ultrarag.encoder import Encoder
from ultrarag.errors import CheckpointError, TrainingError
from ultrarag.files import sync_directory, sync_tree
from ultrarag.finetune.callbacks import StderrProgress, StopOnInterrupt
from ultrarag.finetune.collator import TrainingBatch
from ultrarag.finetune.distributed import gather, mean_weight, world_size
from ultrarag.finetune.evaluation import Evaluator
from ultrarag.finetune.gradcache import cached_step
from ultrarag.finetune.loader import PlannedLoader
from ultrarag.finetune.lora import Lora
from ultrarag.finetune.masking import FalseNegatives
from ultrarag.finetune.rerank_evaluation import RerankEvaluator
from ultrarag.finetune.throughput import Throughput
from ultrarag.finetune.trainable import Trainable
from ultrarag.hookspecs import Features, LoadOptions
from ultrarag.loss_arguments import LossArguments
from ultrarag.progress import quiet_progress
from ultrarag.publish import write_checkpoint
from ultrarag.types import Embeddings


class EmbeddingTrainer(Trainer):
    """Trains an `Encoder` on planned batches; the order of data, the saves and the resume are ours."""

    def __init__(
        self,
        encoder: Encoder,
        heads: tuple[str, ...],
        args: TrainingArguments,
        loader: PlannedLoader,
        loss_arguments: LossArguments,
        sub_batch_size: int | None,
        record: Training,
        evaluator: Evaluator | RerankEvaluator | None = None,
        callbacks: Sequence[Any] = (),
        lora: Lora | None = None,
        masking: FalseNegatives | None = None,
        peak_tflops: float | None = None,
    ) -> None:
        super().__init__(
            model=Trainable(encoder, heads),
            args=args,
            train_dataset=loader.dataset,
            eval_dataset=loader.dataset if evaluator else None,  # the Trainer insists on one; `evaluate` is ours
            data_collator=loader.collate_fn,
            callbacks=list(callbacks),
        )
        self.encoder = encoder
        self.heads = heads
        self.loader = loader
        self.loss_arguments = loss_arguments
        self.sub_batch_size = sub_batch_size
        self.record = record
        self.evaluator = evaluator
        self.lora = lora
        self.masking = masking
        self.throughput = Throughput(encoder.model, args.device, args.bf16 or args.fp16, peak_tflops)
        self.interrupt = StopOnInterrupt()
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)
        self.add_callback(StderrProgress())
        self.add_callback(self.interrupt)

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
        """Encode, gather, loss, backward; in pieces of `sub_batch_size` texts where that is set."""
        model.train()
        self.throughput.count([side for side in (inputs["queries"], inputs["passages"]) if side is not None])
        batch: TrainingBatch = self._prepare_inputs(inputs)  # type: ignore[assignment]
        sides = [side for side in (batch["queries"], batch["passages"]) if side is not None]
        share = 1 / self.current_gradient_accumulation_steps
        if self.sub_batch_size:
            return cached_step(
                sides,
                functools.partial(self._encode, model),
                lambda embeddings: self._loss(batch, embeddings) * share,
                self.accelerator.backward,
                self.sub_batch_size,
                functools.partial(self.accelerator.no_sync, model=model),
            )
        loss = self._loss(batch, self._encode(model, sides)) * share
        self.accelerator.backward(loss)
        return loss.detach()

    def _encode(self, model: nn.Module, sides: Sequence[Features]) -> list[Embeddings]:
        with self.compute_loss_context_manager():
            result: list[Embeddings] = model(sides)
        return result

    def _loss(self, batch: TrainingBatch, embeddings: list[Embeddings]) -> Tensor:
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
        loss = self.encoder.adapter.loss(self.encoder.model, query, passage, teacher, step, arguments)
        if not torch.isfinite(loss):
            raise TrainingError(_not_finite(loss, step, batch))
        return loss * mean_weight(queries, loss.device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what was measured, what this process achieved, and how many passages were left out as false negatives."""
        if "loss" in logs:
            logs |= self.throughput.entries()
        if self.masking and "loss" in logs:
            logs["false_negatives"] = round(self.masking.share(), 4)
        super().log(logs, *args, **kwargs)

    # ---- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure retrieval on the held-out data."""
        assert self.evaluator is not None
        found = self.evaluator(self.encoder, self.heads)
        metrics = {f"{metric_key_prefix}_{name.lower()}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- saving

    def weights(self, state_dict: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The encoder's state dict, out of the wrapper's (or a gathered one)."""
        found = self.accelerator.unwrap_model(self.model).state_dict() if state_dict is None else state_dict
        return {name.removeprefix("model."): value for name, value in found.items()}

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
                    write_checkpoint(self.encoder, folder, self.lora.weights(), record, more)
            else:
                write_checkpoint(self.encoder, folder, self.weights(state_dict), record)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write checkpoint-N beside, then rename it: a reader, and a resume, see all of it or nothing."""
        final = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        stage = final.with_name(f".{final.name}.tmp")
        if self.args.should_save:
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir(parents=True)
        self._wait()
        self.store_flos()
        self.save_model(str(stage), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(stage))
            self._save_scaler(str(stage))
            self._save_rng_state(str(stage))
        if self.state.best_global_step:
            best = final.with_name(f"checkpoint-{self.state.best_global_step}")
            self.state.best_model_checkpoint = str(best)
        self._wait()
        if self.args.should_save:
            self._write_state(stage)
            sync_tree(stage)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(stage, final)
            sync_directory(final.parent)
            self._remove_old_checkpoints(final)
        self._wait()

    def _write_state(self, folder: Path) -> None:
        """The Trainer's counters, with those of its callbacks (early stopping)."""
        saved: dict[str, Any] = self.state.stateful_callbacks  # type: ignore[assignment]
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                saved[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _remove_old_checkpoints(self, newest: Path) -> None:
        """Keep `save_total_limit` checkpoints: the newest, and the best one always."""
        limit = self.args.save_total_limit
        if not limit or limit <= 0:
            return
        found = sorted(newest.parent.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]))
        kept = {newest, Path(self.state.best_model_checkpoint or newest)}
        removable = [path for path in found if path not in kept]
        for path in removable[: max(0, len(found) - max(limit, len(kept)))]:
            shutil.rmtree(path)

    def _wait(self) -> None:
        if world_size() > 1:
            dist.barrier()

    # ---- loading

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Put a checkpoint's weights into the model, every one of them, or raise."""
        self._load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        self._load_weights(str(self.state.best_model_checkpoint))

    def _load_weights(self, folder: str) -> None:
        options = LoadOptions(
            heads=self.encoder.heads,
            pooling=self.encoder.settings.pooling,
            normalize=self.encoder.settings.normalize,
        )
        with quiet_progress():
            loaded = self.encoder.adapter.load(folder, options)
        if self.lora:
            self.lora.restore(Path(folder), loaded.state_dict())
            return
        try:
            self.encoder.model.load_state_dict(loaded.state_dict(), strict=True)
        except RuntimeError as error:
            raise CheckpointError(f"{folder} does not fit the model that is trained: {error}") from error


def _not_finite(loss: Tensor, step: int, batch: TrainingBatch) -> str:
    rows = ", ".join(batch["sources"][:8]) + (" ..." if len(batch["sources"]) > 8 else "")
    return (
        f"the loss is {loss.item()} at step {step}, dataset '{batch['dataset']}', rows {rows}; nothing was saved from "
        "this step. Usual causes: fp16 overflow (use --bf16), a learning rate that is too high, a temperature that is "
        "too low, or damaged teacher scores in these rows"
    )
