"""Hard negatives for rows of training data: `mine` for rows in memory, `mine_files` for files, resumably."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrarag.errors import DataError, UsageError, did_you_mean
from ultrarag.io import Output, identity, progress_bar, resumable, write_json
from ultrarag.mining.choice import Job, MiningSettings, RerankerVeto, choose, fill
from ultrarag.mining.pool import MiningSources, pool_file, prepare, read_pool, say_blank
from ultrarag.mining.report import MiningReport
from ultrarag.mining.search import BM25_HEAD, Asked, Found, MiningSearch, candidate_heads
from ultrarag.rows import BadRow, Paths, Row, checked_row, file_paths, parse_row, raw_rows, reading, text_key
from ultrarag.types import is_blank

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder
    from ultrarag.retrieve import LiveIndex

#: Rows searched together: the vectors are read from the disk once for all of them.
CHUNK_ROWS = 1024


@dataclass(frozen=True)
class Mined:
    """A row with its new negatives."""

    row: dict[str, Any]
    #: how many candidates there were, and what became of them, by reason
    counts: dict[str, Any]


@dataclass(frozen=True)
class Mining:
    """What `mine` returns."""

    rows: list[dict[str, Any]]
    #: per row
    counts: list[dict[str, Any]]
    report: MiningReport


def mine(
    rows: Sequence[Mapping[str, Any]],
    encoder: Encoder | None,
    pool: Iterable[str] | None = None,
    *,
    reranker: Encoder | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> Mining:
    """Return the rows with hard negatives in `neg`, in place of what was there.

    Args:
        rows: of training data (`query`, `pos`, ...).
        encoder: None where BM25 alone finds candidates (weights={"bm25": 1}).
        pool: candidates; default: the passages of the rows themselves.
        reranker: a cross-encoder, for `veto_above` and `veto_margin`.
        settings: fields of `MiningSettings`.

    Example:
        >>> from ultrarag.retrieve import mine
        >>> rows = [{"query": "what is milvus?", "pos": ["Milvus is a vector database."]}]
        >>> pool = ["Milvus is a vector database.", "Kites are birds.", "Qdrant is a vector database."]
        >>> mine(rows, encoder, pool, range=(0, 3), negatives=1, sampling="hardest").rows[0]["neg"]
        ['Qdrant is a vector database.']

    Raises:
        DataError: a row cannot be used.
        UsageError: a setting cannot be used, or the pool is smaller than the range.
    """
    checked = [_checked(number, row) for number, row in enumerate(rows, 1)]
    texts = None if pool is None else _visible(pool)
    sources = MiningSources(lambda: checked, None if texts is None else lambda: texts)
    chosen = _settings(settings)
    found: list[Mined] = []
    with (
        tempfile.TemporaryDirectory(prefix="ultrarag-mine-") as folder,
        Miner(Path(folder), sources, encoder, chosen, reranker=reranker, progress=progress) as miner,
        progress_bar(len(checked), "mine", "row", progress) as bar,
    ):
        for start in range(0, len(checked), CHUNK_ROWS):
            found += miner.mine(start, checked[start : start + CHUNK_ROWS])
            bar.update(len(found) - start)
    return Mining([one.row for one in found], [one.counts for one in found], miner.report)


def _visible(pool: Iterable[str]) -> list[str]:
    given = list(pool)
    kept = [text for text in given if not is_blank(text)]
    say_blank(len(given) - len(kept), "the pool")
    return kept


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
    chunk_rows: int = CHUNK_ROWS,
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
        out.afterwards(lambda: write_json(output.with_name(f"{output.name}.report.json"), out.state))
        if not work_dir:
            out.afterwards(lambda: shutil.rmtree(folder, ignore_errors=True))
        if out.finished:
            return MiningReport.from_dict(out.state)
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
            _mine(miner, paths, out, chunk_rows)
            out.state = miner.report.to_dict()
            return miner.report


def _checked(number: int, row: Any) -> Row:
    try:
        return parse_row(row)
    except BadRow as error:
        raise DataError(f"<rows>:{number}: {error}") from error


def _settings(values: Mapping[str, Any]) -> MiningSettings:
    from ultrarag.finetune.flags import refuse_unknown

    refuse_unknown(values, MiningSettings.__dataclass_fields__, "setting")  # type: ignore[arg-type]
    return MiningSettings(**values)


def _mine(miner: Miner, paths: list[str], out: Output, chunk_rows: int) -> None:
    """Go on after the rows that earlier runs have written."""
    if out.state:
        earlier = MiningReport.from_dict(out.state)
        for name, seconds in miner.report.seconds.items():
            earlier.seconds[name] += seconds
        miner.report = earlier
    with reading(paths, "mine", skip=out.done) as items:
        while chunk := list(islice(items, chunk_rows)):
            rows = [checked_row(place, raw) for place, raw in chunk]
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


class Miner:
    """A prepared pool and the rows that are given to it; use it as a context."""

    def __init__(
        self,
        folder: Path,
        sources: MiningSources,
        encoder: Encoder | None,
        settings: MiningSettings,
        *,
        reranker: Encoder | None = None,
        reranker_options: Mapping[str, Any] | None = None,
        identity: Mapping[str, Any] | None = None,
        gpu: bool = False,
        batch_tokens: int | None = None,
        progress: bool | None = None,
    ) -> None:
        """Encode the pool into `folder`, or take up what is there of the same `identity`."""
        self.settings = settings
        self.veto = _veto(settings, reranker, reranker_options or {})
        weights = checked_weights(settings.weights, encoder)
        heads = tuple(head for head in (*weights, *candidate_heads(tuple(weights), encoder)))
        vectors = tuple(head for head in heads if head != BM25_HEAD)
        self.prepared = prepare(
            folder,
            sources,
            encoder,
            vectors,
            BM25_HEAD in heads,
            identity or {},
            precision=settings.vectors,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        texts, parts = self.prepared.texts, (self.prepared.vectors, self.prepared.words)
        self.report = MiningReport(pool=texts.pool, repeated=texts.repeated, seconds=self.prepared.seconds)
        try:
            self._check_size(texts.pool)
            self.search = MiningSearch(weights, texts.pool, encoder, *parts, settings.fusion, gpu)
        except BaseException:
            self.prepared.close()
            raise

    def __enter__(self) -> Miner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.search.cuts.tell()
        self.prepared.close()

    def mine(self, first: int, rows: Sequence[Row]) -> list[Mined]:
        """Find negatives for rows number `first` and those after it; what is drawn depends on seed and number."""
        texts = self.prepared.texts
        asked = [Asked(row.query, row.prompt, texts.find(row.pos)) for row in rows]
        before = dict(self.search.seconds)
        found = self.search.find(asked, self.settings.range[1])
        for name, seconds in self.search.seconds.items():
            self.report.seconds[name] += seconds - before.get(name, 0.0)
        return self._chosen(first, rows, found)

    def _chosen(self, first: int, rows: Sequence[Row], found: Sequence[Found]) -> list[Mined]:
        started = time.perf_counter()
        jobs = [self._job(first + place, *pair) for place, pair in enumerate(zip(rows, found, strict=True))]
        choose(jobs, self.veto)
        if self.veto and self.settings.write_scores:
            self.veto.judge_positives(jobs)
        if self.settings.fill_random:
            for job in jobs:
                fill(job, self.prepared.texts.pool)
        self.report.add(jobs)
        numbered = enumerate(zip(rows, jobs, strict=True), first)
        mined = [Mined(self._row(row, job), _counts(number, row, job)) for number, (row, job) in numbered]
        self.report.seconds["choose"] += time.perf_counter() - started
        return mined

    def _job(self, number: int, row: Row, found: Found) -> Job:
        texts, low = self.prepared.texts, self.settings.range[0]
        return Job(
            query=row.query,
            positives=row.pos,
            found=Found(found.numbers[low:], found.scores[low:], found.positive_scores),
            forbidden=self.prepared.positives_of(row.query),
            query_numbers=texts.same(np.array([text_key(row.query)], np.uint64)),
            settings=self.settings,
            random=np.random.default_rng([self.settings.seed, number]),
            read=texts.read,
        )

    def _row(self, row: Row, job: Job) -> dict[str, Any]:
        """The row with its new negatives; scores of other negatives go, since they would be theirs."""
        values = row.model_dump(exclude_unset=True, exclude={"neg", "pos_scores", "neg_scores"})
        values["neg"] = [job.read(number) for number in job.chosen]
        if self.settings.write_scores:
            values["pos_scores"] = job.positives_judged if self.veto else job.found.positive_scores.tolist()
            scores = job.judged if self.veto else job.score_of
            values["neg_scores"] = [scores[number] for number in job.chosen]
        return values

    def _check_size(self, pool: int) -> None:
        low = self.settings.range[0]
        if pool <= low:
            raise UsageError(
                f"negatives are drawn from rank {low} on, and the pool has {pool} texts: give a range that begins "
                "earlier, such as 0-100 with a margin, or a larger pool"
            )


def checked_weights(asked: Mapping[str, float] | None, encoder: Encoder | None) -> dict[str, float]:
    """The heads that count with their weights; without any given, the dense head or the only one.

    Raises:
        UsageError: the encoder is a cross-encoder or missing, or lacks a head.
    """
    if encoder is not None and encoder.adapter.declared.pair_input:
        raise UsageError("a cross-encoder cannot search: give an embedding model, and this one as the reranker")
    if asked is None:
        if encoder is None:
            raise UsageError("candidates are found by an embedding model, or by BM25 alone (weights bm25=1)")
        return {"dense" if "dense" in encoder.heads else encoder.heads[0]: 1.0}
    _check_heads(asked, encoder)
    weights = {head: float(weight) for head, weight in asked.items() if weight}
    if not weights or any(not weight > 0 for weight in weights.values()):
        raise UsageError(f"weights: {dict(asked)}; at least one head must count, and none below 0")
    return weights


def _check_heads(weights: Mapping[str, float], encoder: Encoder | None) -> None:
    """Raise UsageError for a head that the model lacks."""
    known = ("bm25",) if encoder is None else (*encoder.heads, "bm25")
    for head, weight in weights.items():
        if head not in known and weight:
            has = ", ".join(known)
            raise UsageError(f"weights: there is no head '{head}'{did_you_mean(head, known)}; to choose from are {has}")


def _veto(settings: MiningSettings, reranker: Encoder | None, options: Mapping[str, Any]) -> RerankerVeto | None:
    asked = settings.veto_above is not None or settings.veto_margin is not None
    if asked and reranker is None:
        raise UsageError("veto_above and veto_margin are about a reranker's scores: give a reranker")
    if reranker is None:
        return None
    return RerankerVeto(reranker, settings.veto_above, settings.veto_margin, **options)


def _counts(number: int, row: Row, job: Job) -> dict[str, Any]:
    counts = {name: count for name, count in job.counts.items() if count or name in ("candidates", "chosen")}
    return {"row": number + 1, "query": row.query, "positive_score": round(job.positive_score, 6), **counts}
