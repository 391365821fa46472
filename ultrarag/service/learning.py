"""Learning: /v1/refresh and its jobs, /v1/swap and /v1/rollback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from starlette.responses import Response, StreamingResponse

from ultrarag.errors import UsageError, did_you_mean
from ultrarag.retrieve import FROM_FEEDBACK
from ultrarag.service.endpoint import Answer, Body, Call, Endpoint, answer
from ultrarag.service.faults import Fault
from ultrarag.service.jobs import ENDED, server_sent
from ultrarag.service.searching import Options
from ultrarag.service.state import Service

#: Arguments of fine-tuning that a client may give. Others name files, models or code, which are the operator's affair.
ARGUMENTS = (
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("warmup_ratio", "warmup_steps", "weight_decay", "lr_scheduler_type", "max_grad_norm", "seed", "temperature"),
    *(
        "train_group_size",
        "query_max_len",
        "passage_max_len",
        "sub_batch_size",
        "sub_batch_tokens",
        "knowledge_distillation",
    ),
    *("early_stopping_patience", "replay_ratio", "max_forgetting", "allow_seen_data", "ignore_identical_ids"),
    *("on_bad_rows", "map_learning_rate", "map_regularization", "map_steps", "map_rank", "eval_steps", "logging_steps"),
)
#: Options of the gate's searches.
SEARCH = (*Options.model_fields, "ignore_identical_ids")
#: Seconds between two looks for events, and between two signs of life on a stream.
LOOK, HEARTBEAT = 0.5, 15.0


class Judged(Body):
    queries: dict[str, str] = Field(min_length=1, description="query id -> text")
    qrels: dict[str, dict[str, int]] = Field(description="query id -> passage id -> relevance")


class RefreshBody(Body):
    rows: list[dict[str, Any]] | None = Field(None, min_length=1, description="training rows: query, pos, neg, ...")
    train_data: list[str] | None = Field(
        None, min_length=1, description="files or folders below --data_dir, in place of rows"
    )
    feedback: bool = Field(False, description="train on what the feedback log gives, in place of rows")
    eval_rows: list[dict[str, Any]] | None = Field(None, min_length=1, description="held-out rows, also the gate's")
    eval_data: str | None = Field(None, description="a file or BEIR folder below --data_dir, in place of eval_rows")
    gate: Judged | bool = Field(True, description="judged queries; true: those of the held-out data; false: no gate")
    force: bool = Field(False, description="go live although the gate says no; needs a reason, which is recorded")
    reason: str | None = None
    metric: str = "nDCG@10"
    search: dict[str, Any] | None = Field(None, description="options of the gate's searches, such as weights")
    effort: str = "full"
    bridge: bool = False
    arguments: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="of fine-tuning, such as learning_rate"
    )

    @model_validator(mode="after")
    def _complete(self) -> RefreshBody:
        if (self.rows is not None) + (self.train_data is not None) + self.feedback != 1:
            raise ValueError("give one of rows, train_data and feedback: true")
        if self.eval_rows is not None and self.eval_data is not None:
            raise ValueError("give eval_rows or eval_data, not both")
        if self.force and not (self.reason or "").strip():
            raise ValueError("force needs a reason")
        return self


class JobAnswer(Answer):
    id: str
    kind: str
    state: str = Field(description="running, done, refused, failed, cancelled or interrupted")
    created: float
    started: float | None
    ended: float | None
    request: dict[str, Any]
    progress: dict[str, Any] = Field(description="stage, step, total, the loss logged last and its step, seconds left")
    report: dict[str, Any] | None
    error: str | None


class JobsAnswer(Answer):
    jobs: list[JobAnswer]


class EventAnswer(Answer):
    id: str = Field(description="its number, from 1")
    event: str = Field(description="started, progress, or the state in which the job ended")
    data: str = Field(description="JSON: id, event and time, and how far the job is or what went wrong")


class EventsQuery(Body):
    after: int = Field(0, ge=0, description="the number of the last event that is known")


class SwapBody(Body):
    generation: int | None = Field(None, description="default: the one that is ready")
    gate: Judged | None = None
    force: bool = Field(False, description="go live although the gate says no")
    metric: str = "nDCG@10"
    search: dict[str, Any] | None = None


class FlipAnswer(Answer):
    old: dict[str, Any]
    new: dict[str, Any]
    verdict: dict[str, Any] | None
    seconds: float = Field(description="that writers waited; searches never did")


class RemovedAnswer(Answer):
    removed: str


def below(service: Service, name: str) -> str:
    """A path that a request names, which must lie below the folder for it."""
    root = service.settings.data_dir
    if root is None:
        raise UsageError("this service reads no files for clients: send rows, or start it with --data_dir FOLDER")
    try:
        found = (Path(root) / name).resolve()
        inside = found.is_relative_to(Path(root).resolve())
    except (OSError, ValueError) as error:
        raise UsageError(f"{name[:200]!r} is no path") from error
    if not inside or not found.exists():
        raise UsageError(f"{name[:200]!r} is not in the folder that this service reads training data from")
    return str(found)


def requested(service: Service, body: RefreshBody) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Keyword arguments of a refresh, and the rows that came along, by the name of their file."""
    for name in body.arguments:
        if name not in ARGUMENTS:
            raise UsageError(f"arguments: '{name}' cannot be given here{did_you_mean(name, ARGUMENTS)}")
    found: dict[str, Any] = {
        "train_data": {"file": "train.jsonl"},
        "gate": body.gate.model_dump() if isinstance(body.gate, Judged) else body.gate,
        "force": body.force,
        "reason": body.reason,
        "metric": body.metric,
        "search": _searched(body.search) or None,
        "effort": body.effort,
        "bridge": body.bridge,
        **body.arguments,
    }
    files: dict[str, list[Any]] = {}
    if body.rows is not None:
        files["train.jsonl"] = body.rows
    elif body.feedback:
        found["train_data"] = FROM_FEEDBACK
    else:
        found["train_data"] = [below(service, name) for name in body.train_data or ()]
    if body.eval_rows is not None:
        files["eval.jsonl"] = body.eval_rows
        found["eval_data"] = {"file": "eval.jsonl"}
    elif body.eval_data is not None:
        found["eval_data"] = below(service, body.eval_data)
    return found, files


