"""`ultrarag data split`: rows by length, or into train and test so that no test passage is ever trained on."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ultrarag.data.cli import Parser
from ultrarag.errors import DataError, UsageError, did_you_mean
from ultrarag.io import identity, print_result, resumable, table
from ultrarag.rows import Paths, Row, as_json, checked_row, file_paths, reading, text_key
from ultrarag.rows.checks import guessed_tokens

#: The buckets of FlagEmbedding's split_data_by_length.
LENGTHS = (0, 500, 1000, 2000, 3000, 4000, 5000, 6000, 7000)
WAYS = ("document", "length")


@dataclass
class SplitReport:
    """The files that were written."""

    #: file -> rows
    files: dict[str, int] = field(default_factory=dict)
    #: by document: groups of rows that share queries or positives
    components: int | None = None
    #: by document: negatives of the training rows that are positives of held-out rows, and were left out
    negatives_left_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        text = table(("file", "rows"), list(self.files.items()))
        if self.components is not None:
            text += f"\n{self.components} groups of rows that share a query or a positive"
        if self.negatives_left_out:
            text += f"\n{self.negatives_left_out} negatives are positives of held-out rows and were left out"
        return text


def split(
    files: Paths,
    output: str | os.PathLike[str],
    *,
    by: str = "document",
    test_share: float = 0.1,
    dev_share: float = 0.0,
    seed: int = 42,
    length_list: Sequence[int] = LENGTHS,
    model: str | None = None,
    overwrite: bool = False,
) -> SplitReport:
    """Split rows into files of the directory `output`.

    Args:
        files: a file, files, or directories of them.
        by: "document": train.jsonl, test.jsonl (and dev.jsonl). Rows that share a query or a positive, directly or
            through others, stay together; what is a positive of held-out rows is left out of the others' negatives.
            "length": len-A-B.jsonl, by the longest text of a row: A or more and fewer than B tokens.
        test_share: the most rows of test.jsonl, as a share of all; likewise `dev_share`.
        seed: of the choice of groups; the same seed and files give the same split.
        length_list: where the buckets begin.
        model: count its tokens; without it they are guessed from the characters.

    Raises:
        DataError: a row cannot be used, a file is there, or no group is small enough to be held out.
        UsageError: a value that cannot be used.
    """
    if by not in WAYS:
        raise UsageError(f"by is '{by}'; it must be one of {', '.join(WAYS)}{did_you_mean(by, WAYS)}")
    paths, folder = file_paths(files), Path(output)
    made_by = {"command": "split", "by": by, "inputs": [identity(path) for path in paths]}
    more: dict[str, Any]
    if by == "length":
        chooser, more = _by_length(length_list, model), {"length_list": list(length_list), "model": model}
    else:
        shares = _shares(test_share, dev_share)
        chooser, more = _by_document(paths, shares, seed), {"shares": shares, "seed": seed}
    return _write(paths, folder, chooser, {**made_by, **more}, overwrite)


@dataclass
class _Chooser:
    """Which file a row goes into; it may remove texts from the row."""

    names: list[str]
    #: (number, row) -> file
    choose: Callable[[int, Row], int]
    report: SplitReport = field(default_factory=SplitReport)


def _write(
    paths: Sequence[str], folder: Path, chooser: _Chooser, made_by: Mapping[str, Any], overwrite: bool
) -> SplitReport:
    targets, report = [folder / name for name in chooser.names], chooser.report
    with resumable(targets, made_by, overwrite) as out, reading(paths, "split", out.done) as items:
        counts = out.state.setdefault("rows", [0] * len(targets))
        report.negatives_left_out = out.state.get("negatives", 0)
        for place, raw in items:
            row = checked_row(place, raw)
            number = chooser.choose(out.done, row)
            out.write(as_json(row), number)
            counts[number] += 1
            out.state["negatives"] = report.negatives_left_out
            out.advance()
    for target, count in zip(targets, counts, strict=True):
        if count:
            report.files[str(target)] = count
        else:
            target.unlink(missing_ok=True)  # an empty file is no dataset
    return report


# ---- by length


def _by_length(starts: Sequence[int], model: str | None) -> _Chooser:
    if not starts or list(starts) != sorted(set(starts)) or starts[0] != 0:
        raise UsageError(f"length_list is {list(starts)}; it must begin with 0 and rise")
    ends = [*map(str, starts[1:]), "inf"]
    count = _tokens(model)

    def choose(number: int, row: Row) -> int:
        return bisect_right(starts, max(count([row.query, *row.pos, *(row.neg or [])]))) - 1

    return _Chooser([f"len-{start}-{end}.jsonl" for start, end in zip(starts, ends, strict=True)], choose)


def _tokens(model: str | None) -> Callable[[list[str]], list[int]]:
    if model is None:
        return lambda texts: [guessed_tokens(text) for text in texts]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda texts: [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]


# ---- by document


def _shares(test: float, dev: float) -> dict[str, float]:
    if not (0 < test < 1 and 0 <= dev < 1 and test + dev < 1):
        raise UsageError(f"test_share is {test} and dev_share {dev}; each must be a share, and some rows must be left")
    return {"test": test, **({"dev": dev} if dev else {})}


def _by_document(paths: Sequence[str], shares: Mapping[str, float], seed: int) -> _Chooser:
    rows = Components()
    for _, row in _rows(paths, "group"):
        rows.add({text_key(text) for text in (row.query, *row.pos)})
    roots = rows.roots()
    files, groups = _hold_out(roots, shares, seed)
    held = _held_out(paths, files)
    report = SplitReport(components=groups)
    names = ["train.jsonl", *(f"{name}.jsonl" for name in shares)]
    return _Chooser(names, partial(_choose, files, held, report), report)


def _hold_out(roots: np.ndarray, shares: Mapping[str, float], seed: int) -> tuple[np.ndarray, int]:
    """Return each row's file, 0 for train, (rows,) int8; and the number of components."""
    names, sizes = np.unique(roots, return_counts=True)
    chosen = np.zeros(len(names), np.int8)
    order = np.random.default_rng(seed).permutation(len(names))
    for number, (name, share) in enumerate(shares.items(), 1):
        room = int(share * len(roots))
        for group in order:
            if not chosen[group] and sizes[group] <= room:
                chosen[group], room = number, room - sizes[group]
        if not (chosen == number).any():
            raise DataError(
                f"no group of rows fits into {name}, {share:.0%} of {len(roots)} rows: the smallest of {len(names)} "
                f"groups that share queries or positives holds {sizes.min() if len(sizes) else 0}, the largest "
                f"{sizes.max() if len(sizes) else 0}; raise --{name}_share"
            )
    return chosen[np.searchsorted(names, roots)], len(names)


