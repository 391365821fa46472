"""What can be said about an index from any process, without owning it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ultrarag.io import read_owner
from ultrarag.retrieve.bridge import read_report, read_state
from ultrarag.retrieve.generation import Catalog, Generation, IndexLayout, Progress
from ultrarag.retrieve.passages import FORMAT, URI, Store
from ultrarag.types import Passage


def read_status(path: str | Path) -> dict[str, Any]:
    """Return what `LiveIndex.status` does, while another process may own the index.

    Raises:
        IndexStateError: when there is no index, or it is damaged.
    """
    store = Store.open(Path(path), read_only=True)
    try:
        return describe(IndexLayout(Path(path)), store)
    finally:
        store.close()


def read_passages(path: str | Path) -> Iterator[Passage]:
    """Iterate over the passages of an index that another process may own, in the order in which they were added."""
    store = Store.open(Path(path), read_only=True)
    try:
        yield from store.passages()
    finally:
        store.close()


def describe(layout: IndexLayout, store: Store) -> dict[str, Any]:
    """Plain JSON values: passages, write log, the live generation, all others, the owner, bytes on disk."""
    catalog = Catalog(store)
    last, generations = store.last_seq(), catalog.all()
    sizes = _sizes(str(layout.root))
    described = [_describe(layout, store, generation, last, sizes) for generation in generations]
    owner = read_owner(layout.root)
    return {
        "path": str(layout.root),
        "format": FORMAT,
        "passages": store.count(),
        "writes": last,
        "bm25": store.get_meta("bm25") == "1",
        "shared": {"uri": uri} if (uri := store.get_meta(URI)) else None,
        "live": next((entry for entry in described if entry["state"] == "live"), None),
        "live_since": catalog.live_since(),
        "previous": next((entry for entry in described if entry["state"] == "previous"), None),
        "bridge": read_state(layout.root),
        "generations": described,
        "owner": asdict(owner) if owner else None,
        "bytes": sizes.get(str(layout.root), 0),
    }


def _describe(
    layout: IndexLayout, store: Store, generation: Generation, last: int, sizes: Mapping[str, int]
) -> dict[str, Any]:
    directory = layout.directory(generation.id)
    entry = {**asdict(generation), "heads": list(generation.heads), "behind": last - generation.applied_seq}
    entry["bytes"] = sizes.get(str(directory), 0)
    entry["unencoded"] = store.unencoded(generation.vectors_of)
    entry["bridge"] = read_report(directory)
    if generation.state == "building":
        entry["progress"] = _progress(directory)
    return entry


def _progress(directory: Path) -> dict[str, Any]:
    """Passages encoded, of how many, and the seconds that are left."""
    found = Progress.read(directory) or Progress()
    encoded, total = found.held, found.total
    left = found.seconds / encoded * (total - encoded) if encoded and total else None
    return {"encoded": encoded, "total": total, "seconds": found.seconds, "seconds_left": left}


def _sizes(root: str) -> dict[str, int]:
    """What the files below each folder occupy, looked at once; engines preallocate files that are mostly holes."""
    sizes: dict[str, int] = {}
    for folder, folders, names in os.walk(root, topdown=False):  # what is below comes first
        total = sum(sizes.get(os.path.join(folder, name), 0) for name in folders)
        for name in names:
            with suppress(OSError):  # gone since it was listed
                status = os.lstat(os.path.join(folder, name))
                total += getattr(status, "st_blocks", status.st_size // 512) * 512
        sizes[folder] = total
    return sizes
