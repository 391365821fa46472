"""Ways of merging: a fine-tune with its parent, and increments trained on bags of the data, linearly and by slerp.

    python benchmarks/merging.py --data MEDQUAD COVIDQA --guard SCIFACT --seeds 42 43 44

Each folder is in BEIR's layout with train.jsonl beside. Per data set and seed the small real model is trained (the
recipe of benchmarks/finetune.py, in bf16) --bags times for --steps steps on random shares of the rows, each from the
same parent, and once on all rows for as many steps as all bags together ("none"). Then weights are merged in memory,
and everything is measured on the test queries of the domain and of the guard, which nobody trains on:

- "linear w", "slerp w": w of "none" and the rest of the parent; slerp turns each tensor along the arc between the two;
- "bags linear": the mean of the bags' weights; "bags slerp": the same along arcs, one bag after the other;
- "bags arcs": slerp of what each bag changed (its weights minus the parent's), which keeps the length of a change
  where a mean of changes in different directions shortens it.

Nothing is chosen by the test queries: weights and steps are fixed. Corpora are cut to the relevant passages and random
others (--passages), so figures are higher than those of whole corpora. What is measured is kept in --work; the same
command goes on behind it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from finetune import RECIPE, model_path
from machine import origin
from torch import Tensor

from ultrarag.encoder import Encoder
from ultrarag.evaluation import read_beir, significance
from ultrarag.finetune import Evaluator, finetune
from ultrarag.io.durable import write_json

RESULTS = Path(__file__).parent / "results" / "merging.json"
METRIC = "nDCG@10"
#: Contender -> what it has to beat; an interval above 0 on every data set would have shipped it.
AGAINST = {
    "slerp": "linear",
    "bags linear": "none",
    "bags slerp": "bags linear",
    "bags arcs": "bags linear",
}
#: Below this angle, in radians, sin(angle) divides away what float32 holds: the arc is a straight line.
STRAIGHT = 1e-6

Weights = dict[str, Tensor]


# ---- merging


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Turn `start` towards `end` by `share` of the angle between them, both taken as one long vector.

    Source:
        Shoemake, Animating rotation with quaternion curves, 1985.
    """
    angle = angle_between(start, end)
    if angle < STRAIGHT:
        return torch.lerp(start, end, share)
    sides = torch.sin(torch.tensor([(1 - share) * angle, share * angle, angle], dtype=torch.float64))
    return ((sides[0] * start.double() + sides[1] * end.double()) / sides[2]).to(start.dtype)


def angle_between(start: Tensor, end: Tensor) -> float:
    """The angle of two tensors as long vectors, in radians; 0 where one of them is 0."""
    one, other = start.double().flatten(), end.double().flatten()
    if not one.norm() or not other.norm():
        return 0.0
    one, other = one / one.norm(), other / other.norm()
    # of two nearly equal directions the cosine says nothing, the chord does
    return float(2 * torch.atan2((one - other).norm(), (one + other).norm()))


def merged(start: Weights, end: Weights, share: float, mix: Callable[[Tensor, Tensor, float], Tensor]) -> Weights:
    """`mix` of every tensor of floating-point numbers; whole numbers are those of `end`."""
    return {
        name: mix(start[name], tensor, share) if tensor.is_floating_point() else tensor for name, tensor in end.items()
    }


def of_all(parts: list[Weights], mix: Callable[[Tensor, Tensor, float], Tensor]) -> Weights:
    """All parts merged with equal shares, one after the other."""
    found = parts[0]
    for number, part in enumerate(parts[1:], 2):
        found = merged(found, part, 1 / number, mix)
    return found


def minus(left: Weights, right: Weights) -> Weights:
    """What was changed."""
    return {name: left[name] - tensor if tensor.is_floating_point() else tensor for name, tensor in right.items()}


def plus(left: Weights, right: Weights) -> Weights:
    """A change applied."""
    return {name: left[name] + tensor if tensor.is_floating_point() else tensor for name, tensor in right.items()}


def contenders(parent: Weights, plain: Weights, bags: list[Weights], shares: list[float]) -> Any:
    """Yield (name, weights)."""
    yield "none", plain
    for share in shares:
        yield f"linear {share:g}", merged(parent, plain, share, torch.lerp)
        yield f"slerp {share:g}", merged(parent, plain, share, slerp)
    yield "bags linear", of_all(bags, torch.lerp)
    yield "bags slerp", of_all(bags, slerp)
    yield "bags arcs", plus(parent, of_all([minus(bag, parent) for bag in bags], slerp))


