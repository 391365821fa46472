"""The report of a run beside its checkpoint: `report.json` for programs, `report.html` for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ultrarag.checkpoint import Training
from ultrarag.evaluation import MAIN_METRIC, Measured
from ultrarag.finetune.output import checkpoints_in
from ultrarag.io import write_bytes, write_json
from ultrarag.report import Page, render
from ultrarag.rows.checks import described

JSON_FILE, HTML_FILE = "report.json", "report.html"


def write_report(
    folder: Path,
    result: FinetuneResult,
    record: Training,
    history: Sequence[Mapping[str, Any]],
    measured: Measured | None,
) -> None:
    """Write `report.html`, then `report.json`, which names it.

    Args:
        history: the trainer's log.
        measured: the evaluation before and after; None without any.
    """
    page = Page(
        title=f"Fine-tuning: {folder.name}",
        outcome=_outcome(result),
        good=not _worse(result.metrics),
        metrics=result.metrics,
        history=history,
        measured=measured,
        guard=_guard(result.metrics),
        merge=result.merge,
        facts=_facts(result, record),
        notes=result.notes,
    )
    write_text(folder / HTML_FILE, render(page))
    found = {**result.to_dict(), "parent_fingerprint": record.parent, "data": record.data, "history": list(history)}
    found["gained"] = dict(measured.gained()) if measured else {}
    found["lost"] = dict(measured.lost()) if measured else {}
    found["measured"] = measured.short().to_dict() if measured else None
    write_json(folder / JSON_FILE, found)


def read_measured(folder: Path) -> dict[str, Any] | None:
    """What the run in `folder` measured, as `Measured.from_dict` reads it; None where it measured nothing."""
    found = _read(folder).get("measured")
    return dict(found) if found else None


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The trainer's log of the run that made a checkpoint; empty where it kept none."""
    if found := _read(folder).get("history"):
        return list(found)
    for checkpoint in reversed(checkpoints_in(folder)):
        try:
            state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            return list(state["log_history"])
        except (OSError, ValueError, KeyError):
            continue  # cut off while it was written: the one before has almost as much
    return []


def _read(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / JSON_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def write_text(path: Path, value: str) -> None:
    """Replace a text file in one step."""
    write_bytes(path, value.encode("utf-8"))


def _worse(metrics: Mapping[str, Mapping[str, float]]) -> bool:
    return bool(metrics.get("before")) and metrics["after"][MAIN_METRIC] < metrics["before"][MAIN_METRIC]


def _outcome(result: FinetuneResult) -> str:
    done = f"{result.steps} steps" + (f", mean loss {result.loss:.4f}" if result.loss is not None else "")
    if not result.metrics.get("before"):
        return f"Trained: {done}; nothing was evaluated (no --eval_data)"
    before, after = (result.metrics[stage][MAIN_METRIC] for stage in ("before", "after"))
    return f"{'Worse' if after < before else 'Trained'}: {done}; {MAIN_METRIC} {before:.4f} → {after:.4f}"


def _guard(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """The metrics on the guard, under the names that those on the domain have."""
    return {stage.removeprefix("guard_"): found for stage, found in metrics.items() if stage.startswith("guard_")}


def _facts(result: FinetuneResult, record: Training) -> list[tuple[str, str]]:
    merge = result.merge
    return [
        ("checkpoint", result.checkpoint),
        ("fingerprint", result.fingerprint),
        ("parent", result.parent),
        ("parent's fingerprint", record.parent),
        *([("merged with", f"{merge['with']}: {merge['path']}, {merge['fingerprint']}")] if merge else []),
        *([("evaluation split", described(result.overlap))] if result.overlap else []),
        *[(f"{_kind(item)}: {item['name']}", f"{item['rows']} rows, sha256 {item['sha256']}") for item in record.data],
        ("models before it", str(len(record.ancestors))),
        ("steps", str(result.steps)),
        ("seconds of training", f"{result.seconds:.1f}"),
        ("arguments", json.dumps(record.arguments, ensure_ascii=False, sort_keys=True)),
    ]


def _kind(item: Mapping[str, Any]) -> str:
    return "replayed data" if item.get("replay") else "data"


@dataclass
class FinetuneResult:
    """What a fine-tuning run gives back."""

    #: the finished checkpoint's directory
    checkpoint: str
    #: the model it was trained from
    parent: str
    #: identity of the finished model
    fingerprint: str
    steps: int
    #: mean training loss
    loss: float | None
    #: seconds of training, without loading and evaluation
    seconds: float
    #: "before" and "after": metric -> value; empty without eval_data; with guard_data "guard_before" and "guard_after"
    #: too, and with merge_with "unmerged" and "guard_unmerged", the trained weights alone
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    #: what was translated, dropped or changed, one line each
    notes: list[str] = field(default_factory=list)
    #: the model that the weights were averaged with, the weight, and what was tried; None without `merge_with`
    merge: dict[str, Any] | None = None
    #: the page for people
    report: str = ""
    #: what training and evaluation share, and which split that makes (`ultrarag.rows.checks.Overlap`); None where
    #: nothing was evaluated, or the check was skipped
    overlap: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"checkpoint  {self.checkpoint}", f"steps       {self.steps}"]
        if self.loss is not None:
            lines.append(f"loss        {self.loss:.4f}")
        if self.merge:
            lines.append(f"merged      {self.merge['weight']:g} of it with {self.merge['with']} ({self.merge['path']})")
        for name, before in self.metrics.get("before", {}).items():
            lines.append(f"{name:<11} {before:.4f} -> {self.metrics['after'][name]:.4f}")
        for name, before in self.metrics.get("guard_before", {}).items():
            lines.append(f"{name:<11} {before:.4f} -> {self.metrics['guard_after'][name]:.4f} (guard)")
        if self.overlap:
            lines.append(f"split       {described(self.overlap)}")
        return "\n".join(lines)
