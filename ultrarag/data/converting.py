"""`ultrarag data convert`: test collections, columns and RAG-Retrieval's files into rows, and rows into them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from ultrarag.data.cli import Parser
from ultrarag.data.converting_beir import BeirLines, is_beir, read_beir_rows
from ultrarag.data.converting_columns import (
    LAYOUTS,
    ColumnLines,
    Judged,
    count_unread,
    delimiter_of,
    grouped,
    read_column_rows,
)
from ultrarag.errors import DataError, UsageError, did_you_mean
from ultrarag.io import identity, print_result, resumable
from ultrarag.rows import Counts, Paths, Row, as_json, checked_object, checked_row, file_paths, reading

FORMATS = ("rows", "beir", "columns", "rag-retrieval")

#: A row -> (number of the file, line).
Lines = Callable[[Row], Iterator[tuple[int, str]]]


@dataclass
class ConvertReport:
    """What was written."""

    rows: int = 0
    #: file -> lines, the header included
    files: dict[str, int] = field(default_factory=dict)
    #: reason -> how often
    left_out: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.rows} rows"]
        lines += [f"{count} lines in {name}" for name, count in self.files.items()]
        return "\n".join([*lines, *(f"left out: {count} {reason}" for reason, count in self.left_out.items())])


@dataclass(frozen=True)
class Options:
    """What can be chosen in a conversion."""

    #: BEIR: the qrels that are read or written
    split: str = "train"
    #: columns: the query, the positive and the negatives, where the header does not say it
    columns: tuple[str, ...] | None = None
    #: scored or graded texts are positives from this score on
    threshold: float = 0.5
    #: columns: what a line is (see `ColumnLines`)
    layout: str = "triplet"
    #: columns: negatives of an n-tuple
    negatives: int = 1


def convert(
    source: Paths,
    output: str | os.PathLike[str],
    *,
    source_format: str | None = None,
    target_format: str = "rows",
    overwrite: bool = False,
    **options: Any,
) -> ConvertReport:
    """Convert training data, a row at a time.

    Args:
        source: files; for BEIR a folder with corpus.jsonl, queries.jsonl and qrels/.
        output: the file to write; for BEIR a folder.
        source_format: rows, beir, columns or rag-retrieval; None: recognised by the source's name.
        target_format: likewise.
        options: fields of `Options`.

    Raises:
        DataError: a line cannot be used (names file and line), or the output is there.
        UsageError: an unknown format or layout.
    """
    chosen = Options(**options)
    from_, to = _format(source_format or _guess(source)), _format(target_format)
    if from_ == to and from_ != "columns":
        raise UsageError(f"source and target are both {from_}; name another with --from or --to")
    counts: Counts = Counter()
    lines = _writer(to, Path(output), chosen, counts)
    rows = _rows(source, from_, chosen, counts)
    paths = [os.fspath(source)] if from_ == "beir" else file_paths(source)  # type: ignore[arg-type]
    made_by = {"command": "convert", "inputs": [identity(path) for path in paths], "from": from_, "to": to}
    report = ConvertReport(left_out=counts)
    targets = [Path(output) / name if to == "beir" else Path(name) for name in lines.files]
    with resumable(targets, {**made_by, **asdict(chosen)}, overwrite) as out:
        written = out.state.setdefault("lines", [0] * len(targets))
        for place, value in rows:
            # rows that an earlier run wrote are made again, since lines depend on those before them
            row = checked_row(place, value)
            _count_lost(row, lines.holds, to, counts)
            found = list(lines(row))
            report.rows += 1
            if report.rows > out.done:
                _write(out, found, written)
        try:
            _refuse_nothing(report, lines, paths)
        except DataError:
            out.advance(-out.done)  # nothing is worth going on with
            raise
    report.files = {str(target): count for target, count in zip(targets, written, strict=True)}
    return report


def _refuse_nothing(report: ConvertReport, lines: Any, paths: Sequence[str]) -> None:
    """Raise DataError where there is nothing to write, with what was left out."""
    if not report.rows:
        left_out = "; ".join(f"{count} {reason}" for reason, count in report.left_out.items())
        raise DataError(f"there is no row in {', '.join(map(str, paths))}" + (f" ({left_out})" if left_out else ""))
    if isinstance(lines, ColumnLines):
        lines.refuse_nothing(report.rows)


def _count_lost(row: Row, holds: Collection[str] | None, to: str, counts: Counts) -> None:
    """Count what of a row the target has no place for; None: it has one for everything."""
    for name in row.model_fields_set.difference(holds) if holds is not None else ():
        if getattr(row, name) not in (None, []):
            counts[f"values of '{name}', for which {to} has no place"] += 1


def _write(out: Any, lines: Sequence[tuple[int, str]], written: list[int]) -> None:
    for number, line in lines:
        out.write(line, number)
        written[number] += 1
    out.advance()


def _format(name: str) -> str:
    if name not in FORMATS:
        raise UsageError(
            f"the format '{name}' is not known{did_you_mean(name, FORMATS)}; known are {', '.join(FORMATS)}"
        )
    return name


def _guess(source: Paths) -> str:
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else os.fspath(source[0])
    if is_beir(path):
        return "beir"
    if delimiter_of(path):
        return "columns"
    raise UsageError(f"what '{path}' holds cannot be recognised by its name: give --from, one of {', '.join(FORMATS)}")


def _rows(source: Paths, name: str, options: Options, counts: Counts) -> Iterator[tuple[str, Any]]:
    if name == "beir":
        if not isinstance(source, str | os.PathLike):
            raise UsageError("--from beir takes one folder")
        return read_beir_rows(os.fspath(source), options.split, counts)
    paths = file_paths(source)
    if name == "columns":
        return read_column_rows(paths, options.columns, options.threshold, counts)
    if name == "rag-retrieval":
        return _rag_retrieval_rows(paths, options.threshold, counts)
    return _own_rows(paths)


def _own_rows(paths: Sequence[str]) -> Iterator[tuple[str, Any]]:
    with reading(paths, "convert") as items:
        yield from items


#: RAG-Retrieval's files hold embedding rows (query, pos, neg, and `scores` of pos), reranker rows (pos_scores and
#: neg_scores; graded: all texts in pos), pointwise lines (query, content, label), or groups (query, hits of content
#: and label).
_RAG_KEYS = ("query", "pos", "neg", "pos_scores", "neg_scores")
#: What grades the texts of `pos`: the first of these that a line has.
_GRADES = ("pos_scores", "scores", "labels")


def _rag_retrieval_rows(paths: Sequence[str], threshold: float, counts: Counts) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row); in graded data, texts with at least `threshold` are positives, the others negatives.

    Raises:
        DataError: a line is none of the four kinds.
    """
    with reading(paths, "convert") as items:
        lines = ((place, checked_object(place, raw)) for place, raw in items)
        for pointwise, part in groupby(lines, lambda line: "content" in line[1]):
            if pointwise:
                yield from grouped((_point(place, value, threshold, counts) for place, value in part), counts)
            else:
                for place, value in part:
                    yield from _group(place, value, threshold, counts)


