"""BM25 beside an older commit of itself and tantivy: build, p50, p99, disk, memory; with dense search; nDCG.

    python benchmarks/bm25.py [--passages 50000 1000000] [--before dee4ec6] [--hybrid] [--data path/to/scifact ...]

Texts are made of 30 to 90 made-up words, queries of eight. Each contender has a process of its own and one processor;
rounds of searches take turns, and a figure is the median of its rounds. Contenders that are not installed, and a commit
that this repository does not have, are left out and named. `--hybrid` builds dense vectors too (slow from 100,000
on) and searches both. `--data` takes BEIR folders: nDCG@10 of ours and of tantivy over the same tokens, also
after passages of another folder were added and deleted again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from bm25_contenders import K, queries
from machine import in_turn, origin
from older import COMMIT, older_code

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "bm25.json"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the result."""
    asked = parse(arguments)
    with tempfile.TemporaryDirectory(dir=asked.folder) as place:
        code = {"ours": HERE.parent, "before": checked_out(asked.before, Path(place))}
        names = [name for name in ("ours", "before", "tantivy") if available(name, code)]
        report: dict[str, Any] = origin(1, ("numpy", *(["tantivy"] if "tantivy" in names else [])))
        report |= {"before": asked.before, "queries": asked.queries, "rounds": asked.rounds, "k": K, "sizes": []}
        for size in asked.passages:
            folder = Path(place) / str(size)
            report["sizes"].append(measure(size, names, code, folder, asked))
        report["quality"] = [quality(folder, asked.data) for folder in asked.data]
    report["load_average_after"] = round(os.getloadavg()[0], 1)
    print(json.dumps(report, indent=1))
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="*", default=[50_000])
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", default=COMMIT, help="the commit beside; '' for none")
    parser.add_argument("--hybrid", action="store_true", help="also build dense vectors, and search both")
    parser.add_argument("--engine", default="qdrant-edge", help="the engine of --hybrid")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="BEIR folders for nDCG@10")
    parser.add_argument("--folder", type=Path, help="where the indexes are made (default: the temporary folder)")
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args(arguments)


def checked_out(commit: str, place: Path) -> Path | None:
    """The code of a commit in a folder; None where the repository does not have it."""
    try:
        return older_code(place / "before", commit) if commit else None
    except LookupError:
        return None


def available(name: str, code: dict[str, Path | None]) -> bool:
    """Whether a contender can run here; says why not."""
    there = find_spec("tantivy") is not None if name == "tantivy" else code[name] is not None
    if not there:
        print(f"{name}: left out, it is not here", file=sys.stderr)
    return there


def measure(
    size: int, names: Sequence[str], code: dict[str, Path | None], folder: Path, asked: argparse.Namespace
) -> dict[str, Any]:
    """All contenders at one size."""
    rows: dict[str, Any] = {}
    for name in names:
        (folder / name).mkdir(parents=True)
        rows[name] = in_process("build", name, code, folder, size, asked)
        print(f"{size} {name}: {rows[name]}", file=sys.stderr)
    found: dict[str, list[Any]] = {name: [] for name in names}
    for number in range(asked.rounds):
        for name in in_turn(names, number):
            found[name].append(in_process("search", name, code, folder, size, asked))
    for name, rounds in found.items():
        for which in (50, 99):
            figures = [float(np.percentile(one["ms"], which)) for one in rounds]
            rows[name][f"p{which} ms"] = statistics.median(figures)
        rows[name]["MiB"] = statistics.median(one["MiB"] for one in rounds)
        rows[name]["passages/s"] = size / rows[name]["wall"]
        hits = zip(rounds[0]["hits"], found["ours"][0]["hits"], strict=True)
        rows[name]["overlap"] = statistics.mean(len({*a} & {*b}) / max(1, len(b)) for a, b in hits)
    rows = {name: {key: round(value, 4) for key, value in row.items()} for name, row in rows.items()}
    report: dict[str, Any] = {"passages": size, "contenders": rows, "ours to": compared(rows)}
    if asked.hybrid:
        report["hybrid"] = hybrid(folder, size, asked)
    return report


def compared(rows: dict[str, Any]) -> dict[str, Any]:
    """What ours is to each other one; above 1 is better for the build, below 1 for the rest."""
    ours = rows["ours"]
    keys = ("passages/s", "p50 ms", "p99 ms", "disk", "MiB")
    return {name: {key: round(ours[key] / row[key], 3) for key in keys} for name, row in rows.items() if name != "ours"}


