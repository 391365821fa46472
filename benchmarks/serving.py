"""Many clients of one index: searches a second, and how long one takes, idle and while passages are added; old and new.

    python benchmarks/serving.py [--old dee4ec6] [--clients 1 16 64] [--adds 60] [--seconds 10] [--rounds 3] [--small]
                                 [--int8 CHECKPOINT]

The code of an older commit (--old) is unpacked with `git archive` and run by a process of its own, beside this one: in
each round both are measured in turn, and another one begins. Each has an index of the same made-up texts under the
small real model, and threads that ask one query after the other without a pause (dense and BM25); `new, engine auto` is
the new code with what its race on this CPU chooses (torch or OpenVINO), `new, int8` with the same model, quantised by
`ultrarag checkpoint quantise` (--int8). The start is that of
`ultrarag index search` with one query, from the shell to its end. Ratios are of the medians of the rounds. Results:
results/serving.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from live_index_contenders import texts
from live_index_searching import small_model
from machine import in_turn, origin
from older import COMMIT, older_code
from steps import peak

HERE = Path(__file__).parent
RESULT = HERE / "results" / "serving.json"
AUTO, INT8 = "new, engine auto", "new, int8"
SEARCH: dict[str, Any] = {"k": 10, "weights": {"dense": 1.0, "bm25": 1.0}}
#: Words of a query and of a passage: about 25 and 256 tokens.
QUERY_WORDS, PASSAGE_WORDS = 15, 180


class Client(threading.Thread):
    """Asks one query after the other, until it is stopped."""

    def __init__(self, live: Any, queries: list[str]) -> None:
        super().__init__(daemon=True)
        self.live, self.queries = live, queries
        #: when each search began, and how long it took
        self.seen: list[tuple[float, float]] = []
        self.failed: list[str] = []
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            began = time.perf_counter()
            try:
                self.live.search(self.queries[len(self.seen) % len(self.queries)], **SEARCH)
            except Exception as error:
                self.failed.append(repr(error))
            self.seen.append((began, time.perf_counter() - began))


@contextmanager
def clients(live: Any, number: int) -> Iterator[list[Client]]:
    """So many threads that search, and have warmed up when the block begins."""
    threads = [Client(live, texts(50, QUERY_WORDS, seed)) for seed in range(number)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(1)
        yield threads
    finally:
        for thread in threads:
            thread.over.set()
        for thread in threads:
            thread.join()


def between(threads: list[Client], start: float, end: float) -> dict[str, float]:
    """How the searches fared that were under way within a span; in milliseconds."""
    if failed := [error for thread in threads for error in thread.failed]:
        raise SystemExit(f"{len(failed)} searches failed: {failed[0]}")
    seen = [(began, took) for thread in threads for began, took in list(thread.seen)]
    ended = [1000 * took for began, took in seen if start <= began + took <= end]
    if not ended:
        raise SystemExit(f"no search ended within {end - start:.1f} s: measure for longer (--seconds)")
    return {
        "searches_per_second": len(ended) / (end - start),
        "p50_ms": float(np.percentile(ended, 50)),
        "p99_ms": float(np.percentile(ended, 99)),
    }


def measure(live: Any, number: int, seconds: float, adds: list[str]) -> dict[str, float]:
    """So many clients for some seconds alone, then while passages are added (and deleted again afterwards)."""
    rows = [{"id": f"new{row}", "text": text} for row, text in enumerate(adds)]
    with clients(live, number) as threads:
        start = time.perf_counter()
        time.sleep(seconds)
        middle = time.perf_counter()
        live.add(rows)
        end = time.perf_counter()
        time.sleep(0.5)  # what began beside it has ended
    live.delete([row["id"] for row in rows])
    idle, beside = between(threads, start, middle), between(threads, middle, end + 0.5)
    return {**idle, **{f"adding_{name}": value for name, value in beside.items()}, "add_seconds": end - middle}


def serve(folder: Path, model: str, passages: int, precision: str) -> None:
    """In the process of one contender: answer each line of stdin, a measurement that is asked for, by one of stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints is no answer

    from ultrarag import Encoder
    from ultrarag.retrieve import LiveIndex

    how: dict[str, Any] = {"passage_max_length": 256} if precision == "fp32" else {"precision": precision}
    encoder = Encoder.load(model, "bge", device="cpu", **how)
    with LiveIndex.create(folder / "index", encoder) as live:
        live.add({"id": f"p{row}", "text": text} for row, text in enumerate(texts(passages, 30, 0)))
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            found = measure(live, asked["clients"], asked["seconds"], texts(asked["adds"], PASSAGE_WORDS, 7))
            print(json.dumps({**found, "peak_mib": peak()}), file=answers, flush=True)


