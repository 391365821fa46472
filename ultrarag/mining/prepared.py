"""Prepared: the pool of a mining run in one folder, as texts, vectors and words; a killed preparation goes on."""

from __future__ import annotations

import json
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrarag.errors import DataError, UsageError, did_you_mean
from ultrarag.io import Vectors, progress_bar, write_json
from ultrarag.mining.pool import MiningSources, Texts
from ultrarag.retrieve.bm25 import BM25
from ultrarag.rows import text_key

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder

#: Texts encoded between two commits. ColBERT's many vectors per text make it less.
WINDOW, COLBERT_WINDOW = 4096, 256
#: Texts whose words are indexed at a time.
_WORDS = 4096
#: Passages whose vectors are taken from a live index at a time.
_COPIED = 512


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
    _claim(folder, identity)
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


class _timed:
    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds[self.name] += time.perf_counter() - self.started


def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    note, wanted = folder / "mining.json", json.loads(json.dumps(identity))
    if not note.exists():
        if any(folder.iterdir()):
            raise DataError(f"'{folder}' holds something else; name an empty folder for the vectors, or a new one")
        write_json(note, wanted)
    elif (found := json.loads(note.read_text(encoding="utf-8"))) != wanted:
        other = [key for key in wanted if found.get(key) != wanted[key]]
        raise DataError(
            f"'{folder}' holds the vectors of a run with another {', '.join(other) or 'setting'}: remove it, "
            "or name another folder"
        )


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
        while batch := list(islice(stored, _COPIED)):
            ids: list[str] = []
            for passage, number in zip(batch, texts.find([p.content for p in batch]).tolist(), strict=True):
                if number == vectors.rows + len(ids):
                    ids.append(passage.id)
            if ids:
                vectors.append(live.vectors(ids))
                vectors.commit()
            bar.update(len(batch))


def _encode(texts: Texts, vectors: Vectors, encoder: Encoder, batch_tokens: int | None, progress: bool | None) -> None:
    rest = (texts.read(number) for number in range(vectors.rows, len(texts)))
    window = COLBERT_WINDOW if "colbert" in vectors.heads else WINDOW
    with progress_bar(len(texts), "encode", "text", progress) as bar:
        bar.update(vectors.rows)
        options: dict[str, Any] = {"batch_tokens": batch_tokens, "on_batch": bar.update}
        for part in encoder.iter_encode(rest, "passage", heads=vectors.heads, window=window, **options):
            vectors.append(part)
            vectors.commit()


def _words(folder: Path, texts: Texts, progress: bool | None) -> BM25:
    """Index the words of all texts; what a killed process began is begun again."""
    done, place = folder / "words.done", folder / "words"
    if done.exists():
        return BM25.open(place)
    shutil.rmtree(place, ignore_errors=True)
    with closing(BM25.create(place)) as index, progress_bar(len(texts), "index words", "text", progress) as bar:
        for start in range(0, len(texts), _WORDS):
            numbers = range(start, min(start + _WORDS, len(texts)))
            index.upsert([str(n) for n in numbers], [texts.read(n) for n in numbers], [{} for _ in numbers])
            index.flush()
            bar.update(len(numbers))
    done.touch()
    return BM25.open(place)


def check_heads(weights: Mapping[str, float], encoder: Encoder | None) -> None:
    """Raise UsageError for a head that the model lacks."""
    known = ("bm25",) if encoder is None else (*encoder.heads, "bm25")
    for head, weight in weights.items():
        if head not in known and weight:
            has = ", ".join(known)
            raise UsageError(f"weights: there is no head '{head}'{did_you_mean(head, known)}; to choose from are {has}")
