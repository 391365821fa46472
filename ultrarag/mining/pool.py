"""The pool of a mining run: where its texts come from, and all of it in one folder, as texts, vectors and words.

A killed preparation of the folder goes on where it was.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from ultrarag.encode import CHUNK_TEXTS, encode_rest, same_work
from ultrarag.errors import DataError
from ultrarag.io import Vectors, progress_bar, replacing, write_json
from ultrarag.retrieve.bm25 import BM25
from ultrarag.rows import BadJson, Row, raw_rows, text_key
from ultrarag.types import Passage, is_blank

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder
    from ultrarag.retrieve import LiveIndex

log = logging.getLogger(__name__)

#: Texts of a block with ColBERT's many vectors per text.
COLBERT_CHUNK_TEXTS = 256
#: Passages whose vectors are taken from a live index at a time.
CHUNK_PASSAGES = 512


class _PoolRow(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)
    id: str = Field("", validation_alias=AliasChoices("_id", "id"))
    text: str = Field(validation_alias=AliasChoices("text", "contents"))
    title: str | None = None


def read_pool(path: str | os.PathLike[str]) -> Iterator[Passage]:
    """Yield the passages of a pool: a JSONL file (or list) with `text` and maybe `title` and `id`, or a BEIR folder.

    Blank ones are left out, and counted in a warning; an id may be missing: it is empty then.

    Raises:
        DataError: names file and line of what cannot be used.
    """
    blank = 0
    for place, raw in raw_rows(str(pool_file(path))):
        if isinstance(raw, BadJson):
            raise DataError(f"{place}: {raw}")
        try:
            row = _PoolRow.model_validate_json(raw) if isinstance(raw, bytes) else _PoolRow.model_validate(raw)
        except ValidationError as error:
            raise DataError(f"{place}: a passage is a JSON object with 'text': {_reason(error)}") from None
        passage = Passage(row.id, row.text, row.title or "")
        if passage.blank:
            blank += 1
        else:
            yield passage
    say_blank(blank, f"'{path}'")


def say_blank(count: int, where: str) -> None:
    """Say how many blank passages are no candidates."""
    if count:
        log.warning("%d blank passages of %s are left out of the pool", count, where)


def pool_file(path: str | os.PathLike[str]) -> Path:
    """The file of a pool: itself, or the corpus.jsonl of a folder in BEIR's layout.

    Raises:
        DataError: it is not there.
    """
    file = Path(path) / "corpus.jsonl" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise DataError(f"there is no '{file}'; a pool is a JSONL file with 'text', or a folder in BEIR's layout")
    return file


def _reason(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}".removeprefix(": ")


@dataclass
class MiningSources:
    """What is mined: rows, which are read more than once, and where their candidates come from."""

    rows: Callable[[], Iterable[Row]]
    #: None: the passages of the rows themselves, positives and negatives
    pool: Callable[[], Iterable[str]] | None = None
    #: an open index: its passages are the pool, and their vectors need not be computed
    live: LiveIndex | None = None
    #: (query, positive) keys of all rows, filled while they are read
    judged: array[int] = field(default_factory=lambda: array("Q"))

    def pool_texts(self) -> Iterator[str]:
        """The candidates."""
        if self.live is not None:
            yield from (passage.content for passage in self.live.passages() if not passage.blank)
        elif self.pool is not None:
            yield from self.pool()
        else:
            for row in self.rows():
                self._note(row)
                yield from (*row.pos, *(row.neg or ()))

    def other_texts(self) -> Iterator[str]:
        """The positives, whose scores are needed also where the pool lacks them."""
        if self.live is None and self.pool is None:
            return
        for row in self.rows():
            self._note(row)
            yield from row.pos

    def judgements(self) -> np.ndarray:
        """(pairs, 2): the keys of each row's query and positives."""
        return np.array(self.judged, np.uint64).reshape(-1, 2)

    def _note(self, row: Row) -> None:
        query = text_key(row.query)
        for key in dict.fromkeys(key for text in row.pos for key in (text_key(text), text_key(without_title(text)))):
            self.judged.extend((query, key))


def without_title(text: str) -> str:
    """A passage's text as `Passage.content` writes it, title first, without the title: what follows the first line."""
    _, _, body = text.partition("\n")
    return text if is_blank(body) else body


_TEXTS, _TABLE = "texts.bin", "texts.npz"


