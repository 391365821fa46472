"""DataReport: what is known about training data before a run, and the check that every fine-tune makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrarag.errors import DataError
from ultrarag.io import table
from ultrarag.rows.checks import (
    Cost,
    Finding,
    LeakChecks,
    Lengths,
    RowChecks,
    Sample,
    described_scripts,
    measure,
    token_counter,
)

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder
    from ultrarag.finetune.batches import TrainData
    from ultrarag.finetune.evaluate import HeldOut
    from ultrarag.finetune.flags import FinetuneArguments

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

    @property
    def ok(self) -> bool:
        """There is no error."""
        return not any(item.level == "error" for item in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        parts = [self._summary(), self._histogram(), findings_table(self.findings) or "nothing to complain of"]
        return "\n\n".join(part for part in parts if part)

    def _summary(self) -> str:
        unusable = f", {self.bad} of which cannot be used" if self.bad else ""
        lines = [("rows", f"{self.rows}{unusable}, in {len(self.files)} file{'s' * (len(self.files) != 1)}")]
        for kind, shares in self.scripts.items():
            lines.append((f"{kind} script", ", ".join(f"{name} {share:.1%}" for name, share in shares.items())))
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
    held_out: HeldOut | None,
    note: Callable[[str], None],
) -> None:
    """Look at a run's rows, at most `ROWS_BEFORE_TRAINING` of them, and note what was found in one table.

    Args:
        held_out: the held-out data, whose texts should not be in the rows.

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
    leaks = LeakChecks.of(held_out, "warning") if held_out else None
    sample = Sample(SAMPLE_BEFORE_TRAINING[0])
    numbers = np.unique(np.linspace(0, len(data) - 1, min(len(data), ROWS_BEFORE_TRAINING)).astype(np.int64))
    for number in numbers:
        row = data[int(number)]
        checks.add(row.source, row.query, row.pos, row.neg, row.pos_scores, row.neg_scores)
        sample.add(row.query, [*row.pos, *row.neg])
        if leaks:
            leaks.add(row.source, row.query, row.pos)
    measured = measure(sample.within(SAMPLE_BEFORE_TRAINING[1]), token_counter(encoder), limits, "pair" in limits)
    note_findings(assembled(checks, leaks, measured, len(data)), note)


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
