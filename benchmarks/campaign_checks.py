"""What is left of an index after a process was ended: opened in a fresh process, compared with what was promised."""

from __future__ import annotations

import re
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from faults import State, check_derived, explain, outcomes

from ultrarag.errors import UltraragError
from ultrarag.retrieve import LiveIndex, remove_shared
from ultrarag.retrieve.command import main as command
from ultrarag.retrieve.engines import ServerError

#: How often an index is looked at whose server does not answer within the address's two seconds: a machine that is
#: busy with other things is no fault of an index.
TRIES = 3
#: Passages whose texts are searched for after each round.
ASKED = 5
#: The folder of a build that can be taken up.
BUILDING = re.compile(r".*generations/\d+\.tmp")


def check_index(paths: list[Path], events: list[dict[str, Any]], known: dict[str, Any]) -> dict[str, Any]:
    """Open the index (and the mirror that only reads, before and after the owner), and say what is wrong with it.

    Args:
        paths: the index, and of a shared one a second mirror.
        events: what the process began and what it acknowledged.
        known: passages, and the number of the live generation, before it.
    """
    silent: Exception | None = None
    for _ in range(TRIES):
        try:
            return _looked_at(paths, events, known)
        except ServerError as error:
            silent = error
        except Exception as error:
            return {"lost": [], "closed": [f"{type(error).__name__}: {error}"], "wrong": []}
    return {"lost": [], "closed": [f"{type(silent).__name__}, {TRIES} times: {silent}"], "wrong": []}


def _looked_at(paths: list[Path], events: list[dict[str, Any]], known: dict[str, Any]) -> dict[str, Any]:
    findings: dict[str, Any] = {"lost": [], "closed": [], "wrong": []}
    for path in paths[1:]:
        with LiveIndex.open(path, device="cpu") as reader:
            findings["wrong"] += wrong_answers(reader, _passages(reader))
    with LiveIndex.open(paths[0], device="cpu") as live:
        live.delete(["nobody has this id"])  # of a shared index: take over from the writer that is gone
        found = _passages(live)
        findings |= _state(live, found)
        findings["lost"] += lost(found, live.status()["live"]["id"], events, known)
        findings["wrong"] += wrong_answers(live, found) + underived(live, found)
    for path in paths[1:]:
        with LiveIndex.open(path, device="cpu") as reader:
            findings["wrong"] += [] if _passages(reader) == found else [f"{path.name} differs from its index"]
    return findings


def _passages(live: LiveIndex) -> State:
    return {passage.id: (passage.text, dict(passage.metadata)) for passage in live.passages()}


def _state(live: LiveIndex, found: State) -> dict[str, Any]:
    """What the next round must know."""
    generations = live.status()["generations"]
    by_state = {state: [g["id"] for g in generations if g["state"] == state] for state in ("live", "previous", "ready")}
    wrong = [] if len(by_state["live"]) == 1 else [f"live generations: {by_state['live']}"]
    live_now = by_state["live"][0]
    kind = next(_kind(g) for g in generations if g["id"] == live_now)
    return {"known": {"passages": found, **by_state, "live": live_now, "kind": kind}, "wrong": wrong}


def _kind(generation: dict[str, Any]) -> str:
    """Where its vectors come from."""
    if generation["vectors_of"] != generation["id"]:
        return "shared vectors"
    return "encoded" if generation["mapped_from"] is None else "mapped vectors"


def lost(found: State, number: int, events: list[dict[str, Any]], known: dict[str, Any]) -> list[str]:
    """Acknowledged writes and flips that are not there, and a write in flight of which a part is there."""
    expected = {id: (text, metadata) for id, (text, metadata) in known["passages"].items()}
    before, after, lives = outcomes(events, expected, known["live"])
    missing = [] if found in (before, after) else [explain(found, before, after)]
    any_new = None in lives and number > known["live"]  # a refresh makes a number that nobody knew
    return missing + ([] if number in lives or any_new else [f"generation {number} is live, not one of {lives}"])


def wrong_answers(live: LiveIndex, found: State) -> list[str]:
    """Hits of another text than the passage's, of no passage, or whose vector the encoder does not give that text."""
    texts = [found[id][0] for id in list(found)[:ASKED]]
    hits = {hit.id: hit for part in live.search_many(texts, k=5, heads=["dense"]) for hit in part} if texts else {}
    stored = {id: hit for id, hit in hits.items() if id in found and hit.passage.text == found[id][0]}
    wrong = [f"{id}: '{hits[id].passage.text}' is not what is stored" for id in hits.keys() - stored.keys()]
    if not stored:
        return wrong
    held = live.vectors(list(stored)).dense
    fresh = live.encoder.encode([hit.passage.text for hit in stored.values()], progress=False).dense
    wrong += [f"{id}: not its vector" for id, a, b in zip(stored, held, fresh, strict=True) if abs(a - b).max() > 1e-4]
    return wrong + _mixed(live, texts[0])


def _mixed(live: LiveIndex, text: str) -> list[str]:
    """Hits whose score is not that of the live encoder's query and passage."""
    hits = live.search(text, k=5, heads=["dense"])
    query = live.encoder.encode([text], "query", progress=False).dense[0]
    passages = live.encoder.encode([hit.passage.text for hit in hits], progress=False).dense
    scores = zip(hits, passages @ query, strict=True)
    return [
        f"{hit.id}: score {hit.score:.4f} instead of {own:.4f}" for hit, own in scores if abs(hit.score - own) > 1e-3
    ]


def underived(live: LiveIndex, found: State) -> list[str]:
    """What of vectors and words does not belong to the passages."""
    try:
        check_derived(live, found)
    except AssertionError as error:
        return [f"vectors or words: {' '.join(str(error).split())[:300]}"]
    return []


def check_creation(path: Path, words: list[str], uri: str | None) -> dict[str, Any]:
    """An index that was being created is whole, or not there and can be created again; it is removed."""
    findings: dict[str, Any] = {"lost": [], "closed": [], "wrong": []}
    try:
        if not path.exists():
            if uri is not None:
                with suppress(UltraragError):  # what was begun in the server is removed by hand: it says so
                    remove_shared(uri)
            if command(words):
                findings["closed"].append("cannot be created again")
        with LiveIndex.open(path, device="cpu") as live:
            live.add([{"id": "1", "text": "river stone"}])
            findings["wrong"] += wrong_answers(live, _passages(live))
    except Exception as error:
        findings["closed"].append(f"{type(error).__name__}: {error}")
    if uri is not None:
        remove_shared(uri)
    return findings


def left_over(folder: Path) -> list[str]:
    """Files that somebody had to remove: stages, temporary files, locks of the engine."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    return [name for name in names if _is_rest(name)]


def _is_rest(name: str) -> bool:
    *_, last = parts = name.split("/")
    if any(part.startswith(".atomicwrite") for part in parts):
        return not BUILDING.match(name)  # a build that goes on, or is given up whole
    return name.startswith("tmp/") or (last.endswith((".tmp", ".part", ".partial")) and not BUILDING.fullmatch(name))


def children(process: int) -> set[int]:
    """The processes whose parent is this one; with a subreaper, also those whose parent has ended."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True, check=False)
    return {int(word) for word in found.stdout.split()}
