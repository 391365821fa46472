"""GradCache here beside sentence-transformers' cached loss: one step over the same rows, its time and its peak memory.

    python benchmarks/gradcache_peer.py --data path/to/medquad [--batch 1024] [--rounds 3] [--threads 1]

The same rows, model, loss (in-batch negatives, temperature 0.05, dropout on), and texts of at most 128 tokens, of
different lengths. Every step is one of a process of its own, warmed up by a small one, so that the peak is its own.
Mini-batches of both are by texts (32, sentence-transformers' default) and by tokens; float32, and bfloat16 by autocast,
which is ours by default on CPUs that have it. Tokenizing counts in both; the optimizer is the same and is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from encode import small_model
from machine import in_turn, origin
from steps import peak
from unified_step import resident

TOKENS, TEMPERATURE, TEXTS = 128, 0.05, 32
#: mini-batches by tokens: as many as 32 texts of 128 tokens
BUDGET = 4096
RESULT = Path(__file__).parent / "results" / "gradcache_peer.json"
#: name -> (whose, mini-batch by, half precision)
CONTENDERS = {
    "ultrarag": ("ours", "tokens", False),
    "ultrarag, 32 texts": ("ours", "texts", False),
    "ultrarag, bf16": ("ours", "tokens", True),
    "sentence-transformers": ("peer", "texts", False),
    "sentence-transformers, tokens": ("peer", "tokens", False),
    "sentence-transformers, tokens, bf16": ("peer", "tokens", True),
}

Step = Callable[[list[dict[str, Any]]], float]


def main(arguments: list[str] | None = None) -> int:
    """Run every contender in turn, print the result and write it."""
    asked = parse(arguments)
    if asked.child:
        print(json.dumps(one_step(asked)))
        return 0
    report: dict[str, Any] = origin(asked.threads, ("torch", "transformers", "sentence-transformers"))
    report |= {"data": asked.data.name, "batch": asked.batch, "rounds": asked.rounds}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in asked.contenders}
    for number in range(asked.rounds):
        for name in in_turn(asked.contenders, number):
            found[name].append(child(name, asked))
    report["contenders"] = {
        name: {key: round(median(row[key] for row in rows), 3) for key in rows[0]} for name, rows in found.items()
    }
    report["ours to the peer's"] = ratios(report["contenders"])
    report["load_average_after"] = round(os.getloadavg()[0], 1)
    print(json.dumps(report, indent=1))
    asked.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train.jsonl")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def child(name: str, asked: argparse.Namespace) -> dict[str, float]:
    """One step of a contender in a process of its own."""
    words = [sys.executable, __file__, "--child", name, "--data", str(asked.data), "--batch", str(asked.batch)]
    words += ["--threads", str(asked.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(asked.threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {found}", file=sys.stderr, flush=True)
    return found


def one_step(asked: argparse.Namespace) -> dict[str, float]:
    """Load, warm up, take the step, and say what it took."""
    import torch

    torch.manual_seed(0)
    whose, by, half = CONTENDERS[asked.child]
    lines = (asked.data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[: asked.batch]]
    if len(rows) < asked.batch:
        raise SystemExit(f"{asked.data / 'train.jsonl'} has {len(rows)} rows, and the batch is {asked.batch}")
    step = (ours if whose == "ours" else peer)(by == "tokens", half)
    step(rows[:8])
    before = resident()
    wall, spent = time.perf_counter(), time.process_time()
    loss = step(rows)
    seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - spent}
    return {**seconds, "loss": loss, "before MiB": before, "peak MiB": peak(), "step MiB": peak() - before}


def ours(tokens: bool, half: bool) -> Step:
    """A step of ultrarag."""
    import torch

    from ultrarag import Encoder
    from ultrarag.finetune.step import Trainable, by_texts, by_tokens, cached_step
    from ultrarag.loss_arguments import LossArguments

    encoder = Encoder.load(small_model(), adapter="bge", device="cpu")
    module, arguments = Trainable(encoder, ("dense",)).train(), LossArguments(temperature=TEMPERATURE, group_size=1)
    cut = by_tokens(BUDGET) if tokens else by_texts(TEXTS)

    def encode(sides: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return module(sides)

    def loss(sides: Any) -> Any:
        return encoder.adapter.loss(encoder.model, *sides, None, 0, arguments)

    def step(rows: list[dict[str, Any]]) -> float:
        texts = [("query", [row["query"] for row in rows]), ("passage", [row["pos"][0] for row in rows])]
        sides = [encoder.features(encoder.tokenize(part, kind, TOKENS)) for kind, part in texts]
        value = cached_step(sides, encode, loss, lambda scalar: scalar.backward(), cut, contextlib.nullcontext)
        module.zero_grad()
        return float(value)

    return step


def peer(tokens: bool, half: bool) -> Step:
    """A step of sentence-transformers."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    model = SentenceTransformer(small_model(), device="cpu").train()
    model.max_seq_length = TOKENS
    budget = BUDGET if tokens else None
    criterion = CachedMultipleNegativesRankingLoss(
        model, scale=1 / TEMPERATURE, mini_batch_size=TEXTS, mini_batch_num_tokens=budget
    )

    def step(rows: list[dict[str, Any]]) -> float:
        queries = model.preprocess([row["query"] for row in rows])
        passages = model.preprocess([row["pos"][0] for row in rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = criterion([queries, passages], None)
        value.backward()
        model.zero_grad()
        return float(value)

    return step


def ratios(contenders: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Ours to sentence-transformers' faster one of the same precision, and what each does by default."""
    pairs = {
        "float32, tokens": ("ultrarag", "sentence-transformers, tokens"),
        "float32, 32 texts": ("ultrarag, 32 texts", "sentence-transformers"),
        "bf16, tokens": ("ultrarag, bf16", "sentence-transformers, tokens, bf16"),
        "by default": ("ultrarag, bf16", "sentence-transformers"),
    }
    return {
        name: {
            key: round(contenders[mine][key] / contenders[theirs][key], 3) for key in ("wall", "processor", "step MiB")
        }
        for name, (mine, theirs) in pairs.items()
        if mine in contenders and theirs in contenders
    }


if __name__ == "__main__":
    sys.exit(main())
