"""Half precision on this processor: a query and a batch in float32, under autocast, and with the matrices cast once.

    python benchmarks/precision.py [--layers 12] [--width 768] [--rounds 5] [--precision bf16]

A BERT of random weights. Autocast casts every matrix anew in each forward, which a batch of many tokens hides and a
query does not; ultrarag keeps them cast beside the weights, for the same vectors to the bit. Where the processor has
no fast bf16, float32 is the one to use: the page shows that too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import in_turn, origin

from ultrarag.io.durable import write_json

PAGE = Path(__file__).parent / "results" / "precision.md"
#: Texts and tokens of each.
WORK = {"one query": (1, 16), "a batch": (16, 128)}


def main() -> None:
    """Measure in turn, print the page, and write it with its JSON."""
    options = parse()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        contenders = load(make_model(Path(folder), options), options.precision)
    report = {**origin(options.threads), "model": {"layers": options.layers, "width": options.width}}
    report |= {"precision": options.precision, "rounds": options.rounds}
    report["work"] = {name: measure(contenders, *size, options.rounds) for name, size in WORK.items()}
    page = render(report)
    print(page)
    options.output.write_text(page, encoding="utf-8")
    write_json(options.output.with_suffix(".json"), report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--output", type=Path, default=PAGE)
    return parser.parse_args()


def make_model(folder: Path, options: argparse.Namespace) -> Path:
    """A BERT of that size."""
    import torch
    from transformers import BertConfig, BertModel

    from ultrarag.io.terminal import quiet_progress
    from ultrarag.testing.tiny import tiny_tokenizer

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    size = {"hidden_size": options.width, "intermediate_size": 4 * options.width}
    config = BertConfig(
        vocab_size=len(tokenizer), num_hidden_layers=options.layers, num_attention_heads=options.width // 64, **size
    )
    with quiet_progress():
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path, precision: str) -> dict[str, Any]:
    """An encoder per contender."""
    from ultrarag import Encoder

    names = {"fp32": "fp32", f"{precision}, autocast alone": precision, f"{precision}, cast once": precision}
    encoders = {name: Encoder.load(folder, "bge", device="cpu", precision=kind) for name, kind in names.items()}
    encoders[f"{precision}, autocast alone"].casts.stop()
    return encoders


def measure(encoders: dict[str, Any], count: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """Median seconds of each; in every round another one begins."""
    texts = [" ".join(["vector"] * (length - 2))] * count
    names, seconds = list(encoders), {name: [] for name in encoders}
    vectors = {name: encoder.encode(texts, progress=False).dense for name, encoder in encoders.items()}  # warms up
    for number in range(rounds):
        for name in in_turn(names, number):
            started = time.perf_counter()
            encoders[name].encode(texts, progress=False)
            seconds[name].append(time.perf_counter() - started)
    first, alone, once = vectors.values()
    assert np.array_equal(alone, once), "casting once gave other vectors than autocast"
    return [
        {"name": name, "seconds": statistics.median(taken), "cosine": float((vectors[name] * first).sum(1).min())}
        for name, taken in seconds.items()
    ]


def render(report: dict[str, Any]) -> str:
    size = report["model"]
    lines = [
        "# Half precision on a CPU",
        "",
        f"A BERT of {size['layers']} layers, {size['width']} wide, random weights; {report['machine']}; medians of "
        f"{report['rounds']} rounds in turn. Written by `benchmarks/precision.py`.",
    ]
    for name, (texts, tokens) in WORK.items():
        lines += ["", f"## {name.capitalize()}: {texts} x {tokens} tokens", ""]
        lines += ["| | milliseconds | to autocast alone | cosine to fp32 |", "|---|---|---|---|"]
        alone = report["work"][name][1]["seconds"]
        lines += [
            f"| {row['name']} | {1000 * row['seconds']:.1f} | {row['seconds'] / alone:.2f}x | {row['cosine']:.6f} |"
            for row in report["work"][name]
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
