"""Teacher scores: what a reranker's, and the model's own, add to a fine-tune on the same rows with mined negatives.

    python benchmarks/distillation.py --data MEDQUAD COVIDQA --guard SCIFACT --seeds 42 43 44

Each folder is in BEIR's layout with train.jsonl beside. Per data set, once: `mine` gives the training rows negatives
with the small real model, some whole documents of them are held out, and a cross-encoder with that model as its body
and a fresh head is trained on the others ("reranker"). `score` gives those rows its scores, and the scores of the
embedding model fine-tuned on them without a teacher ("self"). How good a teacher is: nDCG@10 when it orders the best
--depth hits of the untuned model for the test queries. "both" is the sum of the two teachers' logits.

Then the embedding model is fine-tuned (the recipe of benchmarks/finetune.py, in bf16) for --steps steps on the same rows
with the same negatives, without teacher scores and with those of each teacher, and measured on the test queries of the
domain and of the guard. How scores are scaled and which kd_loss_type learns from them is chosen on the held-out
training rows, by one run each; no test query takes part. Corpora are cut to the relevant passages and random others
(--passages), so figures are higher than those of whole corpora. What is measured is kept in --work; the same command
goes on behind it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from finetune import RECIPE, model_path
from increments import parts_of
from machine import origin
from merging import METRIC, compared, held_out, means, queries_of, spread, trained

from ultrarag.data import mine, score
from ultrarag.data.scoring import Scorer
from ultrarag.encoder import Encoder
from ultrarag.evaluation import evaluate_run, significance
from ultrarag.finetune import Evaluator, finetune
from ultrarag.io.durable import write_json
from ultrarag.mining import MiningSettings
from ultrarag.rows import Row

RESULTS = Path(__file__).parent / "results" / "distillation.json"
MINING = MiningSettings(range=(0, 50), negatives=3, max_share=0.9)
#: Of the rows, by whole documents, one part is held out to choose by.
PARTS = 5
#: Of the teacher, and of the trials; no seed that is measured.
SEED = 7
TEACHER = {"batch": 8, "lr": 2e-4, "warmup": 0.1, "eval_steps": 60}
#: What one score becomes before a softmax over the group makes a distribution of them.
SCALES: dict[str, Callable[[float], float]] = {
    "as it is": lambda value: value,
    "0 to 1": lambda value: 1 / (1 + math.exp(-value)),
    "by the temperature": lambda value: value / RECIPE["temperature"],
}
#: Teacher -> the ways to learn from it: (scale, kd_loss_type).
TRIALS = {
    "reranker": [("as it is", "kl_div"), ("0 to 1", "kl_div"), ("as it is", "m3_kd_loss")],
    "self": [("by the temperature", "kl_div"), ("as it is", "kl_div")],
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


def read_domain(folder: Path, options: argparse.Namespace) -> Domain:
    """Mine negatives for the rows, and hold whole documents of them out."""
    work = options.work / folder.name
    mined = work / "mined.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    if not mined.exists():
        mine(folder / "train.jsonl", mined, embedder(options), MINING, candidate_pool=folder)
    rows = [json.loads(line) for line in mined.read_text(encoding="utf-8").splitlines()]
    dev, *others = parts_of([row for row in rows if len(row["neg"]) == MINING.negatives], PARTS)
    kept = [row for part in others for row in part]
    random.Random(0).shuffle(kept)
    dev, kept = dev[: options.dev], kept[: options.rows]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    searched = held_out(folder, options.passages, options.tokens, {row["query"] for row in dev})
    return Domain(work, kept, dev, searched, held_out(folder, options.passages, options.tokens))


def embedder(options: argparse.Namespace, path: str | Path | None = None) -> Encoder:
    """The untuned model, or a tuned one."""
    lengths = {"query_max_length": options.tokens, "passage_max_length": options.tokens}
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
            max_len=options.tokens,
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


def scorers(domain: Domain, options: argparse.Namespace) -> dict[str, Scorer]:
    """The teachers; "self" is what the trial without a teacher has made of the model."""
    student(domain, "none", domain.rows, SEED, options)
    return {
        "reranker": Scorer(taught(domain, options), max_length=options.tokens),
        "self": Scorer(embedder(options, domain.work / f"none-{SEED}")),
    }


def scored(domain: Domain, teacher: str, scorer: Scorer) -> list[dict[str, Any]]:
    """The rows with a teacher's scores."""
    output = domain.work / f"scored-{teacher}.jsonl"
    if not output.exists():
        score(domain.work / "rows.jsonl", output, scorer)
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def scaled(rows: list[dict[str, Any]], scale: str) -> list[dict[str, Any]]:
    """The rows with other scores."""
    change = SCALES[scale]
    sides = ("pos_scores", "neg_scores")
    return [{**row, **{side: [change(value) for value in row[side]] for side in sides}} for row in rows]