def angles(parent: Weights, plain: Weights, bags: list[Weights]) -> dict[str, float]:
    """How far apart the weights are, in radians: parent and fine-tune, and what two bags changed."""
    names = [name for name, tensor in plain.items() if tensor.is_floating_point() and parent[name].norm()]
    of_tensors = [angle_between(parent[name], plain[name]) for name in names]
    first, second = (minus(bag, parent) for bag in bags[:2])
    whole = [torch.cat([part[name].flatten() for name in names]) for part in (first, second)]
    return {
        "parent to none, mean of tensors": mean(of_tensors),
        "parent to none, largest": max(of_tensors),
        "changes of two bags": angle_between(*whole),
    }


# ---- training and measuring


def held_out(folder: Path, passages: int, tokens: int, dev: Collection[str] | None = None) -> Evaluator:
    """The test queries, or the training queries with one of some texts; the passages that answer them, and others."""
    found = read_beir(folder, "test" if dev is None else "train")
    queries = {key: text for key, text in found.queries.items() if dev is None or text in dev}
    right = {passage for key, judged in found.qrels.items() if key in queries for passage in judged}
    others = sorted(found.corpus.keys() - right)
    random.Random(0).shuffle(others)
    kept = right | set(others[: max(0, passages - len(right))])
    corpus = {key: passage.content for key, passage in found.corpus.items() if key in kept}
    return Evaluator(corpus, queries, found.qrels, tokens, tokens, keep_tokens=True)


def trained(rows: list[Any], output: Path, steps: int, seed: int, options: argparse.Namespace, **more: Any) -> Weights:
    """The weights after some steps, with in-batch negatives alone but for `more`; from disk where they are there."""
    if not (output / "ultrarag.json").exists():
        finetune(
            model_path(),
            rows,
            output,
            adapter="bge",
            query_max_len=options.tokens,
            passage_max_len=options.tokens,
            per_device_train_batch_size=RECIPE["batch"],
            learning_rate=options.lr,
            temperature=RECIPE["temperature"],
            max_steps=steps,
            seed=seed,
            use_cpu=True,
            bf16=True,
            save_strategy="no",
            skip_data_check=True,
            disable_tqdm=True,
            cache_path=output.parent / "cache",
            **{"train_group_size": 1, **more},
        )
    return dict(Encoder.load(str(output), device="cpu").model.state_dict())


def measure(folder: Path, seed: int, guard: Evaluator, options: argparse.Namespace) -> dict[str, Any]:
    """Train and measure all contenders of one data set and seed; query by query."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines() if line]
    work, draws = options.work / f"{folder.name}-{seed}", random.Random(seed)
    share = int(options.bag_share * len(rows))
    bags = [
        trained(draws.sample(rows, share), work / f"bag-{number}", options.steps, seed + 1000 * (number + 1), options)
        for number in range(options.bags)
    ]
    plain = trained(rows, work / "none", options.bags * options.steps, seed, options)
    encoder = Encoder.load(model_path(), "bge", device="cpu", precision="bf16")
    parent = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    domain, found = held_out(folder, options.passages, options.tokens), {}
    for name, weights in contenders(parent, plain, bags, options.shares):
        encoder.model.load_state_dict(weights)
        found[name] = queries_of(encoder, domain, guard)
        print(f"{folder.name} {seed} {name}: {means(found[name])}", file=sys.stderr, flush=True)
    return {"angles": angles(parent, plain, bags), "queries": found}


def queries_of(encoder: Encoder, domain: Evaluator, guard: Evaluator) -> dict[str, dict[str, float]]:
    """The metric of every test query of both."""
    return {
        name: evaluator.evaluate(encoder, ("dense",), [METRIC]).of(METRIC)
        for name, evaluator in (("domain", domain), ("guard", guard))
    }


def means(queries: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Of the domain and of the guard."""
    return {name: round(mean(values.values()), 4) for name, values in queries.items()}


# ---- what came of it


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """The means of every seed, and each contender compared with what it has to beat, query by query over the seeds."""
    tables: dict[str, Any] = {}
    for name, seeds in found["runs"].items():
        runs = [run["queries"] for run in seeds.values()]
        values = {
            contender: {side: [mean(run[contender][side].values()) for run in runs] for side in ("domain", "guard")}
            for contender in runs[0]
        }
        tables[name] = {
            "before": means(found["before"][name]),
            "nDCG@10": values,
            "angles": {kind: mean(run["angles"][kind] for run in seeds.values()) for kind in AGAINST_ANGLES},
            "compared": {
                f"{contender} - {rival}": {side: compared(runs, rival, contender, side) for side in ("domain", "guard")}
                for contender, rival in rivals(list(values))
            },
        }
    return tables


AGAINST_ANGLES = ("parent to none, mean of tensors", "parent to none, largest", "changes of two bags")


