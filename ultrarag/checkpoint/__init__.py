"""Checkpoints: directories that every tool loads, published whole or not at all.

A model's files come in; a manifest, a fingerprint of the content and a lineage go out. Nothing here knows how a
model was trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.checkpoint.manifest import (
        MANIFEST,
        Identity,
        Manifest,
        Training,
        changed_files,
        checkpoint_log,
        fingerprint,
        lineage_text,
        local_folder,
        read_manifest,
        tokenizer_content,
    )
    from ultrarag.checkpoint.publishing import (
        check_replaceable,
        copy_checkpoint,
        largest_difference,
        probe_vectors,
        publish,
        write_checkpoint,
    )
else:
    __getattr__, __dir__, __all__ = exports(__name__)