def in_process(
    task: str, name: str, code: dict[str, Path | None], folder: Path, size: int, asked: argparse.Namespace
) -> Any:
    """What one process of a contender found."""
    words = [sys.executable, str(HERE / "bm25_contenders.py"), task, name, str(folder / name), str(size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(code.get(name) or "")
    done = subprocess.run([*words, str(asked.queries)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: {task} failed\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def hybrid(folder: Path, size: int, asked: argparse.Namespace) -> dict[str, float]:
    """Dense and BM25, 100 candidates each, and their min-max sum: milliseconds."""
    from live_index_contenders import vectors

    from ultrarag.retrieve.bm25 import BM25
    from ultrarag.retrieve.engines import Schema, create
    from ultrarag.retrieve.search.fusion import fuse
    from ultrarag.types import Embeddings

    data, wanted = vectors(size, asked.dim, 0), vectors(asked.queries, asked.dim, 9)
    backend = create(folder / "dense", Schema(dense=asked.dim), asked.engine)
    for start in range(0, size, 1000):
        part = data[start : start + 1000]
        ids = [f"p{start + i}" for i in range(len(part))]
        backend.upsert(ids, Embeddings(dense=part), [{}] * len(part))
    backend.optimize()
    backend.flush()
    del data
    words, took = BM25.open(folder / "ours" / "bm25"), []
    for query, vector in zip(queries(asked.queries), wanted, strict=True):
        started = time.perf_counter()
        lists = {"dense": backend.search_dense(vector, 100), "bm25": words.search(query, 100)}
        fuse(lists, K, {"dense": 1.0, "bm25": 1.0})
        took.append(1000 * (time.perf_counter() - started))
    words.close()
    backend.close()
    return {"engine": asked.engine, "p50 ms": float(np.median(took)), "p99 ms": float(np.percentile(took, 99))}


def quality(folder: Path, folders: Sequence[Path]) -> dict[str, Any]:
    """nDCG@10 of ours and of tantivy over the same tokens; then with as many passages of another set gone again."""
    from ultrarag.evaluation import read_beir
    from ultrarag.evaluation.metrics import metrics

    judged, other = read_beir(folder, "test"), read_beir(folders[folders.index(folder) - 1], "test")
    passages = {id: text_of(passage) for id, passage in judged.corpus.items()}
    foreign = {f"x{id}": text_of(passage) for id, passage in other.corpus.items()}
    asked = judged.queries
    row: dict[str, Any] = {"name": folder.resolve().name, "passages": len(passages), "of another": len(foreign)}
    for name, search in (("ours", search_ours), ("tantivy", search_tantivy)):
        if name == "tantivy" and find_spec("tantivy") is None:
            continue
        for label, added in ((name, {}), (f"{name}, after deletions", foreign)):
            run = search(passages, added, asked)
            row[label] = round(metrics(judged.qrels, run, ["nDCG@10"])["nDCG@10"], 5)
    return row


def text_of(passage: Any) -> str:
    """Title and text, as the index reads them."""
    return getattr(passage, "content", None) or f"{passage.get('title', '')} {passage['text']}".strip()


def search_ours(passages: dict[str, str], added: dict[str, str], asked: dict[str, str]) -> dict[str, dict[str, float]]:
    """Runs of ours."""
    from ultrarag.retrieve.bm25 import BM25

    with tempfile.TemporaryDirectory() as place:
        index = BM25.create(Path(place) / "bm25")
        everything = {**passages, **added}
        index.upsert(list(everything), list(everything.values()), [{}] * len(everything))
        index.delete(list(added))
        run = {id: dict(index.search(query, 100)) for id, query in asked.items()}
        index.close()
    return run


def search_tantivy(
    passages: dict[str, str], added: dict[str, str], asked: dict[str, str]
) -> dict[str, dict[str, float]]:
    """Runs of tantivy over the tokens of ours; its deleted passages count until a merge."""
    import tantivy

    from ultrarag.retrieve.bm25.terms import tokenize

    builder = tantivy.SchemaBuilder()
    builder.add_text_field("id", stored=True, tokenizer_name="raw", index_option="basic")
    builder.add_text_field("text", tokenizer_name="whitespace", index_option="freq")
    schema = builder.build()
    index = tantivy.Index(schema)
    writer = index.writer(heap_size=128_000_000, num_threads=1)
    for id, text in {**passages, **added}.items():
        writer.add_document(tantivy.Document(id=id, text=" ".join(tokenize(text))))
    writer.commit()
    for id in added:
        writer.delete_documents_by_term("id", id)
    writer.commit()
    index.reload()
    searcher, run = index.searcher(), {}
    for id, query in asked.items():
        terms = [(tantivy.Occur.Should, tantivy.Query.term_query(schema, "text", token)) for token in tokenize(query)]
        hits = searcher.search(tantivy.Query.boolean_query(terms), 100).hits if terms else []
        run[id] = {searcher.doc(address)["id"][0]: float(score) for score, address in hits}
    return run


if __name__ == "__main__":
    sys.exit(main())
