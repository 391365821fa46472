"""mine: rows of files with hard negatives, streamed, resumable, with counts per row and a report."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.io import Output, identity, resumable, write_json
from ultrarag.mining.miner import WINDOW, Miner
from ultrarag.mining.pool import MiningSources, pool_file, read_pool
from ultrarag.mining.report import MiningReport
from ultrarag.mining.settings import MiningSettings
from ultrarag.rows import Paths, checked_row, file_paths, raw_rows, reading

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ultrarag.encoder import Encoder
    from ultrarag.retrieve import LiveIndex
    from ultrarag.rows import Row


def mine_files(
    input_file: Paths,
    output_file: str | Path,
    encoder: Encoder | None,
    settings: MiningSettings,
    *,
    candidate_pool: str | Path | None = None,
    live: LiveIndex | None = None,
    reranker: Encoder | None = None,
    reranker_options: Mapping[str, Any] | None = None,
    work_dir: str | Path | None = None,
    overwrite: bool = False,
    gpu: bool = False,
    batch_tokens: int | None = None,
    progress: bool | None = None,
    window: int = WINDOW,
) -> MiningReport:
    """Write rows with hard negatives to `output_file`, and beside it OUTPUT.counts.jsonl and OUTPUT.report.json.

    A killed call goes on where it was, when it is made again with the same arguments.

    Args:
        candidate_pool: see `read_pool`; default: the passages of the rows.
        live: an open index, in place of a pool and with its own encoder.
        work_dir: keeps texts and vectors for other calls with the same input, pool and model.

    Raises:
        DataError: rows or candidates cannot be used, or the output exists or was begun with other arguments.
        UsageError: settings cannot be used.
    """
    output = Path(output_file)
    paths = file_paths(input_file)
    folder = Path(work_dir) if work_dir else output.with_name(f"{output.name}.mining")
    if overwrite and not work_dir:
        shutil.rmtree(folder, ignore_errors=True)
    pool = _pool_identity(candidate_pool, live, encoder, settings, paths)
    targets = [output, output.with_name(f"{output.name}.counts.jsonl")]
    with resumable(targets, {**pool, **_choices(settings, reranker, reranker_options)}, overwrite) as out:
        sources = MiningSources(lambda: _rows(paths), _pool_of(candidate_pool), live)
        with Miner(
            folder,
            sources,
            encoder,
            settings,
            reranker=reranker,
            reranker_options=reranker_options,
            identity=pool,
            gpu=gpu,
            batch_tokens=batch_tokens,
            progress=progress,
        ) as miner:
            _mine(miner, paths, out, window)
            report = miner.report
    write_json(output.with_name(f"{output.name}.report.json"), report.to_dict())
    if not work_dir:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def _mine(miner: Miner, paths: list[str], out: Output, window: int) -> None:
    """Go on after the rows that earlier runs have written."""
    if out.state:
        earlier = MiningReport.from_dict(out.state)
        for name, seconds in miner.report.seconds.items():
            earlier.seconds[name] += seconds
        miner.report = earlier
    with reading(paths, "mine", skip=out.done) as items:
        while batch := list(islice(items, window)):
            rows = [checked_row(place, raw) for place, raw in batch]
            for one in miner.mine(out.done, rows):
                out.write(one.row)
                out.write(one.counts, 1)
            out.state = miner.report.to_dict()
            out.advance(len(rows))


def _rows(paths: list[str]) -> Iterator[Row]:
    for path in paths:
        for place, raw in raw_rows(path):
            yield checked_row(place, raw)


def _pool_of(path: str | Path | None) -> Any:
    return None if path is None else lambda: (passage.content for passage in read_pool(path))


def _pool_identity(
    pool: str | Path | None, live: LiveIndex | None, encoder: Encoder | None, settings: MiningSettings, paths: list[str]
) -> dict[str, Any]:
    """What texts and vectors depend on."""
    return {
        "input": [identity(path) for path in paths],
        "pool": None if pool is None else identity(pool_file(pool)),
        "live_index": None if live is None else [str(live.path.resolve()), live.status()["writes"]],
        "model": None if encoder is None else [encoder.fingerprint, encoder.precision],
        "heads": sorted(head for head, weight in (settings.weights or {}).items() if weight),
        "vectors": settings.vectors,
    }


def _choices(settings: MiningSettings, reranker: Encoder | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """What else the negatives depend on."""
    judge = None if reranker is None else [reranker.fingerprint, reranker.precision, dict(options or {})]
    return {"settings": asdict(settings), "reranker": judge}
