"""Corpora of UltraRAG v3: lines of id and contents, where the chunks of one article may all have its id."""

from __future__ import annotations

from typing import Any

#: What becomes a passage's id and text; every other field goes to its metadata.
ID, TEXT = ("id", "_id"), ("contents", "text")


class ChunkRows:
    """Rows of one corpus, in its order, as rows of passages whose ids differ.

    The first row of an id keeps it; the next ones are `id#2`, `id#3`. The order decides, so that a file that is
    imported again, or with more rows behind, gives the same ids. A title is metadata: these pipelines read `contents`
    alone, where their chunker has put it already.

    Example:
        >>> rows = ChunkRows()
        >>> [rows({"id": 7, "contents": text})["id"] for text in "ab"], rows.renamed, rows.example
        (['7', '7#2'], 1, '7#2')
    """

    def __init__(self) -> None:
        #: rows whose id was there before
        self.renamed = 0
        #: the first id that was made
        self.example = ""
        self._last: dict[str, int] = {}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        known = {name: row[name] for name in (*ID, *TEXT) if name in row}
        own = row.get("metadata")
        if own is not None and not isinstance(own, dict):
            return row  # which is then refused in words
        rest = {name: value for name, value in row.items() if name not in known and name != "metadata"}
        return self._named({**known, "metadata": {**rest, **(own or {})}})

    def _named(self, row: dict[str, Any]) -> dict[str, Any]:
        field = next((name for name in ID if name in row), None)
        if field is None or not isinstance(row[field], str | int) or isinstance(row[field], bool):
            return row
        return {**row, field: self._own(str(row[field]))}

    def _own(self, id: str) -> str:
        if id not in self._last:
            self._last[id] = 1
            return id
        number = self._last[id] + 1
        while (name := f"{id}#{number}") in self._last:  # an id may itself look so
            number += 1
        self._last[id], self._last[name] = number, 1
        self.renamed += 1
        self.example = self.example or name
        return name
