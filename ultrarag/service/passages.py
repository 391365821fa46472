"""Passages: listed, read, added, relabelled and deleted at /v1/passages."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, Literal

from pydantic import Field, model_validator

from ultrarag.service.endpoint import Answer, Body, Call, Endpoint
from ultrarag.service.faults import Fault
from ultrarag.types import Passage

#: Passages of a page, where nothing else is asked for.
PAGE = 100


class PassageBody(Body):
    id: str = Field(min_length=1)
    text: str
    title: str = ""
    metadata: dict[str, Any] = Field(default_factory=dict)


class AddBody(Body):
    passages: list[PassageBody] = Field(min_length=1)
    on_existing: Literal["replace", "skip", "fail"] = Field(
        "replace", description="of ids that are there: replace, skip, or fail (nothing is added)"
    )


class WrittenAnswer(Answer):
    added: int
    changed: int = Field(description="another text: encoded anew")
    metadata: int = Field(description="only the metadata was new")
    unchanged: int
    passages: int = Field(description="passages in the index now")


class DeleteBody(Body):
    ids: list[str] | None = None
    filter: dict[str, Any] | None = Field(None, description="delete what passes it; an empty one is refused")

    @model_validator(mode="after")
    def _one(self) -> DeleteBody:
        if (self.ids is None) == (self.filter is None):
            raise ValueError("give either ids or a filter")
        return self


class DeletedAnswer(Answer):
    deleted: int
    passages: int


class UpdateBody(Body):
    filter: dict[str, Any] = Field(description="which passages; {} for all")
    metadata: dict[str, Any] = Field(description="keys to set; null removes one, others stay")


class UpdatedAnswer(Answer):
    updated: int


class PassageAnswer(Answer):
    id: str
    text: str
    title: str
    metadata: dict[str, Any]


class ListQuery(Body):
    filter: str | None = Field(None, description="a condition on the metadata, as JSON")
    ids: list[str] | None = Field(None, description="only these; may be given several times")
    after: str = Field("", description="the id behind which the page begins: `next` of the page before")
    limit: int = Field(PAGE, ge=1)


class ListAnswer(Answer):
    passages: list[PassageAnswer]
    next: str | None = Field(description="give it as `after` for the next page; null: this was the last one")


class CountQuery(Body):
    filter: str | None = Field(None, description="a condition on the metadata, as JSON")


class CountAnswer(Answer):
    count: int


def shown(passage: Passage) -> dict[str, Any]:
    """A passage, as JSON values."""
    return {"id": passage.id, "text": passage.text, "title": passage.title, "metadata": dict(passage.metadata)}


def _filter(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Fault(400, f"'filter' is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise Fault(400, '\'filter\' is a JSON object, such as {"lang": "en"}')
    return found


async def listed(call: Call) -> dict[str, Any]:
    service, asked = call.service, call.query
    service.check_most("limit", asked.limit, service.settings.limits.passages)
    options = {"ids": asked.ids, "after": asked.after, "limit": asked.limit + 1}
    chosen = _filter(asked.filter)
    found = await service.writes.run(lambda: list(service.live.passages(chosen, **options)))
    more = len(found) > asked.limit
    page = found[: asked.limit]
    return {"passages": [shown(passage) for passage in page], "next": page[-1].id if more else None}


async def one(call: Call) -> dict[str, Any]:
    id = call.path["id"]
    found = await call.service.writes.run(call.service.live.get, id)
    if found is None:
        raise Fault(404, f"there is no passage {id!r}")
    return shown(found)


async def count(call: Call) -> dict[str, int]:
    chosen = _filter(call.query.filter)
    return {"count": await call.service.writes.run(call.service.live.count, chosen)}


async def add(call: Call) -> dict[str, int]:
    service, body = call.service, call.body
    service.check_most("passages", len(body.passages), service.settings.limits.passages)
    passages = [Passage(p.id, p.text, p.title, p.metadata) for p in body.passages]
    written = await service.writes.run(lambda: service.live.add(passages, on_existing=body.on_existing))
    for what, number in asdict(written).items():
        if number:
            service.metrics.written.labels(what).inc(number)
    return {**asdict(written), "passages": len(service.live)}


async def delete(call: Call) -> dict[str, int]:
    service, body = call.service, call.body
    if body.ids is not None:
        service.check_most("ids", len(body.ids), service.settings.limits.passages)
    return await _deleted(call, body.ids, body.filter)


async def delete_one(call: Call) -> dict[str, int]:
    return await _deleted(call, [call.path["id"]], None)


async def _deleted(call: Call, ids: list[str] | None, filter: dict[str, Any] | None) -> dict[str, int]:
    service = call.service
    gone = await service.writes.run(lambda: service.live.delete(ids, filter=filter))
    if gone:
        service.metrics.written.labels("deleted").inc(gone)
    return {"deleted": gone, "passages": len(service.live)}


async def update(call: Call) -> dict[str, int]:
    service, body = call.service, call.body
    return {"updated": await service.writes.run(service.live.update, body.filter, body.metadata)}


ENDPOINTS = (
    Endpoint(
        "GET",
        "/v1/passages",
        listed,
        "List passages, a page at a time, in the order of their ids",
        query=ListQuery,
        answer=ListAnswer,
        errors=(400, 413),
    ),
    Endpoint(
        "POST",
        "/v1/passages",
        add,
        "Add passages, or replace those with the same id; durable when answered",
        body=AddBody,
        answer=WrittenAnswer,
        errors=(400, 409),
    ),
    Endpoint(
        "PATCH",
        "/v1/passages",
        update,
        "Merge metadata into that of the passages that pass a filter",
        body=UpdateBody,
        answer=UpdatedAnswer,
        errors=(400, 409),
    ),
    Endpoint(
        "DELETE",
        "/v1/passages",
        delete,
        "Delete passages by ids or by a filter",
        body=DeleteBody,
        answer=DeletedAnswer,
        errors=(400, 409),
    ),
    Endpoint("GET", "/v1/count", count, "Count passages", query=CountQuery, answer=CountAnswer),
    Endpoint("GET", "/v1/passages/{id:path}", one, "One passage", answer=PassageAnswer, errors=(404,)),
    Endpoint(
        "DELETE",
        "/v1/passages/{id:path}",
        delete_one,
        "Delete one passage; whether it was there is counted",
        answer=DeletedAnswer,
        errors=(400, 409),
    ),
)
