"""DataReport: what is known about training data before a run, with a preview of how rows become batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrarag.encoder import Encoder
from ultrarag.errors import DataError
from ultrarag.finetune.batches import AnyPlan, Batch, Collator, PairCollator, PairLengths
from ultrarag.io import table
from ultrarag.rows.checks import (
    Cost,
    Finding,
    LeakChecks,
    Lengths,
    Overlap,
    RowChecks,
    Sample,
    described_scripts,
    measure,
    token_counter,
)
from ultrarag.tokenizer_limits import keep_limits

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder
    from ultrarag.finetune.batches import TrainData
    from ultrarag.finetune.flags import FinetuneArguments
    from ultrarag.types import Example


#: A fine-tune looks at this many rows, drawn evenly: two seconds at 9 texts a row. `ultrarag data check` looks at all.
ROWS_BEFORE_TRAINING = 10_000
#: Rows and characters whose tokens are counted.
SAMPLE_BEFORE_TRAINING, SAMPLE = (500, 1_000_000), (5_000, 20_000_000)


@dataclass
class DataReport:
    """What a check found."""

    rows: int
    #: rows looked at
    checked: int
    #: rows that cannot be used
    bad: int = 0
    files: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    lengths: list[Lengths] = field(default_factory=list)
    #: "query" and "passage" -> script -> share
    scripts: dict[str, dict[str, float]] = field(default_factory=dict)
    cost: Cost | None = None
    #: what the rows share with the evaluation data; None without any
    overlap: Overlap | None = None

    @property
    def ok(self) -> bool:
        """There is no error."""
        return not any(item.level == "error" for item in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        overlap = self.overlap.to_dict() if self.overlap else None
        return {"ok": self.ok, **asdict(self), "overlap": overlap}

    def __str__(self) -> str:
        parts = [self._summary(), self._histogram(), findings_table(self.findings) or "nothing to complain of"]
        return "\n\n".join(part for part in parts if part)

    def _summary(self) -> str:
        unusable = f", {self.bad} of which cannot be used" if self.bad else ""
        lines = [("rows", f"{self.rows}{unusable}, in {len(self.files)} file{'s' * (len(self.files) != 1)}")]
        for kind, shares in self.scripts.items():
            lines.append((f"{kind} script", ", ".join(f"{name} {share:.1%}" for name, share in shares.items())))
        lines += [("evaluation", str(self.overlap))] if self.overlap else []
        lines += self.cost.lines() if self.cost else []
        return "\n".join(f"{name:<15} {value}" for name, value in lines)

    def _histogram(self) -> str:
        """Tokens of the sampled texts: one column per kind of text."""
        if not self.lengths:
            return ""
        edges = sorted({edge for item in self.lengths for edge, _ in item.histogram})
        columns = [dict(item.histogram) for item in self.lengths]
        rows: list[Sequence[object]] = [(f"up to {e}", *(c.get(e, 0) for c in columns)) for e in edges]
        for name, value in (("median", "median"), ("95 % at most", "p95"), ("longest", "longest"), ("read", "limit")):
            rows.append((name, *(getattr(item, value) for item in self.lengths)))
        rows.append(("cut", *(f"{item.cut:.1%}" for item in self.lengths)))
        how = "tokens" if self.lengths[0].counted else "tokens (guessed)"
        return table((how, *(item.kind for item in self.lengths)), rows)


def findings_table(findings: Sequence[Finding]) -> str:
    """Return one line per finding; empty where there is none."""
    order = sorted(findings, key=lambda item: (item.level != "error", -item.rows))
    rows = [(item.level, item.name, item.rows, item.text + _places(item)) for item in order]
    return table(("level", "what", "count", "meaning"), rows) if rows else ""


def _places(finding: Finding) -> str:
    more = ", ..." if finding.rows > len(finding.places) else ""
    return f" [{', '.join(finding.places[:3])}{more}]" if finding.places else ""


def check_rows(
    arguments: FinetuneArguments,
    data: TrainData,
    encoder: Encoder,
    leaks: LeakChecks | None,
    note: Callable[[str], None],
) -> None:
    """Look at a run's rows, at most `ROWS_BEFORE_TRAINING` of them, and note what was found in one table.

    Args:
        leaks: what has looked for the held-out data in the rows.

    Raises:
        DataError: a finding is an error.
    """
    from ultrarag.finetune.batches import PairLengths

    settings = arguments.data
    limits = {"query": settings.query_max_len, "passage": settings.passage_max_len}
    if encoder.adapter.declared.pair_input:
        lengths = PairLengths.of(settings)
        limits = {"query": lengths.query, "pair": lengths.pair}
    checks = RowChecks(settings.train_group_size)
    sample = Sample(SAMPLE_BEFORE_TRAINING[0])
    for row in rows_before_training(data):
        checks.add(row.source, row.query, row.pos, row.neg, row.pos_scores, row.neg_scores)
        sample.add(row.query, [*row.pos, *row.neg])
    measured = measure(sample.within(SAMPLE_BEFORE_TRAINING[1]), token_counter(encoder), limits, "pair" in limits)
    note_findings(assembled(checks, leaks, measured, len(data)), note)


def rows_before_training(data: TrainData) -> Iterator[Example]:
    """At most `ROWS_BEFORE_TRAINING` rows, drawn evenly."""
    for number in np.unique(np.linspace(0, len(data) - 1, min(len(data), ROWS_BEFORE_TRAINING)).astype(np.int64)):
        yield data[int(number)]


def looked_for(checks: LeakChecks, data: TrainData) -> Overlap:
    """Let `checks` look for evaluation data in the rows, at most `ROWS_BEFORE_TRAINING` of them."""
    for row in rows_before_training(data):
        checks.add(row.source, row.query, row.pos)
    return checks.overlap(len(data))


def refuse_shared(overlap: Overlap, arguments: FinetuneArguments) -> None:
    """Refuse what shares too much with the evaluation data, where that was asked for.

    Raises:
        DataError: with the count, examples, and what to do.
    """
    if arguments.evaluation.shared_eval_data == "refuse" and overlap.too_much:
        examples = "".join(f"\n  {line}" for line in overlap.examples)
        raise DataError(
            f"--shared_eval_data refuse: {overlap}{examples}\nevaluate on other documents (ultrarag data split --by "
            "document), take these rows out, or say --shared_eval_data warn"
        )


def assembled(checks: RowChecks, leaks: LeakChecks | None, lengths: list[Lengths], rows: int) -> DataReport:
    """Put together what the parts of a check found."""
    findings = [
        *checks.findings(),
        *(leaks.findings() if leaks else ()),
        *(f for item in lengths for f in item.findings()),
    ]
    scripts = {kind: described_scripts(Counter(counts)) for kind, counts in checks.scripts.items()}
    return DataReport(rows, len(checks.places), findings=findings, lengths=lengths, scripts=scripts)


def note_findings(report: DataReport, note: Callable[[str], None]) -> None:
    """Note the findings.

    Raises:
        DataError: one of them is an error.
    """
    if not report.findings:
        return
    seen = "" if report.checked == report.rows else f" in {report.checked} of {report.rows} rows"
    text = f"data check{seen} (ultrarag data check says more):\n{findings_table(report.findings)}"
    if not report.ok:
        raise DataError(f"{text}\ncorrect the data, or train on it as it is with --skip_data_check")
    note(text)


@dataclass
class RenderedText:
    """One row of a batch's token ids, padding left out."""

    ids: list[int]
    #: the tokens, as the tokenizer writes them
    tokens: list[str]
    #: there was more of the text than is read
    cut: bool
    #: the text before tokenization, without its instruction
    text: str
    #: positive or negative; None for a query
    role: str | None = None
    #: the teacher's score
    teacher: float | None = None

    def lines(self, indent: str) -> Iterator[str]:
        """Yield what people read."""
        score = "" if self.teacher is None else f", teacher {self.teacher:g}"
        mark = ", cut" if self.cut else ""
        yield f"{indent}{self.role or 'query'}: {len(self.ids)} tokens{mark}{score}"
        yield f"{indent}  {' '.join(self.tokens)}"
        yield f"{indent}  {' '.join(map(str, self.ids))}"


