"""A sequence of increments, refreshed one after another by each rung with replay, against learning all of it at once.

    python benchmarks/increments.py --data medquad covidqa scifact --guard cmrc --parts 5 --docstrings 1500

The training rows of the first folder are cut into parts of whole documents; each other folder is one more increment,
and so is a FAQ made of the docstrings of installed packages. All passages lie in one index, the guard's too, which is
never trained on. After each increment the test queries of all folders, and of the guard, are searched. With
`--place` the indexes lie in a folder that stays, and the same command goes on where a run was stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from hybrid_quality import DENSE, small_model
from ladder import processor_seconds
from machine import origin, without_folders

METRIC = "nDCG@10"
RESULT = Path(__file__).parent / "results" / "increments.json"
EFFORTS = ("query-map", "query", "passage-map", "full")
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "learning_rate": 2e-5,
    "temperature": 0.05,
    "train_group_size": 1,
    "allow_seen_data": True,
}


@dataclass(eq=False)
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

    def sample(self, rows: int | None, passages: int | None) -> Domain:
        """At most so many rows, whole documents of them, and so many passages; what is judged or trained on stays."""
        groups = parts_of(self.rows, -(-len(self.rows) // rows)) if rows and len(self.rows) > rows else [self.rows]
        kept = groups[0]
        texts = {text for row in kept for text in row["pos"]}
        judged = {id for found in self.qrels.values() for id in found}
        needed = [passage.id in judged or passage.content in texts for passage in self.passages]
        others = np.random.default_rng(0).permutation(np.flatnonzero(~np.array(needed)))
        room = len(others) if passages is None else max(0, passages - sum(needed))
        chosen = np.union1d(np.flatnonzero(needed), others[:room])
        return replace(self, passages=[self.passages[number] for number in chosen], rows=kept)


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
    with _place(options.place) as place:
        increments, guard = _increments(options, place)
        report: dict[str, Any] = {**origin(), "length": options.length}
        report |= {"increments": [f"{d.name}: {len(rows)} rows" for d, rows in increments], "guard": guard.name}
        report["passages"] = {d.name: len(d.passages) for d in [*dict.fromkeys(d for d, _ in increments), guard]}
        if options.place and options.output.exists():
            report |= _measured_before(options.output, report)
        sequence = Increments(place, increments, guard, options.epochs, options.length)
        for part in sequence.measured(report, options.efforts, options.at_once):
            options.output.write_text(json.dumps(part, indent=2) + "\n", encoding="utf-8")
    print(render(report))


@contextmanager
def _place(given: Path | None) -> Iterator[Path]:
    if given is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    given.mkdir(parents=True, exist_ok=True)
    yield given


def _increments(options: argparse.Namespace, place: Path) -> tuple[list[Any], Domain]:
    """(domain, rows) of each increment, and the guard."""
    domains = [Domain.read(path).sample(options.rows, options.passages) for path in options.data]
    if options.docstrings:
        from ultrarag.demo.corpus import build_demo

        folder = place / "docstrings"
        if not (folder / "train.jsonl").exists():
            build_demo(folder, options.docstrings, options.docstrings // 5)
        domains.append(Domain.read(folder))
    first, *others = domains
    parts = [(first, rows) for rows in parts_of(first.rows, options.parts)]
    return [*parts, *((domain, domain.rows) for domain in others)], Domain.read(options.guard).sample(
        None, options.passages
    )


def _measured_before(file: Path, report: dict[str, Any]) -> dict[str, Any]:
    """What a run over the same increments, which was stopped, has measured."""
    found = json.loads(file.read_text(encoding="utf-8"))
    same = all(found[name] == report[name] for name in ("length", "increments", "guard", "passages"))
    return {name: found[name] for name in ("before", "efforts", "at once") if same and name in found}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="BEIR folders with train.jsonl")
    parser.add_argument("--guard", type=Path, required=True, help="a BEIR folder that is never trained on")
    parser.add_argument("--parts", type=int, default=5, help="increments that the first folder is cut into")
    parser.add_argument("--docstrings", type=int, default=0, metavar="N", help="a last increment of N functions")
    parser.add_argument("--efforts", nargs="+", default=list(EFFORTS), choices=EFFORTS)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--rows", type=int, help="rows of each folder at most, whole documents of them")
    parser.add_argument("--passages", type=int, help="passages of each folder at most, beside those that are needed")
    parser.add_argument("--length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--at-once", action=argparse.BooleanOptionalAction, default=True, help="all rows in one run")
    parser.add_argument("--place", type=Path, help="a folder for the indexes, by which a stopped run goes on")
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser


class Increments:
    """The increments, and the index that each rung begins from."""

    def __init__(self, place: Path, increments: list[Any], guard: Domain, epochs: float, length: int) -> None:
        self.place, self.increments, self.guard = place, increments, guard
        self.lengths = {"query_max_length": length, "passage_max_length": length}
        self.settings = {**SETTINGS, "num_train_epochs": epochs, "cache_path": str(place / "cache")}
        self.settings |= {"query_max_len": length, "passage_max_len": length}
        self.domains = list({domain.name: domain for domain, _ in increments}.values())

    def measured(self, report: dict[str, Any], efforts: Sequence[str], at_once: bool) -> Iterator[dict[str, Any]]:
        """Fill in what the report lacks, and yield it after each refresh."""
        if "before" not in report:
            self._index()
            with self._copy("before") as live:
                report |= {"before": self._measured(live), "efforts": {}}
            yield report
        for effort in efforts:
            done = report["efforts"].setdefault(effort, [])
            for _ in self._refreshed(effort, done):
                yield report
        if at_once and "at once" not in report:
            with self._copy("at-once") as live:
                rows = [row for _, part in self.increments for row in part]
                report["at once"] = self._refresh(live, rows, self.place / "all", "full", {})
            yield report

    def _index(self) -> None:
        """All passages, with the vectors of the model as it is."""
        from ultrarag import Encoder
        from ultrarag.retrieve import LiveIndex

        shutil.rmtree(self.place / "base", ignore_errors=True)
        encoder = Encoder.load(small_model(), "bge", device="cpu", **self.lengths)
        with LiveIndex.create(self.place / "base", encoder) as live:
            for domain in [*self.domains, self.guard]:
                live.add(domain.passages)

    def _copy(self, name: str) -> Any:
        from ultrarag.retrieve import LiveIndex

        if not (self.place / name).exists():
            shutil.copytree(self.place / "base", self.place / f"{name}.part", dirs_exist_ok=True)
            (self.place / f"{name}.part").rename(self.place / name)
        return LiveIndex.open(self.place / name, device="cpu")

    def _measured(self, live: Any) -> dict[str, float]:
        return {
            domain.name: float(live.evaluate(domain.queries, domain.qrels, [METRIC], **DENSE).metrics[METRIC])
            for domain in [*self.domains, self.guard]
        }

    def _refreshed(self, effort: str, done: list[dict[str, Any]]) -> Iterator[None]:
        """Go through the increments that are not done; each is measured once it is learned."""
        earlier: list[dict[str, Any]] = []
        with self._copy(effort) as live:
            for number, (_, rows) in enumerate(self.increments):
                if number >= len(done):
                    output = self.place / f"{effort}-{number}"
                    done.append(self._refresh(live, rows, output, effort, {"replay_data": earlier} if earlier else {}))
                    print(effort, number, json.dumps(done[-1]), file=sys.stderr, flush=True)
                    yield
                    shutil.rmtree(output, ignore_errors=True)
                earlier = [*earlier, *rows]

    def _refresh(self, live: Any, rows: list[Any], output: Path, effort: str, more: dict[str, Any]) -> dict[str, Any]:
        from ultrarag.errors import UltraragError

        used, started, refused = processor_seconds(), time.perf_counter(), None
        try:
            live.refresh(rows, output_dir=output, effort=effort, gate=False, **self.settings, **more)
        except UltraragError as error:  # such as a map that gains nothing: the live model stays
            refused = without_folders(str(error))
        cost = {"seconds": round(time.perf_counter() - started, 1), "cpu_seconds": round(processor_seconds() - used, 1)}
        return {**cost, "refused": refused, "metrics": self._measured(live)}


def render(report: dict[str, Any]) -> str:
    """The page: what each rung has come to at the end, its lowest guard on the way, and the time of all."""
    guard, names = report["guard"], [name for name in report["before"] if name != report["guard"]]
    lines = [
        f"| | {' | '.join(names)} | mean | {guard} (guard) | lowest guard | processor s |",
        f"|---|{'---|' * (len(names) + 4)}",
    ]

    def row(name: str, steps: list[dict[str, Any]]) -> str:
        last = steps[-1]["metrics"]
        lowest = min(step["metrics"][guard] for step in steps)
        values = [*(last[key] for key in names), fmean(last[key] for key in names), last[guard], lowest]
        return f"| {name} | {' | '.join(f'{v:.4f}' for v in values)} | {sum(s['cpu_seconds'] for s in steps):.0f} |"

    lines.append(row("before", [{"metrics": report["before"], "cpu_seconds": 0.0}]))
    lines += [row(effort, steps) for effort, steps in report["efforts"].items()]
    if "at once" in report:
        lines.append(row("all at once", [report["at once"]]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
