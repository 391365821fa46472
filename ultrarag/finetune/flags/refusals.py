"""Flags that could not do here what they say: refused before anything is loaded."""

from __future__ import annotations

from typing import Any

from ultrarag.errors import UsageError
from ultrarag.finetune.flags.arguments import FinetuneArguments
from ultrarag.finetune.step import world_size


def refuse_unsupported(arguments: FinetuneArguments) -> None:
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
    if training.train_sampling_strategy not in ("random", "group_by_length"):
        raise UsageError(
            f"--train_sampling_strategy {training.train_sampling_strategy} is not supported: rows come in random "
            "order, or group_by_length"
        )
    if arguments.lora.use_lora:
        _refuse_with_lora(arguments)
    if training.fsdp:
        _refuse_with_fsdp(training.fsdp_config)


def _refuse_with_fsdp(config: Any) -> None:
    if isinstance(config, dict) and int(config.get("version", 2)) != 2:
        raise UsageError('--fsdp: version 1 in fsdp_config is not supported; give {"version": 2}, or leave it out')
    if world_size() == 1:
        raise UsageError("--fsdp shards the weights over processes and there is one: start with torchrun")


def _refuse_with_lora(arguments: FinetuneArguments) -> None:
    """Sharded weights cannot be merged with their adapters on the way to a checkpoint."""
    if arguments.model.fix_encoder:
        raise UsageError("--use_lora adapts the backbone that --fix_encoder freezes; leave one of them out")
    if arguments.training.fsdp or arguments.training.deepspeed:
        raise UsageError("--use_lora does not work with --fsdp or --deepspeed; leave them out (plain DDP works)")
