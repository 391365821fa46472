"""Gate: what the last comparison measured, which queries gained and lost, and the way past it, with a reason."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.responses import Response

from ultrarag.errors import IndexStateError
from ultrarag.retrieve import RefreshReport
from ultrarag.service.console.page import Ask, Page
from ultrarag.service.faults import Fault
from ultrarag.service.jobs import Job
from ultrarag.service.state import Service

#: Queries that are named on each side.
MOST_NAMED = 25
#: Characters of a reason: fewer say nothing.
SHORTEST_REASON, LONGEST_REASON = 10, 2000


async def gate(ask: Ask) -> Response:
    """The last verdict, or that of a job."""
    found = await ask.service.writes.run(_state, ask.service, ask.text("job"))
    return ask.show("gate.html", **found)


def _state(service: Service, wanted: str) -> dict[str, Any]:
    judged: list[tuple[Job, dict[str, Any]]] = []
    for job in service.jobs.all():
        report = _report(service, job)
        if report is not None and report["verdict"]:
            judged.append((job, report))
    chosen = next((pair for pair in judged if wanted in ("", pair[0].id)), None)
    if chosen is None and wanted:
        raise Fault(404, f"job '{wanted[:100]}' has no verdict")
    if chosen is None:
        return {"jobs": [], "job": None}
    job, report = chosen
    states = {entry["id"]: entry["state"] for entry in service.live.status()["generations"]}
    gained = sorted(report["gained"].items(), key=lambda item: -item[1])
    lost = sorted(report["lost"].items(), key=lambda item: item[1])
    return {
        "jobs": [job for job, _ in judged],
        "job": job,
        "report": report,
        "verdict": report["verdict"],
        "bar": bar(report["verdict"]["change"]),
        "gained": _named(report, gained),
        "lost": _named(report, lost),
        "counts": (len(gained), len(lost)),
        "forcible": job.state == "refused" and states.get(report["generation"]) == "ready",
        "shortest": SHORTEST_REASON,
        "longest": LONGEST_REASON,
    }


def _named(report: dict[str, Any], changes: list[tuple[str, float]]) -> list[tuple[str, str, float]]:
    """(query id, its text, change); an earlier version's report has no texts."""
    texts = report.get("queries", {})
    return [(id, texts.get(id, ""), change) for id, change in changes[:MOST_NAMED]]


def _report(service: Service, job: Job) -> dict[str, Any] | None:
    """What a refresh came to; one that was refused has it in its folder alone."""
    if job.report is not None:
        return job.report
    if job.state != "refused":
        return None
    try:
        return asdict(RefreshReport.read(service.jobs.folder(job.id) / "model" / "refresh.json"))
    except IndexStateError:
        return None


def bar(change: dict[str, Any]) -> dict[str, float]:
    """Where an interval lies on a line of 600 units with 0 in its middle."""
    reach = max(abs(change["low"]), abs(change["high"]), abs(change["difference"]), 1e-9) * 1.1
    return {name: round(300 + 300 * change[name] / reach, 1) for name in ("low", "high", "difference")}


async def force(ask: Ask) -> Response:
    """Let a refused generation go live; the reason is kept with the job."""
    reason = ask.text("reason")
    if not SHORTEST_REASON <= len(reason) <= LONGEST_REASON:
        raise Fault(400, f"give the reason, in {SHORTEST_REASON} to {LONGEST_REASON} characters")
    job = await ask.service.writes.run(ask.service.jobs.force, ask.text("job"), reason)
    return ask.go(f"/console/refresh/{job.id}")


PAGES = (Page("GET", "/console/gate", gate), Page("POST", "/console/force", force))
