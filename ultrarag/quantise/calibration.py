"""Calibration: the texts that the ranges of an int8 model's numbers are taken from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrarag.encoder.engines import digest_of
from ultrarag.errors import DataError
from ultrarag.evaluation import parse_passage
from ultrarag.io import write_json
from ultrarag.rows import BadRow, parse_row
from ultrarag.types import Kind

#: So many texts. Quantising all-MiniLM-L6-v2 takes 38 s of a processor with 300 long ones, and nearly all for these.
TEXTS = 128


@dataclass(frozen=True)
class Calibration:
    """Texts, (kind, text) each, and where they are from, for people."""

    texts: tuple[tuple[Kind, str], ...]
    source: str

    @classmethod
    def of(cls, texts: Sequence[tuple[Kind, str]], source: str, most: int = TEXTS) -> Calibration:
        """The texts to take of many: spread evenly, the same ones every time.

        Raises:
            DataError: there are none.
        """
        seen = [text for text in texts if text[1].strip()]
        if not seen:
            raise DataError(f"{source}: there is no text to calibrate int8 on")
        count = min(most, len(seen))
        return cls(tuple(seen[number * len(seen) // count] for number in range(count)), source)

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """The texts of a file of passages or training rows (JSONL), or of the corpus of a BEIR folder.

        Raises:
            DataError: there is no such file, or a line is neither; names it.
        """
        file = path / "corpus.jsonl" if path.is_dir() else path
        if not file.is_file():
            raise DataError(f"calibration: there is no '{file}'; give passages or training rows, a line each (JSONL)")
        return cls.of(list(_texts(file)), str(file))

    @property
    def digest(self) -> str:
        """Of the texts, in order."""
        return digest_of(self.texts)

    def write(self, file: Path) -> None:
        """Keep it for another process."""
        write_json(file, {"source": self.source, "texts": [list(text) for text in self.texts]})

    @classmethod
    def kept(cls, file: Path) -> Calibration:
        """What `write` wrote."""
        found: Any = json.loads(file.read_text(encoding="utf-8"))
        return cls(tuple((kind, text) for kind, text in found["texts"]), found["source"])


def _texts(file: Path) -> Iterator[tuple[Kind, str]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield from _of_line(f"{file.name}:{number}", line)


def _of_line(place: str, line: bytes) -> Iterator[tuple[Kind, str]]:
    if b'"pos"' in line:
        try:
            row = parse_row(line)
        except BadRow as error:
            raise DataError(f"{place}: {error}") from error
        yield ("query", row.query)
        yield from (("passage", text) for text in row.pos)
    else:
        passage = parse_passage(place, line)
        yield ("passage", passage.content)
