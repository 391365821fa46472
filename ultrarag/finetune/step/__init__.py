"""The room of the training step: one forward, one loss, gathered between ranks, saved atomically.

Features come in; a trained model goes out. GradCache, sharding, LoRA and masks of false negatives work here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.finetune.step.distributed import least, rank, world_size
    from ultrarag.finetune.step.gradcache import cached_step
    from ultrarag.finetune.step.lora import Lora, add_lora
    from ultrarag.finetune.step.masking import FalseNegatives, Guide, check_honoured, guide_adapter
    from ultrarag.finetune.step.sharding import load_models_whole
    from ultrarag.finetune.step.trainable import Trainable, choose_heads, freeze
    from ultrarag.finetune.step.trainer import EmbeddingTrainer
else:
    __getattr__, __dir__, __all__ = exports(__name__)
