"""Rows from a folder in BEIR's layout, and back; texts are found on disk: ids and places are in memory, never texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from ultrarag.errors import DataError
from ultrarag.evaluation import judgements, parse_passage, parse_query, qrels_file
from ultrarag.io import progress_bar
from ultrarag.rows import Counts, Row
from ultrarag.rows.checks import document_of

_Item = TypeVar("_Item")


class _OnDisk(Generic[_Item]):
    """The lines of a JSONL file by id: 8 bytes and the id are held of each."""

    def __init__(self, path: Path, parse: Callable[[str, bytes], _Item], id_of: Callable[[_Item], str]) -> None:
        self.path, self._parse = path, parse
        self._starts: dict[str, int] = {}
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise DataError(f"cannot read '{path}': {error.strerror}") from error
        self._file.seek(3 if self._file.read(3) == b"\xef\xbb\xbf" else 0)
        self._index(id_of)

    def _index(self, id_of: Callable[[_Item], str]) -> None:
        number, at = 0, self._file.tell()
        while line := self._file.readline():
            number += 1
            if line.strip():
                self._starts[id_of(self._parse(f"{self.path}:{number}", line))] = at
            at += len(line)

    def __contains__(self, id: str) -> bool:
        return id in self._starts

    def __getitem__(self, id: str) -> _Item:
        self._file.seek(self._starts[id])
        return self._parse(str(self.path), self._file.readline())

    def close(self) -> None:
        self._file.close()


def read_beir_rows(folder: str, split: str, counts: Counts) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) for every query of a split: relevant passages are `pos`, those judged 0 or less `neg`.

    `counts` says how many queries have no relevant passage and give no row, and how many judgements are of blank
    passages.

    Raises:
        DataError: a file is missing, or a line cannot be used, or names what is not there.
    """
    file = qrels_file(Path(folder), split)
    corpus = _OnDisk(Path(folder) / "corpus.jsonl", parse_passage, lambda passage: passage.id)
    queries = _OnDisk(Path(folder) / "queries.jsonl", parse_query, lambda query: query[0])
    judged: dict[str, dict[str, int]] = {}
    for place, query, passage, relevance in judgements(file):
        if query not in queries or passage not in corpus:
            missing = f"query '{query}'" if query not in queries else f"passage '{passage}'"
            raise DataError(f"{place}: {missing} is not in '{folder}'")
        judged.setdefault(query, {})[passage] = relevance
    with progress_bar(len(judged), "convert", "query") as bar:
        for query, relevant in judged.items():
            passages = {id: corpus[id] for id in relevant}
            if blank := sum(passage.blank for passage in passages.values()):
                counts["judgements of blank passages"] += blank
            texts = {id: passage.content for id, passage in passages.items() if not passage.blank}
            pos = [text for id, text in texts.items() if relevant[id] > 0]
            neg = [text for id, text in texts.items() if relevant[id] <= 0]
            bar.update(1)
            if not pos:
                counts["queries without a relevant passage"] += 1
                continue
            ids = [id for id in texts if relevant[id] > 0]
            more = {"pos_ids": ids} if any(document_of(id) for id in ids) else {}  # `data split` needs them
            yield (
                f"{file}: query '{query}'",
                {"query": queries[query][1], "pos": pos, **({"neg": neg} if neg else {}), "id": query, **more},
            )
    corpus.close()
    queries.close()


class BeirLines:
    """What a row gives to corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv; equal texts are one passage.

    16 bytes of each distinct text and judgement are kept to know it again.
    """

    def __init__(self, split: str) -> None:
        self.holds = {"query", "pos", "neg"}
        self.files = ["corpus.jsonl", "queries.jsonl", f"qrels/{split}.tsv"]
        self._seen: set[int] = set()
        self._header = ["query-id\tcorpus-id\tscore"]

    def __call__(self, row: Row) -> Iterator[tuple[int, str]]:
        """Yield (number of the file, line)."""
        yield from ((2, line) for line in self._header)
        self._header = []
        query = _id("q", row.query)
        if self._new(query):
            yield 1, json.dumps({"_id": query, "text": row.query}, ensure_ascii=False)
        for text in [*row.pos, *(row.neg or [])]:
            if self._new(passage := _id("p", text)):
                yield 0, json.dumps({"_id": passage, "title": "", "text": text}, ensure_ascii=False)
        for text in row.pos:
            if self._new(line := f"{query}\t{_id('p', text)}\t1"):
                yield 2, line

    def _new(self, name: str) -> bool:
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
        known = key in self._seen
        self._seen.add(key)
        return not known


def _id(kind: str, text: str) -> str:
    """Return an id that is the text's own: the same in every run."""
    return kind + hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def is_beir(path: str) -> bool:
    """Return whether a path is a folder in BEIR's layout."""
    return (Path(path) / "corpus.jsonl").is_file()
