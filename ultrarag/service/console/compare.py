"""Compare: what two generations find for the same queries, side by side, also without saying which is which."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.responses import Response

from ultrarag.retrieve import Hits
from ultrarag.service.console import access
from ultrarag.service.console.page import Ask, Page
from ultrarag.service.console.search import MOST_HITS, heads_of, options, shown_weights
from ultrarag.service.faults import Fault
from ultrarag.service.state import Service

#: Queries of one comparison at most.
MOST_QUERIES = 50
#: States in which a generation can be searched.
SEARCHABLE = ("live", "previous", "ready")
#: In the folder of the service's work: what was preferred, a line for each form; numbers, and no text of anybody's.
FILE = "preferences.jsonl"


@dataclass(frozen=True)
class Shown:
    """A hit on one side."""

    hit: Any
    #: same, up, down, new or gone; "only" where it is on one side and nobody may know which
    mark: str
    #: how many places it moved
    places: int = 0


@dataclass(frozen=True)
class Pair:
    """A query with what each side finds."""

    query: str
    left: list[Shown]
    right: list[Shown]
    changed: bool


async def compare(ask: Ask) -> Response:
    """The form, and both sides of what it asks."""
    service = ask.service
    heads = await service.writes.run(heads_of, service)
    found = await service.writes.run(generations, service)
    values = _form(ask, found)
    values |= {"generations": found, "weights": shown_weights(ask, heads), "pairs": None, "hidden": 0}
    queries = _queries(ask)
    if queries and len(found) > 1:
        left, right, blind = values["left"], values["right"], values["blind"]
        sides = await service.writes.run(_search, service, queries, (left, right), options(ask, heads))
        pairs = []
        for query, a, b in zip(queries, *sides, strict=True):
            turned = blind and swapped(ask, query, left, right)
            pairs.append(pair(query, *((b, a) if turned else (a, b)), blind))
        kept = [item for item in pairs if item.changed or not values["only"]]
        values |= {"pairs": kept, "hidden": len(pairs) - len(kept), "changed": sum(item.changed for item in pairs)}
    return ask.show("compare.html", **values)


def _form(ask: Ask, found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the form holds; its sides are the previous (or ready) and the live generation where none are chosen."""
    ids = [entry["id"] for entry in found]
    live = next(entry["id"] for entry in found if entry["state"] == "live")
    other = next((entry["id"] for entry in found if entry["state"] != "live"), live)
    chosen = {name: _generation(ask, name, ids, usual) for name, usual in (("left", other), ("right", live))}
    return {
        **chosen,
        "q": ask.text("q"),
        "k": ask.number("k", 5, 1, MOST_HITS),
        "only": bool(ask.text("only")),
        "blind": bool(ask.text("blind")),
    }


def _generation(ask: Ask, name: str, ids: list[int], usual: int) -> int:
    text = ask.text(name) or str(usual)
    if text not in map(str, ids):
        raise Fault(
            404, f"there is no generation '{text[:20]}' that can be searched; there are {', '.join(map(str, ids))}"
        )
    return int(text)


def _queries(ask: Ask) -> list[str]:
    found = list(dict.fromkeys(line.strip() for line in ask.text("q").splitlines() if line.strip()))
    if len(found) > MOST_QUERIES:
        raise Fault(400, f"{len(found)} queries; one comparison takes at most {MOST_QUERIES}")
    return found


def generations(service: Service) -> list[dict[str, Any]]:
    """Those that can be searched, the newest first."""
    found = [entry for entry in service.live.status()["generations"] if entry["state"] in SEARCHABLE]
    return sorted(found, key=lambda entry: -entry["id"])


def _search(
    service: Service, queries: list[str], ids: tuple[int, int], how: dict[str, Any]
) -> tuple[list[Hits], list[Hits]]:
    with service.live.searcher(ids[0]) as left, service.live.searcher(ids[1]) as right:
        return left.search_many(queries, **how), right.search_many(queries, **how)


def pair(query: str, left: Hits, right: Hits, blind: bool = False) -> Pair:
    """Mark what moved, what is new on the right and what is gone from the left."""
    before = {hit.id: rank for rank, hit in enumerate(left)}
    after = {hit.id: rank for rank, hit in enumerate(right)}
    lost = [Shown(hit, _mark(before[hit.id], after.get(hit.id), "only" if blind else "gone", blind)) for hit in left]
    shown = [
        Shown(
            hit,
            _mark(after[hit.id], before.get(hit.id), "only" if blind else "new", blind, right=True),
            abs(after[hit.id] - before.get(hit.id, after[hit.id])),
        )
        for hit in right
    ]
    return Pair(query, lost, shown, list(before) != list(after))


def _mark(here: int, there: int | None, alone: str, blind: bool, right: bool = False) -> str:
    if there is None:
        return alone
    return "same" if here == there or blind or not right else "up" if here < there else "down"


def swapped(ask: Ask, query: str, left: int, right: int) -> bool:
    """Whether a blind comparison shows the right generation on the left: as good as chance, and the same again."""
    seal = access.form_token(ask.service.settings, f"blind {ask.reviewer} {left} {right} {query}")
    return int(seal[0], 16) % 2 == 1


async def prefer(ask: Ask) -> Response:
    """Keep which side was better, query by query, and say whose side it was."""
    found = await ask.service.writes.run(generations, ask.service)
    values = _form(ask, found)
    left, right = values["left"], values["right"]
    counts = {"left": 0, "right": 0, "same": 0}
    for number, query in enumerate(_queries(ask)):
        said = ask.text(f"better_{number}")
        if said in ("a", "b"):
            counts["left" if (said == "a") != swapped(ask, query, left, right) else "right"] += 1
        elif said == "same":
            counts["same"] += 1
    if not any(counts.values()):
        raise Fault(400, "no query was answered: choose a side, or 'the same', for one at least")
    names = {entry["id"]: entry["fingerprint"] for entry in found}
    entry = {
        "time": round(time.time(), 3),
        "reviewer": access.form_token(ask.service.settings, f"reviewer {ask.reviewer}")[:16],
        "generations": [left, right],
        "fingerprints": [names[left], names[right]],
        **counts,
    }
    totals = await ask.service.writes.run(_keep, ask.service.settings.work / FILE, entry)
    return ask.show(
        "preferred.html",
        left=left,
        right=right,
        counts=counts,
        totals=totals,
        chance=sign_test(totals["left"], totals["right"]),
    )


def _keep(path: Path, entry: dict[str, Any]) -> dict[str, int]:
    """Write a line; return what was said of these two encoders so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())
    totals = {"left": 0, "right": 0, "same": 0}
    for line in path.read_text(encoding="utf-8").splitlines():
        kept = json.loads(line)
        if kept["fingerprints"] == entry["fingerprints"]:
            totals = {name: count + kept[name] for name, count in totals.items()}
    return totals


def sign_test(left: int, right: int) -> float:
    """How often chance alone prefers one side at least so clearly (two-sided sign test, ties left out)."""
    both, fewer = left + right, min(left, right)
    return min(1.0, 2 * sum(math.comb(both, count) for count in range(fewer + 1)) / 2**both)


PAGES = (Page("GET", "/console/compare", compare), Page("POST", "/console/prefer", prefer))
