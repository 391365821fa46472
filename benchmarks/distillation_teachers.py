"""What distillation.py learns from: the rows of a data set with mined negatives, and what the teachers make of them."""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from finetune import RECIPE, model_path
from increments import parts_of
from merging import METRIC, held_out

from ultrarag.data import mine, score
from ultrarag.data.scoring import Scorer
from ultrarag.encoder import Encoder
from ultrarag.evaluation import evaluate_run, significance
from ultrarag.finetune import Evaluator, finetune
from ultrarag.mining import MiningSettings
from ultrarag.rows import Row

MINING = MiningSettings(range=(0, 50), negatives=3, max_share=0.9)
#: Of the rows, by whole documents, one part is held out to choose by.
PARTS = 5
#: Of the teacher, and of the trials; no seed that is measured.
SEED = 7
TEACHER = {"batch": 8, "lr": 2e-4, "warmup": 0.1, "eval_steps": 60}
SIDES = ("pos_scores", "neg_scores")
#: What one score becomes before a softmax over the group makes a distribution of them.
SCALES: dict[str, Callable[[float], float]] = {
    "as it is": lambda value: value,
    "a quarter": lambda value: value / 4,
    "0 to 1": lambda value: 1 / (1 + math.exp(-value)),
    "by the temperature": lambda value: value / RECIPE["temperature"],
}

# ---- rows


@dataclass
class Domain:
    """One data set: its rows with negatives, those held out, and what is searched."""

    work: Path
    rows: list[dict[str, Any]]
    dev_rows: list[dict[str, Any]]
    dev: Evaluator
    test: Evaluator
    guard: Evaluator


def read_domain(folder: Path, guard: Evaluator, options: argparse.Namespace) -> Domain:
    """Mine negatives for the rows, and hold whole documents of them out."""
    work = options.work / folder.name
    mined = work / "mined.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    if not mined.exists():
        encoder = embedder(options.teacher_tokens)
        mine(folder / "train.jsonl", mined, encoder, MINING, candidate_pool=folder)
    rows = [json.loads(line) for line in mined.read_text(encoding="utf-8").splitlines()]
    dev, *others = parts_of([row for row in rows if len(row["neg"]) == MINING.negatives], PARTS)
    kept = [row for part in others for row in part]
    random.Random(0).shuffle(kept)
    dev, kept = dev[: options.dev], kept[: options.rows]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    searched = held_out(folder, options.passages, options.tokens, {row["query"] for row in dev})
    return Domain(work, kept, dev, searched, held_out(folder, options.passages, options.tokens), guard)


def embedder(tokens: int, path: str | Path | None = None) -> Encoder:
    """The untuned model, or a tuned one."""
    lengths = {"query_max_length": tokens, "passage_max_length": tokens}
    return Encoder.load(str(path or model_path()), "bge", device="cpu", precision="bf16", **lengths)


# ---- teachers


def taught(domain: Domain, options: argparse.Namespace) -> Encoder:
    """The cross-encoder, with the weights of its best evaluation on the held-out rows."""
    output = domain.work / "reranker"
    if not (output / "ultrarag.json").exists():
        finetune(
            model_path(),
            domain.rows,
            output,
            adapter="bge-reranker",
            train_group_size=1 + MINING.negatives,
            max_len=options.teacher_tokens,
            per_device_train_batch_size=TEACHER["batch"],
            learning_rate=TEACHER["lr"],
            warmup_steps=TEACHER["warmup"],
            max_steps=options.teacher_steps,
            eval_data=domain.dev_rows,
            eval_steps=TEACHER["eval_steps"],
            save_steps=TEACHER["eval_steps"],
            save_total_limit=1,
            seed=SEED,
            use_cpu=True,
            bf16=True,
            skip_data_check=True,
            disable_tqdm=True,
            cache_path=domain.work / "cache",
        )
    return Encoder.load(str(output), device="cpu", precision="bf16")


def scored(domain: Domain, teacher: str, scorer: Scorer) -> list[dict[str, Any]]:
    """The rows with a teacher's scores."""
    output = domain.work / f"scored-{teacher}.jsonl"
    if not output.exists():
        score(domain.work / "rows.jsonl", output, scorer)
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def scaled(rows: list[dict[str, Any]], scale: str) -> list[dict[str, Any]]:
    """The rows with other scores."""
    change = SCALES[scale]
    return [{**row, **{side: [change(value) for value in row[side]] for side in SIDES}} for row in rows]


def summed(rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows with the sum of the two teachers' logits."""
    pairs = zip(rows["reranker"], scaled(rows["self"], "by the temperature"), strict=True)
    return [
        {**one, **{side: [x + y for x, y in zip(one[side], other[side], strict=True)] for side in SIDES}}
        for one, other in pairs
    ]


def certainty(rows: list[dict[str, Any]]) -> float:
    """The greatest share that a softmax over a group gives one passage, mean of the rows."""
    groups = [torch.tensor([*row["pos_scores"], *row["neg_scores"]]) for row in rows]
    return mean(float(group.softmax(0).max()) for group in groups)


def quality(domain: Domain, teachers: dict[str, Scorer], options: argparse.Namespace) -> dict[str, Any]:
    """The metric of the untuned model on the test queries, and of its best hits in each teacher's order."""
    test, found = domain.test, {}
    run = test.search(embedder(options.tokens), ("dense",), options.depth)
    lists = [Row(query=test.queries[key], pos=[test.corpus[id] for id in hits]) for key, hits in run.items()]
    values = {name: [scores for scores, _ in scorer.score(lists)] for name, scorer in teachers.items()}
    by = SCALES["by the temperature"]
    pairs = zip(values["reranker"], values["self"], strict=True)
    values["both"] = [[a + by(b) for a, b in zip(*pair, strict=True)] for pair in pairs]
    for name, scores in values.items():
        found[name] = {key: dict(zip(run[key], one, strict=True)) for key, one in zip(run, scores, strict=True)}
    queries = {name: ndcg(test, each) for name, each in {"untuned": run, **found}.items()}
    return {
        name: {METRIC: mean(each.values()), "to untuned": asdict(significance(queries["untuned"], each))}
        for name, each in queries.items()
    }


def ndcg(test: Evaluator, run: Any) -> dict[str, float]:
    """The metric of every judged query."""
    return evaluate_run({key: dict(test.qrels[key]) for key in test.judged}, run, [METRIC]).of(METRIC)
