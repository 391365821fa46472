"""What a refresh gives back, also beside the checkpoint: `refresh.json` for programs, `refresh.html` for people."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ultrarag.checkpoint import read_manifest
from ultrarag.errors import IndexStateError
from ultrarag.evaluation import Measured
from ultrarag.finetune import read_history, write_text
from ultrarag.io import write_json
from ultrarag.report import Page, render
from ultrarag.retrieve.generation import Generation
from ultrarag.retrieve.refresh.state import State

JSON_FILE, HTML_FILE = "refresh.json", "refresh.html"


@dataclass(frozen=True)
class RefreshReport:
    """The result of `LiveIndex.refresh`."""

    #: "swapped", or "refused" by the gate
    outcome: str
    #: why it was refused
    refused: str | None
    #: it went live although the gate said no
    forced: bool
    checkpoint: str
    index: str
    #: ids of the generations
    old_generation: int
    generation: int
    passages: int
    #: "before" and "after": metric -> value, of the gate's queries, else of the fine-tuning's evaluation
    metrics: dict[str, dict[str, float]]
    #: the comparison that decided: metric, old, new, change; None without a gate
    verdict: dict[str, Any] | None
    #: what it was measured on
    measured_on: str | None
    #: query id -> change, of the metric that decided
    gained: dict[str, float]
    lost: dict[str, float]
    #: stage -> seconds, of its last start
    seconds: dict[str, float]
    #: parent, fingerprint, and the digests of the data
    lineage: dict[str, Any]
    steps: int
    #: mean training loss
    loss: float | None
    notes: list[str]
    #: what was asked for, by content
    request: dict[str, Any]
    #: the page for people
    html: str

    @classmethod
    def of(
        cls,
        state: State,
        generation: Generation,
        folder: Path,
        index: Path,
        passages: int,
        refused: str | None,
        shown: Measured | None,
    ) -> RefreshReport:
        """Collect what a refresh came to; `shown` is what the gate measured, else what the fine-tuning did."""
        assert state.trained is not None
        measured = Measured.from_dict(state.measured) if state.measured else None
        trained = state.trained
        return cls(
            outcome="refused" if refused else "swapped",
            refused=refused,
            forced=generation.forced,
            checkpoint=str(folder),
            index=str(index),
            old_generation=state.parent_generation,
            generation=generation.id,
            passages=passages,
            metrics=_metrics(measured, trained["metrics"]),
            verdict=measured.verdict.to_dict() if measured else None,
            measured_on=shown.where if shown else None,
            gained=dict(shown.gained()) if shown else {},
            lost=dict(shown.lost()) if shown else {},
            seconds=dict(state.seconds),
            lineage=_lineage(state, folder),
            steps=trained["steps"],
            loss=trained["loss"],
            notes=list(dict.fromkeys((*trained["notes"], *(shown.verdict.notes if shown else [])))),
            request=asdict(state.request),
            html=str(folder / HTML_FILE),
        )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> RefreshReport:
        """Read a `refresh.json`.

        Raises:
            IndexStateError: when it is damaged.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{item.name: values[item.name] for item in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IndexStateError(f"'{path}' cannot be read ({type(error).__name__}: {error})") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        parent, own = (self.lineage[name][:12] for name in ("parent", "fingerprint"))
        lines = [
            f"outcome     {_outcome(self)}",
            f"checkpoint  {self.checkpoint} ({parent} -> {own}, {self.steps} steps)",
        ]
        for name, before in self.metrics.get("before", {}).items():
            lines.append(f"{name:<11} {before:.4f} -> {self.metrics['after'][name]:.4f}")
        lines.append("seconds     " + ", ".join(f"{stage} {value:.1f}" for stage, value in self.seconds.items()))
        return "\n".join([*lines, f"report      {self.html}"])


def write_report(report: RefreshReport, measured: Measured | None, folder: Path) -> None:
    """Write `refresh.html`, then `refresh.json`: what names the page comes after it."""
    page = Page(
        title=f"Refresh of the index '{Path(report.index).name}'",
        outcome=_outcome(report),
        good=report.outcome == "swapped" and not report.forced,
        metrics=report.metrics,
        history=read_history(folder),
        measured=measured,
        facts=_facts(report),
        notes=report.notes,
    )
    write_text(folder / HTML_FILE, render(page))
    write_json(folder / JSON_FILE, report.to_dict())


def _metrics(measured: Measured | None, trained: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    if measured is None:
        return trained
    return {"before": dict(measured.before.metrics), "after": dict(measured.after.metrics)}


def _lineage(state: State, folder: Path) -> dict[str, Any]:
    assert state.trained is not None
    manifest = read_manifest(folder)
    data = manifest.training.data if manifest and manifest.training else []
    return {
        "parent": state.parent,
        "fingerprint": state.trained["fingerprint"],
        "train_data": data,
        "train_sha256": state.request.train_data,
        "eval_sha256": state.request.eval_data,
    }


def _outcome(report: RefreshReport) -> str:
    if report.refused:
        return f"Refused: {report.refused}"
    told = f"generation {report.generation} is live in place of {report.old_generation}"
    if report.verdict is None:
        return f"Swapped: {told}; no gate was asked"
    verdict = report.verdict
    numbers = (
        f"{verdict['metric']} {verdict['old']:.4f} → {verdict['new']:.4f} (p = {verdict['change']['p_value']:.4f})"
    )
    return f"{'Forced, against the gate' if report.forced else 'Swapped'}: {told}; {numbers}, {report.measured_on}"


def _facts(report: RefreshReport) -> list[tuple[str, str]]:
    lineage = report.lineage
    return [
        ("index", f"{report.index} ({report.passages} passages)"),
        ("checkpoint", report.checkpoint),
        ("fingerprint", lineage["fingerprint"]),
        ("parent's fingerprint", lineage["parent"]),
        *[(f"data: {item['name']}", f"{item['rows']} rows, sha256 {item['sha256']}") for item in lineage["train_data"]],
        *([("evaluation data", f"sha256 {lineage['eval_sha256']}")] if lineage["eval_sha256"] else []),
        ("steps", str(report.steps)),
        *([("mean training loss", f"{report.loss:.4f}")] if report.loss is not None else []),
        *[(f"seconds: {stage}", f"{value:.1f}") for stage, value in report.seconds.items()],
        *[(f"argument: {name}", json.dumps(value)) for name, value in report.request["arguments"].items()],
    ]
