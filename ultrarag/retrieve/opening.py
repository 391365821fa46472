"""Opening an index: created whole or not at all, its parts opened together, and closed together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ultrarag.errors import IndexStateError, UsageError
from ultrarag.io import named_conditions, publish_directory, staged_directory
from ultrarag.retrieve.bridge import resume
from ultrarag.retrieve.build import end_build
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.generation import lay_out, stored_heads
from ultrarag.retrieve.shared import check_mirror, check_quantise, create_mirror, create_shared, mirror_path

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder


def create_index(
    path: str | os.PathLike[str] | None,
    encoder: Encoder,
    uri: str | None,
    checkpoints: str | os.PathLike[str] | None,
    backend: str | None,
    heads: Sequence[str] | None,
    bm25: bool,
) -> Path:
    """Create an empty index, and return its directory; see `LiveIndex.create`."""
    root = _root(path, uri)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise IndexStateError(
            f"'{root}' is not empty; open an index that is there with LiveIndex.open (ultrarag index status), or name "
            "another directory"
        )
    chosen = stored_heads(encoder.heads, heads)
    with named_conditions(root):
        if uri is None:
            _create_embedded(root, encoder, checkpoints, backend, chosen, bm25)
        elif backend is not None:
            raise UsageError("backend is for an index of this process alone; the uri says where a shared one is")
        else:
            create_shared(root, encoder, uri, absolute(checkpoints), chosen, bm25)
    return root


def _create_embedded(
    root: Path,
    encoder: Encoder,
    checkpoints: str | os.PathLike[str] | None,
    backend: str | None,
    heads: tuple[str, ...],
    bm25: bool,
) -> None:
    if checkpoints is not None:
        raise UsageError("checkpoints is for shared indexes: give a uri, or leave it out")
    with staged_directory(root) as stage:
        lay_out(stage, encoder, backend, heads, bm25)
        publish_directory(stage, root)


def open_core(
    path: str | os.PathLike[str] | None,
    encoder: Encoder | None,
    uri: str | None,
    checkpoints: str | None,
    device: str | None,
    repair: bool,
    trust_remote_code: bool,
    late: bool,
) -> Core:
    """Open the parts of an index, and the bridge that served when it was closed; see `LiveIndex.open`."""
    root = _root(path, uri)
    if uri is not None:
        if root.exists() and any(root.iterdir()):
            check_mirror(root, uri)
        else:
            create_mirror(root, uri, checkpoints)
    core = Core.open(root, encoder, device, repair, checkpoints, trust_remote_code, late)
    try:
        if uri is not None:
            check_quantise(uri, core.catalog.live())
        resume(core)
    except BaseException:
        core.close()
        raise
    return core


def close_core(core: Core) -> None:
    """End what runs, so that it can be taken up again, and close the parts."""
    if core.running is not None:
        core.running.cancel()
    end_build(core)
    core.close()


def absolute(path: str | os.PathLike[str] | None) -> str | None:
    """A path that means the same from everywhere, as text; None stays."""
    return None if path is None else str(Path(path).absolute())


def _root(path: str | os.PathLike[str] | None, uri: str | None) -> Path:
    """The directory of an index: of a shared one that is named by its uri alone, that of this process's mirror."""
    return mirror_path(uri) if path is None and uri is not None else Path(path or "")