async def refresh(call: Call) -> Response:
    service = call.service
    request, files = requested(service, call.body)
    job = await service.writes.run(service.jobs.start, request, files)
    return answer(asdict(job), 202, {"Location": f"/v1/jobs/{job.id}"})


async def jobs(call: Call) -> dict[str, Any]:
    found = await call.service.writes.run(call.service.jobs.all)
    return {"jobs": [asdict(job) for job in found]}


async def job(call: Call) -> dict[str, Any]:
    return asdict(await call.service.writes.run(call.service.jobs.get, call.path["id"]))


async def resume(call: Call) -> Response:
    found = await call.service.writes.run(call.service.jobs.resume, call.path["id"])
    return answer(asdict(found), 202)


async def cancel(call: Call) -> Response:
    found = await call.service.writes.run(call.service.jobs.cancel, call.path["id"])
    return answer(asdict(found), 202)


async def remove(call: Call) -> dict[str, str]:
    await call.service.writes.run(call.service.jobs.remove, call.path["id"])
    return {"removed": call.path["id"]}


async def events(call: Call) -> Response:
    """A stream of what happens to a job, until it has ended or the service stops."""
    service, id = call.service, call.path["id"]
    await service.writes.run(service.jobs.get, id)
    last = call.request.headers.get("last-event-id", "")
    after = int(last) if last.isascii() and last.isdigit() and len(last) < 10 else call.query.after
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_stream(service, id, after), media_type="text/event-stream", headers=headers)


