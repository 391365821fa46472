"""`ultrarag data clean`: texts left out by their teacher's scores, each for a reason that is counted."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ultrarag.data.flags import Parser
from ultrarag.data.output import identity, resumable
from ultrarag.data.reading import Paths, as_json, checked_row, file_paths, reading
from ultrarag.errors import DataError, UsageError
from ultrarag.finetune.row import Row
from ultrarag.tables import table

#: What the rows are for.
TARGETS = ("encoder", "reranker")


@dataclass(frozen=True)
class Rules:
    """When a text is left out; None: the rule is off.

    The reference of a row is the score of its worst positive that is kept.
    """

    #: of the negatives that pass the other rules, keep this many: the highest scored
    keep_neg_num: int | None = None
    #: a negative above this share of the reference is left out (below 0: above reference - (1 - share) x |reference|)
    score_ratio: float | None = None
    #: a negative above reference - margin is left out
    score_margin: float | None = None
    #: a positive below this is left out
    min_pos_score: float | None = None
    #: a negative above this is left out
    max_neg_score: float | None = None
    #: "encoder": a row without a negative is kept, others of its batch will do; "reranker": it is left out
    target: str = "encoder"

    def __post_init__(self) -> None:
        if self.keep_neg_num is not None and self.keep_neg_num < 0:
            raise UsageError(f"keep_neg_num is {self.keep_neg_num}; it must be at least 0")
        if self.score_ratio is not None and not self.score_ratio > 0:
            raise UsageError(f"score_ratio is {self.score_ratio}; it must be above 0")
        if self.target not in TARGETS:
            raise UsageError(f"target is '{self.target}'; it must be one of {', '.join(TARGETS)}")
        if all(value is None for name, value in vars(self).items() if name != "target"):
            names = ", ".join(name for name in vars(self) if name != "target")
            raise UsageError(f"no rule was given, so nothing would be left out; give one of {names}")

    def against(self, score: float, reference: float) -> str | None:
        """Return the name of the first rule that leaves a negative of this score out, or None."""
        if self.max_neg_score is not None and score > self.max_neg_score:
            return "max_neg_score"
        if self.score_margin is not None and score > reference - self.score_margin:
            return "score_margin"
        if self.score_ratio is not None and score > reference - (1 - self.score_ratio) * abs(reference):
            return "score_ratio"
        return None


@dataclass
class CleanReport:
    """What was left out, and why."""

    rows: int = 0
    rows_kept: int = 0
    #: reason -> rows
    rows_left_out: Counter[str] = field(default_factory=Counter)
    positives: int = 0
    positives_left_out: Counter[str] = field(default_factory=Counter)
    negatives: int = 0
    negatives_left_out: Counter[str] = field(default_factory=Counter)
    #: rows that keep none of their negatives
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
        rows: list[Sequence[object]] = []
        for name, left_out in (
            ("rows", self.rows_left_out),
            ("positives", self.positives_left_out),
            ("negatives", self.negatives_left_out),
        ):
            rows.append((name, getattr(self, name), getattr(self, name) - left_out.total(), ""))
            rows += [("", "", "", f"{count} {reason}") for reason, count in sorted(left_out.items())]
        more = f"\n{self.without_negatives} rows keep no negative" if self.without_negatives else ""
        return table(("", "read", "kept", "left out by"), rows) + more


def clean(
    files: Paths, output: str | os.PathLike[str], *, overwrite: bool = False, rules: Rules | None = None, **given: Any
) -> CleanReport:
    """Leave texts out of rows that have `pos_scores` and `neg_scores`, and rows that are then of no use.

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
    report.rows += 1
    kept = _positives(row, rules, report)
    negatives = _negatives(row, min((row.pos_scores or [])[i] for i in kept), rules, report) if kept else []
    reason = "min_pos_score" if not kept else "no_negative" if rules.target == "reranker" and not negatives else None
    if reason:
        report.rows_left_out[reason] += 1
        return None
    report.rows_kept += 1
    report.without_negatives += not negatives
    for name, places in (("pos", kept), ("neg", negatives)):
        if getattr(row, name) is not None:
            setattr(row, name, [getattr(row, name)[i] for i in places])
            setattr(row, f"{name}_scores", [getattr(row, f"{name}_scores")[i] for i in places])
    return row


def _positives(row: Row, rules: Rules, report: CleanReport) -> list[int]:
    """The numbers of the positives that are kept."""
    scores, least = row.pos_scores or [], rules.min_pos_score
    kept = [i for i, score in enumerate(scores) if least is None or score >= least]
    report.positives += len(scores)
    if len(kept) < len(scores):
        report.positives_left_out["min_pos_score"] += len(scores) - len(kept)
    return kept


def _negatives(row: Row, reference: float, rules: Rules, report: CleanReport) -> list[int]:
    """The numbers of the negatives that are kept, in their order."""
    scores = row.neg_scores or []
    report.negatives += len(scores)
    reasons = [rules.against(score, reference) for score in scores]
    report.negatives_left_out.update(reason for reason in reasons if reason)
    kept = [i for i, reason in enumerate(reasons) if reason is None]
    if rules.keep_neg_num is not None and len(kept) > rules.keep_neg_num:
        report.negatives_left_out["keep_neg_num"] += len(kept) - rules.keep_neg_num
        kept = sorted(sorted(kept, key=lambda i: -scores[i])[: rules.keep_neg_num])
    return kept


def _scored(place: str, row: Row) -> Row:
    for name in ("pos", "neg"):
        if getattr(row, name) and not getattr(row, f"{name}_scores"):
            raise DataError(f"{place}: '{name}_scores' is missing; ultrarag data score writes a teacher's scores")
    if row.neg is not None and row.neg_scores is None:
        row.neg_scores = []
    return row


def main(argv: Sequence[str]) -> int:
    """Run `ultrarag data clean`."""
    parser = Parser("clean", "Leave positives and negatives out by their teacher's scores (pos_scores, neg_scores).")
    parser.add_argument("files", nargs="+", metavar="FILE", help="files of rows with scores, or directories of them")
    parser.add_output("the file of rows to write")
    parser.add_argument("--min_pos_score", type=float, metavar="X", help="leave out positives below this")
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
    parser.add_argument("--keep_neg_num", type=int, metavar="N", help="keep the N highest scored of the negatives left")
    parser.add_argument(
        "--target", choices=TARGETS, default="encoder", help="reranker: a row without negatives is left out"
    )
    found = vars(parser.read(argv))
    plain, files, output = found.pop("json"), found.pop("files"), found.pop("output")
    report = clean(files, output, **found)
    print(json.dumps(report.to_dict(), ensure_ascii=False) if plain else report)
    return 0
