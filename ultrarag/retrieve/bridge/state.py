"""What a bridge is judged by, what was measured, and the files that say so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrarag.errors import IndexStateError
from ultrarag.evaluation import Qrels, Significance
from ultrarag.retrieve.bridge.kept import count_kept

#: Of the file below the index.
FORMAT = 1
#: In the bridge's folder while it serves; and in that of its generation, for as long as that is kept.
FILE = "bridge.json"


@dataclass(frozen=True)
class BridgeTerms:
    """What a bridge is judged by."""

    queries: Mapping[str, str]
    qrels: Qrels
    metric: str = "nDCG@10"
    #: options of `LiveIndex.search`
    search: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class BridgeReport:
    """What was measured, and what serves now."""

    generation: int
    #: "raw" (new queries, old vectors) or "mapped"; None: the old encoder serves on
    mode: str | None
    #: each way to serve that was judged -> the comparison with the old one, as `Verdict.to_dict`; "encoded": mapped,
    #: once all candidates of the queries have new vectors, which is judged where neither of the others gains
    measured: dict[str, dict[str, Any]]
    #: passages encoded when it was decided, and passages of the index
    encoded: int
    passages: int
    #: from the beginning of the build until the decision, which a new encoder that serves went live with
    seconds: float
    #: mean squared distance to the new vectors on held-out passages: of the mapped vectors, and of the old ones
    error: float
    error_before: float


def described(report: Mapping[str, Any]) -> str:
    """One line for people, of `BridgeReport` as plain values."""
    ways = [
        f"{name} {found['metric']} {found['old']:.4f} -> {found['new']:.4f}: {Significance(**found['change'])}"
        for name, found in report["measured"].items()
    ]
    after = f"{report['seconds']:.0f} s with {report['encoded']} of {report['passages']} passages encoded"
    serves = f"the old encoder served on, as was decided after {after}"
    if report["mode"] is not None:
        serves = f"it served from the old vectors, {report['mode']}, after {after}"
    return f"bridge to generation {report['generation']}: {serves}; {'; '.join(ways)}"


def read_report(directory: Path) -> dict[str, Any] | None:
    """What was decided when a generation was built with a bridge, from its directory; None where it was not."""
    path = directory / FILE
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise IndexStateError(f"'{path}' cannot be read ({error}): delete it, it is a record alone") from error


def read_state(root: Path) -> dict[str, Any] | None:
    """What serves over the live generation's vectors, from any process; None without a bridge.

    Raises:
        IndexStateError: its file is damaged, or of a newer version.
    """
    path = root / "bridge" / FILE
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if state["format"] > FORMAT:
            raise IndexStateError(f"'{path}' was written by a newer ultrarag: upgrade ultrarag to open this index")
        return {**state, "encoded": max(int(state["encoded"]), count_kept(path.parent))}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise IndexStateError(
            f"'{path}' cannot be read ({error}): delete the folder '{path.parent}', and the old encoder serves"
        ) from error
