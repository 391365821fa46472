"""What a refresh came to, for the trackers that its fine-tuning reports to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultrarag.finetune import compared, send_figures
from ultrarag.retrieve.refresh.report import RefreshReport


def track(report: RefreshReport, reporters: str | Sequence[str] | None, encodes: bool) -> None:
    """Send a refresh's figures: a wandb run of its own beside those of its fine-tunes, and a tensorboard folder.

    Their step is the number of the generation: refreshes of one index that report to one folder make a curve.

    Args:
        encodes: all passages were encoded for its generation.
    """
    output = Path(report.checkpoint)
    place = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or output / "runs") / "refresh"
    figures = refresh_figures(report, encodes)
    send_figures(reporters, figures, place, f"{output.name} refresh", report.generation, "refresh")


def refresh_figures(report: RefreshReport, encodes: bool) -> dict[str, float | int | str]:
    """The gate, the rungs, seconds and passages of a refresh, as numbers and texts."""
    tried = sum(step["encoded"] for step in report.ladder)
    figures: dict[str, float | int | str] = {
        "refresh/outcome": report.outcome,
        "refresh/reason": report.refused or "",
        "refresh/forced": int(report.forced),
        "refresh/swapped": int(report.outcome == "swapped"),
        "refresh/fingerprint": report.lineage["fingerprint"],
        "refresh/parent": report.lineage["parent"],
        "refresh/old_generation": report.old_generation,
        "refresh/generation": report.generation,
        "refresh/passages": report.passages,
        "refresh/passages_encoded": tried + (report.passages if encodes else 0),
        "refresh/steps": report.steps,
        "refresh/seconds": sum(report.seconds.values()),
        **{f"refresh/seconds/{stage}": seconds for stage, seconds in report.seconds.items()},
    }
    if (verdict := report.verdict) is not None:
        figures |= compared(f"gate/{verdict['metric']}", verdict["old"], verdict["new"], verdict["change"])
        figures["gate/queries"] = verdict["change"]["queries"]
    for stage, metrics in report.metrics.items():
        figures |= {f"metrics/{name}/{stage}": value for name, value in metrics.items()}
    for step in report.ladder:
        figures |= _rung(step)
    return figures


def _rung(step: dict[str, Any]) -> dict[str, float | int | str]:
    place = f"ladder/{step['rung']}"
    found: dict[str, float | int | str] = {
        f"{place}/decision": step["decision"],
        f"{place}/taken": int(step["taken"]),
        f"{place}/seconds": step["seconds"],
        f"{place}/passages_encoded": step["encoded"],
        f"{place}/guard_holds": int(step["guard_holds"]),
    }
    for name in ("gain", "guard"):
        if (comparison := step[name]) is not None:
            found |= compared(f"{place}/{name}", comparison["old"], comparison["new"], comparison["change"])
    return found
