"""`python -m tests.retrieve.refresh.refresh_worker INDEX OUTPUT CACHE STAGE`: a refresh killed in a stage."""

from __future__ import annotations

import os
import signal
import sys

from tests.finetune.test_run import QUICK, ROWS
from ultrarag.retrieve.live import LiveIndex

#: texts of the rows, and what is right for each query
TEXTS = sorted({text for row in ROWS for text in (*row["pos"], *row["neg"])})
IDS = {text: f"p{number}" for number, text in enumerate(TEXTS)}
QUERIES = {f"q{number}": row["query"] for number, row in enumerate(ROWS)}
QRELS = {f"q{number}": {IDS[row["pos"][0]]: 1} for number, row in enumerate(ROWS)}
GATE = (QUERIES, QRELS)
ARGUMENTS = {**QUICK, "unified_finetuning": True, "train_group_size": 2, "num_train_epochs": 2, "save_steps": 4}


def die(*args: object, **kwargs: object) -> None:
    """End at once, as by kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(stage: str) -> None:
    """Put the end into a stage: behind a saved step, in publishing, with some vectors built, or behind the flip."""
    if stage == "finetune":
        from ultrarag.finetune.step.trainer import EmbeddingTrainer

        saved = EmbeddingTrainer._save_checkpoint
        EmbeddingTrainer._save_checkpoint = lambda *args: (saved(*args), die())  # type: ignore[method-assign]
    if stage == "published":
        from ultrarag.checkpoint import publishing

        published = publishing.publish_directory
        publishing.publish_directory = lambda *args, **kwargs: (published(*args, **kwargs), die())  # type: ignore[assignment]
    if stage == "build":
        from ultrarag.retrieve.build import child as builder

        in_this_process()
        builder.Build.catch_up = die  # type: ignore[method-assign]
    if stage == "flipped":
        from ultrarag.retrieve.generation.catalog import Catalog

        in_this_process()
        flip = Catalog.flip
        Catalog.flip = lambda *args: (flip(*args), die())  # type: ignore[method-assign]


def in_this_process() -> None:
    """Run the builder's code here: a process of its own takes seconds to import torch."""
    from ultrarag.retrieve.build import start
    from ultrarag.retrieve.build.child import Build

    start.run_builder = lambda root, generation, **options: Build(root, generation, None).run(False)


if __name__ == "__main__":
    index, output, cache, stage = sys.argv[1:]
    arm(stage)
    with LiveIndex.open(index) as opened:
        opened.refresh(ROWS, output_dir=output, gate=GATE, cache_path=cache, **ARGUMENTS)