def _point(place: str, value: dict[str, Any], threshold: float, counts: Counts) -> Judged:
    count_unread(value, value.keys() - {"query", "content", "label"}, counts)
    return _hits(place, [value], value, threshold)


def _group(place: str, value: dict[str, Any], threshold: float, counts: Counts) -> Iterator[tuple[str, dict[str, Any]]]:
    if "hits" in value:
        count_unread(value, value.keys() - {"query", "hits"}, counts)
        yield from _hits(place, value["hits"], value, threshold).rows(counts)
    else:
        count_unread(value, value.keys() - {*_RAG_KEYS, *_GRADES}, counts)
        yield from _like_ours(place, value, threshold, counts)


def _hits(place: str, hits: Any, value: Mapping[str, Any], threshold: float) -> Judged:
    try:
        texts, labels = [hit["content"] for hit in hits], [float(hit["label"]) for hit in hits]
        query = value["query"]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{place}: expected 'query', 'content' and a number as 'label' ({error})") from error
    return Judged.graded(place, query, texts, labels, threshold)


def _like_ours(
    place: str, value: dict[str, Any], threshold: float, counts: Counts
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row like ours; one whose scores grade the texts of `pos` alone is divided by the threshold."""
    scores = next((value[name] for name in _GRADES if name in value), None)
    if not scores or value.get("neg"):
        row = {key: value[key] for key in _RAG_KEYS if value.get(key) is not None}
        yield place, {**row, **({"pos_scores": scores} if scores and value.get("neg_scores") else {})}
        return
    try:
        judged = Judged.graded(place, value["query"], value["pos"], scores, threshold)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{place}: expected 'query', and as many scores as texts in 'pos' ({error})") from error
    yield from judged.rows(counts)


class _RagRetrievalLines:
    """What a row gives to a file that RAG-Retrieval trains embedding models and rerankers on."""

    def __init__(self, path: str) -> None:
        self.files = [path]
        self.holds = set(_RAG_KEYS)

    def __call__(self, row: Row) -> Iterator[tuple[int, str]]:
        """Yield (0, line)."""
        found = {key: getattr(row, key) for key in _RAG_KEYS}
        yield 0, json.dumps({key: value for key, value in found.items() if value}, ensure_ascii=False)


class _RowLines:
    """Rows as they are."""

    holds = None

    def __init__(self, path: str) -> None:
        self.files = [path]

    def __call__(self, row: Row) -> Iterator[tuple[int, str]]:
        yield 0, json.dumps(as_json(row), ensure_ascii=False)


def _writer(name: str, output: Path, options: Options, counts: Counts) -> Any:
    if name == "beir":
        return BeirLines(options.split)
    if name == "columns":
        return ColumnLines(str(output), options.layout, options.negatives, counts)
    return _RagRetrievalLines(str(output)) if name == "rag-retrieval" else _RowLines(str(output))


def main(argv: Sequence[str]) -> int:
    """Run `ultrarag data convert`."""
    parser = Parser("convert", "Convert training data: BEIR folders, columns (JSONL, CSV, TSV), RAG-Retrieval's files.")
    parser.add_argument("source", nargs="+", metavar="SOURCE", help="files, or a folder in BEIR's layout")
    parser.add_output("the file to write, or the folder for BEIR")
    parser.add_argument("--from", dest="source_format", metavar="FORMAT", help=f"what SOURCE is: {', '.join(FORMATS)}")
    parser.add_argument("--to", dest="target_format", default="rows", metavar="FORMAT", help="(default: rows)")
    parser.add_argument("--split", default="train", help="BEIR: the qrels to read or write (default: train)")
    parser.add_argument(
        "--columns",
        type=_names,
        metavar="A,B,...",
        help="columns: query, positive and negatives; default: by their names",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        metavar="X",
        help="scored texts are positives from this on (default: 0.5)",
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="triplet", help="columns: a line is (default: triplet)")
    parser.add_argument("--negatives", type=int, default=1, metavar="N", help="columns: of an n-tuple (default: 1)")
    found = vars(parser.read(argv))
    as_json, source, output = found.pop("json"), found.pop("source"), found.pop("output")
    report = convert(source[0] if len(source) == 1 else source, output, **found)
    print_result(report, as_json)
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
