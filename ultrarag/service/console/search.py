"""Search: the hits of a query with the score of each head, judged with one key."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.responses import Response

from ultrarag.service.console.page import Ask, Page
from ultrarag.service.faults import Fault
from ultrarag.service.state import Service

#: What can be said of a hit, and with which key.
VOTES = (("relevant", "Relevant", "r"), ("not_relevant", "Not relevant", "n"), ("unsure", "Unsure", "u"))
#: Hits of a query at most; more are no page.
MOST_HITS = 100
#: A field of the form for each head, such as weight_dense.
WEIGHT = "weight_"


async def search(ask: Ask) -> Response:
    """The form, and the hits of what it asks."""
    heads = await ask.service.writes.run(heads_of, ask.service)
    values: dict[str, Any] = {
        "query": ask.text("q"),
        "k": ask.number("k", 10, 1, MOST_HITS),
        "filter": ask.text("filter"),
        "weights": shown_weights(ask, heads),
        "hits": None,
        "votes": VOTES,
    }
    if values["query"]:
        kept = is_own(ask) and await ask.service.writes.run(lambda: ask.service.remembers)
        found = await ask.service.search(
            [values["query"]], {**options(ask, heads), "log": kept, "client": ask.reviewer}
        )
        scored = list(dict.fromkeys(name for hit in found[0] for name in hit.scores))
        values |= {"hits": found[0], "kept": kept, "scored": scored, "address": ask.request.url.query}
    return ask.show("search.html", **values)


def heads_of(service: Service) -> list[str]:
    """The heads that can be searched."""
    status = service.live.status()
    return [*status["live"]["heads"], *(["bm25"] if status["bm25"] else [])]


def shown_weights(ask: Ask, heads: list[str]) -> dict[str, str]:
    """Head -> what its field holds: what was sent, else the service's own, else the first head alone."""
    if any(name.startswith(WEIGHT) for name in ask.form):
        return {head: ask.text(WEIGHT + head) for head in heads}
    usual = usual_weights(ask.service)
    return {head: f"{usual[head]:g}" if head in usual else "" for head in heads}


def usual_weights(service: Service) -> dict[str, float]:
    """The service's own, else the first head alone."""
    return dict(service.settings.weights or {heads_of(service)[0]: 1.0})


def options(ask: Ask, heads: list[str]) -> dict[str, Any]:
    """How to search, as the form says.

    Raises:
        Fault: 400, a weight is no number, or the filter no JSON.
    """
    found: dict[str, Any] = {"k": ask.number("k", 10, 1, MOST_HITS)}
    weights = {head: _weight(head, text) for head, text in shown_weights(ask, heads).items() if text}
    if weights:
        found["weights"] = weights
    if text := ask.text("filter"):
        try:
            found["filter"] = json.loads(text)
        except ValueError as error:
            raise Fault(400, f'the filter is no JSON, such as {{"lang": "en"}}: {error}') from error
    return found


def _weight(head: str, text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise Fault(400, f"the weight of {head} is '{text[:50]}'; it must be a number of at least 0")
    return found


def is_own(ask: Ask) -> bool:
    """Whether nobody else's page has made the browser ask: such a search does not go into the feedback log."""
    return ask.request.headers.get("sec-fetch-site", "none") in ("same-origin", "none")


async def judge(ask: Ask) -> Response:
    """Keep what somebody says of a hit; asked by htmx, answer with its buttons."""
    action, query_id, passage_id = ask.text("action"), ask.text("query_id"), ask.text("passage_id")
    label = {name: label for name, label, _ in VOTES}.get(action)
    if label is None:
        raise Fault(400, f"there is no vote '{action[:50]}'")
    live = ask.service.live
    await ask.service.writes.run(lambda: live.feedback(query_id, passage_id, action, client=ask.reviewer))
    values: dict[str, Any] = {
        "query_id": query_id,
        "passage_id": passage_id,
        "said": action,
        "label": label,
        "votes": VOTES,
    }
    rank, address = ask.number("rank", 1, 1, 10_000), ask.text("address")
    back = ask.text("back") if ask.text("back") in BACK else BACK[0]
    if ask.request.headers.get("hx-request"):
        return ask.show("votes.html", rank=rank, address=address, back=back, **values)
    return ask.show("judged.html", address=f"{back}?{address}#hit-{rank}", **values)


#: The pages that judge.
BACK = ("/console/search", "/console/labels")


PAGES = (Page("GET", "/console/search", search), Page("POST", "/console/judge", judge))
