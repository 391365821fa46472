"""Labels: hits worth a look, for people or generations disagree, or somebody doubted, cited or clicked; the exports."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from ultrarag.retrieve.feedback import LoggedQuery
from ultrarag.service.console.disagreements import TOP, Found, disagreements
from ultrarag.service.console.now import feedback_counts
from ultrarag.service.console.page import HEADERS, Ask, Page
from ultrarag.service.console.search import VOTES
from ultrarag.service.faults import Fault
from ultrarag.service.state import Service

#: Why a hit is in the queue, the most urgent first.
REASONS = {
    "disagreement": "people disagree",
    "unsure": "somebody was unsure",
    "down": "its answer was voted down",
    "cited": "an answer cited it",
    "clicked": "somebody clicked it",
}
#: Another list, which is made when it is asked for: two generations answer what was asked last.
GENERATIONS = "generations"
#: Hits of an answer that was voted down, where it cited none.
FIRST = 3
#: Hits on a page of the queue.
SHOWN = 20


@dataclass
class Item:
    """A hit of a query, and what is known of it."""

    query: str
    #: of the last search that was asked so
    query_id: str
    passage_id: str
    clicks: int = 0
    citations: int = 0
    #: who voted -> relevant, not_relevant or unsure; the last one counts
    votes: dict[str, str] = field(default_factory=dict)
    #: who voted last, a keyed hash, and when (seconds since 1970)
    last: tuple[str, float] | None = None
    #: an answer that was made of it was voted down
    down: bool = False

    @property
    def reason(self) -> str | None:
        """Why it is worth a look; None where there is nothing to say, or it is settled."""
        said = set(self.votes.values())
        if {"relevant", "not_relevant"} <= said:
            return "disagreement"
        if "unsure" in said:
            return "unsure"
        if said:
            return None
        if self.down:
            return "down"
        return "cited" if self.citations else "clicked" if self.clicks else None


def queue(queries: Iterable[LoggedQuery]) -> list[tuple[str, Item]]:
    """(reason, hit) of all that is worth a look: disagreements first, then doubts, citations and clicks.

    Queries whose text was only kept as a hash are left out: nobody could judge them.
    """
    found: dict[tuple[int, str], Item] = {}
    for query in queries:
        for action, passage_id, client, at in query.events if query.text else ():
            for id in [passage_id] if passage_id else _answered(query, action):
                item = found.setdefault((query.key, id), Item(query.text, query.query_id, id))
                item.query_id = query.query_id
                _note(item, action, client, at)
    waiting = [(reason, item) for item in found.values() if (reason := item.reason) is not None]
    order = list(REASONS)
    return sorted(waiting, key=lambda pair: (order.index(pair[0]), -pair[1].citations, -pair[1].clicks))


def _answered(query: LoggedQuery, action: str) -> list[str]:
    """The passages of an answer that was voted down: those that it cited, else the first hits."""
    if action != "answer_down":
        return []
    return [id for said, id, *_ in query.events if said == "cite"] or [id for id, _ in query.hits[:FIRST]]


def _note(item: Item, action: str, client: str, at: float) -> None:
    if action == "answer_down":
        item.down = True
    elif action in ("click", "cite"):
        item.clicks += action == "click"
        item.citations += action == "cite"
    else:
        item.votes[client or item.query_id] = action
        item.last = (client, at)


async def labels(ask: Ask) -> Response:
    """The queue."""
    why, start = ask.text("why"), ask.number("start", 0, 0, 10**6)
    if why and why not in (*REASONS, GENERATIONS):
        raise Fault(400, f"there is no reason '{why[:50]}'; choose one of {', '.join((*REASONS, GENERATIONS))}")
    found = await ask.service.writes.run(_state, ask.service, why, start)
    return ask.show("labels.html", why=why, start=start, reasons=REASONS, votes=VOTES, shown=SHOWN, **found)


def _state(service: Service, why: str, start: int) -> dict[str, Any]:
    if feedback_counts(service) is None:
        return {"counts": dict.fromkeys(REASONS, 0), "items": [], "total": 0}
    waiting = queue(service.live.feedback_log.queries())
    counts = {reason: sum(found == reason for found, _ in waiting) for reason in REASONS}
    chosen = [pair for pair in waiting if why in ("", pair[0])]
    if why == GENERATIONS:
        chosen = [
            (_apart(hit), Item(hit.query.text, hit.query.query_id, hit.passage_id)) for hit in _disagreed(service)
        ]
    part = chosen[start : start + SHOWN]
    passages = service.live.get_many([item.passage_id for _, item in part])
    items = [(REASONS.get(reason, reason), item, passages.get(item.passage_id)) for reason, item in part]
    return {"counts": counts, "items": items, "total": len(chosen)}


def _disagreed(service: Service) -> list[Found]:
    return disagreements(service, service.live.feedback_log.queries())


def _apart(hit: Found) -> str:
    return f"at place {hit.rank} of generation {hit.generation}, not among the first {TOP} of generation {hit.other}"


async def rows(ask: Ask) -> Response:
    """Training rows, by the rules."""
    made = await ask.service.writes.run(_made, ask.service)
    return _file("rows.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made.rows))


async def queries(ask: Ask) -> Response:
    """The held-out queries that have votes, as BEIR names them."""
    made = await ask.service.writes.run(_made, ask.service)
    lines = ({"_id": id, "text": made.queries[id]} for id in made.qrels)
    return _file("queries.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


async def qrels(ask: Ask) -> Response:
    """The votes on them."""
    made = await ask.service.writes.run(_made, ask.service)
    lines = ["query-id\tcorpus-id\tscore"]
    for query, judged in made.qrels.items():
        for id, score in judged.items():
            if any(sign in id for sign in "\t\r\n"):
                raise Fault(409, f"the passage {id!r} has an id that no table of qrels can hold (tab or new line)")
            lines.append(f"{query}\t{id}\t{score}")
    return _file("qrels.tsv", "\n".join(lines) + "\n")


def _made(service: Service) -> Any:
    if feedback_counts(service) is None:
        raise Fault(409, "no search was remembered yet, so that there is nothing to export")
    return service.live.training_rows()


def _file(name: str, text: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"', **HEADERS}
    return Response(text, 200, headers, "text/plain; charset=utf-8")


PAGES = (
    Page("GET", "/console/labels", labels),
    Page("GET", "/console/labels/rows.jsonl", rows),
    Page("GET", "/console/labels/queries.jsonl", queries),
    Page("GET", "/console/labels/qrels.tsv", qrels),
)
