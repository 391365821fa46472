"""Test collections in BEIR's layout (corpus.jsonl, queries.jsonl, qrels/{split}.tsv), and runs as TREC files."""

from __future__ import annotations

import csv
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from ultrarag.errors import DataError, UsageError
from ultrarag.evaluation.qrels import Qrels, checked_qrels, relevance
from ultrarag.io import replacing
from ultrarag.types import Passage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Collection:
    """A test collection: passages, the queries of one split, and which passages are relevant to them."""

    corpus: dict[str, Passage]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


class _Row(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)
    id: str = Field(validation_alias=AliasChoices("_id", "id"), min_length=1)


class _PassageRow(_Row):
    text: str = Field(validation_alias=AliasChoices("text", "contents"))
    title: str | None = None
    metadata: dict[str, Any] | None = None

    def passage(self) -> Passage:
        return Passage(self.id, self.text, self.title or "", self.metadata or {})


class _QueryRow(_Row):
    text: str = Field(validation_alias=AliasChoices("text", "query"), pattern=r"\S")


_RowType = TypeVar("_RowType", bound=_Row)


def read_beir(folder: str | Path, split: str = "test") -> Collection:
    """Read corpus.jsonl, queries.jsonl and qrels/{split}.tsv; `queries` are those that the split judges.

    Ids may be numbers in the files and are strings here; `id` is read as `_id`. Passages without a visible character
    in title and text are left out with their judgements, and counted in a warning; queries may not be empty.

    Raises:
        DataError: a file is missing or a row is not usable (names file and line); the split does not exist
            (names those that do); the qrels name a query or passage that is not there.

    Source:
        The layout of BEIR (Thakur et al., 2021).
    """
    folder = Path(folder)
    judged = qrels_file(folder, split)
    passages = {row.id: row.passage() for row in _read_rows(folder / "corpus.jsonl", _PassageRow)}
    corpus = {id: passage for id, passage in passages.items() if not passage.blank}
    queries = {row.id: row.text for row in _read_rows(folder / "queries.jsonl", _QueryRow)}
    qrels = _without_blank(_read_qrels(judged, queries, passages), passages, folder)
    return Collection(corpus, {query_id: queries[query_id] for query_id in qrels}, qrels)


def _without_blank(
    qrels: dict[str, dict[str, int]], passages: Mapping[str, Passage], folder: Path
) -> dict[str, dict[str, int]]:
    """Leave out what is judged of blank passages, and say how many there are."""
    blank = {id for id, passage in passages.items() if passage.blank}
    if not blank:
        return qrels
    kept = {query_id: {p: grade for p, grade in row.items() if p not in blank} for query_id, row in qrels.items()}
    kept = {query_id: row for query_id, row in kept.items() if row}
    lost = sum(map(len, qrels.values())) - sum(map(len, kept.values()))
    log.warning(
        "%d of %d passages of '%s' are blank, '%s' for one, and left out, with %d judgements on them",
        *(len(blank), len(passages), folder, next(id for id in passages if id in blank), lost),
    )
    if not kept:
        raise DataError(f"'{folder}' judges blank passages only: there is nothing to find")
    return kept


