"""Late interaction as a first stage: what codes lose against float32, what they take, and how long a search lasts.

    python benchmarks/late_interaction.py --data path/to/data/sets --folder kept/vectors

Two parts. *Quality*: nDCG@10 of three data sets, of each of which 2,000 passages and all test queries are taken, by
token vectors of a real model (`late_vectors.py` says which): float32 vectors compared with all, and the engine `plaid`,
which finds candidates, scores them by codes, and the best anew by refined ones. *Scale*: 100,000 made-up passages of
120 tokens; contenders build in one process, and each searches in one of its own, with one thread. Queries are those of
the data sets. Times are of the processor, so that other work on the machine counts less; memory is what the searching
process holds more after its searches than before it opened the index, and no file backs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import origin

RESULTS = Path(__file__).parent / "results"
SETS = ("scifact", "medquad", "covidqa")
ENGINES = {f"plaid, {bits} bits": f"plaid?bits={bits}" for bits in (2, 3, 4)}
#: The same without refinements, for the first part.
CODES_ALONE = {f"{label}, codes alone": f"{name}&rest=0" for label, name in ENGINES.items()}
EXACT = "float32, compared with all"
FILTERS: dict[str, dict[str, Any] | None] = {"no filter": None, "1 %": {"hundredth": 1}, "10 %": {"tenth": 1}}
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
K, DIM = 10, 128


def main(arguments: list[str] | None = None) -> None:
    """Measure the parts that are asked for, and write what is known of all."""
    options = parse(arguments)
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    if options.work:
        done = {"build": build, "search": search}[options.work[0]](options, options.work[1])
        print(json.dumps(done))
        return
    path = options.output
    report = json.loads(path.read_text()) if path.exists() else {"quality": {}, "scale": {}}
    # parts may be measured one by one; results of before named one command for both
    commands = report.setdefault("commands", {part: report["command"] for part in ("quality", "scale") if report[part]})
    report.update(origin(1, ("torch", "transformers", "numpy")))
    report.update(size=options.size, tokens=options.tokens)
    prepare(options)
    for part in options.parts:
        if part == "searches":
            report["scale"] = searches(options, report["scale"])
        else:
            report[part] = {"quality": quality, "scale": scale}[part](options)
        commands[part] = report["command"]
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(render(report), encoding="utf-8")
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of data sets in BEIR's layout")
    parser.add_argument("--folder", type=Path, required=True, help="keeps the model, vectors and indexes")
    parser.add_argument("--passages", type=int, default=2000, help="of each data set: those judged, and others")
    parser.add_argument("--judged", type=int, default=1000, help="queries of each data set, at most")
    parser.add_argument("--bits", type=int, nargs="+", default=[2], choices=[2, 3, 4], help="of the contenders")
    parser.add_argument("--size", type=int, default=100_000, help="made-up passages")
    parser.add_argument("--tokens", type=int, default=120, help="of each of them")
    parser.add_argument("--queries", type=int, default=300, help="of the scale part")
    parser.add_argument("--truth", type=int, default=20, help="queries that are compared with all float32 vectors")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"], help="of encoding")
    parts = ["quality", "scale", "searches"]
    told = "searches: those of the part scale again, in the indexes that it left in the folder"
    parser.add_argument("--parts", nargs="+", default=parts[:2], choices=parts, help=told)
    parser.add_argument("--output", type=Path, default=RESULTS / "late_interaction.json")
    parser.add_argument("--work", nargs=2, metavar=("STEP", "NAME"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace) -> None:
    """Encode what is not kept yet."""
    import late_vectors as vectors

    if all((options.folder / f"{name}{kind}-tokens.npy").exists() for name in SETS for kind in ("", "-queries")):
        return
    from ultrarag import Encoder

    options.folder.mkdir(parents=True, exist_ok=True)
    passages = {name: vectors.passages_of(options.data / name, options.passages) for name in SETS}
    texts = [passage.content for name in SETS for passage in passages[name]]
    chosen = np.random.default_rng(0).permutation(len(texts))[: vectors.SAMPLE]
    folder = vectors.model(options.folder / "model", [texts[row] for row in chosen])
    encoder = Encoder.load(folder, device="cpu", precision=options.precision)
    for name in SETS:
        vectors.encoded(options.folder, name, encoder, passages[name], "passage")
        asked = list(vectors.queries_of(options.data / name).values())
        vectors.encoded(options.folder, f"{name}-queries", encoder, asked, "query")


def kept(options: argparse.Namespace, name: str) -> Any:
    """The token vectors of a data set."""
    from late_vectors import Ragged

    files = [options.folder / f"{name}-{part}.npy" for part in ("tokens", "ends")]
    return Ragged(np.load(files[0], mmap_mode="r"), np.load(files[1]))


def quality(options: argparse.Namespace) -> dict[str, Any]:
    """nDCG@10 of each data set by float32 vectors, and by each engine that makes codes of them."""
    import late_vectors as vectors

    found: dict[str, Any] = {}
    for name in SETS:
        passages, asked = kept(options, name), kept(options, f"{name}-queries")
        ids = [passage.id for passage in vectors.passages_of(options.data / name, options.passages)]
        names = list(vectors.queries_of(options.data / name))[: options.judged]
        queries = {query: asked.row(row) for row, query in enumerate(names)}
        judged = vectors.judgements(options.data / name)
        qrels = {query: judged[query] for query in names}
        exact = exactly(passages, ids, queries)
        rows = {EXACT: {"nDCG@10": ndcg(qrels, exact)}}
        for label, engine in chosen(options, ENGINES | CODES_ALONE).items():
            run, mean = searched(options, passages, ids, queries, engine)
            same = [len(run[query].keys() & exact[query].keys()) / K for query in names]
            rows[label] = {
                "nDCG@10": ndcg(qrels, run),
                "standard error": error(qrels, run, exact),
                "found of float32": round(float(np.mean(same)), 3),
                "mean ms": round(mean, 1),
            }
        sizes = {"passages": len(passages), "tokens": len(passages.tokens), "queries": len(names)}
        found[name] = {**sizes, "engines": rows}
    return found


def exactly(passages: Any, ids: list[str], queries: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """The ten best passages of each query by float32 vectors."""
    best = Best(list(queries.values()))
    for row in range(len(passages)):
        best.add(passages.row(row)[None])
    scores = best.scores()
    order = np.argsort(-scores, axis=1)[:, :K]
    return {
        query: {ids[row]: float(line[row]) for row in rows}
        for query, rows, line in zip(queries, order, scores, strict=True)
    }


def searched(
    options: argparse.Namespace, passages: Any, ids: list[str], queries: dict[str, np.ndarray], engine: str
) -> tuple[dict[str, dict[str, float]], float]:
    """The ten best passages of each query by an engine, and milliseconds of a search."""
    from late_vectors import BLOCK

    from ultrarag.retrieve.engines import Schema, create

    place = options.folder / "index"
    shutil.rmtree(place, ignore_errors=True)
    backend = create(place, Schema(colbert=DIM), engine)
    for start in range(0, len(passages), BLOCK):
        part = passages.embeddings(start, start + BLOCK)
        backend.upsert(ids[start : start + BLOCK], part, [{}] * len(part))
    backend.optimize()
    begun = time.process_time()
    run = {query: dict(backend.search_tokens(tokens, K)) for query, tokens in queries.items()}
    mean = 1000 * (time.process_time() - begun) / len(queries)
    backend.close()
    shutil.rmtree(place)
    return run, mean


def ndcg(qrels: dict[str, dict[str, int]], run: dict[str, dict[str, float]]) -> float:
    """nDCG@10, the mean over the queries."""
    import ir_measures

    wanted = ir_measures.nDCG @ K
    return round(float(ir_measures.calc_aggregate([wanted], qrels, run)[wanted]), 4)


def error(qrels: dict[str, dict[str, int]], run: dict[str, Any], exact: dict[str, Any]) -> float:
    """The standard error of the difference of two runs in nDCG@10."""
    import ir_measures

    each = [
        {item.query_id: item.value for item in ir_measures.iter_calc([ir_measures.nDCG @ K], qrels, found)}
        for found in (run, exact)
    ]
    return round(float(np.std([each[0][query] - each[1][query] for query in qrels]) / len(qrels) ** 0.5), 4)


def scale(options: argparse.Namespace) -> dict[str, Any]:
    """Build 100,000 passages with each contender in one process, and search them in others."""
    built = work(options, "build", "all")
    found: dict[str, Any] = {"float32, MB": round(options.size * options.tokens * DIM * 4 / 1e6)}
    for label in chosen(options):
        found[label] = {"build": built[label], "search": work(options, "search", label)}
    return found


def searches(options: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """What the part scale found, with its searches measured anew."""
    again = {label: found[label] | {"search": work(options, "search", label)} for label in chosen(options)}
    return found | again


def work(options: argparse.Namespace, step: str, label: str) -> Any:
    """Run a step in a process of its own."""
    command = [sys.executable, __file__, "--work", step, label]
    for name in ("data", "folder", "passages", "judged", "size", "tokens", "queries", "truth"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--bits", *map(str, options.bits)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def queries(options: argparse.Namespace) -> list[np.ndarray]:
    """Queries of all data sets, in random order."""
    held = [kept(options, f"{name}-queries") for name in SETS]
    rows = [item.row(row) for item in held for row in range(len(item))]
    return [rows[row] for row in np.random.default_rng(3).permutation(len(rows))[: options.queries]]


def metadata(row: int) -> dict[str, int]:
    """What the filters ask for."""
    return {"hundredth": row % 100, "tenth": row % 10}


def chosen(options: argparse.Namespace, contenders: dict[str, str] = ENGINES) -> dict[str, str]:
    """The contenders that are asked for."""
    return {label: name for label, name in contenders.items() if int(label.split()[1]) in options.bits}


def folder_of(options: argparse.Namespace, label: str) -> Path:
    """Where a contender keeps its index."""
    place: Path = options.folder / f"{options.size}-{ENGINES[label].replace('?', '-')}"
    return place


def build(options: argparse.Namespace, _: str) -> dict[str, Any]:
    """Write all passages to each contender, and optimise; note the best of some queries by float32 vectors.

    What it takes to make passages up is left out of the times.
    """
    from late_vectors import made, padded

    from ultrarag.retrieve.engines import Schema, create

    backends = {}
    for label, name in chosen(options).items():
        shutil.rmtree(folder_of(options, label), ignore_errors=True)
        backends[label] = create(folder_of(options, label), Schema(colbert=DIM), name)
    spent, row, best = dict.fromkeys(backends, 0.0), 0, Best(queries(options)[: options.truth])
    for block in made([kept(options, name) for name in SETS], options.size, options.tokens):
        best.add(block)
        numbers = range(row, row + len(block))
        for label, backend in backends.items():
            begun = time.process_time()
            backend.upsert([f"p{n}" for n in numbers], padded(list(block)), [metadata(n) for n in numbers])
            backend.flush()
            spent[label] += time.process_time() - begun
        row += len(block)
    np.save(truth_path(options), np.argsort(-best.scores(), axis=1)[:, :K])
    return {label: finished(options, label, backend, spent[label]) for label, backend in backends.items()}


def finished(options: argparse.Namespace, label: str, backend: Any, spent: float) -> dict[str, Any]:
    """Optimise and close; what it took in all."""
    begun = time.process_time()
    backend.optimize()
    backend.close()
    optimized = time.process_time() - begun
    files = [path for path in folder_of(options, label).rglob("*") if path.is_file()]
    return {
        "built, passages/s": round(options.size / (spent + optimized)),
        "of it optimize, s": round(optimized),
        "MB on disk": round(sum(path.stat().st_size for path in files) / 1e6),
        "MB of codes": round(sum(path.stat().st_size for path in files if path.name.startswith("tokenv")) / 1e6),
        "MB of refinements": round(sum(path.stat().st_size for path in files if path.name.startswith("tokenr")) / 1e6),
        "peak memory of both builds, MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }


class Best:
    """The best passages of queries, found block by block."""

    def __init__(self, asked: list[np.ndarray]) -> None:
        self._ends, self._together = np.cumsum([len(query) for query in asked]), np.concatenate(asked)
        self._scores: list[np.ndarray] = []

    def add(self, block: np.ndarray) -> None:
        """Compare with passages, (passages, tokens, dim)."""
        best = np.stack([(passage @ self._together.T).max(0) for passage in block])
        parts = np.split(best, self._ends[:-1], axis=1)
        self._scores.append(np.stack([part.mean(1) for part in parts]))

    def scores(self) -> np.ndarray:
        """MaxSim of each query with each passage so far, (queries, passages)."""
        return np.concatenate(self._scores, 1)


def truth_path(options: argparse.Namespace) -> Path:
    """Where the best passages by float32 vectors are kept."""
    path: Path = options.folder / f"{options.size}-truth.npy"
    return path


def search(options: argparse.Namespace, label: str) -> dict[str, Any]:
    """Times, memory, and recall against all codes and all float32 vectors."""
    from ultrarag.retrieve.engines import open_backend

    asked = queries(options)
    before = resident()
    begun = time.process_time()
    backend = open_backend(folder_of(options, label), read_only=True)
    opened = time.process_time() - begun
    found: dict[str, Any] = {"open, s": round(opened, 1)}
    for name, filter in FILTERS.items():
        for query in asked[:10]:
            backend.search_tokens(query, K, filter)
        spent, hits = [], []
        for query in asked:
            begun = time.process_time()
            hits.append([id for id, _ in backend.search_tokens(query, K, filter)])
            spent.append(1000 * (time.process_time() - begun))
        rows = {"p50 ms": round(float(np.median(spent)), 1), "p99 ms": round(float(np.percentile(spent, 99)), 1)}
        exact = [
            [id for id, _ in backend.search_tokens(query, K, filter, exact=True)] for query in asked[: options.truth]
        ]
        rows["recall@10 of all that is stored"] = overlap(hits[: len(exact)], exact)
        if filter is None:
            found["MB of memory"] = round(resident() - before)
            best = np.load(truth_path(options))
            rows["recall@10 of float32"] = overlap(hits[: len(best)], [[f"p{row}" for row in line] for line in best])
        found[name] = rows
    backend.close()
    return found


def overlap(found: list[list[str]], wanted: list[list[str]]) -> float:
    """How much of what is wanted was found."""
    return round(float(np.mean([len({*a} & {*b}) / len(b) for a, b in zip(found, wanted, strict=True) if b])), 3)


def resident() -> float:
    """Memory of this process that no file backs, in MB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1e3


