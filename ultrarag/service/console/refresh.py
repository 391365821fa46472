"""Refresh: what there is to learn from, a refresh that is started, watched and cancelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from markupsafe import Markup
from starlette.responses import Response

from ultrarag.report import line_chart
from ultrarag.service.console.now import feedback_counts
from ultrarag.service.console.page import Ask, Page
from ultrarag.service.endpoint import Call
from ultrarag.service.faults import Fault
from ultrarag.service.jobs import RESUMABLE, Job
from ultrarag.service.learning import EventsQuery, RefreshBody, below, events, requested
from ultrarag.service.state import Service

#: Numbers of fine-tuning that the form has: name, label, whole number.
NUMBERS = (
    ("learning_rate", "Learning rate", False),
    ("num_train_epochs", "Epochs", False),
    ("max_steps", "Steps at most", True),
    ("per_device_train_batch_size", "Batch size", True),
    ("passage_max_len", "Tokens of a passage", True),
)
EFFORTS = ("full", "auto", "query", "query-map", "passage-map")
#: Files that the form suggests at most.
MOST_FILES = 200


async def refresh(ask: Ask) -> Response:
    """What there is to learn from, the form, and all jobs."""
    found = await ask.service.writes.run(_state, ask.service)
    return ask.show("refresh.html", numbers=NUMBERS, efforts=EFFORTS, **found)


def _state(service: Service) -> dict[str, Any]:
    counts = feedback_counts(service)
    due = service.live.schedule(service.settings.learn or "daily").due() if counts else None
    report = due.rows.report if due and due.rows else service.live.training_rows().report if counts else None
    return {"report": report, "due": due, "files": _files(service), "jobs": service.jobs.all()}


def _files(service: Service) -> list[str]:
    """Training data below the folder that clients may name files in."""
    if service.settings.data_dir is None:
        return []
    root = Path(service.settings.data_dir)
    found = (path.relative_to(root).as_posix() for path in root.rglob("*.jsonl") if path.is_file())
    return sorted(islice(found, MOST_FILES))


async def start(ask: Ask) -> Response:
    """Begin a refresh from the feedback, or from a file in the folder for it; or only say what it would do."""
    service = ask.service
    request, files = await service.writes.run(_asked, ask)
    if ask.text("dry_run"):
        asked = {name: value for name, value in request.items() if name not in ("force", "reason")}
        trial = await service.writes.run(lambda: service.live.check_refresh(**asked))
        again = {name: values[-1] for name, values in ask.form.items() if name not in ("form_token", "dry_run")}
        return ask.show("trial.html", trial=trial, again=again)
    job = await service.writes.run(service.jobs.start, request, files)
    return ask.go(f"/console/refresh/{job.id}")


def _asked(ask: Ask) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    given: dict[str, Any] = {
        "eval_data": ask.text("eval_data") or None,
        "gate": bool(ask.text("gate")),
        "effort": ask.text("effort", "full"),
        "arguments": {name: _number(ask.text(name), label, whole) for name, label, whole in NUMBERS if ask.text(name)},
    }
    if given["effort"] not in EFFORTS:
        raise Fault(400, f"there is no effort '{ask.text('effort')[:50]}'; choose one of {', '.join(EFFORTS)}")
    source = ask.text("source")
    if source == "file":
        if not ask.text("train_data"):
            raise Fault(400, "name the file to train on")
        return requested(ask.service, RefreshBody(train_data=[ask.text("train_data")], **given))
    if source != "feedback":
        raise Fault(400, "choose what to learn from: the feedback, or a file")
    if given["eval_data"]:
        given["eval_data"] = below(ask.service, given["eval_data"])
    arguments = given.pop("arguments")
    return {"train_data": "feedback", **{k: v for k, v in given.items() if v is not None}, **arguments}, {}


def _number(text: str, label: str, whole: bool) -> float | int:
    try:
        return int(text) if whole else float(text)
    except ValueError as error:
        raise Fault(400, f"{label} is '{text[:50]}'; it must be a {'whole ' if whole else ''}number") from error


async def job(ask: Ask) -> Response:
    """One job; asked by htmx, the part that changes."""
    id = ask.request.path_params["id"]
    found, happened = await ask.service.writes.run(_job, ask.service, id)
    template = "job_fresh.html" if ask.request.headers.get("hx-request") else "job.html"
    curve = Markup(line_chart(losses(happened), "step", "loss"))
    return ask.show(template, job=found, events=happened[-30:], curve=curve, resumable=found.state in RESUMABLE)


def losses(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(step, loss) of the training run that goes on, or that was the last: the steps of one only grow."""
    found: list[tuple[float, float]] = []
    for event in events:
        if (step := event.get("loss_step")) is None or (found and step == found[-1][0]):
            continue
        if found and step < found[-1][0]:
            found.clear()
        found.append((step, event["loss"]))
    return found


def _job(service: Service, id: str) -> tuple[Job, list[dict[str, Any]]]:
    return service.jobs.get(id), service.jobs.events(id)


async def stream(ask: Ask) -> Response:
    """What happens to a job, as server-sent events: the page then asks for its part anew."""
    after = ask.number("after", 0, 0, 10**9 - 1)
    return await events(Call(ask.service, ask.request, None, EventsQuery(after=after), ask.request.path_params))


async def cancel(ask: Ask) -> Response:
    """Stop a job."""
    id = ask.request.path_params["id"]
    await ask.service.writes.run(ask.service.jobs.cancel, id)
    return ask.go(f"/console/refresh/{id}")


async def resume(ask: Ask) -> Response:
    """Go on with a job that was cut off."""
    id = ask.request.path_params["id"]
    await ask.service.writes.run(ask.service.jobs.resume, id)
    return ask.go(f"/console/refresh/{id}")


PAGES = (
    Page("GET", "/console/refresh", refresh),
    Page("POST", "/console/refresh", start),
    Page("GET", "/console/refresh/{id}", job),
    Page("GET", "/console/refresh/{id}/events", stream),
    Page("POST", "/console/refresh/{id}/cancel", cancel),
    Page("POST", "/console/refresh/{id}/resume", resume),
)
