"""What a refresh writes into its output folder: how far it has come, for the next start, and the report at its end.

`refresh.state.json` is there until the new generation is live, and a crash is carried on from it; then `refresh.json`
for programs and `refresh.html` for people stay beside the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ultrarag.checkpoint import read_manifest
from ultrarag.errors import DataError, IndexStateError
from ultrarag.evaluation import Measured
from ultrarag.finetune import read_history, write_text
from ultrarag.io import sha256_of, write_json
from ultrarag.report import Page, Rung, render
from ultrarag.retrieve.bridge import described as bridge_described
from ultrarag.retrieve.generation import Generation
from ultrarag.retrieve.refresh.ladder import Comparison, Step
from ultrarag.rows.checks import described

STATE_FILE, JSON_FILE, HTML_FILE = "refresh.state.json", "refresh.json", "refresh.html"
#: Of the state file.
FORMAT = 1


@dataclass(frozen=True)
class Request:
    """What was asked for, by content: the same request goes on where an earlier one was cut off."""

    train_data: str
    eval_data: str | None
    arguments: dict[str, Any]

    @classmethod
    def of(cls, train_data: Any, eval_data: Any, arguments: Mapping[str, Any]) -> Request:
        """Digest the data; paths count by what the files hold."""
        plain = json.loads(json.dumps(dict(arguments), default=str, sort_keys=True))
        return cls(digest(train_data), None if eval_data is None else digest(eval_data), plain)

    def differences(self, other: Request) -> list[str]:
        """The names of what another request asks for differently."""
        names = sorted(self.arguments.keys() | other.arguments.keys())
        changed = [name for name in names if self.arguments.get(name) != other.arguments.get(name)]
        data = [name for name in ("train_data", "eval_data") if getattr(self, name) != getattr(other, name)]
        return data + changed


@dataclass
class RefreshState:
    """What is done so far; a stage is done when its result is here."""

    request: Request
    #: fingerprint of the live encoder that is trained further
    parent: str
    #: generation of that encoder
    parent_generation: int
    #: result of the fine-tuning: fingerprint, steps, loss, metrics, notes
    trained: dict[str, Any] | None = None
    #: the rungs of the ladder that were tried, where the effort is auto
    ladder: list[Step] = field(default_factory=list)
    #: the generation built from it
    generation: int | None = None
    #: what was decided of a bridge to it; see `ultrarag.retrieve.bridge.BridgeReport`
    bridge: dict[str, Any] | None = None
    #: rung -> the learning rate that was found on a slice, and what was tried; see `ultrarag.retrieve.refresh.rates`
    rates: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: what was measured before the swap; see `ultrarag.evaluation.results`
    measured: dict[str, Any] | None = None
    #: stage -> seconds
    seconds: dict[str, float] = field(default_factory=dict)
    #: what training and evaluation share; see `ultrarag.rows.checks.Overlap`
    overlap: dict[str, Any] | None = None

    def save(self, folder: Path) -> None:
        """Write the state durably."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / STATE_FILE, {"format": FORMAT, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> RefreshState | None:
        """Read the state of a refresh that was begun in `folder`, or None.

        Raises:
            IndexStateError: when the file is damaged or of a newer version.
        """
        path = folder / STATE_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") > FORMAT:
                raise IndexStateError(f"'{path}' was written by a newer ultrarag: upgrade ultrarag to go on with it")
            tried = [Step.from_dict(step) for step in values.get("ladder", [])]
            return cls(**{**values, "request": Request(**values["request"]), "ladder": tried})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IndexStateError(
                f"'{path}' cannot be read ({type(error).__name__}: {error}); give another output_dir, or delete it"
            ) from error


def digest(data: Any) -> str:
    """SHA-256 of training or evaluation data: of the rows, or of the files behind the paths.

    Raises:
        DataError: for a path that does not exist, or rows that are not JSON.
    """
    if isinstance(data, str | os.PathLike):
        return _of_paths([data])
    if not isinstance(data, Sequence):
        raise DataError("give the data as a path, a list of paths, or a list of rows: it is read more than once")
    if data and all(isinstance(item, str | os.PathLike) for item in data):
        return _of_paths(data)
    try:
        rows = json.dumps(list(data), sort_keys=True, ensure_ascii=True)
    except (TypeError, ValueError) as error:
        raise DataError(f"the rows given are not JSON: {error}") from error
    return hashlib.sha256(rows.encode()).hexdigest()


