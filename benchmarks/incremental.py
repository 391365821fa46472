"""What fine-tuning forgets, and what merging with the parent keeps: a domain and a guard, several seeds.

    python benchmarks/incremental.py --data MEDQUAD --guard SCIFACT --seeds 42 43 44 [--mined mined.jsonl]

MEDQUAD and SCIFACT are folders in BEIR's layout with train.jsonl beside. Each seed trains one plain epoch (the recipe
of benchmarks/finetune.py) and searches the weight of the average with the parent (`--merge_with parent --merge_weight
auto`); then the trained weights and the merged ones are measured on the test queries of both sets.

No test query takes part in the choice: the weight is chosen on DEV training queries of the domain, which are held out
from training together with all that share a passage with them, and on the guard's own training queries, which nobody
trains on. That is the kind "merged", whose weights before the merge are "plain"; --kinds plain trains those alone. For
"replay" the guard's training rows come among the new ones instead (`--replay_data`), and nothing is merged. For
"mined", rows of the same queries with negatives (--mined, such as `ultrarag data mine` writes) are trained on. What is
done is in the results file after each run; the same command goes on behind it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from finetune import RECIPE, as_arguments, evaluate, model_path

from ultrarag.evaluation import Collection, read_beir, write_beir
from ultrarag.io.durable import sha256_of, write_json

RESULTS = Path(__file__).parent / "results" / "incremental.json"
#: Names of what is measured, in the order of the table.
KINDS = ("plain", "merged", "replay", "mined")


def held_out(train: Collection, count: int, seed: int = 0) -> set[str]:
    """About `count` training queries that share no passage with the others: whole groups of them, in random order."""
    group: dict[str, set[str]] = {}
    owner: dict[str, set[str]] = {}
    for query, judged in train.qrels.items():
        joined = {query}
        for passage in judged:
            joined |= owner.get(passage, set())
        for member in joined:
            group[member] = joined
            owner.update(dict.fromkeys(train.qrels[member], joined))
    groups = sorted({min(members): sorted(members) for members in group.values()}.values())
    random.Random(seed).shuffle(groups)
    chosen: set[str] = set()
    for members in groups:
        if len(chosen) + len(members) <= count:
            chosen.update(members)
    return chosen


def write_dev(folder: Path, target: Path, queries: set[str] | None, passages: int) -> None:
    """A BEIR folder of some training queries; of all passages, or of those that are right and some others."""
    train = read_beir(folder, "train")
    chosen = sorted(train.queries if queries is None else queries)
    qrels = {query: train.qrels[query] for query in chosen}
    right = {passage for judged in qrels.values() for passage in judged}
    others = [key for key in train.corpus if key not in right]
    random.Random(0).shuffle(others)
    kept = right | set(others[: max(0, passages - len(right))] if passages else others)
    corpus = [passage for key, passage in train.corpus.items() if key in kept]
    write_beir(target, corpus, {query: train.queries[query] for query in chosen}, {"dev": qrels})


def prepare(arguments: argparse.Namespace) -> dict[str, Path]:
    """The dev folders and the training files, without a dev query in any."""
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    train = read_beir(arguments.data, "train")
    dev = held_out(train, arguments.dev)
    write_dev(arguments.data, work / "dev", dev, arguments.dev_passages)
    write_dev(arguments.guard, work / "guard", None, arguments.dev_passages)
    texts = {train.queries[query] for query in dev}
    plain = arguments.data / "train.jsonl"
    sources = {"plain": plain, "merged": plain, "replay": plain, "mined": arguments.mined}
    sources = {name: source for name, source in sources.items() if name in arguments.kinds and source}
    files = {name: work / f"{name}.jsonl" for name in sources}
    for name, source in sources.items():
        lines = source.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.strip() and json.loads(line)["query"] not in texts]
        files[name].write_text("\n".join(kept) + "\n", encoding="utf-8")
        print(f"{name}: {len(kept)} of {len(lines)} rows, {len(dev)} queries held out", file=sys.stderr, flush=True)
    return files


def train(arguments: argparse.Namespace, name: str, file: Path, seed: int) -> dict[str, Any]:
    """Train, merge, and measure both on the test queries."""
    from ultrarag.finetune import finetune

    output = arguments.work / f"{name}-{seed}"
    merged = name == "merged"
    replay = {"replay_data": arguments.guard / "train.jsonl", "replay_ratio": arguments.replay_ratio}
    incremental: dict[str, Any] = {
        "eval_data": arguments.work / "dev",
        "eval_strategy": "no",
        "guard_data": arguments.work / "guard",
        "merge_with": "parent",
        "merge_weight": "auto",
        "max_forgetting": arguments.max_forgetting,
    }
    result = finetune(
        model_path(),
        file,
        output,
        **as_arguments(),
        train_group_size=arguments.group_size if name == "mined" else 1,
        max_steps=arguments.max_steps,
        seed=seed,
        save_strategy="steps",
        save_steps=50,
        save_total_limit=1,
        resume_from_checkpoint=True,
        overwrite_output_dir=True,
        cache_path=arguments.work / "cache",
        **(incremental if merged else replay if name == "replay" else {}),
    )
    if arguments.domain_only and name in ("plain", "mined"):
        return {"seconds": result.seconds, name: {"domain": evaluate(str(output), arguments.data)}}
    if not merged:
        return {"seconds": result.seconds, name: on_test(arguments, str(output))}
    assert result.merge is not None
    found: dict[str, Any] = {
        "weight": result.merge["weight"],
        "tried": result.merge["tried"],
        "seconds": result.seconds,
    }
    found["dev"] = {stage: metrics["nDCG@10"] for stage, metrics in result.metrics.items()}
    for kind, folder in (("plain", output / "unmerged"), ("merged", output)):
        found[kind] = on_test(arguments, str(folder))
    return found


def on_test(arguments: argparse.Namespace, model: str) -> dict[str, float]:
    """nDCG@10 on the test queries of both."""
    return {"domain": evaluate(model, arguments.data), "guard": evaluate(model, arguments.guard)}


def measure(arguments: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Do what the results file does not hold yet."""
    found = read_results(arguments.results, settings)
    files = prepare(arguments)
    if "before" not in found:
        found["before"] = on_test(arguments, model_path())
        save(arguments.results, found)
    for seed in arguments.seeds:
        for name, file in files.items():
            runs = found["runs"].setdefault(str(seed), {})
            if name not in runs:
                runs[name] = train(arguments, name, file, seed)
                save(arguments.results, found)
                print(f"seed {seed} {name}: {json.dumps(runs[name])}", file=sys.stderr, flush=True)
    return found