def _held_out(paths: Sequence[str], files: np.ndarray) -> dict[int, int]:
    """Return the key of each positive of held-out rows -> its file."""
    found: dict[int, int] = {}
    for number, row in _rows(paths, "hold out"):
        if files[number]:
            found.update(dict.fromkeys(map(text_key, row.pos), int(files[number])))
    return found


def _choose(files: np.ndarray, held: Mapping[int, int], report: SplitReport, number: int, row: Row) -> int:
    """Return a row's file; remove from its negatives the positives of files that are held out from it."""
    file = int(files[number])
    kept = [i for i, text in enumerate(row.neg or []) if held.get(text_key(text), file) in (file, 0)]
    if row.neg and len(kept) < len(row.neg):
        report.negatives_left_out += len(row.neg) - len(kept)
        row.neg = [row.neg[i] for i in kept]
        row.neg_scores = [row.neg_scores[i] for i in kept] if row.neg_scores else row.neg_scores
    return file


def _rows(paths: Sequence[str], label: str) -> Iterator[tuple[int, Row]]:
    with reading(paths, label) as items:
        for number, (place, raw) in enumerate(items):
            yield number, checked_row(place, raw)


def main(argv: Sequence[str]) -> int:
    """Run `ultrarag data split`."""
    parser = Parser("split", "Split rows by length, or into train and test files that share no passage.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="files of rows, or directories of them")
    parser.add_output("the directory to write files into")
    parser.add_argument("--by", choices=WAYS, default="document", help="(default: document)")
    parser.add_argument("--test_share", type=float, default=0.1, metavar="X", help="rows of test.jsonl (default: 0.1)")
    parser.add_argument("--dev_share", type=float, default=0.0, metavar="X", help="rows of dev.jsonl (default: 0)")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="of the choice of groups (default: 42)")
    parser.add_argument(
        "--length_list", type=int, nargs="+", default=LENGTHS, metavar="N", help="where buckets begin, in tokens"
    )
    parser.add_argument("--model", help="count the tokens of this model's tokenizer; default: a guess by characters")
    found = vars(parser.read(argv))
    as_json, files, output = found.pop("json"), found.pop("files"), found.pop("output")
    report = split(files, output, **found)
    print_result(report, as_json)
    return 0


class Components:
    """Rows that share a key are in one component; 4 bytes per row, and a dictionary entry per distinct key."""

    def __init__(self) -> None:
        self._parents = array("I")
        self._owners: dict[int, int] = {}

    def add(self, keys: Iterable[int]) -> None:
        """Add a row with its keys."""
        row = len(self._parents)
        self._parents.append(row)
        for key in keys:
            self._join(row, self._owners.setdefault(key, row))

    def _root(self, row: int) -> int:
        parents = self._parents
        while parents[row] != row:
            parents[row] = parents[parents[row]]  # halves the path on the way
            row = parents[row]
        return row

    def _join(self, left: int, right: int) -> None:
        one, other = self._root(left), self._root(right)
        # the smaller number stays: a component is called by its first row, whatever the order of keys
        self._parents[max(one, other)] = min(one, other)

    def roots(self) -> np.ndarray:
        """The component of each row, called by its first row: (rows,) int64."""
        return np.array([self._root(row) for row in range(len(self._parents))], np.int64)