class Texts:
    """Distinct texts on disk, read by number; `write` makes them, `open` finds them again."""

    def __init__(self, folder: Path) -> None:
        with np.load(folder / _TABLE) as table:
            #: where each text begins and ends in the file, (texts,) int64
            self.starts, self.ends = table["starts"], table["ends"]
            self._keys, self._numbers = table["keys"], table["numbers"]
            #: keys of the texts without their titles, ascending, and whose they are
            self._bodies, self._body_numbers = table["bodies"], table["body_numbers"]
            #: the first so many are candidates; those after them are positives that the pool lacks
            self.pool = int(table["pool"])
            #: texts of the pool that were there before
            self.repeated = int(table["repeated"])
        self._file = os.open(folder / _TEXTS, os.O_RDONLY)

    @classmethod
    def write(cls, folder: Path, pool: Iterable[str], others: Iterable[str]) -> Texts:
        """Store the texts of the pool and, after them, others; the first of several equal ones is kept."""
        ends, keys, bodies = array("q"), array("Q"), array("Q")
        with open(folder / _TEXTS, "wb") as file:
            _append(file, pool, ends, keys, bodies)
            given = len(ends)
            _append(file, others, ends, keys, bodies)
            file.flush()
            os.fsync(file.fileno())
        _write_table(folder, np.array(ends), np.array(keys), np.array(bodies), given)
        return cls(folder)

    @classmethod
    def open(cls, folder: Path) -> Texts | None:
        """The texts that `write` finished there; None where it did not, or an older version did."""
        try:
            return cls(folder)
        except (FileNotFoundError, KeyError):  # written again, the texts get the same numbers
            return None

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, number: int) -> str:
        """Return one text."""
        start = int(self.starts[number])
        return os.pread(self._file, int(self.ends[number]) - start, start).decode()

    def find(self, texts: Sequence[str]) -> np.ndarray:
        """The numbers of texts, (n,) int64; -1 for one that is not here."""
        return self.find_keys(np.array([text_key(text) for text in texts], np.uint64))

    def find_keys(self, wanted: np.ndarray) -> np.ndarray:
        """The numbers of texts with these keys, (n,) int64; -1 for one that is not here."""
        if not len(self):
            return np.full(len(wanted), -1, np.int64)
        places = np.searchsorted(self._keys, wanted).clip(max=len(self) - 1)
        found: np.ndarray = np.where(self._keys[places] == wanted, self._numbers[places], -1)
        return found

    def same(self, keys: np.ndarray) -> np.ndarray:
        """The numbers of all texts that have one of these keys, with their title or without it, (n,) int64."""
        first, last = (np.searchsorted(self._bodies, keys, side) for side in ("left", "right"))
        bodies = [self._body_numbers[a:b] for a, b in zip(first.tolist(), last.tolist(), strict=True)]
        whole = self.find_keys(keys)
        return np.unique(np.concatenate([whole[whole >= 0], *bodies]))

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _append(file: object, texts: Iterable[str], ends: array[int], keys: array[int], bodies: array[int]) -> None:
    end = ends[-1] if ends else 0
    for text in texts:
        content = text.encode()
        end += file.write(content)  # type: ignore[attr-defined]
        ends.append(end)
        keys.append(text_key(text))
        bodies.append(text_key(without_title(text)))


def _write_table(folder: Path, ends: np.ndarray, keys: np.ndarray, bodies: np.ndarray, given: int) -> None:
    """Write where the first of each group of equal texts stands; the table appears whole or not at all."""
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ends) else ends
    kept, first = np.unique(keys, return_index=True)
    order = np.argsort(first)
    numbers = np.empty(len(first), np.int64)
    numbers[order] = np.arange(len(first))
    pool = int((first < given).sum())
    where = first[order]
    titled = np.flatnonzero(bodies[where] != keys[where])
    titled = titled[np.argsort(bodies[where][titled], kind="stable")]
    arrays: dict[str, Any] = {"starts": starts[where], "ends": ends[where], "keys": kept, "numbers": numbers}
    arrays |= {"bodies": bodies[where][titled], "body_numbers": titled.astype(np.int64)}
    with replacing(folder / _TABLE) as file:
        np.savez(file, **arrays, pool=pool, repeated=given - pool)


@dataclass
class Prepared:
    """The texts of a mining run with all that is needed to score them."""

    texts: Texts
    vectors: Vectors | None
    words: BM25 | None
    #: (pairs, 2) keys of queries and their positives, sorted
    judged: np.ndarray
    seconds: dict[str, float]

    def positives_of(self, query: str) -> np.ndarray:
        """Numbers of the texts that any row names as a positive of this query, with a title or without it."""
        wanted = np.uint64(text_key(query))
        first, last = (np.searchsorted(self.judged[:, 0], wanted, side) for side in ("left", "right"))
        return self.texts.same(self.judged[first:last, 1])

    def close(self) -> None:
        """Close all files."""
        self.texts.close()
        for part in (self.vectors, self.words):
            if part is not None:
                part.close()


