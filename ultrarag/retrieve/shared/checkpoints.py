"""The folder in which a shared index keeps the checkpoints of its generations, seen by all its processes."""

from __future__ import annotations

from pathlib import Path

from ultrarag.checkpoint import read_manifest
from ultrarag.errors import CheckpointError
from ultrarag.retrieve.building import copy_checkpoint


class Checkpoints:
    """Checkpoints by fingerprint; each appears whole or not at all, and is never changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, checkpoint: Path, fingerprint: str) -> None:
        """Copy a checkpoint into the folder, unless it is there."""
        target = self.folder / fingerprint
        if target.exists():
            return
        manifest = read_manifest(checkpoint)
        if manifest is None:
            raise CheckpointError(f"'{checkpoint}' is no checkpoint: its manifest is missing")
        self.folder.mkdir(parents=True, exist_ok=True)
        copy_checkpoint(checkpoint, manifest, target)

    def fetch(self, fingerprint: str, target: Path) -> None:
        """Copy a checkpoint out of the folder, compared with its checksums.

        Raises:
            CheckpointError: when it is not there, damaged, or another one.
        """
        source = self.folder / fingerprint
        manifest = read_manifest(source) if source.is_dir() else None
        if manifest is None:
            raise CheckpointError(
                f"'{source}' is missing: every process of a shared index must see the folder with its checkpoints; "
                f"name it with checkpoints=, as this machine sees it"
            )
        if manifest.fingerprint != fingerprint:
            raise CheckpointError(f"'{source}' holds the encoder {manifest.fingerprint[:12]}, not the one of its name")
        copy_checkpoint(source, manifest, target)

    def remove_others(self, fingerprints: set[str]) -> None:
        """Delete the checkpoints of generations that no longer are."""
        import shutil

        for folder in self.folder.iterdir() if self.folder.is_dir() else ():
            if folder.is_dir() and len(folder.name) == 64 and folder.name not in fingerprints:
                shutil.rmtree(folder)
