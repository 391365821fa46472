"""How far a build has come, in the file that any process reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ultrarag.errors import IndexStateError
from ultrarag.retrieve.generation.catalog import Progress


def test_a_build_without_a_note_has_no_progress(tmp_path: Path) -> None:
    assert Progress.read(tmp_path) is None


@pytest.mark.parametrize("ahead", [0, 7])
def test_progress_is_read_as_it_was_written(tmp_path: Path, ahead: int) -> None:
    written = Progress(row=12, encoded=10, ahead=ahead, applied=3, seconds=1.5, total=40, own={"taken": 4})
    written.write(tmp_path)
    assert Progress.read(tmp_path) == written
    assert json.loads((tmp_path / "progress.json").read_text())["encoded"] == 10 + ahead  # for whoever asks


def test_a_note_of_an_earlier_version_is_understood(tmp_path: Path) -> None:
    """As a build on Ray wrote it, that was killed."""
    note = {"row": 5, "encoded": 90, "applied": 8, "seconds": 2.0, "taken": 85, "resumed": 0, "up_to_row": 5}
    (tmp_path / "progress.json").write_text(json.dumps({**note, "total": 100}))
    found = Progress.read(tmp_path)
    assert (found.row, found.encoded, found.held, found.total, found.finished) == (5, 5, 90, 100, False)
    assert found.own == {"taken": 85, "resumed": 0}


@pytest.mark.parametrize("content", ["half a n", "[1]", '{"encoded": "many"}'])
def test_damaged_progress_is_named_with_the_remedy(tmp_path: Path, content: str) -> None:
    (tmp_path / "progress.json").write_text(content)
    with pytest.raises(IndexStateError, match=r"progress\.json' is damaged .*; delete .* and build again"):
        Progress.read(tmp_path)