def _of_paths(paths: Sequence[str | os.PathLike[str]]) -> str:
    """Contents in their order, with the names below each path, and never the path itself: it may be moved."""
    found = hashlib.sha256()
    for given in paths:
        path = Path(given)
        if not path.exists():
            raise DataError(f"'{path}' does not exist")
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            found.update(f"{file.relative_to(path) if file != path else ''}\0{sha256_of(file)}\n".encode())
    return found.hexdigest()


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
    #: the rungs of the ladder that were tried: gain, guard, seconds, passages encoded, and what was decided
    ladder: list[dict[str, Any]]
    #: what was asked for, by content
    request: dict[str, Any]
    #: the page for people
    html: str
    #: by which split it was judged, and what training and evaluation share (`ultrarag.rows.checks.Overlap`): "split" is
    #: "by document", "by query", "no split" or "unknown"; None where nothing was judged
    overlap: dict[str, Any] | None = None
    #: what was decided of a bridge (`ultrarag.retrieve.bridge.BridgeReport`); None where none was asked for
    bridge: dict[str, Any] | None = None
    #: query id -> text, of those that gained or lost
    queries: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        state: RefreshState,
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
        gained, lost = (dict(shown.gained()), dict(shown.lost())) if shown else ({}, {})
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
            gained=gained,
            lost=lost,
            seconds=dict(state.seconds),
            lineage=_lineage(state, folder),
            steps=trained["steps"],
            loss=trained["loss"],
            notes=list(
                dict.fromkeys((*trained["notes"], *_shared(state.overlap), *(shown.verdict.notes if shown else [])))
            ),
            ladder=[_without_values(step) for step in state.ladder],
            request=asdict(state.request),
            html=str(folder / HTML_FILE),
            overlap=state.overlap or trained.get("overlap"),
            bridge=state.bridge,
            queries={id: shown.queries[id] for id in (*gained, *lost)} if shown else {},
        )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> RefreshReport:
        """Read a `refresh.json`.

        Raises:
            IndexStateError: when it is damaged.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            values = {"ladder": [], **values}  # an earlier version knew no rungs
            # a report of an earlier version does not say what was shared
            return cls(**{item.name: values[item.name] for item in fields(cls) if item.name in values})
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
        lines += [f"{step['rung']:<11} {step['decision']} ({step['seconds']:.0f} s)" for step in self.ladder]
        if self.overlap:
            lines.append(f"split       {described(self.overlap)}")
        if self.bridge:
            lines.append(f"bridge      {bridge_described(self.bridge)}")
        lines.append("seconds     " + ", ".join(f"{stage} {value:.1f}" for stage, value in self.seconds.items()))
        return "\n".join([*lines, f"report      {self.html}"])


def _without_values(step: Step) -> dict[str, Any]:
    return {name: value for name, value in step.to_dict().items() if name not in ("values", "trained")}


def _shared(overlap: Mapping[str, Any] | None) -> list[str]:
    """A warning where the numbers promise too much."""
    if not overlap or overlap["split"] not in ("by query", "no split"):
        return []
    examples = "; ".join(overlap["examples"][:3])
    return [
        f"training and evaluation are not apart, so the gain promises too much: {described(overlap)} ({examples}); "
        "evaluate on other documents (ultrarag data split --by document)"
    ]


def is_begun(folder: Path) -> bool:
    """Whether a refresh is under way in an output folder, or was carried through there."""
    return any((folder / name).exists() for name in (STATE_FILE, JSON_FILE))


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
        ladder=[_rung(step) for step in report.ladder],
    )
    write_text(folder / HTML_FILE, render(page))
    write_json(folder / JSON_FILE, report.to_dict())


def _metrics(measured: Measured | None, trained: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    if measured is None:
        return trained
    return {"before": dict(measured.before.metrics), "after": dict(measured.after.metrics)}


def _lineage(state: RefreshState, folder: Path) -> dict[str, Any]:
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


def _rung(step: dict[str, Any]) -> Rung:
    gain, guard = (None if step[name] is None else Comparison(**step[name]) for name in ("gain", "guard"))
    return Rung(
        step["rung"],
        None if gain is None else gain.significance,
        None if guard is None else guard.significance,
        step["seconds"],
        step["encoded"],
        step["taken"],
        step["decision"],
    )


def _facts(report: RefreshReport) -> list[tuple[str, str]]:
    lineage = report.lineage
    return [
        ("index", f"{report.index} ({report.passages} passages)"),
        ("checkpoint", report.checkpoint),
        ("fingerprint", lineage["fingerprint"]),
        ("parent's fingerprint", lineage["parent"]),
        *[(f"data: {item['name']}", f"{item['rows']} rows, sha256 {item['sha256']}") for item in lineage["train_data"]],
        *([("evaluation data", f"sha256 {lineage['eval_sha256']}")] if lineage["eval_sha256"] else []),
        *([("evaluation split", described(report.overlap))] if report.overlap else []),
        *([("bridge", bridge_described(report.bridge))] if report.bridge else []),
        ("steps", str(report.steps)),
        *([("mean training loss", f"{report.loss:.4f}")] if report.loss is not None else []),
        *[(f"seconds: {stage}", f"{value:.1f}") for stage, value in report.seconds.items()],
        *[(f"argument: {name}", json.dumps(value)) for name, value in report.request["arguments"].items()],
    ]
