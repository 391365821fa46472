"""A copy of a checkpoint is the checkpoint, or is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ultrarag.checkpoint import Manifest, copy_checkpoint, read_manifest
from ultrarag.errors import CheckpointError


@pytest.fixture
def checkpoint(minilm_encoder, tmp_path: Path) -> tuple[Path, Manifest]:
    """A folder, and its manifest."""
    folder = minilm_encoder.save(tmp_path / "original")
    manifest = read_manifest(folder)
    assert manifest is not None
    return folder, manifest


def test_the_copy_holds_every_file_and_nothing_else(checkpoint, tmp_path: Path) -> None:
    folder, manifest = checkpoint
    (folder / "notes.txt").write_text("mine")
    copy_checkpoint(folder, manifest, tmp_path / "copy")
    assert read_manifest(tmp_path / "copy") == manifest
    assert not (tmp_path / "copy" / "notes.txt").exists()


def test_a_damaged_file_is_named_and_nothing_is_published(checkpoint, tmp_path: Path) -> None:
    folder, manifest = checkpoint
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json' is not what the checkpoint's manifest says"):
        copy_checkpoint(folder, manifest, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
