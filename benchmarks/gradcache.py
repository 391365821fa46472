"""GradCache: peak memory against the batch, and its time beside the plain step.

    python benchmarks/gradcache.py [--batches 64 512 4096] [--chunk 64] [--rounds 3]

Every batch is one training step (encode, in-batch loss, backward) of the small real model in a process of its own, so
that the peak is its own: first the smallest batch in one piece, then all of them in chunks of texts. Made-up
texts of 16 (query) and 32 (passage) tokens, one passage per query, fp32.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import processor_name
from steps import peak
from unified_step import resident

QUERY, PASSAGE = 16, 32
PAGE = Path(__file__).parent / "results" / "gradcache.md"


def main() -> None:
    """Run every batch, print the page, and write it with its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="of the smallest batch, for the times")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", help="folder or hub name (default: the small model of the tests)")
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(step(options)))
        return
    smallest = min(options.batches)
    # plain and in chunks in turn: twice over, in the chunks of a quarter, so that there is something to cut
    pairs = [(child(smallest, 0, options), child(smallest, smallest // 4, options)) for _ in range(options.rounds)]
    report: dict[str, Any] = {
        "machine": f"{processor_name()}, {os.cpu_count()} cores, {options.threads} threads",
        "chunk": options.chunk,
        "plain": pairs[0][0],
        "batches": [child(batch, options.chunk, options) for batch in sorted(options.batches)],
        "time of chunks to plain": {
            key: statistics.median(cut[key] / plain[key] for plain, cut in pairs) for key in ("wall", "processor")
        },
    }
    first, last = report["batches"][0], report["batches"][-1]
    report["memory of the largest to the smallest"] = last["peak_mib"] / first["peak_mib"]
    page = render(report)
    print(page)
    options.output.write_text(page, encoding="utf-8")
    options.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def child(batch: int, chunk: int, options: argparse.Namespace) -> dict[str, Any]:
    """One step in a process of its own; chunk 0: in one piece."""
    words = [sys.executable, __file__, "--child", str(batch), "--chunk", str(chunk)]
    words += ["--threads", str(options.threads), *(["--model", options.model] if options.model else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"batch {batch} chunk {chunk}: {found}", file=sys.stderr, flush=True)
    return found


def step(options: argparse.Namespace) -> dict[str, Any]:
    """Load, warm up with a small batch, take the step, and say what it took."""
    import torch
    from encode import small_model

    from ultrarag import Encoder
    from ultrarag.finetune.step.gradcache import by_texts, cached_step
    from ultrarag.finetune.step.trainable import Trainable
    from ultrarag.loss_arguments import LossArguments

    torch.manual_seed(0)
    encoder = Encoder.load(options.model or small_model(), adapter="bge", device="cpu")
    module, arguments = Trainable(encoder, ("dense",)).train(), LossArguments(temperature=0.05, group_size=1)

    def loss(sides: Any) -> Any:
        return encoder.adapter.loss(encoder.model, *sides, None, 0, arguments)

    def run(batch: int, chunk: int) -> None:
        sides = [made_up(batch, length, len(encoder.tokenizer)) for length in (QUERY, PASSAGE)]
        if chunk:
            cached_step(sides, module, loss, lambda value: value.backward(), by_texts(chunk), contextlib.nullcontext)
        else:
            loss(module(sides)).backward()

    run(8, options.chunk and 4)
    before = resident()
    wall, spent = time.perf_counter(), time.process_time()
    run(options.child, options.chunk)
    seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - spent}
    return {"batch": options.child, "chunk": options.chunk, **seconds, "before_mib": before, "peak_mib": peak()}


def made_up(count: int, length: int, vocabulary: int) -> Any:
    """Token ids at random, without padding."""
    import torch

    ids = torch.randint(1000, vocabulary, (count, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def render(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    ratio = report["time of chunks to plain"]
    lines = [
        "# GradCache",
        "",
        f"One step, {report['machine']}; written by `benchmarks/gradcache.py`. The largest batch takes "
        f"{report['memory of the largest to the smallest']:.2f} times the memory of the smallest, both in chunks of "
        f"{report['chunk']} texts. A batch in four chunks takes {ratio['wall']:.2f} times the wall time and "
        f"{ratio['processor']:.2f} times the processor time of the same batch in one piece.",
        "",
        "| batch | chunk | peak MiB | of it before the step | wall s | processor s |",
        "|---|---|---|---|---|---|",
    ]
    for row in [report["plain"], *report["batches"]]:
        chunk = row["chunk"] or "one piece"
        lines.append(
            f"| {row['batch']} | {chunk} | {row['peak_mib']:.0f} | {row['before_mib']:.0f} | {row['wall']:.1f} "
            f"| {row['processor']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
