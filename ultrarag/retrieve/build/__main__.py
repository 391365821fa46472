"""`torchrun ... -m ultrarag.retrieve.build INDEX CHECKPOINT`: build a generation with many processes or machines.

Each process encodes its share of the passages into files below the index (see `ultrarag.encode.ranks`), and the
first one then joins them into a generation by an ordinary build, which encodes nothing but what was written meanwhile.
Started again after any crash, with as many processes or others, it goes on with the blocks that have no file. The index
may be in use: searches and writes go on, and the process that owns it then joins, with `build` of the same checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ultrarag.encode import Encoded, Rank
from ultrarag.encoder.engines import family
from ultrarag.errors import IndexStateError
from ultrarag.io import print_error, print_result, read_owner, run_command
from ultrarag.retrieve.build.origin import origin_of
from ultrarag.retrieve.command import built, share_flags
from ultrarag.retrieve.generation import Catalog, IndexLayout, Progress, Source, generation_adapter
from ultrarag.retrieve.live import LiveIndex
from ultrarag.retrieve.passages import Store


def encode_share(
    root: Path,
    checkpoint: str,
    rank: Rank,
    adapter: str | None,
    heads: Sequence[str] | None,
    device: str,
    backend: str | None = None,
    share: bool | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Encode this rank's blocks that have no file yet, and return the number of passages."""
    from ultrarag.encoder import Encoder

    store = Store.open(root, read_only=True)
    try:
        live = Catalog(store).live()
        adapter, precision = adapter or generation_adapter(checkpoint, IndexLayout(root), live), family(live.precision)
        options: dict[str, Any] = {"device": device, "precision": precision, "trust_remote_code": trust_remote_code}
        encoder = Encoder.load(checkpoint, adapter, **options)
        catalog = Catalog(store)
        origin, chosen = origin_of(IndexLayout(root), catalog, Source(encoder), backend, heads, share)
        if origin.vectors_of is not None or origin.mapped_from is not None:
            return 0  # nothing has to be encoded, and whoever joins says so
        if _is_built(store, encoder.fingerprint, chosen):
            return 0
        ahead = Encoded(root, encoder.fingerprint, chosen, encoder.precision, store.last_row())
        return ahead.encode(encoder, store, rank, _rows_built(root, store, encoder.fingerprint))
    finally:
        store.close()


def _is_built(store: Store, fingerprint: str, heads: tuple[str, ...]) -> bool:
    """Whether a generation with these vectors only waits to go live."""
    return any(
        found.state == "ready" and (found.fingerprint, found.heads) == (fingerprint, heads)
        for found in Catalog(store).all()
    )


def _rows_built(root: Path, store: Store, fingerprint: str) -> int:
    """The rows that an unfinished build of this encoder has taken already."""
    rows = [0]
    for found in Catalog(store).in_state("building"):
        if found.fingerprint == fingerprint:
            rows.append((Progress.read(IndexLayout(root).directory(found.id)) or Progress()).row)
    return max(rows)


def join(root: Path, checkpoint: str, device: str, **wishes: Any) -> dict[str, Any]:
    """Build the generation from what is encoded; an index that is in use is left to its owner."""
    owner = read_owner(root)
    if owner is not None:
        print_error(
            f"'{root}' is in use by {owner}: the vectors are encoded; build the same checkpoint there "
            f"(live.build) to join them, which encodes nothing again"
        )
        return {"state": "encoded", "owner": asdict(owner)}
    with LiveIndex.open(root, device=device) as live:
        generation = live.build(checkpoint, device=device, **wishes)
        return {**asdict(generation), "built": generation.how_built()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank; return the exit status: 0, 1 (it failed), 2 (wrong usage), 130 (Ctrl-C)."""
    rank = Rank.of_environment()
    who = f"rank {rank.number}" if rank.world > 1 else ""
    return run_command(
        lambda: _show(_parser().parse_args(arguments), rank),
        "the blocks that are encoded are kept; the same command goes on",
        who,
    )


def _show(asked: argparse.Namespace, rank: Rank) -> None:
    found = _run(asked, rank)
    if found is not None:
        print_result(found, asked.json or found["state"] == "encoded", built)


def _run(asked: argparse.Namespace, rank: Rank) -> dict[str, Any] | None:
    root = Path(asked.index)
    if not root.is_dir():
        raise IndexStateError(f"there is no index '{root}'; LiveIndex.create (ultrarag index create) makes one")
    device = asked.device or rank.device()
    wanted = (asked.adapter, asked.heads, device, asked.backend, asked.share, asked.trust_remote_code)
    count = encode_share(root, asked.checkpoint, rank, *wanted)
    print_error(f"rank {rank.number} of {rank.world}: {count} passages encoded")
    rank.wait()
    if rank.number:
        return None
    names = ("adapter", "heads", "backend", "threads", "share", "trust_remote_code")
    wishes = {name: getattr(asked, name) for name in names}
    return join(root, asked.checkpoint, device, **wishes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrun ... -m ultrarag.retrieve.build",
        description="Build a generation of an index with many processes or machines that see the same directory.",
        allow_abbrev=False,
    )
    parser.add_argument("index", metavar="INDEX", help="the index directory")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the checkpoint to encode the passages with")
    parser.add_argument(
        "--adapter",
        metavar="NAME",
        help="the kind of model; default: what the checkpoint says",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--heads", type=lambda text: tuple(text.split(",")), metavar="A,B", help="default: all")
    parser.add_argument("--backend", help="the vector engine; default: the live one's, ivf for many passages")
    parser.add_argument("--device", help="default: the GPU of the process's local rank, or the CPU")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of the process that joins; default: half of the cores"
    )
    share_flags(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
