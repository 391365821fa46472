"""Matrix products in float32 by torch's own library and by oneDNN, for a forward and a backward, and what oneDNN keeps.

    python benchmarks/products.py [--rows 4096 512] [--rounds 7] [--threads 1]

The shapes of linear layers of MiniLM and of bge-m3, GFLOP/s by the best of the rounds, in turn. `kept` is what the
process holds more after products of 400 numbers of rows, as they are and rounded as ultrarag rounds them.
Results: results/products.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import in_turn, origin
from steps import resident

from ultrarag.io.durable import write_json

RESULT = Path(__file__).parent / "results" / "products.json"
#: (in, out) features
LAYERS = ((384, 384), (384, 1536), (1536, 384), (1024, 1024), (1024, 4096), (4096, 1024))
#: how the numbers of rows are given to oneDNN
KEPT = ("torch", "oneDNN, as they are", "oneDNN, rounded")


def main() -> None:
    """Measure, write the result and print it."""
    options = parse()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)
    if options.kept:
        print(json.dumps(kept(options.kept)))
        return
    report: dict[str, Any] = {**origin(options.threads, ("torch",)), "rounds": options.rounds}
    report["GFLOP/s"] = [
        {"rows": rows, "in": before, "out": after, **rates(rows, before, after, options.rounds)}
        for rows in options.rows
        for before, after in LAYERS
    ]
    report["kept, MiB"] = {name: child(name) for name in KEPT}
    write_json(options.output, report)
    print(json.dumps(report, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[12, 64, 512, 4096])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--kept", choices=KEPT, help=argparse.SUPPRESS)
    return parser.parse_args()


def rates(rows: int, before: int, after: int, rounds: int) -> dict[str, Any]:
    """GFLOP/s of the three products of a layer by both, and how many times torch's oneDNN has."""
    import torch

    from ultrarag.products import _multiply

    hidden, gradient = torch.randn(rows, before), torch.randn(rows, after)
    weight, bias = torch.randn(after, before), torch.randn(after)
    products: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "forward": (
            lambda: torch.nn.functional.linear(hidden, weight, bias),
            lambda: _multiply(hidden, weight, bias),
        ),
        "gradient of the rows": (lambda: gradient @ weight, lambda: _multiply(gradient, weight.t(), None)),
        "gradient of the weight": (
            lambda: gradient.t() @ hidden,
            lambda: _multiply(gradient.t(), hidden.t(), None),
        ),
    }
    operations = 2 * rows * before * after
    found: dict[str, Any] = {}
    with torch.no_grad():
        for name, pair in products.items():
            best = fastest({"torch": pair[0], "oneDNN": pair[1]}, rounds)
            found[name] = {who: round(operations / seconds / 1e9, 1) for who, seconds in best.items()}
            found[name]["oneDNN to torch"] = round(best["torch"] / best["oneDNN"], 2)
    return found


def fastest(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each, the best of the rounds after one that warms up."""
    best = dict.fromkeys(contenders, float("inf"))
    for number in range(rounds + 1):
        for name in in_turn(list(contenders), number):
            began = time.perf_counter()
            contenders[name]()
            if number:
                best[name] = min(best[name], time.perf_counter() - began)
    return best


def child(name: str) -> float:
    """What a process of its own keeps."""
    done = subprocess.run([sys.executable, __file__, "--kept", name], capture_output=True, text=True, check=True)
    found: float = json.loads(done.stdout)
    return found


def kept(name: str) -> float:
    """MiB that the process holds more after the products of 400 numbers of rows, drawn up to 2,048, of three layers."""
    import torch

    from ultrarag.products import _multiply, rounded

    draw = random.Random(0)
    layers = [torch.randn(after, before) for before, after in LAYERS[:3]]
    numbers = [draw.randint(1, 2048) for _ in range(400)]
    before = resident()["RssAnon"]
    with torch.no_grad():
        for number in numbers:
            rows = rounded(number) if name.endswith("rounded") else number
            for weight in layers:
                hidden = torch.ones(rows, weight.shape[1])
                if name == "torch":
                    torch.nn.functional.linear(hidden, weight)
                else:
                    _multiply(hidden, weight, None)
    return round((resident()["RssAnon"] - before) / 2**20, 1)


if __name__ == "__main__":
    main()
