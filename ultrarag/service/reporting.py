"""Reporting: /v1/feedback, what people did with the hits, and what it would teach."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator

from ultrarag.service.endpoint import Answer, Body, Call, Endpoint


class FeedbackBody(Body):
    query_id: str = Field(min_length=1, description="of a search with log: true")
    action: Literal["click", "cite", "relevant", "not_relevant", "unsure", "answer_up", "answer_down"]
    passage_id: str | None = Field(None, description="the passage it is about; none for answer_up and answer_down")
    client: str | None = Field(None, description="who did it; default: whoever searched; kept as a keyed hash")
    event_id: str | None = Field(None, description="an event that is sent again with the same id changes nothing")


class ReportedAnswer(Answer):
    kept: bool = Field(description="true: it is on the disk")


class FeedbackAnswer(Answer):
    log: dict[str, Any] = Field(description="searches, queries, clients and events; how long they are kept")
    rules: dict[str, Any] = Field(description="what the rules make of them (docs/feedback.md)")
    schedule: str | None = Field(description="when the service learns by itself; null: never")


class ForgetQuery(Body):
    client: str | None = None
    before: float | None = Field(None, description="seconds since 1970")

    @model_validator(mode="after")
    def _either(self) -> ForgetQuery:
        if (self.client is None) == (self.before is None):
            raise ValueError("give client or before")
        return self


class ForgottenAnswer(Answer):
    deleted: int = Field(description="searches that were deleted")


async def report(call: Call) -> dict[str, bool]:
    body: FeedbackBody = call.body
    feedback = partial(call.service.live.feedback, client=body.client, event_id=body.event_id)
    await call.service.writes.run(feedback, body.query_id, body.passage_id, body.action)
    call.service.metrics.feedback.labels(body.action).inc()
    return {"kept": True}


async def counts(call: Call) -> dict[str, Any]:
    live = call.service.live
    log = await call.service.writes.run(lambda: live.feedback_log.counts())
    rules = await call.service.writes.run(lambda: live.training_rows().report)
    return {"log": log, "rules": rules, "schedule": call.service.settings.learn}


async def forget(call: Call) -> dict[str, int]:
    query: ForgetQuery = call.query
    live = call.service.live

    def delete() -> int:
        return live.feedback_log.forget(client=query.client, before=query.before)

    return {"deleted": await call.service.writes.run(delete)}


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/feedback",
        report,
        "What somebody did with the hits of a search",
        body=FeedbackBody,
        answer=ReportedAnswer,
    ),
    Endpoint(
        "GET", "/v1/feedback", counts, "What was reported, and what it would teach", answer=FeedbackAnswer, errors=()
    ),
    Endpoint(
        "DELETE",
        "/v1/feedback",
        forget,
        "Delete what a client did, or what is old, for good",
        query=ForgetQuery,
        answer=ForgottenAnswer,
    ),
)
