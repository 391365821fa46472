"""What each rung of a refresh gains, forgets and costs, and which one `effort="auto"` takes; on BEIR folders.

    python benchmarks/ladder.py --data path/to/medquad path/to/covidqa --guard path/to/scifact

Each refresh starts from the same index of the small model's vectors, and is rolled back after it was measured. `auto`
and the gate see queries that are held out from the training rows by document; the test queries are seen by nobody. A
refresh counts the processor time of this process and of its children. The guard is searched exactly, in a corpus of its
own.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from hybrid_quality import DENSE, small_model, tune, weighted
from machine import origin, without_folders

METRIC = "nDCG@10"
RESULT = Path(__file__).parent / "results" / "ladder.json"
LENGTH = 128
#: of the rung that trains both sides; the others, and `auto`, are told nothing, as most users tell them nothing
FULL = {"num_train_epochs": 1, "per_device_train_batch_size": 32, "learning_rate": 2e-5}


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the result after every refresh."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="BEIR folders with train.jsonl")
    parser.add_argument("--guard", type=Path, required=True, help="BEIR folder of another kind")
    parser.add_argument("--efforts", nargs="+", default=["query-map", "query", "passage-map", "full", "auto"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--full-epochs", type=float, default=FULL["num_train_epochs"], help='of the effort "full"')
    parser.add_argument("--tuned", action="store_true", help="also search with BM25, weighted on the train queries")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    logging.getLogger("ultrarag").setLevel(logging.ERROR)
    report: dict[str, Any] = {**origin(), "guard": options.guard.name, "data": []}
    if options.output.exists():  # data sets that are not measured now keep what was measured of them
        report["data"] = json.loads(options.output.read_text(encoding="utf-8"))["data"]
    for folder in options.data:
        with tempfile.TemporaryDirectory() as place:
            for part in Measuring(folder, Path(place), options).parts():
                report["data"] = [*(item for item in report["data"] if item["name"] != part["name"]), part]
                options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(render(report))


class Measuring:
    """One data set."""

    def __init__(self, folder: Path, place: Path, options: argparse.Namespace) -> None:
        from ultrarag import Encoder
        from ultrarag.encode import CorpusVectors
        from ultrarag.evaluation import read_beir
        from ultrarag.retrieve import LiveIndex
        from ultrarag.retrieve.refresh.judging import Questions

        self.folder, self.place, self.options = folder, place, options
        self.test, self.train = read_beir(folder, "test"), read_beir(folder, "train")
        self.rows, self.dev = held_out(folder / "train.jsonl", place, self.test.corpus)
        self.encoder = Encoder.load(
            small_model(), "bge", device="cpu", query_max_length=LENGTH, passage_max_length=LENGTH
        )
        self.live = LiveIndex.create(place / "index", self.encoder)
        self.live.add(self.test.corpus.values())
        guard = read_beir(options.guard, "test")
        self.guard = Questions(guard.queries, guard.qrels)
        self.guarded = CorpusVectors.of(self.encoder, list(guard.corpus.values()), ("dense",))
        self.guard_corpus = list(guard.corpus.values())

    def parts(self) -> Any:
        """Yield what was measured so far, after every refresh."""
        found: dict[str, Any] = {
            "name": self.folder.resolve().name,
            **origin(),
            "passages": len(self.test.corpus),
            "train_rows": sum(1 for _ in self.rows.open(encoding="utf-8")),
            "held_out_queries": len(self.dev[1]),
            "before": {"test": self._test(), "guard": self._guard(self.encoder, False)},
            "refreshes": [],
        }
        for seed in range(self.options.seeds):
            for effort in self.options.efforts:
                found["refreshes"].append(self._refresh(effort, seed))
                print(found["name"], json.dumps(found["refreshes"][-1]), file=sys.stderr, flush=True)
                yield found

    def _refresh(self, effort: str, seed: int) -> dict[str, Any]:
        from ultrarag import Encoder
        from ultrarag.errors import GateError, TrainingError

        output = self.place / f"{effort}-{seed}"
        settings = {**FULL, "num_train_epochs": self.options.full_epochs} if effort == "full" else {}
        before, started = processor_seconds(), time.perf_counter()
        try:
            report = self.live.refresh(
                str(self.rows),
                output_dir=output,
                effort=effort,
                gate=self.dev,
                search=DENSE,
                temperature=0.05,
                train_group_size=1,
                query_max_len=LENGTH,
                passage_max_len=LENGTH,
                seed=seed,
                cache_path=str(self.place / "cache"),
                **settings,
            )
        except (GateError, TrainingError) as error:
            refused = without_folders(str(error))
            return {"effort": effort, "seed": seed, "refused": refused, "cpu_seconds": processor_seconds() - before}
        seconds, spent = time.perf_counter() - started, processor_seconds() - before
        generation = self.live.generation(report.generation)
        encoder = Encoder.load(output, device="cpu")
        row = {
            "effort": effort,
            "seed": seed,
            "taken": next((step["rung"] for step in report.ladder if step["taken"]), effort),
            "held_out": report.verdict["new"] if report.verdict else None,
            "test": self._test(),
            "guard": self._guard(encoder, generation.encodes),
            "seconds": round(seconds, 1),
            "cpu_seconds": round(spent, 1),
            "passages_encoded": len(self.test.corpus) if generation.encodes else 0,
            "ladder": report.ladder,
        }
        if self.options.tuned:
            weight = tune(self.live, self.train)["bm25_weight"]
            found = self.live.evaluate(self.test.queries, self.test.qrels, [METRIC], **weighted(weight))
            row["tuned_hybrid"] = found.metrics[METRIC]
        self.live.rollback()
        return row

    def _test(self) -> float:
        found = self.live.evaluate(self.test.queries, self.test.qrels, [METRIC], **DENSE)
        return float(found.metrics[METRIC])

    def _guard(self, encoder: Any, encode: bool) -> float:
        from ultrarag.encode import CorpusVectors
        from ultrarag.retrieve.refresh.ladder import Judge

        vectors = CorpusVectors.of(encoder, self.guard_corpus, ("dense",)) if encode else self.guarded
        judge = Judge(self.guard, vectors, encoder if encode else self.encoder, METRIC, False)
        return float(judge.measure(encoder).metrics[METRIC])


def held_out(rows: Path, place: Path, corpus: Any) -> tuple[Path, tuple[dict[str, str], dict[str, dict[str, int]]]]:
    """Hold out a seventh of the training rows by document: the rest in a file, and the queries with their passages."""
    from ultrarag.data import split

    split(rows, place / "split", by="document", test_share=0.15)
    ids = {passage.content: id for id, passage in corpus.items()}
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for number, line in enumerate((place / "split" / "test.jsonl").read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        if judged := {ids[text]: 1 for text in row["pos"] if text in ids}:
            queries[f"held-out-{number}"], qrels[f"held-out-{number}"] = row["query"], judged
    return place / "split" / "train.jsonl", (queries, qrels)


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def render(report: dict[str, Any]) -> str:
    """The page: means over the seeds."""
    lines = [f"Test {METRIC} and that of the guard ({report['guard']}); means over the seeds."]
    for data in report["data"]:
        before = data["before"]
        lines += ["", f"### {data['name']}: {data['passages']} passages, {data['train_rows']} rows", ""]
        lines += ["| effort | taken | test | guard | processor s | passages encoded |", "|---|---|---|---|---|---|"]
        lines.append(f"| before | | {before['test']:.4f} | {before['guard']:.4f} | | |")
        for effort in dict.fromkeys(row["effort"] for row in data["refreshes"]):
            rows = [row for row in data["refreshes"] if row["effort"] == effort]
            done = [row for row in rows if "test" in row]
            refused = f"refused {len(rows) - len(done)} of {len(rows)}" if len(done) < len(rows) else ""
            if not done:
                cost = fmean(row["cpu_seconds"] for row in rows)
                lines.append(f"| {effort} | {refused} | | | {cost:.0f} | |")
                continue
            mean = {name: fmean(row[name] for row in done) for name in ("test", "guard", "cpu_seconds")}
            taken = ", ".join(dict.fromkeys(row["taken"] for row in done if row["taken"] != effort)) or refused
            lines.append(
                f"| {effort} | {taken} | {mean['test']:.4f} | {mean['guard']:.4f} | {mean['cpu_seconds']:.0f} | "
                f"{max(row['passages_encoded'] for row in done)} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
