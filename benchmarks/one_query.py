"""One query: from text to vector, and a search end to end, beside the code of an older commit.

    python benchmarks/one_query.py [--old dee4ec6] [--int8 CHECKPOINT] [--rounds 9] [--queries 60]

Each contender is a process of its own, with one thread, that has an index of the same made-up passages: they answer in
turn, a block of queries each, and another one begins every round. Reported are medians over all blocks, of the
processor's time (the threads that help included) and of the clock. `--int8` is the same model, quantised by
`ultrarag checkpoint quantise`. Results: results/one_query.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from live_index_contenders import texts
from live_index_searching import small_model
from machine import in_turn, origin
from older import COMMIT, older_code

HERE = Path(__file__).parent
RESULT = HERE / "results" / "one_query.json"
#: Of 12 tokens.
QUERY = "what is the effect of vitamin d on bone loss"
OLD, FLOAT, INT8 = "old", "new, openvino, float32", "new, openvino, int8"
#: contender -> engine, precision
ENGINES = {OLD: ("torch", "fp32"), "new, torch, float32": ("torch", "fp32"), FLOAT: ("openvino", "fp32")}
SEARCH: dict[str, Any] = {"k": 10, "weights": {"dense": 1.0, "bm25": 1.0}}
#: Queries before a block counts: the others' weights are in the caches.
WARM = 5


def serve(folder: Path, model: str, precision: str, passages: int) -> None:
    """In the process of one contender: answer each line of stdin, a number of queries, by a line of stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints is no answer

    from ultrarag import Encoder
    from ultrarag.retrieve import LiveIndex

    encoder = Encoder.load(model, "bge", device="cpu", precision=precision)
    with LiveIndex.create(folder / "index", encoder) as live:
        live.add({"id": f"p{row}", "text": text} for row, text in enumerate(texts(passages, 30, 0)))
        work: dict[str, Callable[[], Any]] = {
            "encode": lambda: encoder.encode(QUERY, "query"),
            "search": lambda: live.search(QUERY, **SEARCH),
        }
        vector = encoder.encode(QUERY, "query").dense[0].tolist()
        print(json.dumps({"vector": vector}), file=answers, flush=True)
        for line in sys.stdin:
            found = {name: block(run, int(line)) for name, run in work.items()}
            print(json.dumps(found), file=answers, flush=True)


def block(run: Callable[[], Any], count: int) -> list[tuple[float, float]]:
    """Seconds of the processor and of the clock, of each call."""
    for _ in range(WARM):
        run()
    spent = []
    for _ in range(count):
        began, started = time.process_time(), time.perf_counter()
        run()
        spent.append((time.process_time() - began, time.perf_counter() - started))
    return spent


class Contender:
    """A process that answers."""

    def __init__(self, tree: Path, folder: Path, model: str, engine: str, precision: str, passages: int) -> None:
        folder.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "ULTRARAG_ENGINE": engine}
        words = [str(Path(__file__).resolve()), "--serve", str(folder), "--model", model, "--precision", precision]
        self.process = subprocess.Popen(
            [sys.executable, *words, "--passages", str(passages)],
            env=environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.vector: list[float] = self.answer()["vector"]
        self.spent: dict[str, list[tuple[float, float]]] = {}

    def answer(self) -> dict[str, Any]:
        """The next line."""
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"a contender's process ended ({self.process.wait()})")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, count: int) -> None:
        """Have a block measured."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        for name, spent in self.answer().items():
            self.spent.setdefault(name, []).extend(map(tuple, spent))

    def stop(self) -> None:
        """Close its index."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def run(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """All contenders' medians, and their ratios to the old code's."""
    model, old = options.model or small_model(), older_code(place / "code", options.old)
    engines = {**ENGINES, **({INT8: ("torch", "int8")} if options.int8 else {})}
    contenders = {
        name: Contender(
            old if name == OLD else HERE.parent,
            place / str(number),
            options.int8 if precision == "int8" else model,
            engine,
            precision,
            options.passages,
        )
        for number, (name, (engine, precision)) in enumerate(engines.items())
    }
    for number in range(options.rounds):
        for name in in_turn(list(contenders), number):
            contenders[name].ask(options.queries)
    for contender in contenders.values():
        contender.stop()
    expected = np.array(contenders[OLD].vector)
    return {
        name: {
            "cosine with old": float(np.array(contender.vector) @ expected),
            **{what: medians(spent, contenders[OLD].spent[what]) for what, spent in contender.spent.items()},
        }
        for name, contender in contenders.items()
    }


def medians(spent: list[tuple[float, float]], old: list[tuple[float, float]]) -> dict[str, float]:
    """Milliseconds of the processor and of the clock, and their ratios to the old code's."""
    processor, clock = (statistics.median(column) for column in zip(*spent, strict=True))
    before = [statistics.median(column) for column in zip(*old, strict=True)]
    return {
        "processor_ms": 1000 * processor,
        "clock_ms": 1000 * clock,
        "processor to old": processor / before[0],
        "clock to old": clock / before[1],
    }


def main() -> None:
    """Measure, write the result and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", default=COMMIT, help="the commit to compare with (default: %(default)s)")
    parser.add_argument("--int8", help="a quantised checkpoint of the model")
    parser.add_argument("--model", help="folder or hub name (default: the small model of the tests)")
    parser.add_argument("--passages", type=int, default=1000, help="in the index")
    parser.add_argument("--queries", type=int, default=60, help="of a block")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--note", help="what a reader of the result should know, such as what else ran")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.model, options.precision, options.passages)
        return
    with tempfile.TemporaryDirectory() as place:
        found = run(options, Path(place))
    noted = {"note": options.note} if options.note else {}
    report = {**origin(1, ("torch", "transformers", "openvino")), **noted, "old": options.old, "contenders": found}
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
