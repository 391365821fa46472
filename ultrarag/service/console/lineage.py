"""Lineage: which models the index had, what each was trained on, what two differ in, and the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from starlette.responses import Response

from ultrarag.checkpoint import checkpoint_log
from ultrarag.errors import CheckpointError
from ultrarag.retrieve.generation import IndexLayout
from ultrarag.service.console.page import Ask, Page
from ultrarag.service.faults import Fault
from ultrarag.service.state import Service


async def lineage(ask: Ask) -> Response:
    """All generations, the chain of checkpoints, and the difference of two of these."""
    found = await ask.service.writes.run(_state, ask.service)
    records = found["records"]
    old, new = (ask.text(name) for name in ("old", "new"))
    values = {"old": old, "new": new, "differences": None, **found}
    if old or new:
        values["differences"] = list(differences(_record(records, old), _record(records, new)))
    elif len(records) > 1:  # the two newest, in the form
        values |= {"old": records[1]["fingerprint"], "new": records[0]["fingerprint"]}
    notice = "Rolled back: the previous generation is live again." if ask.text("done") == "rollback" else None
    return ask.show("lineage.html", notice=notice, **values)


def _state(service: Service) -> dict[str, Any]:
    status = service.live.status()
    generations = sorted(status["generations"], key=lambda entry: -entry["id"])
    layout = IndexLayout(service.live.path)
    records: dict[str, dict[str, Any]] = {}
    for entry in generations:
        try:
            log = checkpoint_log(layout.checkpoint(layout.directory(entry["id"])))
        except CheckpointError:  # its files are gone, or it is what all began with
            continue
        for record in log:
            records.setdefault(record["fingerprint"], record)
    newest = sorted(records.values(), key=lambda record: record["created"], reverse=True)
    held: dict[str, list[int]] = {}
    for entry in generations:
        held.setdefault(entry["fingerprint"], []).append(entry["id"])
    return {"generations": generations, "previous": status["previous"], "records": newest, "held": held}


def _record(records: list[dict[str, Any]], fingerprint: str) -> dict[str, Any]:
    found = next((record for record in records if record["fingerprint"] == fingerprint), None)
    if found is None:
        raise Fault(404, f"no checkpoint with a record has the fingerprint '{fingerprint[:64]}'")
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, old value, new value) of all that two records differ in; names are paths, such as arguments.loss.bf16."""
    left, right = dict(_flat("", old)), dict(_flat("", new))
    for name in {**left, **right}:
        if left.get(name) != right.get(name):
            yield name, left.get(name, ""), right.get(name, "")


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value, 1):
            yield from _flat(f"{name}.{number}", item)
    else:
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


async def rollback(ask: Ask) -> Response:
    """Bring the previous generation back."""
    if not ask.text("sure"):
        raise Fault(400, "tick the box first: rolling back changes what everybody's searches find")
    await ask.service.writes.run(ask.service.live.rollback)
    ask.service.metrics.swaps.labels("rollback").inc()
    return ask.go("/console/lineage?done=rollback")


PAGES = (Page("GET", "/console/lineage", lineage), Page("POST", "/console/rollback", rollback))
