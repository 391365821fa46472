"""What each command of `ultrarag index` does; called with the arguments that `parser` has read."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ultrarag.encode.ray import RayPool
from ultrarag.errors import DataError, IndexStateError, UsageError
from ultrarag.evaluation import Collection, differences, evaluate_run, read_beir, read_run, write_run
from ultrarag.io import print_error, print_result, progress_bar, standard_input
from ultrarag.retrieve.bridge import BridgeTerms
from ultrarag.retrieve.command import printing
from ultrarag.retrieve.generation import Generation
from ultrarag.retrieve.live import LiveIndex
from ultrarag.retrieve.passages import STDIN, Written, passage_file, read_queries
from ultrarag.retrieve.status import read_status
from ultrarag.types import Hit

#: Queries searched at a time.
CHUNK_QUERIES = 64

_Item = TypeVar("_Item")


def create(arguments: argparse.Namespace) -> None:
    """Make an empty index."""
    from ultrarag.encoder import Encoder

    lengths = {name: getattr(arguments, name) for name in ("query_max_length", "passage_max_length")}
    encoder = Encoder.load(
        arguments.model,
        arguments.adapter,
        device=arguments.device,
        precision=arguments.precision,
        trust_remote_code=arguments.trust_remote_code,
        **lengths,
    )
    chosen = {"backend": arguments.backend, "heads": arguments.heads, "bm25": not arguments.no_bm25}
    chosen |= {"uri": arguments.uri, "checkpoints": arguments.checkpoints}
    LiveIndex.create(arguments.path, encoder, **chosen).close()
    status(arguments)


def mirror(arguments: argparse.Namespace) -> None:
    """Make a mirror of a shared index, or bring one up to date."""
    chosen = {"uri": arguments.uri, "checkpoints": arguments.checkpoints, "device": arguments.device}
    LiveIndex.open(arguments.path, **chosen, trust_remote_code=arguments.trust_remote_code).close()
    status(arguments)


def add(arguments: argparse.Namespace) -> None:
    """Check every file before the first passage is added."""
    with ExitStack() as files:
        sources = [files.enter_context(passage_file(name, layout=arguments.layout)) for name in arguments.files]
        for source in sources:
            if source.renamed:
                print_error(printing.renamed(source.name, source.renamed, source.example))
        bar = progress_bar(sum(source.count for source in sources), "add", "passage")
        with _open(arguments) as live, bar:
            written = Written()
            for source in sources:
                written += live.add(_counted(source, bar))
            blank = sum(source.blank for source in sources)
            _show(arguments, {**asdict(written), "blank": blank, "passages": len(live)}, printing.written)


def _counted(items: Iterable[_Item], bar: Any) -> Iterator[_Item]:
    for item in items:
        yield item
        bar.update(1)


def delete(arguments: argparse.Namespace) -> None:
    """Delete passages, named as words or in a file."""
    ids = [*arguments.ids, *(_lines(arguments.ids_file) if arguments.ids_file else [])]
    if not ids:
        raise UsageError("name the passages to delete: as words, or with --ids_file FILE")
    with _open(arguments) as live:
        deleted = live.delete(ids)
        found = {"deleted": deleted, "unknown": len(set(ids)) - deleted, "passages": len(live)}
    _show(arguments, found, printing.deleted)


def _lines(name: str) -> list[str]:
    try:
        text = standard_input().read() if name == STDIN else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read '{name}': {error}") from error
    return [line for line in text.splitlines() if line]


def search(arguments: argparse.Namespace) -> None:
    """Print the hits of one query, or of a file of queries; or write them as a run."""
    if (arguments.query is None) == (arguments.queries is None):
        raise UsageError("search needs a query, or --queries FILE, and not both")
    queries = read_queries(arguments.queries) if arguments.queries else {"1": arguments.query}
    with _open(arguments, late=True) as live:
        hits = dict(_searched(live, queries, {"k": arguments.k, **_options(arguments)}))
    if arguments.run:
        write_run(arguments.run, {id: {hit.id: hit.score for hit in found} for id, found in hits.items()})
        print_error(f"{sum(map(len, hits.values()))} hits of {len(hits)} queries in {arguments.run}")
    if arguments.json or not arguments.run:
        rows = [{"id": id, "query": queries[id], "hits": [asdict(hit) for hit in found]} for id, found in hits.items()]
        shown = (printing.hits(found, queries[id] if arguments.queries else "") for id, found in hits.items())
        print_result(rows if arguments.queries else rows[0], arguments.json, lambda _: "\n\n".join(shown))


def _searched(live: LiveIndex, queries: dict[str, str], options: dict[str, Any]) -> Iterator[tuple[str, list[Hit]]]:
    with progress_bar(len(queries), "search", "query") as bar:
        ids = iter(queries)
        while part := list(islice(ids, CHUNK_QUERIES)):
            yield from zip(part, live.search_many([queries[id] for id in part], **options), strict=True)
            bar.update(len(part))


def status(arguments: argparse.Namespace) -> None:
    """Describe the index without owning it."""
    _show(arguments, read_status(arguments.path), printing.status)


def build(arguments: argparse.Namespace) -> None:
    """Build a generation."""
    names = ("adapter", "backend", "heads", "threads", "share", "trust_remote_code", "precision")
    wishes = {name: getattr(arguments, name) for name in names}
    ray = _ray_pool(arguments)  # before the index is opened, which may take a while
    terms = None
    if arguments.bridge:
        judged = read_beir(arguments.bridge, "test")
        terms = BridgeTerms(judged.queries, judged.qrels)
    with _open(arguments) as live:
        generation = live.build(arguments.checkpoint, ray=ray, bridge=terms, **wishes)
        bridge = next(entry["bridge"] for entry in live.status()["generations"] if entry["id"] == generation.id)
    _show(arguments, {**asdict(generation), "built": generation.how_built(), "bridge": bridge}, printing.built)


#: Flag -> field of a RayPool.
_RAY = {
    "workers": "workers",
    "gpus_per_worker": "gpus",
    "cpus_per_worker": "cpus",
    "batch_tokens": "batch_tokens",
    "block": "block",
}


def _ray_pool(arguments: argparse.Namespace) -> RayPool | None:
    given = {flag: value for flag in _RAY if (value := getattr(arguments, flag)) is not None}
    if arguments.ray is None:
        if given:
            raise UsageError(f"--{next(iter(given))} is for a build on Ray: say where with --ray ADDRESS")
        return None
    return RayPool(arguments.ray, **{_RAY[flag]: value for flag, value in given.items()})


def swap(arguments: argparse.Namespace) -> None:
    """Make a generation live, through the gate if there is one."""
    gate = None
    if arguments.gate:
        judged = read_beir(arguments.gate, arguments.split)
        gate = (judged.queries, judged.qrels)
    elif arguments.force:
        print_error("--force changes nothing without --gate: no comparison is made")
    with _open(arguments) as live:
        generation = arguments.generation if arguments.generation is not None else _ready(live).id
        flip = live.swap(generation, gate, force=arguments.force, metric=arguments.metric, **_options(arguments))
    _show(arguments, _flip(flip), printing.flip)


def _ready(live: LiveIndex) -> Generation:
    """The one generation that waits to go live."""
    ready = [entry["id"] for entry in live.status()["generations"] if entry["state"] == "ready"]
    if len(ready) != 1:
        found = (
            f"{len(ready)} generations are ready ({', '.join(map(str, ready))}): name one"
            if ready
            else ("no generation is ready: build one first (ultrarag index build PATH CHECKPOINT)")
        )
        raise IndexStateError(found)
    return live.generation(ready[0])


def rollback(arguments: argparse.Namespace) -> None:
    """Bring the previous generation back."""
    with _open(arguments) as live:
        flip = live.rollback()
    _show(arguments, _flip(flip), printing.flip)


def _flip(flip: Any) -> dict[str, Any]:
    verdict = flip.verdict.to_dict() if flip.verdict else None
    return {"old": asdict(flip.old), "new": asdict(flip.new), "verdict": verdict, "seconds": flip.seconds}


def evaluate(arguments: argparse.Namespace) -> None:
    """Print the metrics on a BEIR folder, and how they differ from those of a run."""
    judged: Collection = read_beir(arguments.folder, arguments.split)
    same = {"ignore_identical_ids": arguments.ignore_identical_ids}
    compared = read_run(arguments.compare) if arguments.compare else None
    other = None if compared is None else evaluate_run(judged.qrels, compared, arguments.metrics, **same)
    with _open(arguments) as live:
        options = {**_options(arguments), **same}
        found = live.evaluate(judged.queries, judged.qrels, arguments.metrics, arguments.k, **options)
    if arguments.run:
        write_run(arguments.run, found.run)
    report: dict[str, Any] = {"queries": len(found.per_query), "metrics": found.metrics, "notes": list(found.notes)}
    if other is not None:
        changes = {name: asdict(change) for name, change in differences(other, found).items()}
        report["compared"] = {"run": arguments.compare, "metrics": other.metrics, "change": changes}
        report["notes"] += [f"{arguments.compare}: {note}" for note in other.notes]
    if arguments.per_query:
        report["per_query"] = found.per_query
    _show(arguments, report, printing.evaluation)


def refresh(arguments: argparse.Namespace) -> None:
    """Fine-tune, build, compare and swap."""
    with _open(arguments) as live:
        report = live.refresh(
            arguments.train_data,
            arguments.eval_data,
            output_dir=arguments.output_dir,
            gate=not arguments.no_gate,
            force=arguments.force,
            metric=arguments.metric,
            search=_options(arguments) or None,
            effort=arguments.effort,
            bridge=arguments.bridge,
            **arguments.finetune,
        )
    _show(arguments, report.to_dict(), lambda found: str(report))


def retry(arguments: argparse.Namespace) -> None:
    """`ultrarag index retry`: encode the passages again that could not be encoded."""
    with _open(arguments) as live:
        before = len(live.status()["live"]["unencoded"])
        failed = live.retry()
    _show(arguments, {"encoded": before - len(failed), "unencoded": failed}, printing.retried)


def vacuum(arguments: argparse.Namespace) -> None:
    """Give back space on the disk."""
    with _open(arguments) as live:
        before = live.status()["bytes"]
        live.vacuum()
        found = {"before": before, "after": live.status()["bytes"]}
    _show(arguments, found, printing.vacuumed)


def _open(arguments: argparse.Namespace, late: bool = False) -> LiveIndex:
    return LiveIndex.open(arguments.path, device=arguments.device, late=late)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The search options that were given."""
    names: Sequence[str] = ("weights", "heads", "fusion", "normalize", "filter", "candidates", "exact")
    names = (*names, "ignore_identical_ids")  # of the gates
    return {name: value for name in names if (value := getattr(arguments, name, None)) not in (None, False)}


def _show(arguments: argparse.Namespace, found: dict[str, Any], text: Any) -> None:
    print_result(found, arguments.json, text)
