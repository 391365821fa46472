"""The rows of a refresh from feedback, as they were when it began: one that is killed goes on with the same."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ultrarag.io import publish_directory, staged_directory, write_json
from ultrarag.retrieve.feedback.forgotten import FOLDER, JUDGED, ROWS
from ultrarag.retrieve.feedback.rows import TrainingRows

MADE_FOR = "output_dir.json"


def freeze(index: Path, output: Path, begun: bool, rows: Callable[[], TrainingRows]) -> tuple[Path, Any]:
    """Return the file with the rows, and (queries, qrels) for the gate.

    Args:
        index: its folder; the rows lie in it, so that nothing is written where the checkpoint is to be.
        output: of the refresh.
        begun: whether the refresh is under way or finished there: then its rows are taken as they were.
        rows: makes them from the log.

    Raises:
        DataError: there is nothing to train on; says what the log holds.
    """
    folder = index / FOLDER
    place = folder / hashlib.sha256(str(output.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    if not (begun and place.is_dir()):
        made = rows().checked()
        folder.mkdir(exist_ok=True)
        _prune(folder)
        if place.exists():
            shutil.rmtree(place)
        with staged_directory(place) as stage:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in made.rows)
            (stage / ROWS).write_text("".join(lines), encoding="utf-8")
            write_json(stage / JUDGED, {"queries": made.gate[0], "qrels": made.gate[1], "report": made.report})
            write_json(stage / MADE_FOR, str(output.absolute()))
            publish_directory(stage, place)
    judged = json.loads((place / JUDGED).read_text(encoding="utf-8"))
    return place / ROWS, (judged["queries"], judged["qrels"])


def _prune(folder: Path) -> None:
    """Remove the rows of refreshes whose output folder is gone."""
    for place in folder.iterdir():
        made_for = place / MADE_FOR
        if made_for.is_file() and not Path(json.loads(made_for.read_text(encoding="utf-8"))).exists():
            shutil.rmtree(place, ignore_errors=True)
