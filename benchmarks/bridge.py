"""What a new model gains over a bridge before its build is done, and what searches cost then; on BEIR folders.

    python benchmarks/bridge.py --data path/to/medquad path/to/covidqa

The small model is fine-tuned on both sides; its bridge over the old vectors is judged by the test queries and serves;
they are searched, their candidates are encoded behind them and kept, and they are searched again; then the build is
finished and swapped for what the whole gain is. The curve says what the bridge gives when a share of all passages has
new vectors: in the order of the builder, and in random order. It is calculated from both generations' stored vectors.
"""

from __future__ import annotations

import argparse
import json
import logging
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from hybrid_quality import DENSE, small_model
from machine import origin

METRIC = "nDCG@10"
RESULT = Path(__file__).parent / "results" / "bridge.json"
LENGTH = 128
#: searches timed, each of one query; queries asked together; and seconds in which nothing more is encoded
TIMED, TOGETHER, SETTLED = 200, 20, 4.0
#: of a search; and shares of passages with new vectors
CANDIDATES, SHARES = 50, (0.0, 0.25, 0.5, 0.75, 1.0)


def main(arguments: list[str] | None = None) -> None:
    """Measure each folder and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="BEIR folders with train.jsonl")
    parser.add_argument("--steps", type=int, default=60, help="of the fine-tune, 32 rows each")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    logging.getLogger("ultrarag").setLevel(logging.ERROR)
    report: dict[str, Any] = {**origin(), "data": []}
    for folder in options.data:
        with tempfile.TemporaryDirectory() as place:
            report["data"].append(measure(folder, Path(place), options.steps))
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(render(report))


def measure(folder: Path, place: Path, steps: int) -> dict[str, Any]:
    """One data set: before, on the bridge, and after the swap."""
    from ultrarag import Encoder
    from ultrarag.evaluation import read_beir
    from ultrarag.finetune import finetune
    from ultrarag.retrieve import BridgeTerms, LiveIndex

    task = read_beir(folder, "test")
    lengths = {"query_max_length": LENGTH, "passage_max_length": LENGTH}
    encoder = Encoder.load(small_model(), "bge", device="cpu", **lengths)
    old = encoder.save(place / "old")
    finetune(
        old,
        str(folder / "train.jsonl"),
        place / "new",
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=2e-5,
        temperature=0.05,
        train_group_size=1,
        query_max_len=LENGTH,
        passage_max_len=LENGTH,
        bf16=True,
    )
    found: dict[str, Any] = {"name": folder.resolve().name, "passages": len(task.corpus), "queries": len(task.queries)}
    with LiveIndex.create(place / "index", encoder) as live:
        live.add(task.corpus.values())
        stored = live.corpus_vectors()
        found["before"], found["search_ms_before"] = evaluated(live, task), search_ms(live, task)
        build_stopped(live, place / "new", BridgeTerms(task.queries, task.qrels, METRIC, DENSE))
        bridge = Bridge.read(place / "index", stored.ids) if live.status()["bridge"] else None
        if bridge is not None:
            found |= on_the_bridge(live, task)
        built = time.perf_counter()
        live.swap(live.build(place / "new", threads=1))
        found["build_seconds"] = round(time.perf_counter() - built, 1)
        found["after"], found["search_ms_after"] = evaluated(live, task), search_ms(live, task)
        if bridge is not None:
            new = live.corpus_vectors()
            rows = {id: row for row, id in enumerate(new.ids)}
            vectors = new.read(np.array([rows[id] for id in stored.ids]), ("dense",)).dense
            queries = Encoder.load(place / "new").encode(list(task.queries.values()), "query").dense
            found["curve"] = curve(
                bridge, stored.read(np.arange(len(stored)), ("dense",)).dense, vectors, queries, task
            )
    if bridge is not None and (gain := found["after"] - found["before"]) > 0:
        found["share_of_the_gain"] = (found["searched_again"] - found["before"]) / gain
        lowest = min(point["order"] for point in found["curve"])
        found["never_below_old"] = min(lowest, found["served"], found["searched_again"]) >= found["before"]
    return found


def evaluated(live: Any, task: Any) -> float:
    """nDCG@10 of the test queries as they are answered now."""
    return float(live.evaluate(task.queries, task.qrels, [METRIC], **DENSE).metrics[METRIC])


def on_the_bridge(live: Any, task: Any) -> dict[str, Any]:
    """What the bridge gives at once, and when every query has been asked and its candidates have new vectors."""
    state = live.status()["bridge"]
    found = {name: state[name] for name in ("mode", "encoded", "seconds", "error", "error_before", "measured")}
    found |= {"served": evaluated(live, task), "search_ms_bridged": search_ms(live, task)}
    queries = list(task.queries.values())
    for start in range(0, len(queries), TOGETHER):
        live.search_many(queries[start : start + TOGETHER], k=10, **DENSE)
        settle(live)
    found |= {"searched_again": evaluated(live, task), "encoded_then": live.status()["bridge"]["encoded"]}
    return {**found, "search_ms_settled": search_ms(live, task)}


def settle(live: Any) -> None:
    """Wait until no further passage is encoded behind the searches."""
    before, now = -1, live.status()["bridge"]["encoded"]
    while now != before:
        time.sleep(SETTLED)
        before, now = now, live.status()["bridge"]["encoded"]


@dataclass
class Bridge:
    """What a bridge was made of."""

    map: Any
    ids: Sequence[str]
    #: rows of passages, those first that have new vectors when it begins to serve, then those of the builder's order
    order: np.ndarray
    #: how many of them the sample is
    sample: int

    @classmethod
    def read(cls, index: Path, ids: Sequence[str]) -> Bridge:
        """Read the files of the bridge that serves."""
        from ultrarag.maps import LinearMap

        rows = {id: row for row, id in enumerate(ids)}
        with closing(sqlite3.connect(index / "bridge" / "vectors.sqlite")) as database:
            kept = [rows[id] for (id,) in database.execute("SELECT id FROM kept ORDER BY id")]
        lines = (index / "bridge" / "order.jsonl").read_text(encoding="utf-8").splitlines()
        ordered = [rows[json.loads(line)] for line in lines]
        order = list(dict.fromkeys([*kept, *ordered]))
        return cls(LinearMap.load(index / "bridge" / "map"), ids, np.array(order), len(kept))


def curve(bridge: Bridge, old: np.ndarray, new: np.ndarray, queries: np.ndarray, task: Any) -> list[dict[str, float]]:
    """The metric by share of passages with new vectors: 50 candidates by the transposed map, 50 of these passages.

    Args:
        old, new: (passages, d), in the order of the index.
        queries: (queries, d), of the new model.
    """
    from ultrarag.evaluation import evaluate_run

    ids, mapped = bridge.ids, bridge.map.apply(old)
    candidates = np.argsort(-(bridge.map.transposed(queries)[0] @ old.T), axis=1, kind="stable")[:, :CANDIDATES]
    rest = np.random.default_rng(0).permutation(bridge.order[bridge.sample :])
    orders = {"order": bridge.order, "random": np.concatenate([bridge.order[: bridge.sample], rest])}
    points = []
    for share in SHARES:
        point = {"share": max(share, bridge.sample / len(ids))}
        for name, order in orders.items():
            mixed = mapped.copy()
            done = order[: round(point["share"] * len(ids))]
            mixed[done] = new[done]
            fresh = done[np.argsort(-(queries @ new[done].T), axis=1, kind="stable")[:, :CANDIDATES]]
            both = np.concatenate([candidates, fresh], axis=1)
            scores = np.einsum("qd,qkd->qk", queries, mixed[both])
            run = {
                query_id: {ids[row]: float(score) for row, score in zip(both[n], scores[n], strict=True)}
                for n, query_id in enumerate(task.queries)
            }
            point[name] = float(evaluate_run(task.qrels, run, [METRIC]).metrics[METRIC])
        points.append(point)
    return points


def build_stopped(live: Any, checkpoint: Path, terms: Any) -> None:
    """Begin a build, which ends as by Ctrl-C when the bridge is there and before its passages are encoded."""
    from ultrarag.retrieve.build import start

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with patch.object(start, "run_builder", stop), suppress(KeyboardInterrupt):
        live.build(checkpoint, bridge=terms)


def search_ms(live: Any, task: Any) -> float:
    """The median of single searches, in milliseconds."""
    seconds = []
    for query in list(task.queries.values())[:TIMED]:
        started = time.perf_counter()
        live.search(query, k=10, heads=["dense"])
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def render(report: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "| data | before | serves | at once | candidates encoded | after | share of the gain | search, and bridged |",
        "|---|---|---|---|---|---|---|---|",
    ]
    curves = []
    for row in report["data"]:
        if "served" not in row:
            lines.append(f"| {row['name']} | {row['before']:.4f} | the old model | | | {row['after']:.4f} | | |")
            continue
        ways = f"{row['mode']} | {row['served']:.4f} | {row['searched_again']:.4f}"
        share = f"{row['share_of_the_gain']:.0%}" if "share_of_the_gain" in row else ""
        names = [name for name in ("before", "bridged", "settled") if f"search_ms_{name}" in row]
        times = ", ".join(f"{row[f'search_ms_{name}']:.1f} ms" for name in names)
        lines.append(f"| {row['name']} | {row['before']:.4f} | {ways} | {row['after']:.4f} | {share} | {times} |")
        points = ", ".join(f"{p['share']:.0%}: {p['order']:.4f} (random {p['random']:.4f})" for p in row["curve"])
        curves.append(f"{row['name']}, by share of passages with new vectors: {points}")
    return "\n".join([*lines, "", *curves])


if __name__ == "__main__":
    main()
