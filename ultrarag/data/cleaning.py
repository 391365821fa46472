"""`ultrarag data clean`: texts left out by their teacher's scores, each for a reason that is counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ultrarag.data.cli import Parser
from ultrarag.errors import DataError, UsageError
from ultrarag.io import identity, print_result, resumable, table
from ultrarag.rows import Paths, Row, as_json, checked_row, file_paths, reading


@dataclass(frozen=True)
class Rules:
    """When a negative, or a row, is left out: the rules of UltraRAG's encoder and reranker cleaning; None: it is off.

    The reference of a row is the score of its worst positive.
    """

    #: a row with fewer negatives left than this is left out
    keep_neg_num: int | None = None
    #: a negative above this share of the reference is left out (below 0: above reference - (1 - share) x |reference|)
    score_ratio: float | None = None
    #: a negative above reference - margin is left out
    score_margin: float | None = None
    #: a row whose reference is below this is left out
    min_pos_score: float | None = None
    #: a negative above this is left out
    max_neg_score: float | None = None

    def __post_init__(self) -> None:
        if self.keep_neg_num is not None and self.keep_neg_num < 0:
            raise UsageError(f"keep_neg_num is {self.keep_neg_num}; it must be at least 0")
        if self.score_ratio is not None and not self.score_ratio > 0:
            raise UsageError(f"score_ratio is {self.score_ratio}; it must be above 0")
        if all(value is None for value in vars(self).values()):
            raise UsageError(f"no rule was given, so nothing would be left out; give one of {', '.join(vars(self))}")

    def against(self, score: float, reference: float) -> str | None:
        """Return the name of the first rule that leaves a negative of this score out, or None."""
        if self.max_neg_score is not None and score > self.max_neg_score:
            return "max_neg_score"
        if self.score_margin is not None and score > reference - self.score_margin:
            return "score_margin"
        # a share of a number below 0 is above it: the distance counts, which is the same for numbers above 0
        if self.score_ratio is not None and score > reference - (1 - self.score_ratio) * abs(reference):
            return "score_ratio"
        return None


@dataclass
class CleanReport:
    """What was left out, and why."""

    rows: int = 0
    #: reason -> rows
    rows_left_out: Counter[str] = field(default_factory=Counter)
    #: of all rows
    negatives: int = 0
    #: reason -> negatives; those of rows that are left out whole do not count
    negatives_left_out: Counter[str] = field(default_factory=Counter)
    #: rows written that keep none of their negatives
    without_negatives: int = 0

    @classmethod
    def of(cls, state: dict[str, Any]) -> CleanReport:
        """Take up the counts of a run that was stopped."""
        counts: dict[str, Any] = {
            name: Counter(value) if isinstance(value, dict) else value for name, value in state.items()
        }
        return cls(**counts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = []
        for name, left_out in (("rows", self.rows_left_out), ("negatives", self.negatives_left_out)):
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(left_out.items()))
            lines.append((name, getattr(self, name), left_out.total(), reasons))
        more = f"\n{self.without_negatives} rows keep no negative" if self.without_negatives else ""
        return table(("", "read", "left out", "by"), lines) + more


def clean(
    files: Paths, output: str | os.PathLike[str], *, overwrite: bool = False, rules: Rules | None = None, **given: Any
) -> CleanReport:
    """Leave negatives out of rows with `pos_scores` and `neg_scores`, and rows that are then of no use.

    Args:
        files: a file, files, or directories of them.
        output: the file to write; a stopped run goes on when it is called again.
        rules: what is left out; or give the fields of `Rules` as keywords.

    Raises:
        DataError: a row cannot be used or lacks scores (names file and line), or the output is there.
        UsageError: no rule, or a value that cannot be used.
    """
    rules = rules or Rules(**given)
    paths = file_paths(files)
    made_by = {"command": "clean", "inputs": [identity(path) for path in paths], **vars(rules)}
    with resumable(output, made_by, overwrite) as out, reading(paths, "clean", out.done) as items:
        report = CleanReport.of(out.state)
        out.state = report.__dict__
        for place, raw in items:
            if row := cleaned(_scored(place, checked_row(place, raw)), rules, report):
                out.write(as_json(row))
            out.advance()
    return report


def cleaned(row: Row, rules: Rules, report: CleanReport) -> Row | None:
    """Return the row without what the rules leave out, or None; `report` counts."""
    scores, reference = row.neg_scores or [], min(row.pos_scores or [])
    report.rows += 1
    report.negatives += len(scores)
    reasons = [rules.against(score, reference) for score in scores]
    kept = [i for i, reason in enumerate(reasons) if reason is None]
    if rules.min_pos_score is not None and reference < rules.min_pos_score:
        report.rows_left_out["min_pos_score"] += 1
        return None
    if rules.keep_neg_num is not None and len(kept) < rules.keep_neg_num:
        report.rows_left_out["keep_neg_num"] += 1
        return None
    report.negatives_left_out.update(reason for reason in reasons if reason)
    report.without_negatives += not kept
    if row.neg is not None:
        row.neg, row.neg_scores = [row.neg[i] for i in kept], [scores[i] for i in kept]
    return row


def _scored(place: str, row: Row) -> Row:
    for name in ("pos", "neg"):
        if getattr(row, name) and not getattr(row, f"{name}_scores"):
            raise DataError(f"{place}: '{name}_scores' is missing; ultrarag data score writes a teacher's scores")
    if row.neg is not None and row.neg_scores is None:
        row.neg_scores = []
    return row


def main(argv: Sequence[str]) -> int:
    """Run `ultrarag data clean`."""
    parser = Parser("clean", "Leave negatives and rows out by their teacher's scores (pos_scores, neg_scores).")
    parser.add_argument("files", nargs="+", metavar="FILE", help="files of rows with scores, or directories of them")
    parser.add_output("the file of rows to write")
    parser.add_argument("--min_pos_score", type=float, metavar="X", help="leave out rows whose worst positive is below")
    parser.add_argument("--max_neg_score", type=float, metavar="X", help="leave out negatives above this")
    parser.add_argument(
        "--score_margin", type=float, metavar="X", help="leave out negatives above the row's worst positive less this"
    )
    parser.add_argument(
        "--score_ratio",
        type=float,
        metavar="X",
        help="leave out negatives above this share of the row's worst positive",
    )
    parser.add_argument("--keep_neg_num", type=int, metavar="N", help="leave out rows with fewer negatives left")
    found = vars(parser.read(argv))
    as_json, files, output = found.pop("json"), found.pop("files"), found.pop("output")
    report = clean(files, output, **found)
    print_result(report, as_json)
    return 0
