"""What a new model gains over a bridge before its build is done, and what searches cost then; on BEIR folders.

    python benchmarks/bridge.py --data path/to/medquad path/to/covidqa

The small model is fine-tuned on both sides; its bridge over the old vectors is measured with the test queries (raw,
mapped, and mapped with the candidates encoded on demand), searches are timed before and on the bridge, and the build is
finished and swapped for what the whole gain is.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hybrid_quality import DENSE, small_model
from machine import origin

METRIC = "nDCG@10"
RESULT = Path(__file__).parent / "results" / "bridge.json"
LENGTH = 128
#: searches timed, each of one query
TIMED = 200


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
        found["before"] = live.evaluate(task.queries, task.qrels, [METRIC], **DENSE).metrics[METRIC]
        found["search_ms_before"] = search_ms(live, task)
        terms = BridgeTerms(task.queries, task.qrels, METRIC, DENSE)
        build_stopped(live, place / "new", terms)
        state = live.status()["bridge"]
        if state is not None:
            found |= {name: state[name] for name in ("mode", "encoded", "seconds", "error", "error_before")}
            found["measured"] = {name: verdict["new"] for name, verdict in state["measured"].items()}
            found["on_the_bridge"] = live.evaluate(task.queries, task.qrels, [METRIC], **DENSE).metrics[METRIC]
            found["search_ms_bridged"] = search_ms(live, task)
        ready = live.build(place / "new")
        live.swap(ready)
        found["after"] = live.evaluate(task.queries, task.qrels, [METRIC], **DENSE).metrics[METRIC]
    gain = found["after"] - found["before"]
    if state is not None and gain > 0:
        found["share_of_the_gain"] = (found["measured"]["encoded"] - found["before"]) / gain
    return found


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
        "| data | before | raw | mapped | encoded | after | share of the gain | search before, on the bridge |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["data"]:
        if "measured" not in row:
            ends = f"{row['before']:.4f} | the old model serves on | | | {row['after']:.4f}"
            lines.append(f"| {row['name']} | {ends} | | |")
            continue
        ways = " | ".join(f"{row['measured'][name]:.4f}" for name in ("raw", "mapped", "encoded"))
        share = f"{row['share_of_the_gain']:.0%}" if "share_of_the_gain" in row else ""
        times = f"{row['search_ms_before']:.1f} ms, {row['search_ms_bridged']:.1f} ms"
        lines.append(f"| {row['name']} | {row['before']:.4f} | {ways} | {row['after']:.4f} | {share} | {times} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