def qrels_file(folder: Path, split: str) -> Path:
    """Return the file of a split's judgements.

    Raises:
        DataError: it does not exist; names those that do.
    """
    if not folder.is_dir():
        raise DataError(f"'{folder}' is not a folder; it should hold corpus.jsonl, queries.jsonl and qrels/")
    file = folder / "qrels" / f"{split}.tsv"
    if not file.is_file():
        splits = sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))
        have = f"the splits there are: {', '.join(splits)}" if splits else "there are no splits at all"
        raise DataError(f"split '{split}' needs the file '{file}', which does not exist; {have}")
    return file


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yield ("file:line", text) for every line that is not blank."""
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield f"{file}:{number}", line
    except OSError as error:
        raise DataError(f"cannot read '{file}': {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"'{file}' is not UTF-8 text: {error.reason}") from error


def _read_rows(file: Path, row_type: type[_RowType]) -> Iterator[_RowType]:
    seen: dict[str, str] = {}
    for place, line in _lines(file):
        row = _row(place, line, row_type)
        if row.id in seen:
            raise DataError(f"{place}: '_id' '{row.id}' was used before, at {seen[row.id]}")
        seen[row.id] = place
        yield row
    if not seen:
        raise DataError(f"'{file}' holds no rows")


def _row(place: str, line: str | bytes, row_type: type[_RowType]) -> _RowType:
    try:
        return row_type.model_validate_json(line)
    except ValidationError as error:
        raise DataError(f"{place}: {_reason(error)}") from error


def parse_passage(place: str, line: str | bytes) -> Passage:
    """Return the passage of one line of corpus.jsonl; raises DataError, naming `place`, when it is none."""
    return _row(place, line, _PassageRow).passage()


def parse_query(place: str, line: str | bytes) -> tuple[str, str]:
    """Return id and text of one line of queries.jsonl; raises DataError, naming `place`, when it is none."""
    row = _row(place, line, _QueryRow)
    return row.id, row.text


def _reason(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("string_pattern_mismatch", "string_too_short"):
        return f"'{where}' is empty"
    return f"'{where}': {first['msg']}" if where else f"not a JSON object ({first['msg']})"


def _read_qrels(file: Path, queries: Mapping[str, str], corpus: Mapping[str, Passage]) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for place, query_id, passage_id, grade in judgements(file):
        if query_id not in queries:
            raise DataError(f"{place}: query '{query_id}' is not in queries.jsonl")
        if passage_id not in corpus:
            raise DataError(f"{place}: passage '{passage_id}' is not in corpus.jsonl")
        judged = qrels.setdefault(query_id, {})
        if judged.get(passage_id, grade) != grade:
            raise DataError(f"{place}: '{query_id}' and '{passage_id}' were judged before, and differently")
        judged[passage_id] = grade
    if not qrels:
        raise DataError(f"'{file}' holds no judgements")
    return qrels


def judgements(file: Path) -> Iterator[tuple[str, str, str, int]]:
    """Yield (place, query id, passage id, relevance); the first line is a header unless it ends in a number."""
    header_possible = True
    for place, line in _lines(file):
        fields = line.rstrip("\r\n").split("\t")
        if len(fields) != 3:
            raise DataError(f"{place}: {len(fields)} fields; expected query-id, corpus-id, score, separated by tabs")
        try:
            grade = relevance(fields[2])
        except ValueError:
            if not header_possible or _is_number(fields[2]):
                raise DataError(f"{place}: the relevance '{fields[2].strip()}' is not a whole number") from None
        else:
            yield place, fields[0], fields[1], grade
        header_possible = False


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def write_beir(
    folder: str | Path, corpus: Sequence[Passage], queries: Mapping[str, str], splits: Mapping[str, Qrels]
) -> None:
    """Write what `read_beir` reads: corpus.jsonl, queries.jsonl and one qrels/{split}.tsv per split."""
    import jsonlines

    folder = Path(folder)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    with jsonlines.open(folder / "corpus.jsonl", "w") as writer:
        writer.write_all({"_id": p.id, "title": p.title, "text": p.text, "metadata": dict(p.metadata)} for p in corpus)
    with jsonlines.open(folder / "queries.jsonl", "w") as writer:
        writer.write_all({"_id": query_id, "text": text} for query_id, text in queries.items())
    for split, qrels in splits.items():
        with (folder / "qrels" / f"{split}.tsv").open("w", encoding="utf-8", newline="") as stream:
            table = csv.writer(stream, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE)
            table.writerow(["query-id", "corpus-id", "score"])
            table.writerows([q, p, grade] for q, judged in checked_qrels(qrels).items() for p, grade in judged.items())


# ---- TREC runs

_FIELDS = "query-id Q0 passage-id rank score tag"


def write_run(path: str | Path, run: Mapping[str, Mapping[str, float]], tag: str = "ultrarag") -> None:
    """Write a run; an existing file is replaced once the new one is whole.

    Args:
        run: query id -> passage id -> score. Hits are ranked by score, equal ones in the order given; the scores
            read back as the same numbers.
        tag: names the system.

    Raises:
        DataError: for an id that the format cannot hold (empty, or with white space), or when it cannot be written.
    """
    if not re.fullmatch(r"\S+", tag):
        raise UsageError(f"the tag of a run is one word, not '{tag}'")
    path = Path(path)
    try:
        with replacing(path) as file:
            for query_id, hits in run.items():
                file.writelines(line.encode("utf-8") for line in _run_lines(query_id, hits, tag))
    except OSError as error:
        raise DataError(f"cannot write '{path}': {error.strerror or error}") from error


def _run_lines(query_id: str, hits: Mapping[str, float], tag: str) -> list[str]:
    ranked = sorted(hits.items(), key=lambda hit: -hit[1])
    return [
        f"{_word(query_id)} Q0 {_word(passage_id)} {rank} {float(score)!r} {tag}\n"
        for rank, (passage_id, score) in enumerate(ranked, 1)
    ]


def _word(id: str) -> str:
    if not re.fullmatch(r"\S+", id):
        raise DataError(f"a TREC run cannot hold the id {id!r}: its fields are separated by white space; use --json")
    return id


def read_run(path: str | Path) -> dict[str, dict[str, float]]:
    """Read a run, query id -> passage id -> score, best first; the rank and the tag of a line are not used.

    Raises:
        DataError: naming file and line.

    Source:
        As in trec_eval, the scores make the ranking.
    """
    run: dict[str, dict[str, float]] = {}
    try:
        with Path(path).open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    _add(run, line, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 text: {error.reason}") from error
    if not run:
        raise DataError(f"'{path}' holds no hits")
    return {query_id: dict(sorted(hits.items(), key=lambda hit: -hit[1])) for query_id, hits in run.items()}


def _add(run: dict[str, dict[str, float]], line: str, place: str) -> None:
    fields = line.split()
    if len(fields) != 6:
        raise DataError(f"{place}: {len(fields)} fields; a line of a TREC run has six: {_FIELDS}")
    query_id, _, passage_id, _, score, _ = fields
    hits = run.setdefault(query_id, {})
    if passage_id in hits:
        raise DataError(f"{place}: passage '{passage_id}' is there twice for query '{query_id}'")
    hits[passage_id] = _score(score, place)


def _score(text: str, place: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if math.isnan(score):
        raise DataError(f"{place}: the score '{text}' is not a number")
    return score
