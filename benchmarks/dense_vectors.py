"""Vectors for `dense_engines.py`: real ones of a small model over data sets of texts, and made-up clustered ones.

Real ones are of the passages of every data set and of windows of their sentences (about 130 and 260 characters; half as
many in Chinese), each encoded once and kept in a folder. Where more are asked for than there are texts, the rest are
variants: a real vector plus 0.2 to 0.6 of another one of the same file, at unit length. Queries are those of the
test sets, which are in no passage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from live_index_contenders import vectors as clustered

#: texts encoded at a time, each time kept
CHUNK = 8192
#: texts of which vectors are made; what more is asked for are variants
MOST_ENCODED = 32_768
SENTENCE = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])")
CHINESE = re.compile("[\u4e00-\u9fff]")
WINDOWS, LONGEST = (130, 260), 1200


def prepare(kind: str, folder: Path, size: int, dim: int, queries: int, data: Path | None) -> tuple[Path, Path]:
    """The files of the passages, (size, dim), and of the queries, (queries, dim), both float32; made where missing."""
    folder.mkdir(parents=True, exist_ok=True)
    passages, asked = folder / f"{kind}-{size}.npy", folder / f"{kind}-queries-{queries}.npy"
    if not (passages.exists() and asked.exists()):
        found = real(folder, size, queries, data) if kind == "real" else made(size, dim, queries)
        np.save(asked, found[1])
        np.save(passages, found[0])
    return passages, asked


def made(size: int, dim: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit sums of one of 200 centres and noise in 32 directions, the same centres for the queries."""
    return clustered(size, dim, 0), clustered(queries, dim, 9)


def real(folder: Path, size: int, queries: int, data: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Encoded texts, and variants of them where there are too few."""
    if data is None:
        raise SystemExit("--data names the folder of the data sets, each in BEIR's layout, for --vectors real")
    texts = windows_of_all(data)
    np.random.default_rng(0).shuffle(texts)
    asked = test_queries(data)
    chosen = np.random.default_rng(1).permutation(len(asked))[:queries]
    held = encoded(folder, texts[: min(size, MOST_ENCODED)])
    return with_variants(held, size), encode([asked[row] for row in chosen], "query")


def with_variants(held: np.ndarray, size: int) -> np.ndarray:
    """The first `size` vectors; what is missing is made of two of them."""
    rng, found = np.random.default_rng(2), np.empty((size, held.shape[1]), np.float32)
    found[: len(held)] = held[:size]
    for start in range(len(held), size, CHUNK):
        rows = min(CHUNK, size - start)
        one, other = rng.integers(len(held), size=(2, rows))
        part = held[one] + rng.uniform(0.2, 0.6, (rows, 1)).astype(np.float32) * held[other]
        found[start : start + rows] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return found


def encoded(folder: Path, texts: list[str]) -> np.ndarray:
    """The vectors of texts; each chunk is kept, so that a second run goes on."""
    parts = []
    for start in range(0, len(texts), CHUNK):
        path = folder / f"part-{start:06}.npy"
        if not path.exists():
            np.save(path, encode(texts[start : start + CHUNK], "passage"))
        parts.append(np.load(path))
    return np.concatenate(parts)[: len(texts)]


def encode(texts: list[str], side: str) -> np.ndarray:
    """By the small model of the tests, in bf16, at most 128 tokens."""
    from encode import small_model

    from ultrarag import Encoder

    encoder = Encoder.load(small_model(), "bge", device="cpu", precision="bf16", passage_max_length=128)
    return np.asarray(encoder.encode(texts, side, progress=False).dense, np.float32)  # type: ignore[call-overload]


def windows_of_all(data: Path) -> list[str]:
    """Every passage of every corpus below a folder, and the windows of its sentences; each text once."""
    found: dict[str, None] = {}
    for corpus in sorted(data.glob("*/corpus.jsonl")):
        for line in corpus.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found[f"{row.get('title', '')}\n{row['text']}".strip()] = None
            scale = 0.45 if CHINESE.search(row["text"]) else 1
            for target in WINDOWS:
                found.update((window[:LONGEST], None) for window in windows(row["text"], target * scale))
    return list(found)


def windows(text: str, target: float) -> Iterator[str]:
    """Consecutive sentences, joined up to so many characters."""
    held = ""
    for sentence in filter(str.strip, SENTENCE.split(text)):
        if held and len(held) + len(sentence) > target:
            yield held
            held = ""
        held = f"{held} {sentence}".strip()
    if held:
        yield held


def test_queries(data: Path) -> list[str]:
    """The texts of the queries that the test sets judge."""
    found: dict[str, None] = {}
    for judged in sorted(data.glob("*/qrels/test.tsv")):
        ids = {line.split("\t")[0] for line in judged.read_text(encoding="utf-8").splitlines()}
        lines = (judged.parents[1] / "queries.jsonl").read_text(encoding="utf-8").splitlines()
        found.update((row["text"], None) for row in map(json.loads, lines) if row["_id"] in ids)
    return list(found)
