"""What a model was trained on, kept small in its manifest, so that nobody trains on the same rows again unawares.

A record holds the digests of the files, and of the rows the smallest keys: all of up to `KEPT` rows, else a random
sample by value. The sample of any later data below the same limit can be compared with it exactly, so the share of
rows that were seen is known to a few percent, whatever the size, also of a file that was grown by new rows.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ultrarag.checkpoint import Training
from ultrarag.finetune.data import TrainData

#: Row keys that a record keeps: 16 KiB of numbers, 22 KiB in the manifest.
KEPT = 2048
#: A refresh refuses data of which at least this share was seen.
TOO_MANY = 0.1


def record_of(parts: Sequence[TrainData]) -> dict[str, Any]:
    """What was trained on, as plain JSON values."""
    keys = np.unique(np.concatenate([part.keys() for part in parts]))
    kept = keys[:KEPT]
    files = {digest: name for part in parts for name, digest in part.files.items()}
    return {"files": files, "rows": len(keys), "keys": base64.b64encode(kept.astype("<u8").tobytes()).decode()}


@dataclass(frozen=True)
class Seen:
    """How much of some data a model was trained on before."""

    #: names of files, now, whose content was trained on as a whole
    files: list[str]
    #: distinct rows that could be compared, and those of them that were seen
    compared: int
    found: int
    #: who saw most of them: the checkpoint's fingerprint, empty for the parent itself
    by: str

    @property
    def share(self) -> float:
        """The share of rows that were seen."""
        return self.found / self.compared if self.compared else float(bool(self.files))

    @property
    def too_many(self) -> bool:
        """So many that training on them again is likely to be a mistake."""
        return bool(self.files) or self.share >= TOO_MANY

    def __str__(self) -> str:
        who = f"a model of its lineage, {self.by[:12]}," if self.by else "this model"
        whole = f"{', '.join(self.files)}: the whole file was trained on before; " if self.files else ""
        about = "" if self.compared < KEPT else "about "
        return f"{whole}{about}{self.share:.0%} of the rows were trained on before ({who} saw most of them)"


def seen_before(data: TrainData, parent: Training | None) -> Seen | None:
    """Compare data with what the parent and all before it were trained on; None where nothing was seen.

    Args:
        parent: how the model came about that is to be trained.
    """
    if parent is None:
        return None
    keys = np.unique(data.keys())
    records = [("", parent.seen), *((item.get("fingerprint", ""), item.get("seen")) for item in parent.ancestors)]
    known = [(by, record) for by, record in records if record]
    files = [name for name, digest in data.files.items() if any(digest in record["files"] for _, record in known)]
    held = [(by, *_keys_of(record)) for by, record in known]
    # each record alone, and all together in what all of them can tell
    found = [_compare(keys, limit, rows, by) for by, limit, rows in held]
    if len(held) > 1:
        limits = [limit for _, limit, _ in held if limit is not None]
        everything = np.unique(np.concatenate([rows for _, _, rows in held]))
        most = max(found, key=lambda item: item.found).by
        found.append(_compare(keys, min(limits) if limits else None, everything, most))
    best = max(found, key=lambda item: item.share, default=Seen([], 0, 0, ""))
    return replace(best, files=files) if files or best.found else None


def _compare(keys: np.ndarray, limit: np.uint64 | None, rows: np.ndarray, by: str) -> Seen:
    mine = keys if limit is None else keys[keys <= limit]
    return Seen([], len(mine), len(np.intersect1d(mine, rows, assume_unique=True)), by)


def _keys_of(record: Mapping[str, Any]) -> tuple[np.uint64 | None, np.ndarray]:
    """The keys of a record, and the largest key that it would hold; None where it holds all rows."""
    held = np.frombuffer(base64.b64decode(record["keys"]), "<u8").astype(np.uint64)
    return (held[-1] if record["rows"] > len(held) else None), held
