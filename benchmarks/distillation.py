"""Teacher scores: what a reranker's, and the model's own, add to a fine-tune on the same rows with mined negatives.

    python benchmarks/distillation.py --data MEDQUAD COVIDQA --guard SCIFACT --seeds 42 43 44

Each folder is in BEIR's layout with train.jsonl beside. Per data set, once: `mine` gives the training rows negatives
with the small real model, some whole documents of them are held out, and a cross-encoder with that model as its body
and a fresh head is trained on the others ("reranker"). `score` gives those rows its scores, and the scores of the
embedding model fine-tuned on them without a teacher ("self"); "both" is the sum of the two teachers' logits. How good a
teacher is: nDCG@10 when it orders the best --depth hits of the untuned model for the test queries.

Then the embedding model is fine-tuned for --steps steps (temperature and batch of benchmarks/finetune.py, in bf16) on
the same rows, each with its positive and GROUP - 1 of the same negatives, without teacher scores ("none") and with
those of each teacher, and measured on the test queries of the domain and of the guard. How scores are scaled and which
kd_loss_type learns from them is chosen on the held-out training rows, by one run each; no test query takes part.
Corpora are cut to the relevant passages and random others (--passages), so figures are higher than those of whole
corpora. What is measured is kept in --work; the same command goes on behind it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from distillation_teachers import (
    SEED,
    Domain,
    certainty,
    embedder,
    quality,
    read_domain,
    scaled,
    scored,
    summed,
    taught,
)
from finetune import RECIPE
from machine import origin
from merging import METRIC, compared, held_out, interval, kept, means, queries_of, spread, trained

from ultrarag.data.scoring import Scorer
from ultrarag.encoder import Encoder
from ultrarag.finetune import Evaluator
from ultrarag.io.durable import write_json

RESULTS = Path(__file__).parent / "results" / "distillation.json"
#: Passages a query has in a step of the student; the reranker learns from all.
GROUP = 3
#: Teacher -> the ways to learn from it: (scale, kd_loss_type).
TRIALS = {
    "reranker": [("as it is", "kl_div"), ("a quarter", "kl_div"), ("0 to 1", "kl_div"), ("as it is", "m3_kd_loss")],
    "self": [("by the temperature", "kl_div"), ("as it is", "kl_div")],
    "both": [("as it is", "kl_div"), ("a quarter", "kl_div")],
}


# ---- students


def scorers(domain: Domain, options: argparse.Namespace) -> dict[str, Scorer]:
    """The teachers; "self" is what the trial without a teacher has made of the model."""
    student(domain, "none", domain.rows, SEED, options)
    return {
        "reranker": Scorer(taught(domain, options), max_length=options.teacher_tokens),
        "self": Scorer(embedder(options.tokens, domain.work / f"none-{SEED}")),
    }


def student(domain: Domain, name: str, rows: list[dict[str, Any]], seed: int, options: argparse.Namespace) -> Any:
    """The weights after a fine-tune on rows, from the teacher's scores where the rows have some; `name` is its folder.

    A name that ends in a kd_loss_type is learned with that.
    """
    more: dict[str, Any] = {"train_group_size": GROUP}
    if "pos_scores" in rows[0]:
        more |= {"knowledge_distillation": True, "kd_loss_type": name.rpartition(" ")[2]}
    return trained(rows, domain.work / f"{name}-{seed}", options.steps, seed, options, **more)


def trials(domain: Domain, rows: dict[str, Any], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The metric on the held-out rows of every way to learn from every teacher, and without one."""
    encoder, found = embedder(options.tokens), {}
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


def measure(domain: Domain, rows: dict[str, Any], ways: Any, seed: int, options: Any) -> Any:
    """Train and measure one seed without a teacher and with each; query by query."""
    encoder, found = embedder(options.tokens), {}
    given = {"none": ("none", domain.rows)}
    given |= {name: (" ".join([name, *way]), scaled(rows[name], way[0])) for name, way in ways.items()}

    def of(label: str, of_teacher: list[dict[str, Any]]) -> Any:
        encoder.model.load_state_dict(student(domain, label, of_teacher, seed, options))
        return queries_of(encoder, domain.test, domain.guard)

    for name, one in given.items():
        found[name] = kept(domain.work / f"{name}-{seed}.json", partial(of, *one))
        print(f"{domain.work.name} {seed} {name}: {means(found[name])}", file=sys.stderr, flush=True)
    return found


# ---- what came of it