@dataclass
class RenderedQuery:
    """A query with its group; for a cross-encoder the group's texts are whole pairs."""

    #: "file:line" of its row
    source: str
    #: the row's own instruction; None: the run's
    prompt: str | None
    query: RenderedText | None
    group: list[RenderedText] = field(default_factory=list)


@dataclass
class RenderedBatch:
    """The first batch of a run on the first rank."""

    dataset: str
    group_size: int
    in_batch_negatives: bool
    steps_per_epoch: int
    #: tokens that a query and a passage (or a pair) are padded to in this batch
    query_width: int | None
    passage_width: int
    queries: list[RenderedQuery] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        negatives = "with" if self.in_batch_negatives else "without"
        widths = f"{self.passage_width}" if self.query_width is None else f"{self.query_width} and {self.passage_width}"
        lines = [
            f"batch 0 of {self.steps_per_epoch} (epoch 0, rank 0): dataset '{self.dataset}', "
            f"{len(self.queries)} queries x {self.group_size} passages, {negatives} in-batch negatives, "
            f"padded to {widths} tokens"
        ]
        for number, item in enumerate(self.queries):
            prompt = "" if item.prompt is None else f", prompt {item.prompt!r}"
            lines += ["", f"{number}. {item.source}{prompt}"]
            for text in [*([item.query] if item.query else []), *item.group]:
                lines += text.lines("  ")
        return "\n".join(lines)


