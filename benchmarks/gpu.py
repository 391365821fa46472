"""bge-m3's size on a GPU, beside FlagEmbedding and sentence-transformers: tokens per second, MFU and peak memory.

    python benchmarks/gpu.py --peer-python PEER [--rounds 3]
    python benchmarks/gpu.py --tiny --device cpu

XLM-R of 24 layers, 1024 wide, vocabulary 250002, random weights, bf16; lengths are log-normal with mean 180, cut at 512
(queries of a training step: mean 20, cut at 64). Measured are `encode` (dense vectors) on mixed lengths and on texts of
512 tokens, and training steps (forward, loss, backward, AdamW): unified ones beside FlagEmbedding, dense ones beside
both. Each contender is a process of its own in each round, in an order that rotates, on the same texts and token ids.
PEER is a Python with FlagEmbedding (benchmarks/peer/README.md); what is not installed is skipped and named. A
contender that runs out of memory is named too. The second command tries everything out, on small sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_contenders import PACKAGES
from gpu_page import render, summarise
from gpu_work import FULL, TINY, make_model, make_plan
from machine import in_turn, origin

HERE = Path(__file__).parent
PAGE = HERE / "results" / "gpu.md"
LIBRARIES = tuple(PACKAGES)


def main(arguments: list[str] | None = None) -> int:
    """Measure round by round; print the page, and write it with its JSON after every round."""
    options = parse(arguments)
    if options.device.startswith("cuda") and not has_gpu():
        print("gpu.py: torch sees no GPU here; to try it out: --tiny --device cpu", file=sys.stderr)
        return 1
    sizes = TINY if options.tiny else FULL
    pythons, skipped = available(options)
    report: dict[str, Any] = {**origin(), **options_of(options), "sizes": sizes, "skipped": skipped, "contenders": {}}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(folder / "model", sizes)
        plan = make_plan(folder / "model", sizes, options)
        (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        runs: list[dict[str, Any]] = []
        for number in range(options.rounds):
            turned = in_turn(list(pythons), number)
            runs.append({name: contend(name, pythons[name], folder / "plan.json", report) for name in turned})
            summarise(report, plan, runs, options.peak_tflops)
            write(report, options)
    print(render(report))
    return 1 if any("failed" in row["contenders"].get("ultrarag", {}) for row in report["tasks"]) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python with FlagEmbedding 1.4.2")
    parser.add_argument("--st-python", default=sys.executable, help="a Python with sentence-transformers (this one)")
    parser.add_argument("--contenders", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=16384, help="of mixed lengths, to encode")
    parser.add_argument("--full-texts", type=int, default=4096, help="of full length, to encode")
    parser.add_argument("--batch-tokens", type=int, help="of ours when encoding (default: the encoder's own)")
    parser.add_argument("--encode-batch", type=int, default=256, help="texts per forward of the peers when encoding")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64], help="queries of a training step")
    parser.add_argument("--group", type=int, default=2, help="passages per query of a training step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--peak-tflops", type=float, help="what the GPU can do in this precision (known for common ones)"
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes and one round; written only with --output")
    parser.add_argument("--output", type=Path, help=f"default: {PAGE.relative_to(HERE.parent)}")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.rounds, options.texts, options.full_texts, options.batches, options.steps = 1, 24, 8, [4], 2
    elif options.output is None:
        options.output = PAGE
    return options


def options_of(options: argparse.Namespace) -> dict[str, Any]:
    """What of the command line belongs into the report."""
    return {name: getattr(options, name) for name in ("precision", "rounds", "encode_batch", "group", "steps", "tiny")}


def has_gpu() -> bool:
    """Whether torch sees one (without taking any of its memory)."""
    import torch

    return torch.cuda.is_available()


def available(options: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """The Python of each contender that can run, and why the others cannot."""
    places = {
        "ultrarag": sys.executable,
        "FlagEmbedding": options.peer_python,
        "sentence-transformers": options.st_python,
    }
    pythons, skipped = {}, {}
    for name in options.contenders:
        python = places[name]
        if python is None:
            skipped[name] = "no --peer-python was given"
        elif not installed(python, PACKAGES[name]):
            skipped[name] = f"{python} has no {PACKAGES[name]}"
        else:
            pythons[name] = python
    if not pythons:
        sys.exit("gpu.py: nothing can run: " + "; ".join(f"{name}: {why}" for name, why in skipped.items()))
    return pythons, skipped


def installed(python: str, package: str) -> bool:
    """Whether that Python finds the package (it is not imported: that takes long)."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    try:
        return subprocess.run([python, "-c", code], check=False).returncode == 0
    except OSError:
        return False


def contend(name: str, python: str, plan: Path, report: dict[str, Any]) -> dict[str, Any]:
    """One contender's answers to all its tasks, by task; what it runs on goes into the report."""
    words = [python, str(HERE / "gpu_contenders.py"), name, str(plan)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}
    found: dict[str, Any] = {}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        for line in process.stdout:
            if not line.startswith("=> "):
                continue
            answer = json.loads(line[3:])
            if "task" in answer:
                found[answer.pop("task")] = answer
                shown = {key: value for key, value in answer.items() if key != "vectors"}
                print(f"{name}: {list(found)[-1]}: {shown}", file=sys.stderr, flush=True)
            else:
                report["contenders"][name] = answer
    if process.returncode:
        found["ended"] = {"failed": f"its process ended with {process.returncode}"}
    return found


def write(report: dict[str, Any], options: argparse.Namespace) -> None:
    """The page and its JSON, where they are wanted."""
    if options.output is None:
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(render(report), encoding="utf-8")
    options.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