def certainty(rows: list[dict[str, Any]]) -> float:
    """The greatest share that a softmax over a group gives one passage, mean of the rows."""
    groups = [torch.tensor([*row["pos_scores"], *row["neg_scores"]]) for row in rows]
    return mean(float(group.softmax(0).max()) for group in groups)


def quality(domain: Domain, teachers: dict[str, Scorer], options: argparse.Namespace) -> dict[str, Any]:
    """The metric of the untuned model on the test queries, and of its best hits in each teacher's order."""
    test, found = domain.test, {}
    run = test.search(embedder(options), ("dense",), options.depth)
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


# ---- students


def student(domain: Domain, name: str, rows: list[dict[str, Any]], seed: int, options: argparse.Namespace) -> Any:
    """The weights after a fine-tune on rows, from the teacher's scores where the rows have some; `name` is its folder.

    A name that ends in a kd_loss_type is learned with that.
    """
    more: dict[str, Any] = {"train_group_size": 1 + MINING.negatives, "sub_batch_size": 32}
    if "pos_scores" in rows[0]:
        more |= {"knowledge_distillation": True, "kd_loss_type": name.rpartition(" ")[2]}
    return trained(rows, domain.work / f"{name}-{seed}", options.steps, seed, options, **more)


def trials(domain: Domain, rows: dict[str, Any], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The metric on the held-out rows of every way to learn from every teacher, and without one."""
    encoder, found = embedder(options), {}
    found["untuned"] = {METRIC: on_dev(domain, encoder)}
    encoder.model.load_state_dict(student(domain, "none", domain.rows, SEED, options))
    found["none"] = {METRIC: on_dev(domain, encoder)}
    for teacher, scale, loss in ((teacher, *way) for teacher, ways in TRIALS.items() for way in ways):
        given = scaled(rows[teacher], scale)
        name = f"{teacher} {scale} {loss}"
        encoder.model.load_state_dict(student(domain, name, given, SEED, options))
        found[name] = {METRIC: on_dev(domain, encoder), "certainty": certainty(given)}
        print(f"{domain.work.name} {name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def on_dev(domain: Domain, encoder: Encoder) -> float:
    """The metric on the held-out training queries."""
    return domain.dev.evaluate(encoder, ("dense",), [METRIC]).metrics[METRIC]


def best(tried: dict[str, dict[str, Any]], teacher: str) -> tuple[str, str]:
    """(scale, kd_loss_type) of the best trial of a teacher."""
    return max(TRIALS[teacher], key=lambda way: tried[" ".join([teacher, *way])][METRIC])


def measure(domain: Domain, rows: dict[str, Any], ways: Any, seed: int, guard: Evaluator, options: Any) -> Any:
    """Train and measure one seed without a teacher and with each; query by query."""
    encoder, found = embedder(options), {}
    given = {"none": ("none", domain.rows)}
    given |= {name: (" ".join([name, *way]), scaled(rows[name], way[0])) for name, way in ways.items()}
    for name, (label, of_teacher) in given.items():
        encoder.model.load_state_dict(student(domain, label, of_teacher, seed, options))
        found[name] = queries_of(encoder, domain.test, guard)
        print(f"{domain.work.name} {seed} {name}: {means(found[name])}", file=sys.stderr, flush=True)
    return found


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """What a file holds; it is made where there is none."""
    if not file.exists():
        write_json(file, make())
    return json.loads(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    o = argparse.Namespace(
        work=Path("/tmp/w/teacher-work"),
        tokens=128,
        rows=1200,
        dev=150,
        passages=650,
        teacher_steps=300,
        steps=10,
        depth=20,
        lr=2e-5,
    )
    torch.set_num_threads(1)
    for d in sys.argv[1:]:
        dom = read_domain(Path(d), o)
        print(
            "mined",
            len(dom.rows),
            len(dom.dev_rows),
            len(dom.dev.judged),
            len(dom.test.judged),
            len(dom.dev.corpus),
            flush=True,
        )
        sc = scorers(dom, o)
        r = {n: scored(dom, n, s) for n, s in sc.items()}
        print(json.dumps(kept(dom.work / "quality.json", lambda: quality(dom, sc, o)), indent=1), flush=True)