def prepare(
    folder: Path,
    sources: MiningSources,
    encoder: Encoder | None,
    heads: Sequence[str],
    words: bool,
    identity: Mapping[str, Any],
    *,
    precision: str = "float32",
    batch_tokens: int | None = None,
    progress: bool | None = None,
) -> Prepared:
    """Store, encode and index the texts of a run, or take up what an earlier call left in `folder`.

    Args:
        heads: whose vectors are needed; none without an encoder.
        words: whether BM25 is needed.
        identity: whatever decides the content, as JSON; a folder made for something else is refused.

    Raises:
        DataError: the folder belongs to another run, or rows or candidates cannot be used.
    """
    _claim(folder, dict(identity))
    seconds: dict[str, float] = defaultdict(float)
    with ExitStack() as opened:  # closes what is open when a later step fails
        with _timed(seconds, "read"):
            texts = _texts(folder, sources, progress)
        opened.callback(texts.close)
        vectors = None
        if heads and encoder is not None:
            vectors = Vectors(folder, heads, precision)
            opened.callback(vectors.close)
            with _timed(seconds, "encode"):
                _copy(texts, vectors, sources, progress)
                _encode(texts, vectors, encoder, batch_tokens, progress)
        with _timed(seconds, "index"):
            index = _words(folder, texts, progress) if words else None
        opened.pop_all()
    return Prepared(texts, vectors, index, _judged(folder), seconds)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] += time.perf_counter() - started


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if same_work(folder / "mining.json", identity, "remove it, or name another folder"):
        return
    if any(folder.iterdir()):
        raise DataError(f"'{folder}' holds something else; name an empty folder for the vectors, or a new one")
    write_json(folder / "mining.json", identity)


def _texts(folder: Path, sources: MiningSources, progress: bool | None) -> Texts:
    if (found := Texts.open(folder)) is not None:
        return found
    with progress_bar(None, "read", "text", progress) as bar:

        def told(texts: Iterator[str], last: bool = False) -> Iterator[str]:
            for text in texts:
                bar.update(1)
                yield text
            if last:  # before the texts are complete: what is complete has its judgements
                np.save(folder / "judged.npy", sources.judgements())

        return Texts.write(folder, told(sources.pool_texts()), told(sources.other_texts(), True))


def _judged(folder: Path) -> np.ndarray:
    pairs: np.ndarray = np.load(folder / "judged.npy")
    return pairs[np.argsort(pairs[:, 0], kind="stable")]


def _copy(texts: Texts, vectors: Vectors, sources: MiningSources, progress: bool | None) -> None:
    """Take over the vectors that a live index holds; its first passage with a text is the one that counts."""
    if (live := sources.live) is None or vectors.rows >= texts.pool:
        return
    stored = (passage for passage in live.passages() if not passage.blank)
    with progress_bar(texts.pool, "copy", "text", progress) as bar:
        while chunk := list(islice(stored, CHUNK_PASSAGES)):
            ids: list[str] = []
            for passage, number in zip(chunk, texts.find([p.content for p in chunk]).tolist(), strict=True):
                if number == vectors.rows + len(ids):
                    ids.append(passage.id)
            if ids:
                vectors.append(live.vectors(ids))
                vectors.commit()
            bar.update(len(chunk))


def _encode(texts: Texts, vectors: Vectors, encoder: Encoder, batch_tokens: int | None, progress: bool | None) -> None:
    rest = (texts.read(number) for number in range(vectors.rows, len(texts)))
    chunk_texts = COLBERT_CHUNK_TEXTS if "colbert" in vectors.heads else CHUNK_TEXTS
    options: dict[str, Any] = {"heads": vectors.heads, "batch_tokens": batch_tokens, "progress": progress}
    encode_rest(encoder, vectors, rest, len(texts), chunk_texts, **options)


def _words(folder: Path, texts: Texts, progress: bool | None) -> BM25:
    """Index the words of all texts; what a killed process began is begun again."""
    done, place = folder / "words.done", folder / "words"
    if done.exists():
        return BM25.open(place)
    shutil.rmtree(place, ignore_errors=True)
    with closing(BM25.create(place)) as index, progress_bar(len(texts), "index words", "text", progress) as bar:
        for start in range(0, len(texts), CHUNK_TEXTS):
            numbers = range(start, min(start + CHUNK_TEXTS, len(texts)))
            index.upsert([str(n) for n in numbers], [texts.read(n) for n in numbers], [{} for _ in numbers])
            index.flush()
            bar.update(len(numbers))
    done.touch()
    return BM25.open(place)
