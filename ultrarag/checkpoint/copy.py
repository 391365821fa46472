"""Copying a checkpoint: each file compared with its checksum, and the copy there as a whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

from ultrarag.checkpoint.manifest import MANIFEST, Manifest, changed_files
from ultrarag.errors import CheckpointError
from ultrarag.io import publish_directory, staged_directory


def copy_checkpoint(source: Path, manifest: Manifest, target: Path) -> None:
    """Copy the files that a manifest lists, compare them with their checksums, and publish them in one step.

    Not hard links: a later training run may write into the same files.

    Raises:
        CheckpointError: when a file is not what the manifest says; nothing is at `target` then.
    """
    with staged_directory(target) as stage:
        for name in (*manifest.files, MANIFEST):
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, stage / name)
        if damaged := changed_files(stage, manifest):
            raise CheckpointError(
                f"'{source / damaged[0]}' is not what the checkpoint's manifest says (checksum; {len(damaged)} such "
                f"files): it is damaged, or was changed; save the checkpoint again"
            )
        publish_directory(stage, target)
