"""Engines on this CPU: a batch, a query and a cross-encoder, by torch and by OpenVINO, beside sentence-transformers.

    python benchmarks/engines.py --model sentence-transformers/all-MiniLM-L6-v2 [--data path/to/scifact] [--threads 1]

All contenders run in one process, in an order that rotates; reported are the best of the rounds for a batch, which
other work on the machine disturbs least, and the median of a query.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encode import mixed_lengths, read_corpus, small_model
from machine import in_turn, origin

from ultrarag.encoder.load import fastest_precision
from ultrarag.io.durable import write_json

PAGE = Path(__file__).parent / "results" / "engines.md"
QUERY = "what is the effect of vitamin d on bone loss"
PEER, PACKAGES = "sentence-transformers", ("torch", "transformers", "sentence-transformers", "openvino")
#: what ours is called, and how it is loaded
OURS = {"torch, fp32": {"engine": "torch"}, "openvino, fp32": {"engine": "openvino"}}
if fastest_precision(torch.device("cpu")) == "bf16":  # elsewhere it runs at a tenth of fp32's speed
    OURS["torch, bf16"] = {"engine": "torch", "precision": "bf16"}
Contenders = dict[str, Callable[[], Any]]


def main() -> None:
    options = parse()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)
    path = options.model or small_model()
    texts = mixed_lengths(read_corpus(options.data), options.texts)
    encoding, querying = embedders(path, texts)
    with tempfile.TemporaryDirectory() as folder:
        scoring = rerankers(path, Path(folder))
        work = {
            f"{len(texts)} texts of mixed length, seconds": in_rounds(encoding, options.rounds),
            "one query of 12 tokens, p50 in seconds": medians(querying, options.queries),
            "100 pairs of 256 tokens, cross-encoder, seconds": in_rounds(scoring, options.rounds),
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    report = {**origin(options.threads, PACKAGES), "work": work, "peak of the process, GiB": round(peak, 2)}
    page = render(report)
    print(page)
    options.output.write_text(page, encoding="utf-8")
    write_json(options.output.with_suffix(".json"), report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name (default: the small model of the tests)")
    parser.add_argument("--data", type=Path, help="BEIR folder, or its corpus.jsonl (default: made-up texts)")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=PAGE)
    return parser.parse_args()


def embedders(path: str, texts: list[str]) -> tuple[Contenders, Contenders]:
    """By name: all texts, and one query, each as unit vectors."""
    from sentence_transformers import SentenceTransformer

    from ultrarag import Encoder

    ours = {name: Encoder.load(path, "bge", device="cpu", **how) for name, how in OURS.items()}
    peer = SentenceTransformer(path, device="cpu")
    peer.max_seq_length = ours["torch, fp32"].max_length("passage")

    def theirs(given: Any) -> Any:
        return peer.encode(given, normalize_embeddings=True, show_progress_bar=False)

    encoding: Contenders = {PEER: lambda: theirs(texts)}
    querying: Contenders = {PEER: lambda: theirs(QUERY)}
    for name, encoder in ours.items():
        encoding[name] = lambda encoder=encoder: encoder.encode(texts, progress=False).dense
        querying[name] = lambda encoder=encoder: encoder.encode(QUERY, "query").dense[0]
    return encoding, querying


def rerankers(path: str, folder: Path) -> Contenders:
    """By name: the scores of 100 pairs, of a classifier whose head is random."""
    from sentence_transformers import CrossEncoder
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from ultrarag import Encoder

    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    pairs = [(QUERY, " ".join(["bone", "loss", "study", f"number {number}"] * 100)) for number in range(100)]
    peer = CrossEncoder(str(folder), device="cpu", max_length=256, activation_fn=torch.nn.Identity())
    found: Contenders = {PEER: lambda: peer.predict(pairs, show_progress_bar=False)}
    for name, how in OURS.items():
        encoder = Encoder.load(folder, "bge-reranker", device="cpu", passage_max_length=256, **how)
        found[name] = lambda encoder=encoder: encoder.score(pairs, progress=False)
    return found


def in_rounds(contenders: Contenders, rounds: int) -> dict[str, dict[str, float]]:
    """The best seconds of each, and how far its results are from the peer's."""
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    results: dict[str, np.ndarray] = {}
    for number in range(rounds):
        for name in in_turn(list(contenders), number):
            started = time.perf_counter()
            results[name] = np.asarray(contenders[name]())
            spent[name].append(time.perf_counter() - started)
    return rows({name: min(seconds) for name, seconds in spent.items()}, results)


def medians(contenders: Contenders, count: int) -> dict[str, dict[str, float]]:
    """The median seconds of each, called in turn."""
    results = {name: np.asarray(run()) for name, run in contenders.items()}
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(count):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            spent[name].append(time.perf_counter() - started)
    return rows({name: statistics.median(seconds) for name, seconds in spent.items()}, results)


def rows(seconds: dict[str, float], results: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "seconds": value,
            "to sentence-transformers": seconds[PEER] / value,
            "to torch, fp32": seconds["torch, fp32"] / value,
            **_apart(results[name], results[PEER]),
        }
        for name, value in seconds.items()
    }


def _apart(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """The least cosine of vectors; of scores the largest difference."""
    if expected.ndim == 1 and len(expected) == 100:
        return {"largest difference": float(np.abs(found - expected).max())}
    return {"least cosine": float((found * expected).sum(-1).min())}


def render(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "# Engines",
        "",
        f"{report['machine']}, {report['date']}, {versions}; load average {report['load_average']}. Peak memory of the "
        f"process, which holds all contenders: {report['peak of the process, GiB']} GiB.",
    ]
    for what, found in report["work"].items():
        lines += ["", f"## {what}", "", "| | seconds | to sentence-transformers | to torch, fp32 | apart |"]
        lines += ["|---|---|---|---|---|"]
        for name, row in found.items():
            apart = next(f"{key} {row[key]:.6f}" for key in ("least cosine", "largest difference") if key in row)
            ratios = f"{row['to sentence-transformers']:.2f}x | {row['to torch, fp32']:.2f}x"
            lines.append(f"| {name} | {row['seconds']:.4f} | {ratios} | {apart} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