async def _stream(service: Service, id: str, after: int) -> AsyncIterator[str]:
    silent = 0.0
    while True:
        state, found = await service.writes.run(_news, service, id, after)
        for text in server_sent(found):
            yield text
        if found:
            after, silent = found[-1]["id"], 0.0
        if state in ENDED or service.stopping:
            return
        await asyncio.sleep(LOOK)
        silent += LOOK
        if silent >= HEARTBEAT:
            silent = 0.0
            yield ": still there\n\n"


def _news(service: Service, id: str, after: int) -> tuple[str, list[dict[str, Any]]]:
    """The state first: what happens between the two is still among the events."""
    state = service.jobs.get(id).state
    return state, service.jobs.events(id, after)


async def swap(call: Call) -> dict[str, Any]:
    service, body = call.service, call.body
    gate = None if body.gate is None else (body.gate.queries, body.gate.qrels)
    options = {"force": body.force, "metric": body.metric, **_searched(body.search)}
    flip = await service.writes.run(lambda: service.live.swap(_wanted(service, body.generation), gate, **options))
    service.metrics.swaps.labels("swap").inc()
    return _shown(flip)


def _searched(options: dict[str, Any] | None) -> dict[str, Any]:
    """Options of the gate's searches."""
    for name in options or {}:
        if name not in SEARCH:
            raise UsageError(f"search: '{name}' cannot be given here{did_you_mean(name, SEARCH)}")
    return dict(options or {})


def _wanted(service: Service, generation: int | None) -> int:
    """The generation that is named, else the one that is ready."""
    found = {entry["id"]: entry["state"] for entry in service.live.status()["generations"]}
    if generation is not None:
        if generation not in found:
            raise Fault(404, f"there is no generation {generation}")
        return generation
    ready = [id for id, state in found.items() if state == "ready"]
    if len(ready) != 1:
        raise Fault(409, f"{len(ready)} generations are ready ({', '.join(map(str, ready)) or 'none'}): name one")
    return ready[0]


async def rollback(call: Call) -> dict[str, Any]:
    flip = await call.service.writes.run(call.service.live.rollback)
    call.service.metrics.swaps.labels("rollback").inc()
    return _shown(flip)


def _shown(flip: Any) -> dict[str, Any]:
    verdict = flip.verdict.to_dict() if flip.verdict else None
    return {"old": asdict(flip.old), "new": asdict(flip.new), "verdict": verdict, "seconds": flip.seconds}


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/refresh",
        refresh,
        "Fine-tune, build, compare and swap, as a job",
        body=RefreshBody,
        answer=JobAnswer,
        status=202,
        errors=(400, 409),
    ),
    Endpoint("GET", "/v1/jobs", jobs, "All jobs, the newest first", answer=JobsAnswer, errors=()),
    Endpoint("GET", "/v1/jobs/{id}", job, "One job", answer=JobAnswer, errors=(404,)),
    Endpoint(
        "GET",
        "/v1/jobs/{id}/events",
        events,
        "What happens to a job, as server-sent events of this shape",
        query=EventsQuery,
        answer=EventAnswer,
        media="text/event-stream",
        errors=(400, 404),
    ),
    Endpoint(
        "POST",
        "/v1/jobs/{id}/cancel",
        cancel,
        "Stop a job; it can be taken up again",
        answer=JobAnswer,
        status=202,
        errors=(404, 409),
    ),
    Endpoint(
        "POST",
        "/v1/jobs/{id}/resume",
        resume,
        "Go on with a job that was cut off",
        answer=JobAnswer,
        status=202,
        errors=(404, 409),
    ),
    Endpoint(
        "DELETE",
        "/v1/jobs/{id}",
        remove,
        "Delete a job that has ended, and its checkpoint",
        answer=RemovedAnswer,
        errors=(404, 409),
    ),
    Endpoint(
        "POST",
        "/v1/swap",
        swap,
        "Make a generation live, through a gate if one is given",
        body=SwapBody,
        answer=FlipAnswer,
        errors=(400, 404, 409),
    ),
    Endpoint("POST", "/v1/rollback", rollback, "Bring the previous generation back", answer=FlipAnswer, errors=(409,)),
)