class Contender:
    """The code of one tree, in a process of its own."""

    def __init__(self, name: str, tree: Path, folder: Path, engine: str, options: argparse.Namespace) -> None:
        self.name, self.folder = name, folder
        folder.mkdir()
        self.environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(options.threads)}
        self.environment["ULTRARAG_ENGINE"] = engine
        words = [str(Path(__file__).resolve()), "--serve", str(folder), "--passages", str(options.passages)]
        int8 = name == INT8
        words += ["--model", options.int8 if int8 else options.model or small_model()]
        words += ["--precision", "int8" if int8 else "fp32"]
        self.process = subprocess.Popen(
            [sys.executable, *words],
            env=self.environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line."""
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"the process of '{self.name}' ended ({self.process.wait()})")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, **question: Any) -> dict[str, Any]:
        """Have something measured."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        """Close its index."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        if self.process.wait():
            raise SystemExit(f"the process of '{self.name}' failed at its end")

    def start_seconds(self) -> float:
        """One search from the shell, in seconds; its index is closed."""
        words = [sys.executable, "-m", "ultrarag", "index", "search", str(self.folder / "index"), "a query", "--k", "3"]
        words += ["--weights", "dense=1"]
        began = time.perf_counter()
        subprocess.run(words, env=self.environment, cwd=self.folder, check=True, capture_output=True)
        return time.perf_counter() - began


def run(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """All rounds."""
    old, new = older_code(place / "code", options.old), HERE.parent
    trees = {"old": (old, "torch"), "new": (new, "torch"), AUTO: (new, "auto")}
    trees |= {INT8: (new, "torch")} if options.int8 else {}
    contenders = {name: Contender(name, tree, place / name, engine, options) for name, (tree, engine) in trees.items()}
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds):
        rounds.append({str(count): {} for count in options.clients})
        for count in options.clients:
            for name in in_turn(list(contenders), number):
                asked = {"clients": count, "seconds": options.seconds, "adds": options.adds}
                rounds[-1][str(count)][name] = contenders[name].ask(**asked)
    for contender in contenders.values():
        contender.stop()
    starts: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(options.starts + 1):  # the first reads the files from the disk
        for name in in_turn(list(contenders), number):
            starts[name].append(contenders[name].start_seconds())
    rows = {str(count): summary([one[str(count)] for one in rounds]) for count in options.clients}
    start = {name: statistics.median(seconds[1:] or seconds) for name, seconds in starts.items()}
    ratios = {f"{name} to old": start[name] / start["old"] for name in start if name != "old"}
    return {"clients": rows, "start_seconds": {**start, **ratios}, "rounds": rounds}


def summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """The medians of each contender, and what was asked for."""
    found: dict[str, Any] = {}
    for name in rounds[0]:
        found[name] = {key: statistics.median(one[name][key] for one in rounds) for key in rounds[0][name]}
        found[name]["adding p99 to idle"] = found[name]["adding_p99_ms"] / found[name]["p99_ms"]
    for name in (name for name in rounds[0] if name != "old"):
        ratio = found[name]["searches_per_second"] / found["old"]["searches_per_second"]
        found[f"searches per second, {name} to old"] = ratio
    return found


def main() -> None:
    """Measure, write the result and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", default=COMMIT, help="the commit to compare with (default: %(default)s)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--passages", type=int, default=2000, help="in the index")
    parser.add_argument("--adds", type=int, default=60, help="passages of one `add`")
    parser.add_argument("--seconds", type=float, default=10, help="of each idle measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=5, help="searches from the shell")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process")
    parser.add_argument("--model", help="folder or hub name (default: the small model of the tests)")
    parser.add_argument("--int8", help="a quantised checkpoint of the model")
    parser.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help="so little that it shows nothing, to see that it works")
    parser.add_argument("--note", help="what a reader of the result should know, such as what else ran")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.model, options.passages, options.precision)
        return
    if options.small:
        options.clients, options.passages, options.adds = [2], 20, 3
        options.seconds, options.rounds, options.starts = 1.0, 1, 0
    with tempfile.TemporaryDirectory() as place:
        found = run(options, Path(place))
    noted = {"note": options.note} if options.note else {}
    sizes = {name: getattr(options, name) for name in ("old", "passages", "adds", "seconds")}
    report = {**origin(options.threads), **noted, **sizes, **found}
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in report.items() if name != "rounds"}, indent=2))


if __name__ == "__main__":
    main()
