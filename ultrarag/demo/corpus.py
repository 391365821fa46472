"""A retrieval task from the documentation that is installed anyway: which function does what this line says?

The query is the first line of a function's docstring and the passage is the rest of it, for the standard library,
numpy, scipy, scikit-learn and torch. Sources are parsed and never imported, so nothing is run, warned about or shown.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import logging
import math
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ultrarag.errors import DataError
from ultrarag.evaluation import Collection, Evaluation, Run, write_beir
from ultrarag.packages import install
from ultrarag.rows.checks import DocumentGroups, hold_out
from ultrarag.types import Passage

#: what to read of each package: its folder, or some of its sub-folders ("." for the files beside them)
SOURCES = {
    "numpy": ("",),
    "scipy": ("",),
    "sklearn": ("",),
    "torch": (".", "nn", "optim", "utils", "distributions", "autograd", "fx", "ao", "signal", "sparse", "masked"),
}
#: folders without documentation for users
SKIPPED = {"test", "tests", "testing", "externals", "site-packages", "idlelib", "lib2to3", "pydoc_data", "encodings"}

SUMMARY_WORDS = 4
SUMMARY_CHARACTERS = 300
BODY_CHARACTERS = (150, 4000)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """A function's documentation, cut in two."""

    #: qualified name, such as "scipy.optimize.minimize"
    name: str
    summary: str
    body: str


@dataclass(frozen=True)
class DemoData:
    """Where the task was written: a BEIR folder, and training rows of the pairs that are not held out."""

    folder: Path
    train_file: Path
    train: int
    held_out: int


def build_demo(folder: str | Path, pairs: int = 1500, held_out: int = 300) -> DemoData:
    """Write corpus.jsonl (all pairs), queries.jsonl, qrels/{train,test}.tsv and train.jsonl.

    The choice depends only on the functions' names and texts: the same packages give the same files.

    Raises:
        DataError: fewer documented functions than `pairs` are installed.
    """
    import jsonlines

    folder = Path(folder)
    chosen = choose(find_pairs(), pairs)
    train, test = apart(chosen, held_out)
    corpus = [Passage(pair.name, pair.body) for pair in sorted(chosen, key=lambda pair: pair.name)]
    splits = {name: {pair.name: {pair.name: 1} for pair in part} for name, part in (("train", train), ("test", test))}
    write_beir(folder, corpus, {pair.name: pair.summary for pair in chosen}, splits)
    train_file = folder / "train.jsonl"
    with jsonlines.open(train_file, "w") as writer:
        writer.write_all({"query": pair.summary, "pos": [pair.body]} for pair in train)
    return DemoData(folder, train_file, len(train), len(test))


def apart(pairs: Sequence[Pair], held_out: int) -> tuple[list[Pair], list[Pair]]:
    """The pairs to learn from, and those that are held out: as many, and never parts of one document.

    Raises:
        DataError: too many of them belong together.
    """
    groups = DocumentGroups()
    for pair in pairs:
        groups.add(pair.summary, [pair.body])
    held = hold_out(groups.joined().roots(), {"test": (held_out + 0.5) / len(pairs)}, seed=0) > 0
    if held.sum() < held_out:
        raise DataError(f"only {held.sum()} of {len(pairs)} functions can be held out with their documents")
    return [pair for pair, out in zip(pairs, held, strict=True) if not out], [
        pair for pair, out in zip(pairs, held, strict=True) if out
    ]


def choose(pairs: Iterable[Pair], count: int) -> list[Pair]:
    """Pick `count` distinct pairs in the order of a hash of their names: a fixed choice that looks random."""
    distinct = list(without_repeats(sorted(pairs, key=lambda pair: pair.name)))
    if len(distinct) < count:
        raise DataError(
            f"the installed packages document {len(distinct)} functions; {count} are needed: "
            f"install what the demo reads: {install('scipy', 'scikit-learn')}"
        )
    return sorted(distinct, key=lambda pair: hashlib.sha256(pair.name.encode()).hexdigest())[:count]


