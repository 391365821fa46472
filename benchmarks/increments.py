"""A sequence of increments, refreshed one after another by each rung with replay, against learning all of it at once.

    python benchmarks/increments.py --data medquad covidqa scifact --guard cmrc --parts 5 --docstrings 1500

The training rows of the first folder are cut into parts of whole documents; each other folder is one more increment,
and so is a FAQ made of the docstrings of installed packages. All passages lie in one index, the guard's too, which is
never trained on. After each increment the test queries of all folders, and of the guard, are searched.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from hybrid_quality import DENSE, small_model
from machine import origin, without_folders

METRIC = "nDCG@10"
RESULT = Path(__file__).parent / "results" / "increments.json"
LENGTH = 128
EFFORTS = ("query-map", "query", "passage-map", "full")
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "learning_rate": 2e-5,
    "temperature": 0.05,
    "train_group_size": 1,
    "query_max_len": LENGTH,
    "passage_max_len": LENGTH,
    "allow_seen_data": True,
}


@dataclass
class Domain:
    """Passages, test queries and training rows; ids begin with the domain's name."""

    name: str
    passages: list[Any]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Domain:
        """Read a BEIR folder with train.jsonl; without it there are no rows."""
        from ultrarag.evaluation import read_beir

        name, task, file = folder.resolve().name, read_beir(folder, "test"), folder / "train.jsonl"
        passages = [replace(passage, id=f"{name}/{id}") for id, passage in task.corpus.items()]
        qrels = {key: {f"{name}/{id}": grade for id, grade in found.items()} for key, found in task.qrels.items()}
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        return cls(name, passages, dict(task.queries), qrels, [json.loads(line) for line in lines])


def parts_of(rows: Sequence[dict[str, Any]], count: int) -> list[list[dict[str, Any]]]:
    """Cut rows into parts of about the same size that share no document."""
    from ultrarag.rows.checks import DocumentGroups

    groups = DocumentGroups()
    for row in rows:
        groups.add(row["query"], row["pos"])
    roots = groups.joined().roots()
    parts: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    for group in np.random.default_rng(0).permutation(np.unique(roots)):
        min(parts, key=len).extend(rows[row] for row in np.flatnonzero(roots == group))
    return parts


def main(arguments: list[str] | None = None) -> None:
    """Measure each rung, then all rows at once, and write the result after each refresh."""
    options = _parser().parse_args(arguments)
    logging.getLogger("ultrarag").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        domains = [Domain.read(path) for path in options.data]
        if options.docstrings:
            from ultrarag.demo.corpus import build_demo

            build_demo(place / "docstrings", options.docstrings, options.docstrings // 5)
            domains.append(Domain.read(place / "docstrings"))
        first, *others = domains
        increments = [(first, rows) for rows in parts_of(first.rows, options.parts)] + [(d, d.rows) for d in others]
        sequence = Increments(place, increments, Domain.read(options.guard), options.epochs)
        report: dict[str, Any] = {**origin(), "increments": [f"{d.name}: {len(rows)} rows" for d, rows in increments]}
        report |= {"guard": options.guard.resolve().name, "before": sequence.before(), "efforts": {}}
        for effort in options.efforts:
            for done in sequence.refreshed(effort):
                report["efforts"][effort] = done
                options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        report["at once"] = sequence.at_once()
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(render(report))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="BEIR folders with train.jsonl")
    parser.add_argument("--guard", type=Path, required=True, help="a BEIR folder that is never trained on")
    parser.add_argument("--parts", type=int, default=5, help="increments that the first folder is cut into")
    parser.add_argument("--docstrings", type=int, default=0, metavar="N", help="a last increment of N functions")
    parser.add_argument("--efforts", nargs="+", default=list(EFFORTS), choices=EFFORTS)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser


class Increments:
    """The increments, and the index that each rung begins from."""

    def __init__(self, place: Path, increments: list[Any], guard: Domain, epochs: float) -> None:
        from ultrarag import Encoder
        from ultrarag.retrieve import LiveIndex

        self.place, self.increments, self.guard = place, increments, guard
        self.settings = {**SETTINGS, "num_train_epochs": epochs, "cache_path": str(place / "cache")}
        self.domains = list({domain.name: domain for domain, _ in increments}.values())
        lengths = {"query_max_length": LENGTH, "passage_max_length": LENGTH}
        encoder = Encoder.load(small_model(), "bge", device="cpu", **lengths)
        with LiveIndex.create(place / "base", encoder) as live:
            for domain in [*self.domains, guard]:
                live.add(domain.passages)

    def _copy(self, name: str) -> Any:
        from ultrarag.retrieve import LiveIndex

        shutil.copytree(self.place / "base", self.place / name)
        return LiveIndex.open(self.place / name, device="cpu")

    def before(self) -> dict[str, float]:
        """The metric of each domain, and of the guard."""
        with self._copy("before") as live:
            return self._measured(live)

    def _measured(self, live: Any) -> dict[str, float]:
        return {
            domain.name: float(live.evaluate(domain.queries, domain.qrels, [METRIC], **DENSE).metrics[METRIC])
            for domain in [*self.domains, self.guard]
        }

    def refreshed(self, effort: str) -> Any:
        """Yield what was measured so far, after each increment."""
        done: list[dict[str, Any]] = []
        earlier: list[dict[str, Any]] = []
        with self._copy(effort) as live:
            for number, (_, rows) in enumerate(self.increments):
                replay = {"replay_data": list(earlier)} if earlier else {}
                done.append(self._refresh(live, rows, self.place / f"{effort}-{number}", effort, replay))
                earlier += rows
                yield done

    def _refresh(self, live: Any, rows: list[Any], output: Path, effort: str, more: dict[str, Any]) -> dict[str, Any]:
        from ultrarag.errors import UltraragError

        started, refused = time.perf_counter(), None
        try:
            live.refresh(rows, output_dir=output, effort=effort, gate=False, **self.settings, **more)
        except UltraragError as error:  # such as a map that gains nothing: the live model stays
            refused = without_folders(str(error))
        seconds = round(time.perf_counter() - started, 1)
        return {"seconds": seconds, "refused": refused, "metrics": self._measured(live)}

    def at_once(self) -> dict[str, Any]:
        """A full fine-tune on all rows."""
        with self._copy("at-once") as live:
            rows = [row for _, part in self.increments for row in part]
            return self._refresh(live, rows, self.place / "all", "full", {})


def render(report: dict[str, Any]) -> str:
    """The page: what each rung has come to at the end, its lowest guard on the way, and the time of all."""
    guard, names = report["guard"], [name for name in report["before"] if name != report["guard"]]
    lines = [
        f"| | {' | '.join(names)} | mean | {guard} (guard) | lowest guard | seconds |",
        f"|---|{'---|' * (len(names) + 4)}",
    ]

    def row(name: str, steps: list[dict[str, Any]]) -> str:
        last = steps[-1]["metrics"]
        lowest = min(step["metrics"][guard] for step in steps)
        values = [*(last[key] for key in names), fmean(last[key] for key in names), last[guard], lowest]
        return f"| {name} | {' | '.join(f'{v:.4f}' for v in values)} | {sum(s['seconds'] for s in steps):.0f} |"

    lines.append(row("before", [{"metrics": report["before"], "seconds": 0.0}]))
    lines += [row(effort, steps) for effort, steps in report["efforts"].items()]
    return "\n".join([*lines, row("all at once", [report["at once"]])])


if __name__ == "__main__":
    main()