def render(report: dict[str, Any]) -> str:
    """The report as tables."""
    commands = "; ".join(f"`{command}`" for command in dict.fromkeys(report["commands"].values()))
    lines = [
        "# Late interaction as a first stage",
        "",
        f"{commands}, {report['date']}, {report['machine']}, load {report['load_average']}; times are of "
        "the processor. The model is made of a small one that was not trained for late interaction (late_vectors.py).",
        "",
    ]
    if report["quality"]:
        lines += ["| nDCG@10 | " + " | ".join(report["quality"]) + " |", "|---" * (len(report["quality"]) + 1) + "|"]
        measured = next(iter(report["quality"].values()))["engines"]
        for label in measured:
            cells = [data["engines"][label] for data in report["quality"].values()]
            lines.append(f"| {label} | " + " | ".join(map(cell, cells)) + " |")
        sizes = [
            f"{name}: {data['passages']:,} passages, {data['tokens']:,} tokens, {data['queries']} queries"
            for name, data in report["quality"].items()
        ]
        lines += [
            "",
            "; ".join(sizes) + ". In brackets: the standard error of the difference to float32, how many of float32's "
            "ten best are found, and a search.",
            "",
        ]
    if report["scale"]:
        lines += [
            f"{report['size']:,} made-up passages of {report['tokens']} tokens, {DIM} wide; float32 would be "
            f"{report['scale']['float32, MB']:,} MB.",
            "",
        ]
        labels = [label for label in ENGINES if label in report["scale"]]
        lines += ["| | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
        flat = {label: flattened(report["scale"][label]) for label in labels}
        lines += [
            f"| {key} | " + " | ".join(f"{flat[label][key]}" for label in labels) + " |" for key in flat[labels[0]]
        ]
    return "\n".join(lines) + "\n"


def cell(found: dict[str, Any]) -> str:
    """One figure of the table of quality."""
    if "mean ms" not in found:
        return f"{found['nDCG@10']:.4f}"
    more = f" (± {found['standard error']:.4f}, {found['found of float32']:.3f}, {found['mean ms']} ms)"
    return f"{found['nDCG@10']:.4f}{more}"


def flattened(found: dict[str, Any]) -> dict[str, Any]:
    """Figures by name, whatever they stand in."""
    rows: dict[str, Any] = {**found["build"]}
    for key, value in found["search"].items():
        rows |= {f"{key}: {name}": cell for name, cell in value.items()} if isinstance(value, dict) else {key: value}
    return rows


if __name__ == "__main__":
    main()