def rivals(names: list[str]) -> list[tuple[str, str]]:
    """(contender, what it has to beat)."""
    pairs = [(name, name.replace("slerp", "linear")) for name in names if name.startswith("slerp")]
    return [*pairs, *((name, rival) for name, rival in AGAINST.items() if name in names)]


def compared(runs: list[Any], rival: str, contender: str, side: str) -> dict[str, Any]:
    """The change, by a paired bootstrap over the queries; each query counts with its mean over the seeds."""
    both = [
        {query: mean(run[name][side][query] for run in runs) for query in runs[0][name][side]}
        for name in (rival, contender)
    ]
    change = significance(*both)
    return {
        **asdict(change),
        "seeds that gain": sum(means(run[contender])[side] > means(run[rival])[side] for run in runs),
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings = report["settings"]
    lines = [
        "# Merging: linear, slerp, and bags of the data",
        "",
        f"{settings['bags']} bags, {settings['steps']} steps each, of {settings['bag_share']:.0%} of the rows, seeds "
        f"{', '.join(map(str, settings['seeds']))}; nDCG@10 on the test queries over {settings['passages']} passages, "
        f"mean of the seeds; the guard {settings['guard']} is never trained on. Machine: {report['machine']}.",
    ]
    for name, found in report["data"].items():
        before = found["before"]
        lines += ["", f"## {name}", "", "| weights | domain | guard |", "|---|---|---|"]
        lines.append(f"| before | {before['domain']:.4f} | {before['guard']:.4f} |")
        for contender, values in found["nDCG@10"].items():
            lines.append(f"| {contender} | {spread(values['domain'])} | {spread(values['guard'])} |")
        lines += ["", "| compared | domain | guard |", "|---|---|---|"]
        for pair, sides in found["compared"].items():
            lines.append(f"| {pair} | {' | '.join(interval(side) for side in sides.values())} |")
        lines += ["", "Angles in radians: " + "; ".join(f"{k} {v:.4f}" for k, v in found["angles"].items()) + "."]
    return "\n".join(lines) + "\n"


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """What a file holds; it is made where there is none."""
    if not file.exists():
        write_json(file, make())
    return json.loads(file.read_text(encoding="utf-8"))


def interval(change: Mapping[str, Any]) -> str:
    """A change as `compared` gives it: the difference, its interval, and how many seeds gain."""
    low, high = change["low"], change["high"]
    return f"{change['difference']:+.4f} [{low:+.4f}, {high:+.4f}], {change['seeds that gain']} up"


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="the domains")
    parser.add_argument("--guard", type=Path, required=True, help="what must not be forgotten")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--bags", type=int, default=3, help="at least 2")
    parser.add_argument("--bag-share", type=float, default=0.6, help="of the training rows, without replacement")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.5], help="of the fine-tune, merged with its parent"
    )
    parser.add_argument("--lr", type=float, default=RECIPE["lr"], help="learning rate")
    parser.add_argument("--tokens", type=int, default=RECIPE["tokens"], help="of queries and passages")
    parser.add_argument("--passages", type=int, default=1200, help="of each domain's corpus to search")
    parser.add_argument("--guard-passages", type=int, default=1200, help="of the guard's corpus")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "ultrarag" / "benchmarks" / "merging")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.bags < 2:
        parser.error(f"--bags is {options.bags}; one bag cannot be merged")
    return options


def main() -> None:
    """Measure what --work does not hold yet, and write the report."""
    options = parse()
    names = ("seeds", "steps", "bags", "bag_share", "shares", "lr", "tokens", "passages", "guard_passages")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"guard": options.guard.name, "batch": RECIPE["batch"], "temperature": RECIPE["temperature"]}
    # runs of other settings are no runs to go on with
    same = {name: value for name, value in settings.items() if name != "seeds"}
    options.work /= hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:12]
    options.work.mkdir(parents=True, exist_ok=True)
    guard = held_out(options.guard, options.guard_passages, options.tokens)
    found: dict[str, Any] = {"before": {}, "runs": {}}
    parent = Encoder.load(model_path(), "bge", device="cpu", precision="bf16")
    for folder in options.data:
        found["before"][folder.name] = queries_of(parent, held_out(folder, options.passages, options.tokens), guard)
    for seed in options.seeds:
        for folder in options.data:
            file = options.work / f"{folder.name}-{seed}.json"
            run = kept(file, partial(measure, folder, seed, guard, options))
            found["runs"].setdefault(folder.name, {})[str(seed)] = run
    report = {**origin(torch.get_num_threads()), "settings": settings, "data": summary(found)}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.results, report)
    options.results.with_suffix(".md").write_text(table(report), encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