def read_results(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What was measured with the same settings; nothing where they were others."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] == settings:
            return found
        print(f"{path} holds results of other settings: measuring anew", file=sys.stderr)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch threads {os.environ.get('OMP_NUM_THREADS')}"
    return {"settings": settings, "machine": machine, "runs": {}}


def save(path: Path, found: dict[str, Any]) -> None:
    """Write the results and their table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    path.with_suffix(".md").write_text(table(found), encoding="utf-8")


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    before, settings = found["before"], found["settings"]
    lines = [
        "# What fine-tuning forgets, and what replaying or merging keeps",
        "",
        f"{settings['data']} is trained on, {settings['guard']} never; nDCG@10 on the test queries of both.",
        f"The weight of the average with the parent is chosen on {settings['dev']} held-out training queries of the",
        f"domain, among those that lose at most {settings['max_forgetting']:g} on the guard's training queries.",
        f"Machine: {found['machine']}.",
        "",
        "| model | seeds | domain | guard | guard lost | weight |",
        "|---|---|---|---|---|---|",
        f"| before | - | {before['domain']:.4f} | {before['guard']:.4f} | - | - |",
    ]
    for kind in KINDS:
        measured = [{k: run[k] for run in seed.values() for k in run} for seed in found["runs"].values()]
        runs = [run for run in measured if kind in run]
        if not runs:
            continue
        domain = [run[kind]["domain"] for run in runs]
        guard = [run[kind]["guard"] for run in runs if "guard" in run[kind]]
        weight = ", ".join(f"{run['weight']:g}" for run in runs) if kind == "merged" else "1"
        kept = f"{spread(guard)} | {before['guard'] - mean(guard):+.4f}" if guard else "not measured | -"
        lines.append(f"| {kind} | {len(runs)} | {spread(domain)} | {kept} | {weight} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """Mean and standard deviation, and the values."""
    around = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{around} ({', '.join(f'{value:.4f}' for value in values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the domain")
    parser.add_argument("--guard", type=Path, required=True, help="what must not be forgotten")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["merged", "replay", "mined"])
    parser.add_argument("--replay-ratio", type=float, default=0.15, help="the share of batches that is replayed")
    parser.add_argument("--mined", type=Path, help="rows of the same training queries, with negatives")
    parser.add_argument("--group-size", type=int, default=3, help="passages per query of the mined rows")
    parser.add_argument("--dev", type=int, default=300, help="training queries that are held out to choose by")
    parser.add_argument("--dev-passages", type=int, default=0, help="passages of each dev corpus; 0: all")
    parser.add_argument("--max-forgetting", type=float, default=0.005)
    parser.add_argument("--domain-only", action="store_true", help="do not measure plain and mined on the guard")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop early, to try it out")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "ultrarag" / "benchmarks" / "incremental")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    settings = {
        "data": arguments.data.name,
        "guard": arguments.guard.name,
        "recipe": RECIPE,
        "dev": arguments.dev,
        "dev_passages": arguments.dev_passages,
        "max_forgetting": arguments.max_forgetting,
        "max_steps": arguments.max_steps,
        "group_size": arguments.group_size,
        "replay_ratio": arguments.replay_ratio,
        "mined": sha256_of(arguments.mined) if arguments.mined else None,
    }
    # runs of other settings are no runs to go on with
    arguments.work /= hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    print(table(measure(arguments, settings)))


if __name__ == "__main__":
    main()