def of_domain(folder: Path, guard: Evaluator, options: argparse.Namespace) -> dict[str, Any]:
    """The teachers, the trials and the runs of one data set."""
    domain = read_domain(folder, guard, options)
    teachers = scorers(domain, options)
    rows = {name: scored(domain, name, scorer) for name, scorer in teachers.items()}
    rows["both"] = summed(rows)
    tried = kept(domain.work / "trials.json", lambda: trials(domain, rows, options))
    ways = {name: best(tried, name) for name in options.teachers}
    before = kept(domain.work / "before.json", lambda: queries_of(embedder(options.tokens), domain.test, domain.guard))
    runs = [measure(domain, rows, ways, seed, options) for seed in options.seeds]
    sides = ("domain", "guard")
    return {
        "rows": len(domain.rows),
        "ways": ways,
        "trials": tried,
        "before": means(before),
        METRIC: {name: {side: [mean(run[name][side].values()) for run in runs] for side in sides} for name in runs[0]},
        "compared": {name: {side: compared(runs, "none", name, side) for side in sides} for name in ways},
        "quality": kept(domain.work / "quality.json", lambda: quality(domain, teachers, options)),
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings = report["settings"]
    lines = [
        "# Teacher scores: a reranker's, the model's own, and both",
        "",
        f"{settings['steps']} steps of {settings['batch']} queries with {GROUP} passages each, seeds "
        f"{', '.join(map(str, settings['seeds']))}; nDCG@10 on the test queries over {settings['passages']} passages, "
        f"mean of the seeds; the guard {settings['guard']} is never trained on. Machine: {report['machine']}.",
    ]
    for name, found in report["data"].items():
        before = found["before"]
        lines += ["", f"## {name}, {found['rows']} rows", ""]
        lines += [
            "| teacher | learned from | domain | guard | domain to none | guard to none |",
            "|---|---|---|---|---|---|",
        ]
        lines.append(f"| untuned | | {before['domain']:.4f} | {before['guard']:.4f} | | |")
        for teacher, values in found[METRIC].items():
            way = ", ".join(found["ways"].get(teacher, ()))
            changes = [interval(side) for side in found["compared"].get(teacher, {}).values()] or ["", ""]
            cells = [teacher, way, spread(values["domain"]), spread(values["guard"]), *changes]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", "| orders the hits of the untuned model | nDCG@10 |", "|---|---|"]
        lines += [f"| {teacher} | {one[METRIC]:.4f} |" for teacher, one in found["quality"].items()]
        lines += ["", "| trial on held-out training rows | nDCG@10 | share of the best in a group |", "|---|---|---|"]
        for label, one in found["trials"].items():
            certain = f"{one['certainty']:.2f}" if "certainty" in one else ""
            lines.append(f"| {label} | {one[METRIC]:.4f} | {certain} |")
    return "\n".join(lines) + "\n"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="the domains")
    parser.add_argument("--guard", type=Path, required=True, help="what must not be forgotten")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--teachers", nargs="+", choices=list(TRIALS), default=list(TRIALS))
    parser.add_argument("--rows", type=int, default=1200, help="of each domain, at most, to learn from")
    parser.add_argument("--dev", type=int, default=150, help="rows, at most, to choose by")
    parser.add_argument("--steps", type=int, default=12, help="of the embedding model")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate of the embedding model")
    parser.add_argument("--tokens", type=int, default=64, help="of queries and passages of the embedding model")
    parser.add_argument("--teacher-steps", type=int, default=300, help="of the reranker")
    parser.add_argument("--teacher-tokens", type=int, default=RECIPE["tokens"], help="of pairs, and in mining")
    parser.add_argument("--depth", type=int, default=10, help="hits that a teacher orders to say how good it is")
    parser.add_argument("--passages", type=int, default=650, help="of each domain's corpus to search")
    parser.add_argument("--guard-passages", type=int, default=650, help="of the guard's corpus")
    parser.add_argument(
        "--work", type=Path, default=Path.home() / ".cache" / "ultrarag" / "benchmarks" / "distillation"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure what --work does not hold yet, and write the report."""
    options = parse()
    others = {"data", "guard", "seeds", "teachers", "work", "output"}
    settings = {name: value for name, value in vars(options).items() if name not in others}
    settings |= {"guard": options.guard.name, "batch": RECIPE["batch"], "temperature": RECIPE["temperature"]}
    # runs of other settings are no runs to go on with
    options.work /= hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    guard = held_out(options.guard, options.guard_passages, options.tokens)
    found = {folder.name: of_domain(folder, guard, options) for folder in options.data}
    settings |= {"seeds": options.seeds, "group": GROUP}
    report = {**origin(torch.get_num_threads()), "settings": settings, "data": found}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, report)
    options.output.with_suffix(".md").write_text(table(report), encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