def without_repeats(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Leave out pairs whose name, summary or body came before: they would have two right answers."""
    seen: set[tuple[str, str]] = set()
    for pair in pairs:
        keys = {("name", pair.name), ("summary", _plain(pair.summary)), ("body", _plain(pair.body))}
        if seen.isdisjoint(keys):
            yield pair
        seen |= keys


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def find_pairs() -> Iterator[Pair]:
    """Yield a pair for every documented public function of the packages in `SOURCES` and the standard library."""
    for package, folder, file in source_files():
        yield from pairs_of_file(file, module_name(package, folder, file))


def source_files() -> Iterator[tuple[str, Path, Path]]:
    """Yield (package, its folder, file); the package is "" for the standard library."""
    yield from (("", stdlib, file) for stdlib in [Path(sysconfig.get_path("stdlib"))] for file in _python_files(stdlib))
    for package, parts in SOURCES.items():
        spec = find_spec(package)
        for location in (spec.submodule_search_locations or []) if spec else []:
            root = Path(location)
            for part in parts:
                files = sorted(root.glob("*.py")) if part == "." else _python_files(root / part)
                yield from ((package, root, file) for file in files)


def _python_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*.py")) if SKIPPED.isdisjoint(file.relative_to(folder).parts)]


def module_name(package: str, folder: Path, file: Path) -> str:
    """Name the module as users know it: without private parts, so scipy/optimize/_minimize.py is scipy.optimize."""
    parts = [package, *file.relative_to(folder).with_suffix("").parts]
    return ".".join(part for part in parts if part and not part.startswith("_"))


def pairs_of_file(file: Path, module: str) -> Iterator[Pair]:
    """Yield the pairs of a file's public functions; a file that is not Python is logged and left out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escape sequences
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError) as error:
        log.warning("left out %s: %s", file, error)
        return
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            pair = pair_of(f"{module}.{node.name}".lstrip("."), ast.get_docstring(node) or "")
            if pair:
                yield pair


def pair_of(name: str, docstring: str) -> Pair | None:
    """Split a docstring after its first paragraph; None when a half is too short, too long or a template."""
    summary, _, body = inspect.cleandoc(docstring).partition("\n\n")
    summary, body = " ".join(summary.split()), body.strip()
    is_sentence = len(summary.split()) >= SUMMARY_WORDS and not re.match(r"[\w.]+\(", summary)
    fits = len(summary) <= SUMMARY_CHARACTERS and BODY_CHARACTERS[0] <= len(body) <= BODY_CHARACTERS[1]
    if is_sentence and fits and "%(" not in docstring:
        return Pair(name, summary, body)
    return None


def comparison(before: Mapping[str, Evaluation], after: Mapping[str, Evaluation]) -> str:
    """Return the mean of each metric for every way of searching, before and after, as lines of text."""
    lines = [f"{'held-out queries':<20}{'before':>8}{'after':>8}{'gain':>9}"]
    for name, side in before.items():
        for metric, old in side.metrics.items():
            new = after[name].metrics[metric]
            lines.append(f"{f'{name} {metric}':<20}{old:>8.3f}{new:>8.3f}{new - old:>+9.3f}")
    return "\n".join(lines)


def example(task: Collection, before: Run, after: Run, hits: int = 3) -> str:
    """Return one query's first hits, before and after, side by side; the right passage is starred."""
    query_id = risen(task, before, after)
    if query_id is None:
        return "No query's right passage rose."
    columns = [_hits(task, run, query_id, hits) for run in (before, after)]
    width = max(len(hit) for hit in [*columns[0], "before"]) + 2
    rows = [f"  {old:<{width}}{new}".rstrip() for old, new in zip(*columns, strict=True)]
    head = f'query: "{task.queries[query_id]}"  (* is the right answer)\n  {"before":<{width}}after'
    return "\n".join([head, *rows])


def risen(task: Collection, before: Run, after: Run) -> str | None:
    """The query whose right passage gained most, by reciprocal rank; the first id among equals."""
    gains = {
        query_id: reciprocal_rank(task, after, query_id) - reciprocal_rank(task, before, query_id)
        for query_id in sorted(task.qrels)
    }
    best = max(gains, key=lambda query_id: gains[query_id])
    return best if gains[best] > 0 else None


def reciprocal_rank(task: Collection, run: Run, query_id: str) -> float:
    """One over the rank of the first relevant passage; 0 when it was not found."""
    ranks = (rank for rank, hit in enumerate(run[query_id], 1) if task.qrels[query_id].get(hit, 0) > 0)
    return 1 / next(ranks, math.inf)


def _hits(task: Collection, run: Run, query_id: str, count: int) -> list[str]:
    found = list(run[query_id].items())[:count]
    lines = [f"{'*' if task.qrels[query_id].get(hit, 0) > 0 else ' '} {score:.3f} {hit}" for hit, score in found]
    return lines + [""] * (count - len(lines))