def rendered_batch(encoder: Encoder, plan: AnyPlan, collator: Collator | PairCollator) -> RenderedBatch:
    """Render batch 0 of epoch 0, by the run's own plan and collator."""
    batch = plan.batch(0, 0, 0)
    made = collator([batch])
    assert made["passages"] is not None  # only training leaves out a frozen side
    passages = _texts(encoder, made["passages"], _uncut(encoder, collator, batch), batch.passages)
    queries: list[RenderedText | None] = [None] * len(batch.queries)
    if made["queries"] is not None:
        queries = list(_texts(encoder, made["queries"], _uncut_queries(encoder, batch), batch.queries))
    width = None if made["queries"] is None else made["queries"]["input_ids"].shape[1]
    found = RenderedBatch(
        batch.dataset, batch.group_size, made["in_batch_negatives"], plan.steps_per_epoch, width,
        made["passages"]["input_ids"].shape[1],
    )  # fmt: skip
    for number, query in enumerate(queries):
        group = passages[number * batch.group_size : (number + 1) * batch.group_size]
        for place, text in enumerate(group):
            text.role = "negative" if place else "positive"
            text.teacher = batch.teacher[number][place] if batch.teacher else None
        found.queries.append(RenderedQuery(batch.sources[number], batch.prompts[number], query, group))
    return found


def _texts(encoder: Encoder, features: Any, uncut: Sequence[int], texts: Sequence[str]) -> list[RenderedText]:
    """Return each row's tokens; `uncut` are the lengths that nothing was cut from."""
    found = []
    for row, mask, full, text in zip(features["input_ids"], features["attention_mask"], uncut, texts, strict=True):
        ids = [int(number) for number in row[mask.bool()]]
        tokens = [str(token) for token in encoder.tokenizer.convert_ids_to_tokens(ids)]
        found.append(RenderedText(ids, tokens, len(ids) < full, text))
    return found


def _uncut_queries(encoder: Encoder, batch: Batch) -> list[int]:
    rendered = [encoder.settings.render(t, "query", p) for t, p in zip(batch.queries, batch.prompts, strict=True)]
    return _lengths(encoder, rendered)


def _uncut(encoder: Encoder, collator: Collator | PairCollator, batch: Batch) -> list[int]:
    """The lengths of the passages, or of the pairs, without a limit."""
    if isinstance(collator, Collator):
        return _lengths(encoder, collator.passages(batch))
    unlimited = PairCollator(encoder, PairLengths(1 << 20, None, 1 << 21))
    pairs = unlimited([batch])["passages"]
    assert pairs is not None
    return [int(mask.sum()) for mask in pairs["attention_mask"]]


def _lengths(encoder: Encoder, texts: list[str]) -> list[int]:
    with keep_limits(encoder.tokenizer):
        return [len(ids) for ids in encoder.tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
