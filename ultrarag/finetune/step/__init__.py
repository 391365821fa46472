"""Training step: one forward, one loss, gathered between ranks, saved atomically.

Features come in; a trained model goes out. GradCache, sharding, LoRA and masks of false negatives work here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.finetune.step.callbacks import Interrupted
    from ultrarag.finetune.step.distributed import encode_by_ranks, least, rank, wait, world_size
    from ultrarag.finetune.step.gradcache import by_texts, by_tokens, cached_step
    from ultrarag.finetune.step.lora import LORA_FILE, Lora, add_lora
    from ultrarag.finetune.step.masking import FalseNegatives
    from ultrarag.finetune.step.trainable import (
        Trainable,
        check_regularized,
        choose_heads,
        freeze,
        layers_of,
        load_encoder,
    )
    from ultrarag.finetune.step.trainer import EmbeddingTrainer, Learner
    from ultrarag.finetune.step.watch import watching
else:
    __getattr__, __dir__, __all__ = exports(__name__)
