"""Cycles of searches, simulated clicks and refreshes: what feedback teaches by the rules, and by raw clicks.

    python benchmarks/feedback.py --data path/to/scifact path/to/medquad [--cycles 5] [--sessions 20] [--queries 600]

The training queries of a BEIR folder are the traffic; a fifth is held out by the library's hash, and nDCG@10 is
measured on those, which nobody trains on. A hit at rank r is examined with probability 1/r, and clicked with 0.8 where
it is judged relevant, with 0.15 where it is not: a model of clicks, not people. "rules": `refresh("feedback")`, whose
gate sees votes on some of the held-out queries. "raw clicks": every clicked passage is a positive, without a gate. Each
way has an index of its own, whose ranking decides what is clicked next.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hybrid_quality import DENSE, small_model
from machine import origin

METRIC = "nDCG@10"
RESULT = Path(__file__).parent / "results" / "feedback.json"
LENGTH = 128
WAYS = ("rules", "raw clicks")
RELEVANT, OTHER = 0.8, 0.15
TRAINING = {
    "temperature": 0.05,
    "train_group_size": 1,
    "query_max_len": LENGTH,
    "passage_max_len": LENGTH,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 64,
    "learning_rate": 5e-5,
    "bf16": True,
    "disable_tqdm": True,
}


def main(arguments: list[str] | None = None) -> None:
    """Measure each data set in each way, and write the result after every cycle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="BEIR folders with train qrels")
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--sessions", type=int, default=20, help="searches of each query in a cycle")
    parser.add_argument("--queries", type=int, default=600, help="queries that are asked in a cycle, at most")
    parser.add_argument("--votes", type=int, default=100, help="held-out queries with votes, for the gate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    logging.getLogger("ultrarag").setLevel(logging.ERROR)
    report: dict[str, Any] = {
        **origin(),
        "sessions": options.sessions,
        "queries a cycle": options.queries,
        "queries with votes": options.votes,
        "seed": options.seed,
        "data": [],
    }
    for folder in options.data:
        part: dict[str, Any] = {"name": folder.resolve().name, "ways": {}}
        report["data"].append(part)
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            index(folder, place / "index")
            for way in WAYS:
                shutil.copytree(place / "index", place / way / "index")
                for found in cycles(folder, way, place / way, options):
                    part |= {"passages": found["passages"], "held_out": found["held_out"]}
                    part["ways"][way] = found["cycles"]
                    print(part["name"], way, json.dumps(found["cycles"][-1]), file=sys.stderr, flush=True)
                    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(render(report))


def index(folder: Path, path: Path) -> None:
    """The passages of a data set, by the small model."""
    from ultrarag import Encoder
    from ultrarag.evaluation import read_beir
    from ultrarag.retrieve import LiveIndex

    encoder = Encoder.load(small_model(), "bge", device="cpu", query_max_length=LENGTH, passage_max_length=LENGTH)
    with LiveIndex.create(path, encoder) as live:
        live.add(read_beir(folder, "train").corpus.values())


def cycles(folder: Path, way: str, place: Path, options: argparse.Namespace) -> Any:
    """Yield what was measured so far, after every cycle."""
    from ultrarag.evaluation import read_beir
    from ultrarag.retrieve import LiveIndex

    train, chance = read_beir(folder, "train"), random.Random(options.seed)
    live = LiveIndex.open(place / "index")
    traffic, held_out = apart(train.queries)
    kept = {query: train.qrels[query] for query in held_out}
    if way == "rules":
        vote(live, train, sorted(held_out)[: options.votes])
    clicked: dict[str, set[str]] = {}
    done = [{"cycle": 0, METRIC: measured(live, train, kept)}]
    for cycle in range(1, options.cycles + 1):
        asked = chance.sample(sorted(traffic), min(options.queries, len(traffic)))
        clicks = simulate(live, train, asked, options.sessions, chance, way == "rules")
        for query, passages in clicks.items():
            clicked.setdefault(query, set()).update(passages)
        started = time.perf_counter()
        row: dict[str, Any] = {
            "cycle": cycle,
            **learn(live, train, clicked, way, place / f"tuned-{cycle}", options.seed),
        }
        row |= {"seconds": round(time.perf_counter() - started, 1), METRIC: measured(live, train, kept)}
        done.append(row)
        yield {"passages": len(train.corpus), "held_out": len(held_out), "cycles": done}
    live.close()


def apart(queries: dict[str, str]) -> tuple[list[str], list[str]]:
    """The ids of queries that may be trained on, and of those that the library holds out."""
    from ultrarag.retrieve.feedback import Rules
    from ultrarag.retrieve.feedback.labels import is_held_out
    from ultrarag.rows import text_key

    held_out = {id for id, text in queries.items() if is_held_out(text_key(text), Rules())}
    return [id for id in queries if id not in held_out], sorted(held_out)


def measured(live: Any, train: Any, qrels: dict[str, dict[str, int]]) -> float:
    """The metric on the held-out queries, all of them."""
    return float(live.evaluate({id: train.queries[id] for id in qrels}, qrels, [METRIC], **DENSE).metrics[METRIC])


def vote(live: Any, train: Any, queries: list[str]) -> None:
    """Somebody says of some held-out queries what is relevant."""
    for query in queries:
        hits = live.search(train.queries[query], log=True, client="judge", **DENSE)
        for passage, relevance in train.qrels[query].items():
            live.feedback(hits.query_id, passage, "relevant" if relevance else "not_relevant")


def simulate(
    live: Any, train: Any, asked: list[str], sessions: int, chance: random.Random, log: bool
) -> dict[str, set[str]]:
    """Sessions over the live ranking; returns what was clicked, and logs it."""
    clicked: dict[str, set[str]] = {}
    found = live.search_many([train.queries[query] for query in asked], k=10, **DENSE)
    for query, hits in zip(asked, found, strict=True):
        ranked, told = [(hit.id, hit.score) for hit in hits], {"fingerprint": hits.fingerprint}
        ids = [f"{hits.query_id}-{session}" for session in range(sessions)]
        if log:
            shown = [(id, train.queries[query], ranked) for id in ids]
            live.feedback_log.remember(shown, **told, generation=hits.generation)
        for id in ids:
            clicks = [
                hit.id
                for rank, hit in enumerate(hits, 1)
                if chance.random() < 1 / rank
                and chance.random() < (RELEVANT if train.qrels[query].get(hit.id) else OTHER)
            ]
            clicked.setdefault(query, set()).update(clicks)
            for passage in clicks if log else ():
                live.feedback(id, passage, "click")
    return clicked


def learn(live: Any, train: Any, clicked: dict[str, set[str]], way: str, output: Path, seed: int) -> dict[str, Any]:
    """Refresh the query side, and say with what and how it ended."""
    from ultrarag.errors import GateError

    settings = {**TRAINING, "output_dir": output, "effort": "query", "seed": seed, "search": DENSE}
    settings["cache_path"] = str(output.parent / "cache")
    if way == "rules":
        made = live.training_rows()
        told = {"rows": len(made.rows), "precision": precision(train, made.rows)}
        try:
            return {**told, "outcome": live.refresh("feedback", **settings).outcome}
        except GateError:
            return {**told, "outcome": "refused"}
    rows = [
        {"query": train.queries[query], "pos": [train.corpus[id].content for id in sorted(passages)]}
        for query, passages in clicked.items()
        if passages
    ]
    file = output.parent / f"{output.name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings |= {"gate": False, "allow_seen_data": True}
    outcome = live.refresh(str(file), **settings).outcome
    return {"rows": len(rows), "precision": precision(train, rows), "outcome": outcome}


def precision(train: Any, rows: list[dict[str, Any]]) -> float:
    """Share of the positives that are judged relevant."""
    relevant = {(train.queries[query], train.corpus[id].content) for query, ids in train.qrels.items() for id in ids}
    pairs = [(row["query"], text) for row in rows for text in row["pos"]]
    return round(sum(pair in relevant for pair in pairs) / max(1, len(pairs)), 3)


def render(report: dict[str, Any]) -> str:
    """The cycles as Markdown."""
    lines = [
        f"{METRIC} on held-out queries after cycles of {report['queries a cycle']} queries (at most), "
        f"{report['sessions']} simulated searches each; the query side of all-MiniLM-L6-v2 learns."
    ]
    for data in report["data"]:
        lines += ["", f"### {data['name']}: {data.get('held_out')} held-out queries", ""]
        count = max((len(cycles) for cycles in data["ways"].values()), default=0)
        lines += ["| | start | " + " | ".join(f"cycle {n}" for n in range(1, count)) + " |", "|---|" + "---|" * count]
        for way, rows in data["ways"].items():
            cells = [f"{row[METRIC]:.4f}" + (" (refused)" if row.get("outcome") == "refused" else "") for row in rows]
            lines.append(f"| {way} | {' | '.join(cells)} |")
        for way, rows in data["ways"].items():
            if len(rows) > 1:
                last = rows[-1]
                lines += [
                    "",
                    f"{way}: {last['rows']} rows in the end, {last['precision']:.0%} of their positives right.",
                ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
