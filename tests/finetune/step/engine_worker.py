"""One rank of the distributed tests: several runs in turn, so that Python and torch are imported once.

`torchrun ... -m tests.finetune.step.engine_worker RUNS.json`: a list of lists of flags of `ultrarag.finetune.bgem3`.
Under an engine each run says on stderr how its weights lie.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from ultrarag.finetune.__main__ import main
from ultrarag.finetune.step import trainer as trainer_module
from ultrarag.finetune.step.distributed import rank


def print_layout(trainer: trainer_module.EmbeddingTrainer) -> None:
    """Say which engine trains, and how much of the weights this rank holds."""
    held = {"full_tensor": 0, "ds_id": 0}
    for parameter in trainer.trained.model.parameters():
        for mark in held:
            held[mark] += hasattr(parameter, mark)
    stage = trainer.model_wrapped.zero_optimization_stage() if trainer.is_deepspeed_enabled else "none"
    shards = [mark for mark, count in held.items() if count]
    print(f"layout: ZeRO stage {stage}, shards {shards}", file=sys.stderr, flush=True)


class Watched(trainer_module.EmbeddingTrainer):
    """Says how its weights lie, when training is over."""

    def _inner_training_loop(self, *args, **kwargs):
        found = super()._inner_training_loop(*args, **kwargs)
        if rank() == 0:
            print_layout(self)
        return found


if __name__ == "__main__":
    from ultrarag.finetune import run

    run.EmbeddingTrainer = Watched
    for flags in json.loads(Path(sys.argv[1]).read_text()):
        for engine in ("DEEPSPEED", "FSDP"):
            os.environ.pop(f"ACCELERATE_USE_{engine}", None)
        status = main(flags, adapter="bgem3")
        if status:
            sys.exit(status)
