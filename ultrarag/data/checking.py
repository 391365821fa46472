"""`ultrarag data check`: everything that would spoil a fine-tune, found in one pass before it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ultrarag.data.cli import Parser
from ultrarag.errors import UsageError
from ultrarag.finetune import SAMPLE, DataReport, assembled
from ultrarag.io import print_result
from ultrarag.rows import BadRow, Dataset, Paths, file_paths, parse_row, reading
from ultrarag.rows.checks import (
    SHOWN,
    Finding,
    LeakChecks,
    RowChecks,
    Sample,
    estimate,
    measure,
    steps_of,
    token_counter,
)

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder

#: Rows that cannot be used of which the reason is listed.
_LISTED = 20


@dataclass(frozen=True)
class Plan:
    """The settings of the fine-tune that the data is for; names and defaults are those of its flags."""

    train_group_size: int = 8
    query_max_len: int = 32
    passage_max_len: int = 128
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 3.0
    max_steps: int = -1
    #: devices
    world_size: int = 1
    #: every row needs a teacher's scores
    knowledge_distillation: bool = False
    gradient_checkpointing: bool = False


@dataclass
class _Seen:
    """What one pass over the files collects."""

    rows: RowChecks
    leaks: LeakChecks | None
    sample: Sample
    teacher: bool
    count: int = 0
    bad: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, place: str, raw: Any, dataset: Dataset) -> None:
        self.count += 1
        try:
            row = parse_row(raw, self.teacher)
            dataset.add(row, place)
        except BadRow as error:
            self.bad += 1
            if len(self.reasons) < _LISTED:
                self.reasons.append(f"{place}: {error}")
            return
        neg = row.neg or []
        self.rows.add(place, row.query, row.pos, neg, row.pos_scores, row.neg_scores)
        self.sample.add(row.query, [*row.pos, *neg])
        if self.leaks:
            self.leaks.add(place, row.query, row.pos, row.model_extra)


def check(
    files: Paths,
    *,
    model: str | None = None,
    adapter: str | None = None,
    eval_data: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    **plan: Any,
) -> DataReport:
    """Look at every row of the files once; hashes of its texts are kept, not the texts.

    Args:
        files: a file, files, or directories of them.
        model: count tokens with this model's tokenizer, estimate memory, and time a few of its forwards.
        adapter: the kind of model; default: what the folder says.
        eval_data: rows, or a folder in BEIR's layout, whose queries and passages should not be in the files.
        trust_remote_code: run Python code that comes with the model.
        plan: settings of the fine-tune (see `Plan`), for group sizes, cuts and estimates.

    Returns:
        The report; `ok` is False where a finding is an error.

    Raises:
        DataError: a file cannot be read. UsageError: a setting that is unknown or cannot be used.

    Example:
        >>> from ultrarag.data import check
        >>> print(check("train.jsonl", train_group_size=2))  # doctest: +SKIP
    """
    settings = _plan(plan)
    leaks = _leaks(eval_data)
    seen = _Seen(RowChecks(settings.train_group_size), leaks, Sample(SAMPLE[0]), settings.knowledge_distillation)
    paths = file_paths(files)
    for path in paths:
        dataset = Dataset()
        with reading(path, "check") as items:
            for place, raw in items:
                seen.add(place, raw, dataset)
    return _report(seen, paths, settings, _encoder(model, adapter, device, trust_remote_code))


def _plan(given: dict[str, Any]) -> Plan:
    try:
        plan = Plan(**given)
    except TypeError as error:
        raise UsageError(
            f"{str(error).partition(') ')[2] or error}; known are {', '.join(Plan.__annotations__)}"
        ) from None
    for name, value in vars(plan).items():
        if value is not True and value is not False and name != "max_steps" and value <= 0:
            raise UsageError(f"{name} is {value}; it must be above 0")
    return plan


def _leaks(eval_data: str | None) -> LeakChecks | None:
    if eval_data is None:
        return None
    from ultrarag.finetune import read_evaluator

    return LeakChecks.of(read_evaluator(eval_data, None, None))


def _encoder(model: str | None, adapter: str | None, device: str | None, trusted: bool) -> Encoder | None:
    if model is None:
        return None
    from ultrarag.encoder import Encoder

    return Encoder.load(model, adapter, device=device, trust_remote_code=trusted)


def _report(seen: _Seen, paths: list[str], plan: Plan, encoder: Encoder | None) -> DataReport:
    rows = seen.sample.within(SAMPLE[1]) if seen.sample.rows else []
    pairs = encoder is not None and encoder.adapter.declared.pair_input
    limits = {"query": plan.query_max_len, "passage": plan.passage_max_len}
    if pairs:  # what the reranker's lengths are without --max_len
        both = plan.query_max_len + plan.passage_max_len
        limits = {"query": plan.query_max_len + plan.passage_max_len // 4, "pair": both}
    lengths = measure(rows, token_counter(encoder) if encoder else None, limits, pairs) if rows else []
    report = assembled(seen.rows, seen.leaks, lengths, seen.count)
    report.overlap = seen.leaks.overlap(report.checked) if seen.leaks else None
    report.files, report.bad = paths, seen.bad
    report.findings = [*_unusable(seen), *report.findings]
    if rows:
        group = plan.train_group_size if seen.rows.rows_with_negatives else 1
        batch = plan.per_device_train_batch_size
        shares = (batch * plan.world_size, plan.gradient_accumulation_steps)
        steps = steps_of(report.checked, *shares, plan.num_train_epochs, plan.max_steps)
        batch *= plan.gradient_accumulation_steps
        texts = [] if pairs else [text for _, passages in rows[:16] for text in passages[:1]]
        report.cost = estimate(steps, batch, group, lengths, encoder, texts, plan.gradient_checkpointing)
    return report


def _unusable(seen: _Seen) -> list[Finding]:
    found = []
    if seen.bad:
        more = f"; and {seen.bad - len(seen.reasons)} more" if seen.bad > len(seen.reasons) else ""
        text = "rows that cannot be used:\n" + "\n".join(f"    {reason}" for reason in seen.reasons) + more
        places = [reason.split(": ", 1)[0] for reason in seen.reasons[:SHOWN]]
        found.append(Finding("error", "unusable_rows", seen.bad, text, places))
    if not len(seen.rows.places):
        found.append(Finding("error", "no_rows", 0, "there is no row to train on"))
    return found


def main(argv: Sequence[str]) -> int:
    """Run `ultrarag data check`; 1 where there are errors."""
    parser = Parser(
        "check", "Find what would spoil a fine-tune: rows that cannot be used, duplicates, conflicts, leaks."
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="files of rows, or directories of them")
    parser.add_argument("--model", help="count its tokens, estimate memory, and time a few forwards")
    parser.add_argument("--adapter", metavar="NAME", help="the kind of model; default: what the folder says")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--device", help="where the timed forwards run; default: the best there is")
    parser.add_argument(
        "--eval",
        "--eval_data",
        dest="eval_data",
        metavar="PATH",
        help="held-out rows, or a BEIR folder: must not be in FILE",
    )
    _plan_flags(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    found = vars(parser.read(argv))
    as_json = found.pop("json")
    report = check(found.pop("files"), **found)
    print_result(report, as_json)
    return 0 if report.ok else 1


def _plan_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings of the fine-tune that the data is for")
    for name, default in vars(Plan()).items():
        if isinstance(default, bool):
            group.add_argument(f"--{name}", action="store_true", help=_HELP[name])
        else:
            text = f"{_HELP[name]} (default: {default:g})"
            group.add_argument(f"--{name}", type=type(default), default=default, metavar="N", help=text)


_HELP = {
    "train_group_size": "passages per query",
    "query_max_len": "longest query in tokens",
    "passage_max_len": "longest passage in tokens",
    "per_device_train_batch_size": "queries per device and step",
    "gradient_accumulation_steps": "batches per optimizer step",
    "num_train_epochs": "passes over the rows",
    "max_steps": "optimizer steps, in place of epochs; -1: not set",
    "world_size": "devices",
    "knowledge_distillation": "every row needs a teacher's scores",
    "gradient_checkpointing": "activations are computed again in the backward pass",
}
