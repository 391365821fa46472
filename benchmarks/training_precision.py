"""What training in bf16, the default on CPUs that have it, costs in quality beside float32: nDCG@10 over several seeds.

    python benchmarks/training_precision.py --data path/to/medquad [--seeds 42 43 44]

One epoch of `finetune.py`'s recipe from the small real model, in a process of its own each; what was saved is judged
in float32 on the test queries. Speed side by side is `train_step.py`'s. Results: results/training_precision.json
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from finetune import RECIPE, as_arguments, evaluate, model_path
from machine import origin

from ultrarag.io.durable import write_json

RESULT = Path(__file__).parent / "results" / "training_precision.json"
PRECISIONS = ("float32", "bf16")


def main() -> None:
    """Train with every seed in each precision, write what is known after each, and print it."""
    options = parse()
    if options.child:
        train(options)
        return
    report: dict[str, Any] = {**origin(), "recipe": RECIPE, "data": options.data.name}
    report |= {"before": evaluate(model_path(), options.data), "runs": []}
    for seed in options.seeds:
        for precision in PRECISIONS:
            report["runs"].append({"seed": seed, "precision": precision, **run(options, seed, precision)})
            report["mean nDCG@10"] = means(report["runs"])
            write_json(options.output, report)
            print(json.dumps(report["runs"][-1]), file=sys.stderr, flush=True)
    print(json.dumps(report, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a BEIR folder with train.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--max-steps", type=int, default=-1, help="fewer than an epoch, to see that it works")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--child", nargs=3, metavar=("SEED", "PRECISION", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def means(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The mean over the seeds of each precision that was run."""
    found = {name: [one["nDCG@10"] for one in runs if one["precision"] == name] for name in PRECISIONS}
    return {name: fmean(values) for name, values in found.items() if values}


def run(options: argparse.Namespace, seed: int, precision: str) -> dict[str, float]:
    """One training and its judgement."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--data", str(options.data), "--max-steps", str(options.max_steps)]
        words += ["--child", str(seed), precision, str(Path(folder) / "model")]
        done = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True)
        found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
        return {**found, "nDCG@10": evaluate(str(Path(folder) / "model"), options.data)}


def train(options: argparse.Namespace) -> None:
    """In a process of its own: train, and print what it took."""
    from ultrarag.finetune import finetune

    seed, precision, folder = options.child
    result = finetune(
        model_path(),
        str(options.data / "train.jsonl"),
        folder,
        **as_arguments(),
        train_group_size=1,
        max_steps=options.max_steps,
        seed=int(seed),
        bf16=precision == "bf16",
        save_strategy="no",
        cache_path=str(Path(folder).parent / "cache"),
    )
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = used.ru_maxrss / 1024
    print(json.dumps({"steps": result.steps, "processor seconds": used.ru_utime + used.ru_stime, "peak MiB": peak}))


if __name__ == "__main__":
    main()
