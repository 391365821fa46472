"""Folders in BEIR's layout as retrieval tasks of MTEB; no hub is asked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ultrarag.doors.mteb.framework import AbsTaskRetrieval, Dataset, TaskMetadata, check_language_code
from ultrarag.errors import UsageError
from ultrarag.evaluation import qrels_file, read_beir
from ultrarag.io import sha256_of


def beir_task(
    folder: str | PathLike[str],
    split: str = "test",
    *,
    name: str | None = None,
    languages: Sequence[str] = ("eng-Latn",),
    candidates: Mapping[str, Sequence[str]] | None = None,
    ignore_identical_ids: bool = False,
) -> AbsTaskRetrieval:
    """Return the task of a folder; its revision is a digest of its files.

    Args:
        name: in the results; default: the folder's.
        languages: in MTEB's codes; written into the results, and read by models that tell languages apart.
        candidates: query id -> passage ids: a reranking task of these, in place of a search, which cross-encoders need.
        ignore_identical_ids: as for `ultrarag.evaluation.evaluate`.

    Raises:
        DataError: the folder cannot be used; see `ultrarag.evaluation.read_beir`.
        UsageError: MTEB takes no such name or language, or a query has no candidates.
    """
    folder = Path(folder)
    collection = read_beir(folder, split)
    queries = collection.queries
    if candidates is not None and (lacking := [id for id in queries if id not in candidates]):
        raise UsageError(f"{len(lacking)} of {len(queries)} queries have no candidates, '{lacking[0]}' for one")
    data = {
        "corpus": Dataset.from_list(
            [{"id": p.id, "title": p.title, "text": p.text} for p in collection.corpus.values()]
        ),
        "queries": Dataset.from_list([{"id": id, "text": text} for id, text in collection.queries.items()]),
        "relevant_docs": collection.qrels,
        "top_ranked": None if candidates is None else {id: list(candidates[id]) for id in collection.queries},
    }
    kind = "Retrieval" if candidates is None else "Reranking"
    task = _class(_metadata(folder, split, name or folder.resolve().name, kind, languages))()
    task.dataset = {"default": {split: data}}
    task.data_loaded = True
    task.ignore_identical_ids = ignore_identical_ids
    return task


def _class(found: TaskMetadata) -> Any:
    """MTEB reads a task's metadata from its class."""

    class BeirFolder(AbsTaskRetrieval):
        metadata = found

        def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
            """The data is there."""

        def unload_data(self) -> None:
            """It stays: the folder may have changed since."""

    return BeirFolder


def _metadata(folder: Path, split: str, name: str, kind: str, languages: Sequence[str]) -> TaskMetadata:
    try:
        for code in languages:
            check_language_code(code)
        return TaskMetadata(
            name=name,
            description=f"The {split} queries of a folder in BEIR's layout.",
            type=kind,
            category="t2t",
            dataset={"path": str(folder), "revision": _digest(folder, split)},
            eval_splits=[split],
            eval_langs=list(languages),
            main_score="ndcg_at_10",
        )
    except ValueError as error:
        raise UsageError(f"MTEB takes no such task ('{name}', {', '.join(languages)}): {error}") from error


def _digest(folder: Path, split: str) -> str:
    files = (folder / "corpus.jsonl", folder / "queries.jsonl", qrels_file(folder, split))
    return hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()
