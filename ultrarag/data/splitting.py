"""`ultrarag data split`: rows by length, or into train and test so that no test document is ever trained on."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ultrarag.data.cli import Parser
from ultrarag.errors import DataError, UsageError, did_you_mean
from ultrarag.io import identity, print_result, resumable, table
from ultrarag.rows import Paths, Row, as_json, checked_row, file_paths, reading, text_key
from ultrarag.rows.checks import (
    EVIDENCE,
    SHOWN,
    Components,
    DocumentGroups,
    guessed_tokens,
    hold_out,
    names_in_row,
)

#: The buckets of FlagEmbedding's split_data_by_length.
LENGTHS = (0, 500, 1000, 2000, 3000, 4000, 5000, 6000, 7000)
WAYS = ("document", "query", "length")
#: A group with more than this share of the rows is worth a word: what holds it together may be no document.
LARGE = 0.2


@dataclass
class SplitReport:
    """The files that were written."""

    #: file -> rows
    files: dict[str, int] = field(default_factory=dict)
    #: "document", "query" or "length"
    by: str = "length"
    #: by document or query: groups of rows that stay together
    components: int | None = None
    #: the largest of them: "rows", "held" (what they share -> how often), and what is "most" shared
    largest: dict[str, Any] | None = None
    #: what a user should look at
    notes: list[str] = field(default_factory=list)
    #: by document: negatives of the training rows that are positives of held-out rows, and were left out
    negatives_left_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        text = table(("file", "rows"), list(self.files.items()))
        if self.components is not None:
            what = "a query" if self.by == "query" else "a query, a positive or a document"
            text += f"\nsplit by {self.by}: {self.components} groups of rows that share {what}"
        if self.negatives_left_out:
            text += f"\n{self.negatives_left_out} negatives are positives of held-out rows and were left out"
        return "\n".join([text, *(f"note: {line}" for line in self.notes)])


def split(
    files: Paths,
    output: str | os.PathLike[str],
    *,
    by: str = "document",
    test_share: float = 0.1,
    dev_share: float = 0.0,
    seed: int = 42,
    together: Sequence[str] = EVIDENCE,
    length_list: Sequence[int] = LENGTHS,
    model: str | None = None,
    overwrite: bool = False,
) -> SplitReport:
    """Split rows into files of the directory `output`.

    Args:
        files: a file, files, or directories of them.
        by: "document": train.jsonl, test.jsonl (and dev.jsonl). Rows that share a query, a positive or a document,
            directly or through others, stay together; what is a positive of held-out rows is left out of the others'
            negatives. "query": the same files, and only rows with the same query stay together: what is measured on
            such a test promises too much, since its passages and documents are trained on.
            "length": len-A-B.jsonl, by the longest text of a row: A or more and fewer than B tokens.
        test_share: the most rows of test.jsonl, as a share of all; likewise `dev_share`. Groups are added while they
            fit, so a share is missed by less than the smallest group that is left.
        seed: of the choice of groups; the same seed and files give the same split.
        together: what makes passages parts of one document, beside the same text: "id" (`pos_ids` of the form doc#3),
            "document" and "source" (keys of a row, or of its `metadata`), "title" (the first line of a positive of
            several lines, or the key `title`), "near" (nearly the same text).
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
        shares, kinds = _shares(test_share, dev_share), _together(together) if by == "document" else None
        chooser = _by_group(paths, shares, seed, kinds)
        more = {"shares": shares, "seed": seed, "together": kinds}
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


# ---- by document, or by query


def _shares(test: float, dev: float) -> dict[str, float]:
    if not (0 < test < 1 and 0 <= dev < 1 and test + dev < 1):
        raise UsageError(f"test_share is {test} and dev_share {dev}; each must be a share, and some rows must be left")
    return {"test": test, **({"dev": dev} if dev else {})}


def _together(given: Sequence[str]) -> list[str]:
    for kind in given:
        if kind not in EVIDENCE:
            raise UsageError(f"together has '{kind}'; known are {', '.join(EVIDENCE)}{did_you_mean(kind, EVIDENCE)}")
    return [kind for kind in EVIDENCE if kind in given]


def _by_group(paths: Sequence[str], shares: Mapping[str, float], seed: int, kinds: list[str] | None) -> _Chooser:
    """Split by document, known by these kinds of evidence; by query alone where `kinds` is None."""
    rows = _grouped(paths, kinds)
    roots = rows.roots()
    largest = _largest(paths, rows, roots, kinds)
    files, groups = _hold_out(roots, shares, seed, largest)
    held = _held_out(paths, files) if kinds is not None else {}
    report = SplitReport(by="query" if kinds is None else "document", components=groups, largest=largest)
    if largest["rows"] > LARGE * len(roots):
        report.notes.append(_described(largest, len(roots)))
    names = ["train.jsonl", *(f"{name}.jsonl" for name in shares)]
    return _Chooser(names, partial(_choose, files, held, report), report)


def _grouped(paths: Sequence[str], kinds: list[str] | None) -> Components:
    """Join rows that share a query and, where `kinds` are given, a positive or a document."""
    groups = DocumentGroups(kinds)
    for _, _, row in _rows(paths, "group"):
        groups.add(row.query, row.pos, row.model_extra or {})
    return groups.joined()


def _names(row: Row, kinds: Sequence[str]) -> list[tuple[str, str]]:
    return [(kind, name) for kind, name in names_in_row(row.model_extra or {}, row.pos) if kind in kinds]


def _largest(paths: Sequence[str], rows: Components, roots: np.ndarray, kinds: list[str] | None) -> dict[str, Any]:
    """The largest group: its "rows", what "held" it together how often, and what is "most" shared in it."""
    names, sizes = np.unique(roots, return_counts=True)
    if not len(names):
        return {"rows": 0, "held": {}, "most": None}
    held, kind, sharing = rows.sharing(int(names[sizes.argmax()]), roots)
    found: dict[str, Any] = {"rows": int(sizes.max()), "held": held, "most": None}
    if sharing:
        shown = {number: (place, row) for number, place, row in _rows(paths, "look at") if number in sharing[:SHOWN]}
        places = [place for place, _ in list(shown.values())[:2]]
        common = set.intersection(*(set(_names(row, [kind])) for _, row in shown.values()))
        name = min((name for _, name in common), default=None)
        found["most"] = {"kind": kind, "name": name, "rows": len(sharing), "places": places}
        found["without"] = [other for other in kinds or () if other != kind] if kind in EVIDENCE else None
    return found


def _described(largest: Mapping[str, Any], rows: int) -> str:
    """What a user should know of a group that is large, and do about it."""
    held = ", ".join(f"{kind} {count}" for kind, count in largest["held"].items())
    text = f"the largest group holds {largest['rows']} of {rows} rows"
    if held:
        text += f", which share: {held}"
    if most := largest["most"]:
        name = "" if most["name"] is None else f" '{most['name']}'"
        text += f"; most rows ({most['rows']}) share the {most['kind']}{name} ({', '.join(most['places'])}, ...)"
        if largest["without"] is not None:
            text += f". If that is no document, leave it out: --together {' '.join(largest['without']) or 'none'}"
        else:
            text += ". Take it out if it is boilerplate; --by query tears such rows apart, and judges by seen passages"
    return text


def _hold_out(
    roots: np.ndarray, shares: Mapping[str, float], seed: int, largest: Mapping[str, Any]
) -> tuple[np.ndarray, int]:
    """Return each row's file, 0 for train, (rows,) int8; and the number of components."""
    sizes = np.unique(roots, return_counts=True)[1]
    files = hold_out(roots, shares, seed)
    for number, (name, share) in enumerate(shares.items(), 1):
        if not (files == number).any():
            raise DataError(
                f"no group of rows fits into {name}, {share:.0%} of {len(roots)} rows: the smallest of {len(sizes)} "
                f"groups that stay together holds {sizes.min() if len(sizes) else 0}; "
                f"{_described(largest, len(roots))}; or raise --{name}_share"
            )
    return files, len(sizes)


def _held_out(paths: Sequence[str], files: np.ndarray) -> dict[int, int]:
    """Return the key of each positive of held-out rows -> its file."""
    found: dict[int, int] = {}
    for number, _, row in _rows(paths, "hold out"):
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


def _rows(paths: Sequence[str], label: str) -> Iterator[tuple[int, str, Row]]:
    with reading(paths, label) as items:
        for number, (place, raw) in enumerate(items):
            yield number, place, checked_row(place, raw)


def main(argv: Sequence[str]) -> int:
    """Run `ultrarag data split`."""
    parser = Parser("split", "Split rows by length, or into train and test files that share no document.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="files of rows, or directories of them")
    parser.add_output("the directory to write files into")
    parser.add_argument("--by", choices=WAYS, default="document", help="(default: document); query shares documents")
    parser.add_argument("--test_share", type=float, default=0.1, metavar="X", help="rows of test.jsonl (default: 0.1)")
    parser.add_argument("--dev_share", type=float, default=0.0, metavar="X", help="rows of dev.jsonl (default: 0)")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="of the choice of groups (default: 42)")
    parser.add_argument(
        "--together",
        nargs="+",
        choices=(*EVIDENCE, "none"),
        default=list(EVIDENCE),
        metavar="KIND",
        help=f"what makes passages one document: {', '.join(EVIDENCE)} (default: all), or none: the same text alone",
    )
    parser.add_argument(
        "--length_list", type=int, nargs="+", default=LENGTHS, metavar="N", help="where buckets begin, in tokens"
    )
    parser.add_argument("--model", help="count the tokens of this model's tokenizer; default: a guess by characters")
    found = vars(parser.read(argv))
    as_json, files, output = found.pop("json"), found.pop("files"), found.pop("output")
    if "none" in found["together"]:
        found["together"] = []
    report = split(files, output, **found)
    print_result(report, as_json)
    return 0
